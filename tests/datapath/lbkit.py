"""The balancer's tc programs beside those of a Cluster, and what packets become on their way."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from services.common.instance import Instance
from services.common.kernel import loader, netns, progs
from services.common.kernel import netlink as nl
from services.common.kernel.maps import BpfMap
from services.common.kernel.netlink import Rtnl
from services.common.kernel.netns import NetNs
from services.common.pipeline import abi as pipeline
from services.common.pipeline.reasons import Reason
from services.identity.network import install as identity
from services.lb import abi, install
from tests import session
from tests.datapath.cluster import TUNNEL_SPEC, Cluster
from tests.datapath.harness import Result
from tests.datapath.lbtables import LbTables

VIP = {4: "10.96.0.1", 6: "fd00:96::1"}
NODE = {4: "192.168.7.1", 6: "fd77::1"}
HAIRPIN = {4: "169.254.42.1", 6: "fd00:fb:42::1"}
CLIENT = {4: "192.0.2.1", 6: "2001:db8:1::1"}
ROUTER = {4: "192.168.7.254", 6: "fd77::fe"}
SERVER = {4: "192.168.7.40", 6: "fd77::40"}
"""A backend that is no pod, on the node's network."""
NARROW = {4: "203.0.113.9", 6: "2001:db8:9::9"}
"""Another one, by a device with an MTU of 1300."""
NODE_MAC, ROUTER_MAC, SERVER_MAC = "02:00:00:00:00:11", "02:00:00:00:00:fe", "02:00:00:00:00:40"
PROTO = {TCP: 6, UDP: 17}


@contextlib.contextmanager
def installed(instance: Instance) -> Iterator[None]:
    """Have identity's and the balancer's programs in an instance's pipeline. They are compiled once a session."""
    slots = instance.pin_dir / pipeline.MAPS[pipeline.SLOTS_MAP]
    if install.program_path(instance, install.LB).exists():
        for owner in (identity, install):
            for slot, name in owner.SLOTS.items():
                with progs.opened(owner.program_path(instance, name)) as fd:
                    progs.set_slot(slots, slot, fd)
    else:
        asyncio.run(loader.load([identity.spec(), TUNNEL_SPEC, install.packets()], instance.pin_dir))
    try:
        yield
    finally:
        for slot in (pipeline.Slot.LB, pipeline.Slot.REMOTE):
            progs.clear_slot(slots, slot)


def own(pod: pipeline.Endpoint, family: int) -> str:
    """A pod's address."""
    return str(pod.ipv4 if family == 4 else pod.ipv6)


class Lab:
    """Tables that are fresh, and a cluster around them."""

    def __init__(self, cluster: Cluster, **sizes: int) -> None:
        self.cluster, self.dp = cluster, cluster.dp
        self.tables = LbTables(cluster.dp.instance.pin_dir, **sizes)
        self.tables.snat(*NODE.values())
        # For a beat nobody searches for a port where an earlier test found none.
        with BpfMap.open(cluster.dp.instance.pin_dir / abi.MAPS["lb_exhausted"], abi.FullKey, abi.Full) as full:
            for key in list(full.keys()):
                full.delete(key)

    def close(self) -> None:
        self.tables.close()

    def serve(
        self,
        family: int,
        backends: list[tuple[str, int]],
        layer: Any = TCP,
        port: int = 80,
        flags: int = abi.ServiceFlag.MAGLEV,
        **fields: Any,
    ) -> tuple[int, list[int]]:
        """A service at the VIP."""
        return self.tables.service([(VIP[family], port)], backends, PROTO[layer], flags, **fields)


def exact(data: bytes) -> bytes:
    """The frame with all lengths and checksums computed anew: equal to the frame if they were right."""
    copy = Ether(data)
    for layer in copy.layers():
        for name in ("chksum", "cksum", "len", "plen"):
            fields = copy[layer].fields
            if name in fields and not (layer is UDP and name == "chksum" and not copy[UDP].chksum):
                del fields[name]
    return bytes(copy)


def rewritten(
    packet: Any, src: str = "", dst: str = "", sport: int = 0, dport: int = 0, ttl: int = 0
) -> bytes:
    """What a packet is, from IP on, with other ends and one hop less (or `ttl` left)."""
    after = Ether(bytes(packet))
    ip = after[1]
    ip.src, ip.dst = src or ip.src, dst or ip.dst
    for layer in (TCP, UDP):
        if layer in after:
            after[layer].sport, after[layer].dport = sport or after[layer].sport, dport or after[layer].dport
            if layer is TCP or after[layer].chksum:
                del after[layer].chksum
    if isinstance(ip, IP):
        ip.ttl = ttl or ip.ttl - 1
        del ip.chksum
    else:
        assert isinstance(ip, IPv6)
        ip.hlim = ttl or ip.hlim - 1
    return bytes(ip)


