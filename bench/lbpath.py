"""Nanoseconds a packet of the load balancer at XDP, by BPF_PROG_TEST_RUN, next to the yardstick of bench/calibration.c.

xdp_dsr_hit is a packet of a known connection, sent on by IP in IP and XDP_TX; xdp_dsr_new a SYN never seen before, whose
backend is a Maglev table's and which is remembered; xdp_snat_hit one that is translated at both ends and sent on by the host's
routes (looked up once a second for each destination), in a namespace with a veth, a route and a neighbour. Tables have the
size a node begins with. "_65536" takes as many connections in turn (dsr_new: a flood beside as many), in tables of the size
that they have grown to then.

Test runs give each repetition the packet as the one before left it: what makes it anew (bench/lbpath.c) is measured too and
taken off.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes as ct
import os
import secrets
import shutil
import struct
import sys
from collections.abc import Callable
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Final

from bench import calibration
from bench.common import Bench, cpus, interleave, log, median, pinned, quick
from services.common.instance import Instance
from services.common.kernel import features, loader, netns, progs
from services.common.kernel import netlink as nl
from services.common.kernel.maps import BpfMap
from services.common.kernel.netlink import Rtnl
from services.common.kernel.netns import NetNs
from services.lb import abi, install
from services.lb.kernel.flows import FLOW_LINES
from services.lb.xdp import abi as xdp_abi
from tests.datapath.lbtables import LbTables

SERVICE: Final = "lbpath"
SAME, SPREAD, FRESH, PASS, PAIR = "fib_same", "fib_spread", "fib_fresh", "fib_pass", "fib_pair"
OUT: Final = {4: "fib_out_v4", 6: "fib_out_v6"}
NEXT: Final = f"{SERVICE}/next"
XDP_PASS, XDP_TX = 2, 3
ACK, SYN = 0x10, 0x02
MANY: Final = 65536
BACKENDS: Final = 100
NODE: Final = {4: "192.168.7.1", 6: "fd00:7::1"}
ROUTER: Final = {4: "192.168.7.254", 6: "fd00:7::fe"}
BEHIND: Final = {4: "10.20.0.0/16", 6: "fd20::/64"}
CLIENT: Final = {4: "192.0.2.1", 6: "2001:db8:1::1"}
VIP: Final = {4: "198.51.100.1", 6: "2001:db8:2::1"}
# Frames of the direct and of the translated service differ in the port.
PORT: Final = {"dsr": 80, "snat": 81}
NODE_MAC, ROUTER_MAC = "02:00:00:00:00:01", "02:00:00:00:00:fe"


def spec() -> loader.ProgramSpec:
    """What comes before the balancer."""
    names = (SAME, SPREAD, FRESH, PASS, PAIR, *OUT.values())
    return loader.ProgramSpec(source=Path(__file__).with_name("lbpath.c"), service=SERVICE, maps={"next": NEXT},
                              functions=dict.fromkeys(names, "xdp"))


def frame(family: int, flags: int, port: int = 80) -> bytes:
    """A TCP packet of 64 bytes over IPv4, 84 over IPv6; its checksum is any but the pseudo header's. The payload begins
    with the port again, which is how lbpath.c knows it.
    """
    tcp = struct.pack(">HHIIBBHHHH", 40000, port, 0, 0, 0x50, flags, 0, 0x1234, 0, port) + b"x" * 8
    macs = bytes.fromhex(NODE_MAC.replace(":", "")) + b"\x02\0\0\0\0\x02"
    if family == 4:
        return (macs + b"\x08\x00" + struct.pack(">BBHHHBBH", 0x45, 0, 50, 0, 0, 64, 6, 0)
                + IPv4Address(CLIENT[4]).packed + IPv4Address(VIP[4]).packed + tcp)
    return (macs + b"\x86\xdd" + struct.pack(">IHBB", 0x60000000, 30, 6, 64)
            + IPv6Address(CLIENT[6]).packed + IPv6Address(VIP[6]).packed + tcp)


class Rig:
    """An instance whose tables have room for so many connections, and what a run needs of it."""

    def __init__(self, stack: contextlib.ExitStack, ifindex: int, lines: int, nats: int) -> None:
        instance = Instance.from_env(f"bench-{os.getpid()}-{lines}")
        stack.callback(shutil.rmtree, instance.pin_dir, ignore_errors=True)
        asyncio.run(loader.load([install.xdp(), calibration.spec(), spec()], instance.pin_dir))
        self._pins, self._ifindex = instance.pin_dir, ifindex
        self._tables = LbTables(instance.pin_dir, 1024, lines, nats)
        stack.callback(self._tables.close)
        self._fill()
        names = {name: SERVICE for name in spec().functions}
        names |= {calibration.YARDSTICK: calibration.SERVICE, install.XDP: install.SERVICE}
        self._fds = {name: stack.enter_context(progs.opened(self._pins / "prog" / service / name))
                     for name, service in names.items()}

    def _fill(self) -> None:
        """A Maglev service a family and kind; direct return goes to neighbours, translation by the router."""
        self._tables.snat(*NODE.values())
        for kind, flags in (("dsr", abi.ServiceFlag.DSR), ("snat", abi.ServiceFlag(0))):
            for family in (4, 6):
                base = ip_network(BEHIND[family])[1]
                addresses = [str(base + number) for number in range(BACKENDS)]
                _, ids = self._tables.service([(VIP[family], PORT[kind])], [(address, 8080) for address in addresses],
                                              flags=flags | abi.ServiceFlag.MAGLEV)
                for ident in ids if kind == "dsr" else ():
                    line = self._tables.line(abi.Table.BACKENDS, ident, abi.Backend)
                    line.ifindex, line.mtu = self._ifindex, 1500
                    line.mac[:] = bytes.fromhex(ROUTER_MAC.replace(":", ""))
                    line.flags = abi.BackendFlag.TX
        with BpfMap.open(self._pins / xdp_abi.MAPS["lb_xdp"], ct.c_uint32, xdp_abi.Own) as own:
            own.update(0, xdp_abi.Own.of([NODE_MAC]))

    def run(self, name: str, packet: bytes, expected: int, repeat: int, then: str = "") -> float:
        """ns a run of a program, which hands its packets on to `then`."""
        if then:
            progs.set_slot(self._pins / NEXT, 0, self._fds[then])
        own = name == calibration.YARDSTICK
        ctx = None if own else struct.pack("=6I", 0, len(packet), 0, self._ifindex, 0, 0)
        if name == SPREAD:
            # The first packet of each connection for seconds notes the time: that is another matter.
            progs.test_run(self._fds[name], packet, MANY, ctx=ctx)
        result = progs.test_run(self._fds[name], packet, repeat, ctx=ctx)
        if result.retval != expected:
            raise RuntimeError(f"{name} gave {result.retval}, not {expected}: this measures something else")
        return float(result.ns)


def links(node: Rtnl) -> int:
    """A device with the node's addresses and a route to the backends; its index."""
    index = node.create_veth("fbx0", NODE_MAC, "fbx1", ROUTER_MAC, 1500)
    messages = [nl.no_link_local(index), nl.link_up(index), nl.link_up(node.ifindex("fbx1"))]
    for family, length in ((4, 24), (6, 64)):
        messages += [nl.address_add(index, ip_address(NODE[family]), length),
                     nl.neighbour_put(index, ip_address(ROUTER[family]), ROUTER_MAC),
                     nl.route_put(ip_network(BEHIND[family]), index, ip_address(ROUTER[family]))]
    for option in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        Path("/proc/sys/net", option).write_text("1")
    node.apply(messages)
    return index


