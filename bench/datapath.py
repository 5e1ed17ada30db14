"""Nanoseconds a packet of the data path, by BPF_PROG_TEST_RUN, next to the yardstick of bench/calibration.c.

The subject is the whole pipeline as installed on a node: from_pod, FORWARD, DELIVER, to a pod of the same node, without
policy and load balancing. A test run does not execute the redirect itself, but everything up to it. The share of
a stage is the difference between the pipeline ended before and behind it; a program that only returns ends it, put
into the slot there. All are measured in turn, round after round, on one CPU; the medians count.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial
from ipaddress import IPv6Address

from bench import calibration
from bench.common import Bench, cpus, interleave, log, median, pinned, quick
from services.common.instance import Instance
from services.common.kernel import features, loader, progs
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi, install
from services.common.pipeline.endpoints import AddrTable, IfaceTable

LOOPBACK = 1
MTU = 1500
A4, B4, A6, B6 = "10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"
# Test runs happen on the loopback device, whose MAC is zero.
HOST_MAC = "00:00:00:00:00:00"


def tcp_ack(family: int) -> bytes:
    """A TCP acknowledgement from pod A to pod B, 64 bytes over IPv4, 84 over IPv6."""
    tcp = struct.pack(">HHIIBBHHH", 40000, 80, 0, 0, 0x50, 0x10, 0, 0, 0) + b"x" * 10
    macs = bytes(6) + b"\x02\0\0\0\0\x01"
    if family == 4:
        return (macs + b"\x08\x00" + struct.pack(">BBHHHBBH", 0x45, 0, 50, 0, 0, 64, 6, 0)
                + bytes((10, 0, 0, 1, 10, 0, 0, 2)) + tcp)
    return (macs + b"\x86\xdd" + struct.pack(">IHBB", 0x60000000, 30, 6, 64)
            + IPv6Address(A6).packed + IPv6Address(B6).packed + tcp)


def pod(number: int, ipv4: str, ipv6: str) -> abi.Endpoint:
    """A pod; all of them are behind the loopback device."""
    return abi.Endpoint.of(id=number, ifindex=LOOPBACK, mac=f"02:00:00:00:00:{number:02x}", host_mac=HOST_MAC, mtu=MTU,
                           ipv4=ipv4, ipv6=ipv6)


def fill_maps(instance: Instance) -> None:
    """Two pods that talk."""
    pod_a, pod_b = pod(1, A4, A6), pod(2, B4, B6)
    with contextlib.closing(IfaceTable(instance)) as ifaces, contextlib.closing(AddrTable(instance)) as addrs:
        ifaces.update(LOOPBACK, pod_a)
        for address, value in ((A4, pod_a), (A6, pod_a), (B4, pod_b), (B6, pod_b)):
            addrs.update(abi.FibAddr.of(address), value)


@contextlib.contextmanager
def empty_near(instance: Instance) -> Iterator[None]:
    """Every lookup takes the long way, as for a pod whose slot another one has."""
    with BpfMap.open(install.map_path(instance, "ep_near"), ctypes.c_uint32, abi.Endpoint) as near:
        kept = [(key, value) for key, value in near.items() if value.id]
        for key, _ in kept:
            near.update(key, abi.Endpoint())
        try:
            yield
        finally:
            for key, value in kept:
                near.update(key, value)


@contextlib.contextmanager
def temporary_instance() -> Iterator[Instance]:
    """An instance of this run's own; its pins are removed at the end."""
    features.ensure_bpffs()
    instance = Instance.from_env(f"bench-{os.getpid()}")
    try:
        yield instance
    finally:
        shutil.rmtree(instance.pin_dir, ignore_errors=True)


