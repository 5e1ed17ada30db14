"""Bringing a node up and down: what `fibril up` and `fibril down` do.

Up starts the supervisor (or finds it) and waits until every service says it is well; again is harmless.
Down ends the processes first, then removes what they left in the kernel and on disk, found by the
instance's name and not by what a process remembers; so it works when everything is dead, when files are
missing, and twice.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn

from services.common.errors import FailedPrecondition, FibrilError, NotFound, Unavailable
from services.common.instance import Instance
from services.ctl import health, procs, supervisor
from services.ctl.child import GRACE_S
from services.ctl.children import ETCD, Options, embedded_etcd, own_etcd, specs
from services.ctl.progress import Progress

POLL_S = 0.02
HOPELESS_RESTARTS = 4  # a child that died this often while coming up will not come up


def up(instance: Instance, options: Options, timeout: float) -> health.NodeHealth:
    """Start what does not run and wait until all is well.

    Raises FailedPrecondition when the kernel lacks something, naming it, or a process keeps dying;
    Unavailable when the node is not well within `timeout` seconds. What has been started keeps running
    then: `fibril status` tells more."""
    with Progress(f"starting instance {instance.name!r}") as progress:
        prepare(instance)
        specs(instance, options)
        _same_netns(instance)
        state = health.supervisor_state(instance)
        if state is not None and state["options"] != _plain(options):
            progress.step("options have changed: restarting the processes")
            _stop_processes(instance)
            state = None
        started = None
        if state is None:
            started = _spawn_supervisor(instance, options)
        return _wait_healthy(instance, options, started, time.monotonic() + timeout, progress)


def prepare(instance: Instance) -> None:
    """What every node needs of the kernel. Raises FailedPrecondition naming what is missing and the
    remedy."""
    from services.common.kernel import features

    if os.geteuid() != 0:
        raise FailedPrecondition("a node can only be started by root", fix="run it with sudo")
    features.ensure_bpffs(instance.bpffs)
    features.probe(instance.bpffs).require()


def _plain(options: Options) -> dict[str, object]:
    """As JSON gives them back."""
    plain: dict[str, object] = json.loads(json.dumps(asdict(options)))
    return plain


def _spawn_supervisor(instance: Instance, options: Options) -> subprocess.Popen[bytes]:
    """Start it in a session of its own, so that it outlives this command and its terminal."""
    log = instance.run_dir / "log" / "supervisor.log"
    supervisor.make_run_dir(instance)
    supervisor.trim(log)
    env = procs.environment(instance.run_dir, "supervisor")
    with log.open("ab") as output:
        return subprocess.Popen(
            supervisor_argv(instance, options),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd="/",
        )


def supervisor_argv(instance: Instance, options: Options) -> list[str]:
    """Command line of the supervisor."""
    return [
        sys.executable,
        "-m",
        "services.ctl.supervisor",
        "--instance",
        instance.name,
        "--options",
        json.dumps(_plain(options)),
    ]


def foreground(instance: Instance, options: Options) -> None:
    """Become the supervisor; for service managers."""
    prepare(instance)
    _same_netns(instance)
    os.execve(
        sys.executable, supervisor_argv(instance, options), procs.environment(instance.run_dir, "supervisor")
    )


def _wait_healthy(
    instance: Instance,
    options: Options,
    started: subprocess.Popen[bytes] | None,
    deadline: float,
    progress: Progress,
) -> health.NodeHealth:
    while True:
        state = health.supervisor_state(instance)
        # Another `up` may have been quicker: then its supervisor is the one to wait for.
        gone = started.poll() if started is not None else None
        if state is None and gone not in (None, supervisor.HAS_ONE):
            _died(instance, "supervisor")
        for child in state["children"] if state is not None else []:
            if child["restarts"] >= HOPELESS_RESTARTS and child["state"] != "running":
                _died(instance, child["name"])
        # Asking costs an import of gRPC: only when there is somebody to ask.
        absent = (
            [s for s in state["services"] if not instance.socket(s).exists()] if state is not None else []
        )
        if absent:
            progress.step(f"waiting for {', '.join(absent)}; the first start compiles the BPF programs")
        elif state is not None:
            node = health.ask(instance, options.services)
            if node.ok:
                return node
            progress.step(f"waiting for {node.trouble() or 'the services to be ready'}")
        if time.monotonic() > deadline:
            node = health.ask(instance, options.services)
            raise Unavailable(
                f"instance {instance.name!r} did not become healthy: {node.trouble() or 'not ready'}",
                fix=f"it keeps trying; see: fibril --instance {instance.name} status",
            )
        time.sleep(POLL_S)


def _died(instance: Instance, name: str) -> NoReturn:
    log = instance.run_dir / "log" / f"{name}.log"
    if name == ETCD:
        raise embedded_etcd(instance).explain(log)
    raise FailedPrecondition(
        f"{name} does not stay up: {_last_line(log) or 'it left no message'}", fix=f"its log is {log}"
    )


def _last_line(log: Path) -> str:
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return ""
    return lines[-1] if lines else ""


def _same_netns(instance: Instance) -> None:
    """A node lives in one network namespace; working on it from another would miss all its links."""
    here = os.stat("/proc/self/ns/net").st_ino
    for process in procs.find(instance.run_dir):
        with process:
            try:
                there = os.stat(f"/proc/{process.pid}/ns/net").st_ino
            except OSError:
                continue
            if there != here:
                raise FailedPrecondition(
                    f"instance {instance.name!r} runs in another network namespace (process {process.pid})",
                    fix=f"enter it first: nsenter --net=/proc/{process.pid}/ns/net",
                )


def down(instance: Instance, keep_state: bool = False) -> list[str]:
    """Remove every trace of a node; gives what could not be removed, one sentence each."""
    _same_netns(instance)
    options = _last_options(instance)
    with Progress(f"stopping instance {instance.name!r}") as progress:
        failures = [f"process {pid}: it does not end" for pid in _stop_processes(instance)]
        with _locked(instance):
            failures += asyncio.run(_remove(_removals(instance, options, keep_state), progress))
    return failures


async def _remove(steps: Iterable[tuple[str, Callable[[], object]]], progress: Progress) -> list[str]:
    """Every step, whether or not those before it succeeded."""
    failures = []
    for what, step in steps:
        progress.step(f"removing {what}")
        try:
            result = step()
            if inspect.isawaitable(result):
                await result
        except (FibrilError, OSError) as error:
            failures.append(f"{what}: {error}")
    return failures


@contextmanager
def _locked(instance: Instance) -> Iterator[None]:
    """Keep a supervisor from starting meanwhile."""
    held = supervisor.lock(instance)
    if held is None:
        raise FailedPrecondition(
            f"instance {instance.name!r} is being started by somebody else", fix="try again"
        )
    try:
        yield
    finally:
        os.close(held)


def _stop_processes(instance: Instance) -> list[int]:
    """The supervisor first, so that it neither restarts what is ended nor leaves an order of its own;
    then what is left, until nothing is. Gives what cannot be ended."""
    for name, grace in (("supervisor", 2 * GRACE_S), ("", 5.0), ("", 1.0)):
        found = procs.find(instance.run_dir)
        try:
            procs.end([p for p in found if name in ("", p.name)], grace)
        finally:
            for process in found:
                process.close()
    left = procs.find(instance.run_dir)
    for process in left:
        process.signal(signal.SIGKILL)
        process.close()
    return [p.pid for p in left]


def _removals(
    instance: Instance, options: Options, keep_state: bool
) -> Iterator[tuple[str, Callable[[], object]]]:
    """What a node leaves outside its processes, in the order it may be removed."""
    from services.ctl import cnidirs, pods
    from services.identity.network import teardown as network
    from services.ipam.cni import install
    from services.ipam.endpoints import teardown
    from services.lb import teardown as balancing
    from services.policy import teardown as policies
    from services.sockaccel import teardown as acceleration

    if options.etcd or options.etcd_members:
        yield "the node's lease in etcd", partial(_leave, instance, options)
    for name in pods.names(instance):
        yield f"pod {name}", partial(pods.remove, instance, name)
    yield "load balancing", partial(balancing.remove, instance)
    yield "policies", partial(policies.remove, instance)
    yield "socket acceleration", partial(acceleration.remove, instance)
    yield "ways to other nodes", partial(network.remove, instance)
    yield "links, routes and rules", partial(teardown.remove, instance)
    yield "BPF programs and maps", partial(remove_tree, instance.pin_dir)
    yield "cgroups", partial(_remove_cgroups, instance)
    for bins, confs in cnidirs.known(instance):
        yield "CNI plugin", partial(install.uninstall, instance, bins, confs)
    if not keep_state:
        yield str(instance.state_dir), partial(remove_tree, instance.state_dir)
    yield str(instance.run_dir), partial(remove_tree, instance.run_dir)


def _last_options(instance: Instance) -> Options:
    """How the node was run, as far as its supervisor's file is still there."""
    try:
        return Options(**json.loads(supervisor.state_file(instance).read_text())["options"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, FibrilError):
        return Options()


async def _leave(instance: Instance, options: Options) -> None:
    """Have other nodes forget this one's pods at once, if etcd goes on without it."""
    from services.common import command
    from services.identity.config import IdentityConfig
    from services.identity.leave import leave

    given = {"etcd.endpoints": ",".join(own_etcd(instance, options)[0]), "etcd.cluster": options.cluster}
    file = Path(options.config) if options.config else None
    # Without a configuration that is right, or without etcd, the lease ends by itself a little later.
    with suppress(FibrilError):
        cfg = command.load("identity", IdentityConfig, file, {k: text for k, text in given.items() if text})
        await leave(instance, cfg)


async def _remove_cgroups(instance: Instance) -> None:
    from services.common.kernel import cgroup
    from services.ctl import pods

    path = cgroup.path_of(instance.cgroup)
    # The host's own processes outlive the node; this may be one of them.
    for pid in cgroup.processes(cgroup.path_of(pods.host_cgroup(instance))):
        with suppress(NotFound):
            cgroup.move(cgroup.mount_point(), pid)
    await cgroup.remove(path, kill=True)
    _remove_if_empty(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a directory with all in it, and its parent if that was the last; one that is not there is
    fine."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    _remove_if_empty(path.parent)


def _remove_if_empty(path: Path) -> None:
    """The directory all instances share goes with the last of them."""
    try:
        path.rmdir()
    except OSError:
        return  # not empty, not there, or not ours to remove
