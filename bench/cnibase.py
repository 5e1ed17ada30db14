"""What bench/pod.py and bench/cni.py have in common: namespaces to attach, Fibril and its peer as networks.

Both networks run through the same minimal runtime (lab/cniruntime.py), each in a node namespace of its
own: Fibril as `fibril cni install` writes it, the peer as Debian's `bridge` with `host-local`, dual
stack, with ipMasq.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.node import Node
from lab.cniruntime import CniRuntime
from services.common.instance import Instance
from services.ipam.cni.install import install

PEERS = Path("/usr/lib/cni")


def netns_path(name: str) -> Path:
    """Where iproute2 keeps a named network namespace."""
    return Path("/run/netns") / name


class Namespaces:
    """Named network namespaces, all deleted at the end."""

    def __init__(self) -> None:
        self.prefix = f"fbb{secrets.token_hex(3)}"
        self._names: list[str] = []

    def __enter__(self) -> Namespaces:
        return self

    def __exit__(self, *_: object) -> None:
        batch = "".join(f"netns del {name}\n" for name in self._names)
        subprocess.run(["ip", "-force", "-batch", "-"], input=batch, text=True, check=False)

    def add(self) -> str:
        """A new one; gives its name."""
        name = f"{self.prefix}-{len(self._names)}-{secrets.token_hex(2)}"
        subprocess.run(["ip", "netns", "add", name], check=True)
        self._names.append(name)
        return name

    def delete(self, name: str) -> None:
        """Delete one."""
        self._names.remove(name)
        subprocess.run(["ip", "netns", "del", name], check=False)


def fibril_network(node: Node, chained: tuple[str, ...] = ()) -> CniRuntime:
    """A running node's CNI network, installed below the node's directory."""
    instance = Instance(node.name, node.root / "run", node.root / "state")
    installed = install(instance, node.root / "bin", node.root / "net.d", chained=chained)
    conflist = json.loads(installed.conflist.read_text())
    return CniRuntime(conflist, [installed.plugin.parent, PEERS], netns_path(node.name))


@contextlib.contextmanager
def bridge_network(namespaces: Namespaces, state: Path) -> Iterator[CniRuntime]:
    """Debian's bridge and host-local, dual stack with ipMasq, in a node namespace of their own."""
    node = namespaces.add()
    conflist: dict[str, Any] = {
        "cniVersion": "1.0.0",
        "name": namespaces.prefix,
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": True,
                "ipMasq": True,
                "ipam": {
                    "type": "host-local",
                    "dataDir": str(state / "host-local"),
                    "ranges": [[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd00:88::/64"}]],
                    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                },
            }
        ],
    }
    with CniRuntime(conflist, [PEERS], netns_path(node)) as runtime:
        yield runtime


def addresses(result: dict[str, Any]) -> tuple[str, str]:
    """(IPv4, IPv6) of an ADD's result."""
    found = [entry["address"].split("/")[0] for entry in result["ips"]]
    return next(text for text in found if ":" not in text), next(text for text in found if ":" in text)
