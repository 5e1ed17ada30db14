"""The XDP program on made-up packets, in a namespace with real routes.

    clients 192.0.2.0/24, 2001:db8:1::/64 -- router .254 --+
                                                           +-- fbx0 192.168.7.1, fd00:7::1 (the node; test runs come in here)
    backends 192.168.7.10 to .19, fd00:7::10 to ::19 ------+

All neighbours are permanent: nothing is resolved.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes as ct
import shutil
import struct
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.utils import checksum

from services.common.instance import Instance
from services.common.kernel import features, loader, netns, progs
from services.common.kernel import netlink as nl
from services.common.kernel.maps import BpfMap
from services.common.kernel.netlink import Rtnl
from services.common.kernel.netns import NetNs
from services.lb import abi, install
from services.lb.xdp import abi as xdp_abi
from tests import session
from tests.datapath.lbtables import LbTables

ABORTED, DROP, PASS, TX, REDIRECT = range(5)
NODE_MAC, ROUTER_MAC = "02:00:00:00:00:01", "02:00:00:00:00:fe"
NODE = {4: "192.168.7.1", 6: "fd00:7::1"}
ROUTER = {4: "192.168.7.254", 6: "fd00:7::fe"}
CLIENT = {4: "192.0.2.1", 6: "2001:db8:1::1"}
VIP = {4: "198.51.100.1", 6: "2001:db8:2::1"}
FAMILIES = (4, 6)


def backend_address(family: int, number: int) -> str:
    return f"192.168.7.{10 + number}" if family == 4 else f"fd00:7::{10 + number}"


def backend_mac(number: int) -> str:
    return f"02:00:00:00:01:{number:02x}"


def ip(family: int, **fields: Any) -> IP | IPv6:
    """From the client to the VIP, unless said otherwise; `ttl` is the hop limit of either family."""
    fields = {"src": CLIENT[family], "dst": VIP[family], **fields}
    if family == 6 and "ttl" in fields:
        fields["hlim"] = fields.pop("ttl")
    return IP(**fields) if family == 4 else IPv6(**fields)


def frame(packet: Any, dst: str = NODE_MAC) -> bytes:
    """As it comes from the router."""
    return bytes(Ether(src=ROUTER_MAC, dst=dst) / packet)


def looks_unsummed(data: bytes) -> bool:
    """Whether the checksum of a frame of TCP or UDP is by chance what it would be if a device were to compute it, the sum of
    the pseudo header: XDP leaves such a frame to tc.
    """
    packet = Ether(data)[1]
    proto, length = (packet.proto, packet.len - 20) if isinstance(packet, IP) else (packet.nh, packet.plen)
    ends = ip_address(packet.src).packed + ip_address(packet.dst).packed
    return bool(packet.payload.chksum == ~checksum(ends + struct.pack("!HH", length, proto)) & 0xFFFF)


def exact(data: bytes) -> bytes:
    """The frame with all lengths and checksums computed anew: equal to the frame if they were right."""
    copy = Ether(data)
    for layer in copy.layers():
        for name in ("chksum", "len", "plen"):
            if name in copy[layer].fields and not (name == "chksum" and layer.__name__ == "UDP" and not copy[layer].chksum):
                del copy[layer].fields[name]
    return bytes(copy)


class XdpRig:
    """An instance with the program, and the namespace. `tables` are fresh ones for each test: see `fresh`."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        features.ensure_bpffs()
        self.instance = Instance.from_env(f"t-xdp-{session.name()}")
        stack.callback(shutil.rmtree, self.instance.pin_dir, ignore_errors=True)
        asyncio.run(loader.load([install.xdp()], self.instance.pin_dir))
        self._fd = stack.enter_context(progs.opened(install.program_path(self.instance, install.XDP)))
        path = Path(f"/run/netns/{session.name()}")
        netns.add(path)
        stack.callback(netns.remove, path)
        self.netns = stack.enter_context(NetNs.open(path))
        self._links()
        with self._own() as own:
            own.update(0, xdp_abi.Own.of([NODE_MAC]))
        self._stack = stack
        self.tables: LbTables

    def _own(self) -> BpfMap[ct.c_uint32, xdp_abi.Own]:
        return BpfMap.open(self.instance.pin_dir / xdp_abi.MAPS["lb_xdp"], ct.c_uint32, xdp_abi.Own)

    def _links(self) -> None:
        with self.netns.entered():
            for option in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
                Path("/proc/sys/net", option).write_text("1")
        with Rtnl(self.netns) as node:
            self.ifindex = node.create_veth("fbx0", NODE_MAC, "fbx1", ROUTER_MAC, 1500)
            self.other = node.create_veth("fbx2", "02:00:00:00:00:02", "fbx3", "02:00:00:00:00:03", 1400)
            ups = [nl.link_up(node.ifindex(f"fbx{n}")) for n in range(4)]
            messages = [nl.no_link_local(self.ifindex), *ups]
            for family, (length, clients) in {4: (24, "192.0.2.0/24"), 6: (64, "2001:db8:1::/64")}.items():
                messages.append(nl.address_add(self.ifindex, ip_address(NODE[family]), length))
                messages.append(nl.neighbour_put(self.ifindex, ip_address(ROUTER[family]), ROUTER_MAC))
                for number in range(10):
                    address = ip_address(backend_address(family, number))
                    messages.append(nl.neighbour_put(self.ifindex, address, backend_mac(number)))
                messages.append(nl.route_put(ip_network(clients), self.ifindex, ip_address(ROUTER[family])))
            node.apply(messages)

    @contextlib.contextmanager
    def fresh(self, **sizes: int) -> Iterator[LbTables]:
        """Empty tables, the node's addresses set."""
        self.tables = LbTables(self.instance.pin_dir, **sizes)
        try:
            self.tables.snat(*NODE.values())
            yield self.tables
        finally:
            self.tables.close()

    def ports(self) -> BpfMap[ct.c_uint32, xdp_abi.Port]:
        """Devices that take what is redirected to them."""
        return BpfMap.open(self.instance.pin_dir / xdp_abi.MAPS["lb_xdp_ports"], ct.c_uint32, xdp_abi.Port)

    def direct(self, ident: int, number: int, mtu: int = 1500, ifindex: int = 0) -> None:
        """Note the next hop of a backend in its line."""
        line = self.tables.line(abi.Table.BACKENDS, ident, abi.Backend)
        line.ifindex, line.mtu = ifindex or self.ifindex, mtu
        line.mac[:] = bytes.fromhex(backend_mac(number).replace(":", ""))
        line.flags |= abi.BackendFlag.TX

    def run(self, data: bytes) -> tuple[int, bytes]:
        """Action, and the frame after it."""
        ctx = struct.pack("=6I", 0, len(data), 0, self.ifindex, 0, 0)
        with self.netns.entered():
            done = progs.test_run(self._fd, data, ctx=ctx)
        return done.retval, done.data

    def send(self, packet: Any) -> Ether:
        """What XDP sends on in place of a packet from the router, right in every length and checksum."""
        action, data = self.run(frame(packet))
        assert action == TX, action
        assert exact(data) == data
        return Ether(data)

    def passes(self, packet: Any, dst: str = NODE_MAC) -> None:
        """Asserts that a packet goes on as it came."""
        data = frame(packet, dst)
        assert self.run(data) == (PASS, data)
