"""Nanoseconds a packet that the prefilter drops, by BPF_PROG_TEST_RUN, next to the yardstick of bench/calibration.c.

The subject is the program that hangs on uplinks. prefilter_drop_N is a packet from an address that is one of N in a set, the
same one each time; "_65536" takes so many of them in turn (the cost of taking turns is taken off), "_v6" is IPv6.
prefilter_pass_1m is a packet that no set holds, while a million prefixes are declared: what all others pay for it (it includes
what the balancer then does with a packet that is none of its own), prefilter_none the same with nothing declared, and
prefilter_limit with a limit for every source. prefilter_load_1m is the time from a million prefixes as
text to their being in force.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes as ct
import random
import struct
import sys
import time
from collections.abc import Callable
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import Final

from bench import calibration
from bench.common import Bench, cpus, interleave, log, median, pinned, quick
from bench.datapath import temporary_instance
from services.common.instance import Instance
from services.common.kernel import loader, progs
from services.common.kernel.maps import BpfMap
from services.lb import install as lb
from services.lb.prefilter import install
from services.lb.prefilter.keys import Keys, family_of, parse_all
from services.lb.prefilter.limits import RATE_MAX, Limit, LimitTables
from services.lb.prefilter.model import PrefixSet, Sets
from services.lb.prefilter.part import SOURCES
from services.lb.prefilter.tables import Tables

SERVICE: Final = "lbprefilter"
TURN, END = "fib_turn", "fib_end"
MAPS: Final = {name: f"{SERVICE}/{name}" for name in ("next", "sources")}
XDP_DROP, XDP_PASS = 1, 2
TURNS: Final = 65536
# Documentation and test addresses; the random ones are others.
FEW: Final = ["192.0.2.0/24", "192.0.2.129", "198.51.100.0/24", "203.0.113.0/24", "203.0.113.7",
              "2001:db8::/48", "2001:db8:1::/64", "2001:db8:2::1", "fd00:1::/32", "fd00:2::/64"]


def spec() -> loader.ProgramSpec:
    return loader.ProgramSpec(source=Path(__file__).with_name("lbprefilter.c"), service=SERVICE, maps=MAPS,
                              functions=dict.fromkeys((TURN, END), "xdp"))


def frame(source: str) -> bytes:
    """A TCP packet of 64 bytes over IPv4, 84 over IPv6."""
    tcp = struct.pack(">HHIIBBHHH", 40000, 80, 0, 0, 0x50, 0x10, 0, 0x1234, 0) + b"x" * 10
    macs = b"\x02\0\0\0\0\x01\x02\0\0\0\0\x02"
    if ":" not in source:
        return (macs + b"\x08\x00" + struct.pack(">BBHHHBBH", 0x45, 0, 50, 0, 0, 64, 6, 0)
                + IPv4Address(source).packed + IPv4Address("192.168.7.1").packed + tcp)
    return (macs + b"\x86\xdd" + struct.pack(">IHBB", 0x60000000, 30, 6, 64)
            + IPv6Address(source).packed + IPv6Address("fd00:7::1").packed + tcp)


def texts(family: int, count: int) -> list[str]:
    """Addresses all over the unicast range, the same in each run."""
    rnd = random.Random(family)
    if family == 4:
        return [str(IPv4Address(rnd.randrange(1 << 24, 192 << 24))) for _ in range(count)]
    return [str(IPv6Address(0x2400 << 112 | rnd.getrandbits(32) << 80 | rnd.getrandbits(64))) for _ in range(count)]


def declare(tables: Tables, prefixes: list[str]) -> float:
    """Put them in force; seconds."""
    begin = time.monotonic()
    keys = parse_all(prefixes)
    v4, v6 = ({key: 0 for key in keys if family_of(key) == family} for family in (4, 6))
    tables.rebuild(Sets([PrefixSet("drop", 1, False, Keys.of(4, v4), Keys.of(6, v6))]))
    return time.monotonic() - begin


def run(bench: Bench, instance: Instance) -> None:
    """Measure and print. RuntimeError if a program does not do what it is measured for."""
    pins = instance.pin_dir
    repeat, rounds, many = quick(200_000, 1_000_000), quick(5, 15), 1_000_000
    with contextlib.ExitStack() as opened:
        def program(service: str, name: str) -> int:
            return opened.enter_context(progs.opened(pins / "prog" / service / name))
        yard = {name: program(calibration.SERVICE, name) for name in (calibration.YARDSTICK, calibration.NOTHING)}
        turn, end, subject = program(SERVICE, TURN), program(SERVICE, END), program(lb.SERVICE, lb.XDP)
        tables = Tables(instance)
        tables.open()
        opened.callback(tables.close)

        def measure(fd: int, packet: bytes, expected: int) -> float:
            result = progs.test_run(fd, packet, repeat)
            if result.retval != expected:
                raise RuntimeError(f"a program returned {result.retval}, not {expected}: this measures something else")
            return float(result.ns)

        def turns(fd: int, expected: int) -> float:
            progs.set_slot(pins / MAPS["next"], 0, fd)
            return measure(turn, frame("192.0.2.1"), expected)

        def taken(subjects: dict[str, Callable[[], float]]) -> dict[str, float]:
            with pinned(cpus()[-1]):
                found = {name: median(values) for name, values in interleave(subjects, rounds).items()}
            for name, value in found.items():
                log(f"{name:26} {value:6.1f} ns  {value / found['yardstick']:5.2f} Y")
            return found

        emit = partial(bench.emit, unit="ns/packet", baseline="yardstick")
        always: dict[str, Callable[[], float]] = {
            "yardstick": partial(measure, yard[calibration.YARDSTICK], calibration.packet(), 0),
            "harness": partial(measure, end, frame("192.0.2.1"), XDP_PASS)}
        declare(tables, FEW)
        ns = taken({**always, "prefilter_drop_10": partial(measure, subject, frame("192.0.2.129"), XDP_DROP),
                    "prefilter_drop_10_v6": partial(measure, subject, frame("2001:db8:2::1"), XDP_DROP)})
        for name in ("prefilter_drop_10", "prefilter_drop_10_v6"):
            emit(name, value=ns[name], baseline_value=ns["yardstick"])

        tables.rebuild(Sets(()))
        ns = taken({**always, "prefilter_none": partial(measure, subject, frame("192.0.2.129"), XDP_PASS)})
        emit("prefilter_none", value=ns["prefilter_none"], baseline_value=ns["yardstick"])
        limits = LimitTables(instance, SOURCES)
        limits.open()
        opened.callback(limits.close)
        limits.agree([Limit(ip_network("0.0.0.0/0"), RATE_MAX, RATE_MAX, 0)])
        tables.limits(True)
        ns = taken({**always, "prefilter_limit": partial(measure, subject, frame("192.0.2.129"), XDP_PASS)})
        emit("prefilter_limit", value=ns["prefilter_limit"], baseline_value=ns["yardstick"])
        tables.limits(False)

        lists = {family: texts(family, many) for family in (4, 6)}
        load = {family: declare(tables, lists[family]) for family in (6, 4)}
        memory = tables.memory()
        fill_turns(pins, lists[4])
        ns = taken({**always, "prefilter_drop_1m": partial(measure, subject, frame(lists[4][7]), XDP_DROP),
                    "prefilter_pass_1m": partial(measure, subject, frame("198.51.100.1"), XDP_PASS),
                    "turns": partial(turns, end, XDP_PASS), "1m in turn": partial(turns, subject, XDP_DROP)})
        emit("prefilter_drop_1m", value=ns["prefilter_drop_1m"], baseline_value=ns["yardstick"])
        emit("prefilter_drop_1m_65536", value=ns["1m in turn"] - (ns["turns"] - ns["harness"]), baseline_value=ns["yardstick"])
        emit("prefilter_pass_1m", value=ns["prefilter_pass_1m"], baseline_value=ns["yardstick"])
        declare(tables, lists[6])
        ns = taken({**always, "prefilter_drop_1m_v6": partial(measure, subject, frame(lists[6][7]), XDP_DROP)})
        emit("prefilter_drop_1m_v6", value=ns["prefilter_drop_1m_v6"], baseline_value=ns["yardstick"])
        bench.emit("prefilter_load_1m", "s", load[4], "target", 5)
        bench.emit("prefilter_load_1m_v6", "s", load[6], "target", 10)
        bench.emit("prefilter_memory_1m", "MiB", memory / (1 << 20), "target", 64)


def fill_turns(pins: Path, addresses: list[str]) -> None:
    """What fib_turn gives packets, out of these."""
    chosen = random.Random(1).sample(addresses, TURNS)
    with BpfMap.open(pins / MAPS["sources"], ct.c_uint32, ct.c_uint32) as sources:
        keys = b"".join(number.to_bytes(4, "little") for number in range(TURNS))
        _, failure = sources.update_packed(keys, b"".join(IPv4Address(text).packed for text in chosen))
        if failure:
            raise failure


def main() -> int:
    with Bench("datapath") as bench, temporary_instance() as instance:
        asyncio.run(loader.load([install.spec(), lb.xdp(), calibration.spec(), spec()], instance.pin_dir))
        run(bench, instance)
    return 0


if __name__ == "__main__":
    sys.exit(main())
