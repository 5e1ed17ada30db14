"""Namespace pods: a network namespace and a cgroup that live without any container runtime.

Pod `a` of instance `node` is the namespace /run/netns/fib-node_a and the cgroup `fibril/node/pods/a`; its
endpoint has the container id `pod.a`. Everything is found by these names, so nothing has to be
remembered.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from services.common.errors import AlreadyExists, InvalidArgument, NotFound
from services.common.instance import Instance
from services.common.kernel import cgroup as cgroups
from services.common.kernel import netns

NETNS_DIR = Path("/run/netns")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_CONTAINER_PREFIX = "pod."


def check_name(name: str) -> str:
    """The name itself, if a pod can be called so. Raises InvalidArgument."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"a pod cannot be called {name!r}",
            field="name",
            fix="use 1 to 63 of a-z, 0-9 and -, beginning and ending with a letter or digit",
        )
    return name


def container_id(name: str) -> str:
    """Under which container id the endpoint of a namespace pod is known."""
    return _CONTAINER_PREFIX + name


def pod_of(container: str) -> str | None:
    """The namespace pod a container id belongs to; None when a runtime made it."""
    return container.removeprefix(_CONTAINER_PREFIX) if container.startswith(_CONTAINER_PREFIX) else None


def netns_path(instance: Instance, name: str) -> Path:
    """File of the pod's network namespace."""
    return NETNS_DIR / f"{_netns_prefix(instance)}{name}"


def _netns_prefix(instance: Instance) -> str:
    # Instance names hold dashes, and so do pod names; "_" in neither keeps ("a", "b-c") and ("a-b", "c")
    # apart.
    return f"fib-{instance.name}_"


def cgroup(instance: Instance, name: str) -> str:
    """The pod's cgroup, relative to the cgroup2 mount."""
    return f"{instance.cgroup}/pods/{name}"


def host_cgroup(instance: Instance) -> str:
    """That of the host's own processes on a node of a lab: several nodes share a kernel, and so its control groups."""
    return f"{instance.cgroup}/host"


def names(instance: Instance) -> list[str]:
    """Namespace pods that exist, by their namespaces; sorted."""
    prefix = _netns_prefix(instance)
    if not NETNS_DIR.is_dir():
        return []
    return sorted(p.name.removeprefix(prefix) for p in NETNS_DIR.iterdir() if p.name.startswith(prefix))


def create(instance: Instance, name: str) -> Path:
    """Make namespace and cgroup as far as they are not there; gives the namespace's path."""
    path = netns_path(instance, check_name(name))
    cgroups.create(cgroup(instance, name))
    try:
        netns.add(path)
    except AlreadyExists:
        try:
            netns.NetNs.open(path).close()
        except InvalidArgument:
            # A file without a namespace on it: `create` or `remove` was killed half-way.
            netns.remove(path)
            netns.add(path)
    return path


async def remove(instance: Instance, name: str) -> bool:
    """End the pod's processes, remove cgroup and namespace; whether there was anything."""
    gone = await cgroups.remove(cgroups.path_of(cgroup(instance, name)), kill=True)
    return netns.remove(netns_path(instance, name)) or gone


def execute(instance: Instance, name: str, argv: Sequence[str]) -> NoReturn:
    """Become `argv` inside the pod, in its cgroup and network namespace; only failure returns, as an
    exception.

    Mounts stay the caller's: what is pinned in bpffs remains visible."""
    path = netns_path(instance, check_name(name))
    if not path.exists():
        raise NotFound(f"there is no pod {name!r} on instance {instance.name!r}", fix="see: fibril pod ls")
    if not shutil.which(argv[0]):
        raise NotFound(f"there is no command {argv[0]!r}")
    cgroups.move(cgroups.create(cgroup(instance, name)), os.getpid())
    with netns.NetNs.open(path) as space, space.entered():
        sys.stdout.flush()
        os.execvp(argv[0], list(argv))


def labels(given: Sequence[str]) -> dict[str, str]:
    """`key=value` words as a mapping. Raises InvalidArgument."""
    found = {}
    for word in given:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise InvalidArgument(f"label {word!r} is not KEY=VALUE", field="label")
        found[key] = value
    return found