def run(bench: Bench, instance: Instance) -> None:
    """Measure and print. RuntimeError if a program does not do what it is measured for."""
    pins = instance.pin_dir
    repeat, rounds = quick(200_000, 1_000_000), quick(9, 21)
    slots = pins / abi.MAPS[abi.SLOTS_MAP]
    path = {name: pins / "prog" / install.SERVICE / name for name in install.PROGRAMS}
    with contextlib.ExitStack() as opened:
        fds = {name: opened.enter_context(progs.opened(where)) for name, where in path.items()}
        ends = {name: opened.enter_context(progs.opened(pins / "prog" / calibration.SERVICE / name))
                for name in (calibration.YARDSTICK, calibration.NOTHING, calibration.RESET)}

        def measure(fd: int, packet: bytes, expected: int) -> float:
            result = progs.test_run(fd, packet, repeat)
            if result.retval != expected:
                raise RuntimeError(f"a program returned {result.retval}, not {expected}: this measures something else")
            return float(result.ns)

        def behind_reset(fd: int, packet: bytes, expected: int, cut: abi.Slot | None = None) -> float:
            """Of a program that rewrites its packet; with the pipeline ending in slot `cut`."""
            progs.set_slot(pins / calibration.NEXT, 0, fd)
            if cut is not None:
                progs.set_slot(slots, int(cut), ends[calibration.NOTHING])
            try:
                return measure(ends[calibration.RESET], packet, expected)
            finally:
                if cut is not None:
                    progs.clear_slot(slots, int(cut))

        def by_hash(packet: bytes) -> float:
            with empty_near(instance):
                return behind_reset(fds[install.FROM_POD], packet, redirect)

        ok, unspec, redirect = 0, 0xFFFFFFFF, 7
        subjects: dict[str, Callable[[], float]] = {
            "yardstick": partial(measure, ends[calibration.YARDSTICK], calibration.packet(), ok),
            "nothing": partial(measure, ends[calibration.NOTHING], calibration.packet(), ok)}
        for family in (4, 6):
            packet = tcp_ack(family)
            entry = fds[install.FROM_POD]
            subjects[f"v{family} reset"] = partial(behind_reset, ends[calibration.NOTHING], packet, ok)
            subjects[f"v{family} full"] = partial(behind_reset, entry, packet, redirect)
            subjects[f"v{family} by hash"] = partial(by_hash, packet)
            subjects[f"v{family} forward"] = partial(behind_reset, entry, packet, ok, abi.Slot.POLICY_INGRESS)
            subjects[f"v{family} entry"] = partial(behind_reset, entry, packet, ok, abi.Slot.LB)
            subjects[f"v{family} to_pod"] = partial(measure, fds[install.TO_POD], packet, unspec)
        with pinned(cpus()[-1]):
            ns = {name: median(values) for name, values in interleave(subjects, rounds).items()}
    for name, value in ns.items():
        log(f"{name:16} {value:6.1f} ns  {value / ns['yardstick']:5.2f} Y")
    emit = partial(bench.emit, unit="ns/packet", baseline="yardstick", baseline_value=ns["yardstick"])
    emit("harness", value=ns["nothing"])
    for family, suffix in ((4, ""), (6, "_v6")):
        extra = ns[f"v{family} reset"] - ns["nothing"]
        full, forward, entered = (ns[f"v{family} {part}"] - extra for part in ("full", "forward", "entry"))
        emit(f"pod_to_pod_plain{suffix}", value=full)
        emit(f"slot_entry{suffix}", value=entered - ns["nothing"])
        emit(f"slot_forward{suffix}", value=forward - entered)
        emit(f"slot_deliver{suffix}", value=full - forward)
        emit(f"pod_to_pod_by_hash{suffix}", value=ns[f"v{family} by hash"] - extra)
        emit(f"host_to_pod_plain{suffix}", value=ns[f"v{family} to_pod"])


def main() -> int:
    with Bench("datapath") as bench, temporary_instance() as instance:
        asyncio.run(loader.load([install.spec(), calibration.spec()], instance.pin_dir))
        fill_maps(instance)
        run(bench, instance)
    return 0


if __name__ == "__main__":
    sys.exit(main())
