"""Nanoseconds a packet of the data path, by BPF_PROG_TEST_RUN, next to the yardstick of bench/calibration.c.

The subject is the whole pipeline as installed on a node, without policy and load balancing: from_pod, FORWARD, DELIVER, to
a pod of the same node; and both halves of the way to a pod of another node in the overlay, with a hundred thousand more
addresses in the ipcache. "spread" sends every packet to another one of these, so that nothing is remembered of any.
"uplink_not_for_pods" is what the host's own traffic pays. A test run does not execute the redirect itself, but everything
up to it; what VXLAN costs is bench.remote's to say. The share of a stage is the difference between the pipeline ended
before and behind it; a program that only returns ends it, put into the slot there. All are measured in turn, round after
round, on one CPU; the medians count.
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
from ipaddress import IPv4Address, IPv6Address

from bench import calibration
from bench.common import Bench, cpus, interleave, log, median, pinned, quick
from services.common.instance import Instance
from services.common.kernel import features, loader, progs
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi, install
from services.common.pipeline.endpoints import AddrTable, IfaceTable
from services.identity.network import install as between

LOOPBACK = 1
MTU = 1500
A4, B4, A6, B6 = "10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"
# A pod of another node.
R4, R6 = "10.1.0.2", "fd01::2"
HERE, THERE = 1, 2
OTHERS = 100_000
# Test runs happen on the loopback device, whose MAC is zero.
HOST_MAC = "00:00:00:00:00:00"


def tcp_ack(source: str, destination: str) -> bytes:
    """A TCP acknowledgement with the MACs a pod's frames have, 64 bytes over IPv4, 84 over IPv6."""
    tcp = struct.pack(">HHIIBBHHH", 40000, 80, 0, 0, 0x50, 0x10, 0, 0, 0) + b"x" * 10
    macs = bytes(6) + b"\x02\0\0\0\0\x01"
    if ":" not in source:
        return (macs + b"\x08\x00" + struct.pack(">BBHHHBBH", 0x45, 0, 50, 0, 0, 64, 6, 0)
                + IPv4Address(source).packed + IPv4Address(destination).packed + tcp)
    return (macs + b"\x86\xdd" + struct.pack(">IHBB", 0x60000000, 30, 6, 64)
            + IPv6Address(source).packed + IPv6Address(destination).packed + tcp)


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


def fill_cluster(instance: Instance) -> None:
    """Another node with one pod, and many addresses more."""
    pins = instance.pin_dir
    with contextlib.ExitStack() as opened:
        addrs = opened.enter_context(BpfMap.open(pins / abi.MAPS["ipc_addr"], abi.FibAddr, abi.IpcacheEntry))
        nodes = opened.enter_context(BpfMap.open(pins / abi.MAPS["nd_nodes"], ctypes.c_uint32, abi.NodeEntry))
        devices = opened.enter_context(BpfMap.open(pins / abi.MAPS["nd_config"], ctypes.c_uint32, abi.NetworkDevices))
        entry = abi.IpcacheEntry(identity=calibration.TUNNEL_IDENTITY, node=THERE, flags=abi.IpcacheFlag.SINGLE)
        known = [IPv4Address("10.128.0.0") + number if number % 2 else IPv6Address("fd80::") + number
                 for number in range(OTHERS)]
        keys = b"".join(bytes(abi.FibAddr.of(address)) for address in (*known, IPv4Address(R4), IPv6Address(R6)))
        done, failure = addrs.update_packed(keys, bytes(entry) * (OTHERS + 2))
        if failure:
            raise failure
        log(f"{done} addresses in the ipcache")
        nodes.update(HERE, abi.NodeEntry(mode=abi.NodeMode.LOCAL))
        nodes.update(THERE, abi.NodeEntry(mode=abi.NodeMode.OVERLAY, mtu=MTU,
                                          v4=abi.be32(IPv4Address(calibration.TUNNEL_FROM))))
        devices.update(0, abi.NetworkDevices(overlay_ifindex=LOOPBACK, host_ifindex=LOOPBACK,
                                             v4=abi.be32(IPv4Address("192.168.7.1"))))