def arriving(packet: Any) -> bytes:
    """As it comes from the router to the uplink."""
    return bytes(Ether(src=ROUTER_MAC, dst=NODE_MAC) / packet)


def outside(family: int, **fields: Any) -> IP | IPv6:
    """From the client to the VIP, unless said otherwise; `ttl` is the hop limit of either family."""
    fields = {"src": CLIENT[family], "dst": VIP[family], **fields}
    if family == 6 and "ttl" in fields:
        fields["hlim"] = fields.pop("ttl")
    return IP(**fields) if family == 4 else IPv6(**fields)


def answer(sent: bytes, layer: Any, **fields: Any) -> Any:
    """What the backend says to a packet it got, from IP on."""
    got = Ether(sent)
    if layer is TCP:
        # Scapy's own would begin something.
        fields = {"flags": "SA", **fields}
    return type(got[1])(src=got[1].dst, dst=got[1].src) / layer(
        sport=got[layer].dport, dport=got[layer].sport, **fields
    )


class Uplink:
    """A namespace with an uplink and routes: clients by a router, a server beside. All neighbours are permanent."""

    lab: Lab
    """Set for each test."""

    def __init__(self, instance: Instance) -> None:
        self._exit = contextlib.ExitStack()
        path = Path(f"/run/netns/{session.name()}")
        netns.add(path)
        self._exit.callback(netns.remove, path)
        self.netns = self._exit.enter_context(NetNs.open(path))
        self._fds = {
            name: self._exit.enter_context(progs.opened(install.program_path(instance, name)))
            for name in (install.UPLINK, install.UPLINK_OUT)
        }
        with self.netns.entered():
            for option in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
                Path("/proc/sys/net", option).write_text("1")
        with Rtnl(self.netns) as node:
            self.ifindex = node.create_veth("fbl0", NODE_MAC, "fbl1", ROUTER_MAC, 1500)
            narrow = node.create_veth("fbl2", "02:00:00:00:00:12", "fbl3", SERVER_MAC, 1300)
            ups = [nl.link_up(node.ifindex(name)) for name in ("lo", "fbl0", "fbl1", "fbl2", "fbl3")]
            messages = [nl.no_link_local(self.ifindex), nl.no_link_local(narrow), *ups]
            for family, (length, clients) in {4: (24, "192.0.2.0/24"), 6: (64, "2001:db8:1::/64")}.items():
                router = ip_address(ROUTER[family])
                messages += [
                    nl.address_add(self.ifindex, ip_address(NODE[family]), length),
                    nl.neighbour_put(self.ifindex, router, ROUTER_MAC),
                    nl.neighbour_put(self.ifindex, ip_address(SERVER[family]), SERVER_MAC),
                    nl.route_put(ip_network(clients), self.ifindex, router),
                    nl.neighbour_put(narrow, ip_address(NARROW[family]), SERVER_MAC),
                    nl.route_put(ip_network(NARROW[family]), narrow),
                ]
            node.apply(messages)

    def close(self) -> None:
        self._exit.close()

    def run(self, data: bytes, program: str = install.UPLINK, *, gso_size: int = 0) -> tuple[int, bytes]:
        """Action, and the frame after it."""
        ctx = struct.pack("=40xI120xI8xI12x", self.ifindex, 2 if gso_size else 0, gso_size)
        self.lab.dp.ring.poll()
        with self.netns.entered():
            done = progs.test_run(self._fds[program], data, ctx=ctx, out_size=65536)
        return done.retval, done.data

    def event(self) -> pipeline.Event:
        """Of the packet run last."""
        (event,) = [
            e
            for e in map(pipeline.Event.from_buffer_copy, self.lab.dp.ring.poll())
            if e.ifindex == self.ifindex
        ]
        return event

    def sends(self, packet: Any, action: int = 7, **options: Any) -> Ether:
        """What the uplink's program makes of a packet from the router; right in every length and checksum."""
        done, data = self.run(arriving(packet), **options)
        assert done == action, (done, Reason(self.event().reason))
        assert exact(data) == data
        return Ether(data)

    def passes(self, packet: Any) -> None:
        """Asserts that the packet is left to the host as it came, uncounted."""
        data = arriving(packet)
        assert self.run(data) == (0xFFFFFFFF, data)
        assert not self.lab.dp.ring.poll()

    def drops(self, packet: Any) -> Reason:
        """Why."""
        action, _ = self.run(arriving(packet))
        assert action == 2, action
        return Reason(self.event().reason)

    def from_pod(self, packet: Any) -> Result:
        """A packet of pod A, where there are routes."""
        with self.netns.entered():
            return self.lab.dp.run(bytes(packet))
