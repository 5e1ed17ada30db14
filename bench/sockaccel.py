"""Connections within a machine: handed over, by TCP, and by a unix socket as the limit.

    pp_SIZE_…       rounds of SIZE bytes there and back, a second
    stream_SIZE_…   writes of SIZE bytes in one direction
    warm_SIZE_…     the same of a connection that was shortened before
    idle_…          connections that no class is about, programs attached against detached

…_vs_loopback is within one namespace, …_vs_veth_policy between two pods of a node with policy enforced, both ways.
With `_one` both ends are on one CPU, with `_two` on two. All take turns in every round.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.cnibase import Namespaces, fibril_network, netns_path
from bench.common import Bench, cpus, interleave, log, paired, quick
from bench.node import Node, node
from bench.pod import cni_pair
from bench.polpod import enforce
from services.common.instance import Instance
from services.common.kernel import cgroup, features, netns
from services.common.kernel import netlink as nl
from services.common.kernel.netlink import Rtnl
from services.common.kernel.netns import NetNs
from services.sockaccel import hooks, install
from services.sockaccel.tables import Tables, Wanted

MS = quick(60, 150)
ROUNDS = quick(5, 21)
SIZES = (64, 1024, 16_384)
WRITES = (64, 1024, 131_072)
PORT, ALONE = 7000, 7001
Run = Callable[[], float]


@dataclass(frozen=True)
class Place:
    """Where a connection is: namespaces of client and server, whom it is to, and in which control group."""

    client: Path
    server: Path
    address: str
    group: Path | None = None

    def run(self, program: Path, mode: str, size: int, two: bool, port: int = PORT) -> Run:
        """Measures once, a second."""
        first, second = cpus()[0], cpus()[-1]

        def measure() -> float:
            done = subprocess.run(
                [program, mode, str(size), str(MS), str(second), str(first if two else second), self.client, self.server,
                 self.address, str(port), self.group or "-"],
                check=True, capture_output=True, text=True)  # fmt: skip
            return float(done.stdout)

        return measure


@contextlib.contextmanager
def loopback() -> Iterator[tuple[Instance, Place, Place]]:
    """A namespace alone, without a service: a place whose connections are shortened, and one whose are not."""
    features.ensure_bpffs()
    instance = Instance.from_env(f"b-accel-{os.getpid()}")
    space = Path(f"/run/netns/fba-{secrets.token_hex(4)}")
    netns.add(space)
    group = cgroup.create(f"fibril-{instance.name}")
    try:
        with NetNs.open(space) as there, Rtnl(there) as inside:
            inside.apply([nl.link_up(1)])
            cookie = there.cookie()
        asyncio.run(install.load(instance))
        hooks.attach_all(instance, group.name)
        with Tables(instance) as tables:
            # Only to one port, as most connections are of no class.
            tables.write(
                Wanted(on=True, classes=1, any_group=1, within=1, spaces={cookie: (1, 1, 0)}, ports={PORT: (1, False)})
            )
        yield instance, Place(space, space, "127.0.0.1", group), Place(space, space, "127.0.0.1")
    finally:
        with contextlib.suppress(Exception):
            hooks.detach_all(instance)
        shutil.rmtree(instance.pin_dir, ignore_errors=True)
        group.rmdir()
        netns.remove(space)


@contextlib.contextmanager
def pods(fresh: Node, scratch: Path) -> Iterator[tuple[Place, Place]]:
    """Two pods of a node with policy enforced: a place whose connections are shortened, and one whose are not."""
    with Namespaces() as spaces, fibril_network(fresh) as fibril:
        enforce(fresh, scratch)
        fresh.fibril("sockaccel", "class", "set", "bench", "--scope", "pods", "--port", str(PORT))
        pair = cni_pair(spaces, fibril)
        group = cgroup.create(f"{Instance(fresh.name).cgroup}/bench")
        client, server = netns_path(pair.client), netns_path(pair.server)
        try:
            yield Place(client, server, pair.ipv4, group), Place(client, server, pair.ipv4)
        finally:
            group.rmdir()
            fibril.delete(pair.client)
            fibril.delete(pair.server)


def compare(bench: Bench, metric: str, unit: str, subject: Run, baselines: dict[str, Run]) -> None:
    """One line a baseline: `metric` followed by its name."""
    found = interleave({"": subject, **baselines}, ROUNDS)
    for name in baselines:
        value, baseline = paired(found[""], found[name])
        bench.emit(metric.format(name), unit, value, name, baseline)


def measure(bench: Bench, program: Path, short: Place, plain: Place, name: str, unix: Place | None) -> None:
    """Everything of one kind of place."""
    for two, suffix in ((False, "_one"), (True, "_two")):
        for size in SIZES:
            peers = {name: plain.run(program, "pp", size, two)}
            if unix is not None:
                peers["unix"] = unix.run(program, "pp", size, two)
            compare(bench, f"pp_{size}_vs_{{}}{suffix}", "rounds/s", short.run(program, "pp", size, two), peers)
        for size in WRITES:
            for mode in ("stream", "warm"):
                compare(
                    bench, f"{mode}_{size}_vs_{{}}{suffix}", "writes/s", short.run(program, mode, size, two),
                    {name: plain.run(program, mode, size, two)},
                )  # fmt: skip


def idle(bench: Bench, program: Path, instance: Instance, place: Place) -> None:
    """Programs attached against detached, for connections that no class is about.

    `_beside`: while others on the machine are shortened, when the programs behind recv() and send() are attached as well.
    """
    assert place.group is not None
    group = place.group.name

    def attached(run: Run, calls: bool) -> Run:
        def measure() -> float:
            hooks.attach_all(instance, group, calls)
            if not calls:
                hooks.detach_calls(instance)
            return run()

        return measure

    def detached(run: Run) -> Run:
        def measure() -> float:
            hooks.detach_all(instance)
            return run()

        return measure

    for mode, unit in (("pp", "rounds/s"), ("connect", "connections/s")):
        run = place.run(program, mode, 64 if mode == "pp" else 1, False, ALONE)
        ways = {"": attached(run, False), "_beside": attached(run, True)}
        found = interleave({**ways, "off": detached(run)}, quick(9, 41))
        for way in ways:
            value, baseline = paired(found[way], found["off"])
            bench.emit(("idle_cost" if mode == "connect" else "idle_cost_rr") + way, unit, value, "detached", baseline)


def build(scratch: Path) -> Path:
    """The compiled driver."""
    program = scratch / "sockaccel"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["gcc", "-O2", "-Wall", "-o", program, source], check=True)
    return program


def main() -> None:
    """Print the figures."""
    with Bench("sockaccel") as bench, tempfile.TemporaryDirectory() as scratch:
        program = build(Path(scratch))
        with loopback() as (instance, short, plain):
            unix = Place(plain.client, plain.server, "unix")
            measure(bench, program, short, plain, "loopback", unix)
            idle(bench, program, instance, short)
        log("pods with policy")
        with node() as fresh:
            fresh.fibril("up")
            with pods(fresh, Path(scratch)) as (short, plain):
                measure(bench, program, short, plain, "veth_policy", None)


if __name__ == "__main__":
    main()
