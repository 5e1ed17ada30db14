"""What load balancing at sockets adds to connect(): of a fresh UDP socket to a service, against one to the backend itself by
a process that no program looks at, on the same CPU in turn.

What the programs cost where they have nothing to do, what connecting the same socket again takes more, and what closing
one does, go to standard error.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

from bench.common import Bench, cpus, log, median, order, quick
from services.common.instance import Instance
from services.common.kernel import cgroup, features, netns
from services.common.kernel import netlink as nl
from services.common.kernel.netlink import Rtnl
from services.common.kernel.netns import NetNs
from services.lb import install
from services.lb.sockets.hooks import Hooks, remove
from tests.datapath.lbtables import UDP, LbTables

COUNT = 500
ROUNDS = quick(50, 150)
LOADS = quick(3, 7)
"""Programs are loaded so often: where in memory they come to lie decides about a fifth of what they cost."""
SERVICES = 200
TARGET_US = 0.15
BACKENDS = {4: "10.90.0.5", 6: "fd90::5"}
OTHERS = {4: "10.90.0.6", 6: "fd90::6"}
"""No service has anything to do with these."""
VIPS = {4: "10.96.0.10", 6: "fd96::10"}
Times = tuple[float, float, float]


class Client:
    """One process of bench/lbsock.c."""

    def __init__(self, program: Path, space: Path, group: Path | None) -> None:
        self._child = subprocess.Popen(
            [program, space, str(cpus()[-1]), str(COUNT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if group is not None:
            cgroup.move(group, self._child.pid)
        self._say("begin")

    def measure(self, address: str, port: int) -> Times:
        """Nanoseconds of a first connect(), a further one, and close()."""
        self._say(f"{address} {port}")
        assert self._child.stdout is not None
        first, further, closing = map(float, self._child.stdout.readline().split())
        return first, further, closing

    def close(self) -> None:
        self._child.communicate()

    def _say(self, line: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(line + "\n")
        self._child.stdin.flush()


@contextlib.contextmanager
def _space() -> Iterator[Path]:
    path = Path(f"/run/netns/fbb-{secrets.token_hex(4)}")
    netns.add(path)
    try:
        with NetNs.open(path) as there, Rtnl(there) as inside:
            addresses = [nl.address_add(1, ip_address(address)) for address in (*BACKENDS.values(), *OTHERS.values())]
            inside.apply([nl.link_up(1), *addresses])
        yield path
    finally:
        netns.remove(path)


@contextlib.contextmanager
def _group(instance: Instance) -> Iterator[Path]:
    """A control group with the programs."""
    path = cgroup.create(f"fibril-{instance.name}")
    hooks = Hooks(instance)
    try:
        hooks.open()
        hooks.attach(path.name)
        yield path
    finally:
        hooks.close()
        remove(instance)
        path.rmdir()


@contextlib.contextmanager
def _programs() -> Iterator[Instance]:
    features.ensure_bpffs()
    instance = Instance.from_env(f"b-sock-{os.getpid()}")
    try:
        asyncio.run(install.install_sockets(instance))
        yield instance
    finally:
        shutil.rmtree(instance.pin_dir, ignore_errors=True)


def _measure(instance: Instance, program: Path, version: int) -> dict[str, list[Times]]:
    backend, vip = BACKENDS[version], VIPS[version]
    with (
        _space() as space,
        _group(instance) as group,
        contextlib.closing(LbTables(instance.pin_dir, lines=1024)) as tables,
        contextlib.closing(Client(program, space, group)) as hooked,
        contextlib.closing(Client(program, space, None)) as bare,
    ):
        for number in range(SERVICES):
            tables.service([(vip, 1000 + number)], [(backend, 5000)] * 4, UDP)
        subjects = {
            "bare": lambda: bare.measure(backend, 5000),
            "unrelated": lambda: hooked.measure(OTHERS[version], 5000),
            "backend": lambda: hooked.measure(backend, 5000),
            "service": lambda: hooked.measure(vip, 1000),
        }
        found: dict[str, list[Times]] = {name: [] for name in subjects}
        for number in range(ROUNDS):
            for name in order(list(subjects), number):
                found[name].append(subjects[name]())
    return found


def _added(loads: list[dict[str, list[Times]]], name: str, which: int) -> float:
    """Microseconds more than without programs: of the rounds' differences the median, and of those the loads' median."""
    return median([
        median([one[which] - other[which] for one, other in zip(found[name], found["bare"], strict=True)])
        for found in loads
    ]) / 1000  # fmt: skip


def main() -> None:
    with Bench("lb") as bench, tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "lbsock"
        subprocess.run(["gcc", "-O2", "-o", program, Path(__file__).with_name("lbsock.c")], check=True)
        loads: dict[int, list[dict[str, list[Times]]]] = {4: [], 6: []}
        for _ in range(LOADS):
            with _programs() as instance:
                for version, found in loads.items():
                    found.append(_measure(instance, program, version))
        for version, found in loads.items():
            bare = [median([times[which] for load in found for times in load["bare"]]) / 1000 for which in range(3)]
            log(f"IPv{version}: connect {bare[0]:.3f} us, again {bare[1]:.3f}, close {bare[2]:.3f} without programs")
            for name in ("unrelated", "backend", "service"):
                log(
                    f"  {name}: + {_added(found, name, 0):.3f} us, again + {_added(found, name, 1):.3f}, "
                    f"close + {_added(found, name, 2):.3f}"
                )
            name = "connect_overhead" + ("" if version == 4 else "_v6")
            bench.emit(name, "us", _added(found, "service", 0), "target", TARGET_US)


if __name__ == "__main__":
    main()
