"""Sockets of real processes with the programs at work on them: loaded once a module, everything within two namespaces.

    namespaces A and B, joined by a veth: 10.91.0.1 and 10.91.0.2, fd91::1 and fd91::2

Both are pods (endpoints 1 and 2), and of class 0, which shortens everything unless a test says otherwise.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from services.common.instance import Instance
from services.common.kernel import cgroup, netns
from services.common.kernel.maps import BpfMap
from services.common.pipeline.abi import Endpoint, FibAddr
from services.common.pipeline.endpoints import AddrTable
from services.sockaccel import abi, hooks
from services.sockaccel.tables import Tables, Wanted
from tests import session
from tests.e2e.lb.sockrig import Process, cookie_of

MAC = "02:00:00:00:00:01"
A4, B4, A6, B6 = "10.91.0.1", "10.91.0.2", "fd91::1", "fd91::2"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def two_spaces() -> Iterator[tuple[Path, Path]]:
    """Namespaces A and B."""
    first, second = (Path(f"/run/netns/{session.name()}") for _ in range(2))
    netns.add(first)
    netns.add(second)
    try:
        ip("-n", first.name, "link", "add", "east", "type", "veth", "peer", "name", "west", "netns", second.name)
        for space, name, v4, v6 in ((first, "east", A4, A6), (second, "west", B4, B6)):
            ip("-n", space.name, "link", "set", "lo", "up")
            ip("-n", space.name, "address", "add", f"{v4}/24", "dev", name)
            ip("-n", space.name, "address", "add", f"{v6}/64", "dev", name, "nodad")
            ip("-n", space.name, "link", "set", name, "up")
        yield first, second
    finally:
        netns.remove(first)
        netns.remove(second)


class Rig:
    """Programs of an instance on a control group of its own, and processes in it."""

    def __init__(self, instance: Instance, group: Path, spaces: tuple[Path, Path]) -> None:
        self.instance, self.group, self.spaces = instance, group, spaces
        self.tables = Tables(instance)
        self._exit = contextlib.ExitStack()
        self._exit.callback(self.tables.close)
        self.cookies = [cookie_of(space) for space in spaces]
        self.wanted = Wanted(
            on=True,
            classes=1,
            any_port=1,
            any_group=1,
            same=1,
            pods=1,
            host=1,
            within=1,
            spaces={self.cookies[0]: (1, 1, 1), self.cookies[1]: (1, 1, 2)},
            endpoints=frozenset({1, 2}),
        )
        with contextlib.closing(AddrTable(instance)) as addresses:
            for number, v4, v6 in ((1, A4, A6), (2, B4, B6)):
                pod = Endpoint.of(id=number, ifindex=number, mac=MAC, host_mac=MAC, mtu=1500, ipv4=v4, ipv6=v6)
                for address in (v4, v6):
                    addresses.update(FibAddr.of(address), pod)
        self._forget_programs()
        self.write()

    def _forget_programs(self) -> None:
        """That some have spliced: processes of all tests have one name."""
        programs = BpfMap.open(self.instance.pin_dir / abi.MAPS["sa_programs"], abi.Program, ct.c_uint32)
        with contextlib.closing(programs):
            for program in list(programs.keys()):
                programs.delete(program)

    def write(self, **changes: Any) -> None:
        """Change what is wanted, and have it."""
        self.wanted = replace(self.wanted, **changes)
        self.tables.write(self.wanted)

    def process(self, space: int = 0) -> Process:
        """A process in the group and a namespace; ended with the rig."""
        return self._exit.enter_context(Process(self.group, self.spaces[space]))

    def pairs(self) -> list[abi.Pair]:
        return self.tables.all_pairs()

    def stat(self, which: abi.Stat) -> int:
        return self.tables.stat(which)

    def ended(self, reason: abi.EndReason) -> int:
        """Pairs that ended for that reason."""
        return self.tables.stat(abi.Stat.ENDED + reason)

    def close(self) -> None:
        self._exit.close()


@contextlib.contextmanager
def at_work(instance: Instance, group: str) -> Iterator[Path]:
    """The loaded programs of an instance, attached to a new control group."""
    path = cgroup.create(group)
    hooks.attach_all(instance, group)
    try:
        yield path
    finally:
        hooks.detach_all(instance)
        path.rmdir()


def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Wait for a condition and give what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)
    return found