@contextlib.contextmanager
def empty_near(instance: Instance) -> Iterator[None]:
    """Every lookup takes the long way, as for a pod whose slot another one has."""
    with BpfMap.open(install.map_path(instance, "ep_near"), ctypes.c_uint32, abi.Endpoint) as near:
        kept = [(key, value) for key, value in near.items() if value.id]
        for key, _ in kept:
            near.update(key, abi.Endpoint(flags=abi.EP_CROWDED))
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
    path = {name: pins / "prog" / part.SERVICE / name for part in (install, between) for name in part.PROGRAMS}
    with contextlib.ExitStack() as opened:
        fds = {name: opened.enter_context(progs.opened(where)) for name, where in path.items()}
        ends = {name: opened.enter_context(progs.opened(pins / "prog" / calibration.SERVICE / name))
                for name in calibration.PROGRAMS}

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

        def behind(between_them: str, fd: int, packet: bytes, expected: int) -> float:
            """As behind_reset, with another program of calibration.c before the one in question."""
            progs.set_slot(pins / calibration.NEXT, 1, fd)
            return behind_reset(ends[between_them], packet, expected)

        def by_hash(packet: bytes) -> float:
            with empty_near(instance):
                return behind_reset(fds[install.FROM_POD], packet, redirect)

        ok, unspec, redirect = 0, 0xFFFFFFFF, 7
        subjects: dict[str, Callable[[], float]] = {
            "yardstick": partial(measure, ends[calibration.YARDSTICK], calibration.packet(), ok),
            "nothing": partial(measure, ends[calibration.NOTHING], calibration.packet(), ok)}
        for family, a, b, r in ((4, A4, B4, R4), (6, A6, B6, R6)):
            packet, away, back = tcp_ack(a, b), tcp_ack(a, r), tcp_ack(r, b)
            entry = fds[install.FROM_POD]
            subjects[f"v{family} reset"] = partial(behind_reset, ends[calibration.NOTHING], packet, ok)
            subjects[f"v{family} full"] = partial(behind_reset, entry, packet, redirect)
            subjects[f"v{family} by hash"] = partial(by_hash, packet)
            subjects[f"v{family} forward"] = partial(behind_reset, entry, packet, ok, abi.Slot.POLICY_INGRESS)
            subjects[f"v{family} entry"] = partial(behind_reset, entry, packet, ok, abi.Slot.LB)
            subjects[f"v{family} to remote"] = partial(behind_reset, entry, away, redirect)
            subjects[f"v{family} tunnel"] = partial(behind, calibration.TUNNEL, ends[calibration.NOTHING], back, ok)
            subjects[f"v{family} overlay"] = partial(behind, calibration.TUNNEL, fds[between.FROM_OVERLAY], back, redirect)
            subjects[f"v{family} uplink"] = partial(measure, fds[between.FROM_UPLINK], away, unspec)
            subjects[f"v{family} to_pod"] = partial(measure, fds[install.TO_POD], packet, unspec)
        away = tcp_ack(A4, R4)
        subjects["v4 spread"] = partial(behind, calibration.SPREAD, ends[calibration.NOTHING], away, ok)
        subjects["v4 to many"] = partial(behind, calibration.SPREAD, fds[install.FROM_POD], away, redirect)
        with pinned(cpus()[-1]):
            ns = {name: median(values) for name, values in interleave(subjects, rounds).items()}
    for name, value in ns.items():
        log(f"{name:16} {value:6.1f} ns  {value / ns['yardstick']:5.2f} Y")
    emit = partial(bench.emit, unit="ns/packet", baseline="yardstick", baseline_value=ns["yardstick"])
    emit("harness", value=ns["nothing"])
    emit("pod_to_remote_overlay_spread", value=ns["v4 to many"] - (ns["v4 spread"] - ns["nothing"]))
    for family, suffix in ((4, ""), (6, "_v6")):
        extra = ns[f"v{family} reset"] - ns["nothing"]
        full, forward, entered = (ns[f"v{family} {part}"] - extra for part in ("full", "forward", "entry"))
        emit(f"pod_to_pod_plain{suffix}", value=full)
        emit(f"slot_entry{suffix}", value=entered - ns["nothing"])
        emit(f"slot_forward{suffix}", value=forward - entered)
        emit(f"slot_deliver{suffix}", value=full - forward)
        emit(f"pod_to_pod_by_hash{suffix}", value=ns[f"v{family} by hash"] - extra)
        emit(f"host_to_pod_plain{suffix}", value=ns[f"v{family} to_pod"])
        emit(f"pod_to_remote_overlay{suffix}", value=ns[f"v{family} to remote"] - extra)
        emit(f"overlay_to_pod{suffix}", value=ns[f"v{family} overlay"] - (ns[f"v{family} tunnel"] - ns["nothing"]))
        emit(f"uplink_not_for_pods{suffix}", value=ns[f"v{family} uplink"])


def main() -> int:
    with Bench("datapath") as bench, temporary_instance() as instance:
        asyncio.run(loader.load([install.spec(), between.spec(), calibration.spec()], instance.pin_dir))
        fill_maps(instance)
        fill_cluster(instance)
        run(bench, instance)
    return 0


if __name__ == "__main__":
    sys.exit(main())