def subjects(few: Rig, many: Rig, repeat: int) -> dict[str, Callable[[], float]]:
    """All runs by name: what counts, and what is to be taken off."""
    found: dict[str, Callable[[], float]] = {
        "yardstick": partial(few.run, calibration.YARDSTICK, calibration.packet(), 0, repeat),
        "nothing": partial(few.run, PASS, frame(4, ACK), XDP_PASS, repeat),
        "pair": partial(few.run, PAIR, frame(4, ACK), XDP_PASS, repeat)}
    for family in (4, 6):
        for how in (SAME, SPREAD, FRESH):
            found[f"v{family} dsr {how}"] = partial(few.run, how, frame(family, ACK), XDP_PASS, repeat, OUT[family])
            found[f"v{family} snat {how}"] = partial(few.run, how, frame(family, ACK), XDP_PASS, repeat, PASS)
        for kind, rig, how, flags in (("dsr hit", few, SAME, ACK), ("dsr hit many", many, SPREAD, ACK),
                                      ("dsr new", few, FRESH, SYN), ("dsr new many", many, FRESH, SYN),
                                      ("snat hit", few, SAME, ACK), ("snat hit many", many, SPREAD, ACK)):
            packet = frame(family, flags, PORT[kind.split()[0]])
            found[f"v{family} {kind}"] = partial(rig.run, how, packet, XDP_TX, repeat, install.XDP)
    return found


def report(bench: Bench, ns: dict[str, float]) -> None:
    """Costs without what stands around them."""
    for name, value in ns.items():
        log(f"{name:20} {value:6.1f} ns  {value / ns['yardstick']:5.2f} Y")
    move = (ns["pair"] - ns["nothing"]) / 2
    for family, suffix in ((4, ""), (6, "_v6")):
        for kind, how in (("dsr hit", SAME), ("dsr hit many", SPREAD), ("dsr new", FRESH), ("dsr new many", FRESH),
                          ("snat hit", SAME), ("snat hit many", SPREAD)):
            first = kind.split()[0]
            around = ns[f"v{family} {first} {how}"] - ns["nothing"] - (move if first == "dsr" else 0)
            name = "xdp_" + kind.replace(" many", f"_{MANY}").replace(" ", "_") + suffix
            bench.emit(name, "ns/packet", ns[f"v{family} {kind}"] - around, "yardstick", ns["yardstick"])


def main() -> int:
    features.ensure_bpffs()
    repeat, rounds = quick(150_000, 1_000_000), quick(7, 21)
    path = Path(f"/run/netns/fbx-{secrets.token_hex(3)}")
    netns.add(path)
    try:
        with Bench("datapath") as bench, contextlib.ExitStack() as stack:
            space = stack.enter_context(NetNs.open(path))
            stack.enter_context(space.entered())
            with Rtnl(space) as node:
                index = links(node)
            few = Rig(stack, index, FLOW_LINES, 4 * MANY)
            many = Rig(stack, index, MANY, 4 * MANY)
            with pinned(cpus()[-1]):
                runs = subjects(few, many, repeat)
                ns = {name: median(values) for name, values in interleave(runs, rounds).items()}
            report(bench, ns)
    finally:
        netns.remove(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
