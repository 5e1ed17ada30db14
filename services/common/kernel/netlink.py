"""Links, addresses, routes, neighbours and qdiscs of one namespace, typed and idempotent.

`Rtnl` holds the operations (blocking). `Netlink` runs them on its one thread:

    async with Netlink() as netlink:
        links = await netlink.call(Rtnl.links, "fb1a2b")
        await netlink.call_in("/run/netns/x", Rtnl.addresses, 1)
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import Concatenate, Final, ParamSpec, Self, TypeVar

from services.common import errors
from services.common.kernel import rtnl
from services.common.kernel.netns import NetNs
from services.common.kernel.requests import (
    BLACKHOLE,
    IFF_NOARP,
    IFF_UP,
    LOCAL,
    PROTO_FIBRIL,
    SCOPE_LINK,
    SCOPE_UNIVERSE,
    TABLE_MAIN,
    UNICAST,
    UNREACHABLE,
    IPAddress,
    IPNetwork,
    address_add,
    address_del,
    family_of,
    link_del,
    link_mtu,
    link_noarp,
    link_up,
    neighbour_del,
    neighbour_put,
    no_link_local,
    route_del,
    route_put,
    veth_add,
    xdp_set,
)
from services.common.kernel.rtnl import Message, RtnlSocket

__all__ = [  # with what `requests` has: callers need one module
    "BLACKHOLE",
    "IFF_NOARP",
    "IFF_UP",
    "LOCAL",
    "PROTO_FIBRIL",
    "SCOPE_LINK",
    "SCOPE_UNIVERSE",
    "TABLE_MAIN",
    "UNICAST",
    "UNREACHABLE",
    "Address",
    "IPAddress",
    "IPNetwork",
    "Link",
    "Neighbour",
    "Netlink",
    "Qdisc",
    "Route",
    "Rtnl",
    "address_add",
    "address_del",
    "family_of",
    "link_del",
    "link_mtu",
    "link_noarp",
    "link_up",
    "mac_text",
    "neighbour_del",
    "neighbour_put",
    "no_link_local",
    "parse_address",
    "parse_link",
    "parse_qdisc",
    "parse_route",
    "route_del",
    "route_put",
    "veth_add",
    "xdp_set",
]

T = TypeVar("T")
P = ParamSpec("P")

_PERMANENT, _EXT_SKIP_STATS = 0x80, 8
_RTM_F_FIB_MATCH: Final = 0x2000


@dataclass(frozen=True)
class Link:
    """An interface. peer_ifindex is of a veth's other end, in the namespace peer_nsid (None: this one)."""

    ifindex: int
    name: str
    up: bool
    carrier: bool
    xdp_prog_id: int
    mtu: int
    mac: str
    kind: str
    peer_ifindex: int
    peer_nsid: int | None
    noarp: bool = False
    xdp_mode: int = 0
    """XDP_ATTACHED_*: services.common.kernel.xdp.Mode."""


@dataclass(frozen=True)
class Address:
    """An address of an interface; flags are IFA_F_*."""

    ifindex: int
    address: IPAddress
    prefix: int
    scope: int = SCOPE_UNIVERSE
    flags: int = 0


@dataclass(frozen=True)
class Route:
    """One route of the node. gateway, ifindex, source, metric and mtu are None or 0 where a route has none; of
    several next hops the first is meant.
    """

    destination: IPNetwork
    gateway: IPAddress | None
    ifindex: int
    source: IPAddress | None
    type: int
    scope: int
    proto: int
    table: int
    metric: int = 0
    mtu: int = 0


@dataclass(frozen=True)
class Neighbour:
    ifindex: int
    address: IPAddress
    mac: str
    permanent: bool


@dataclass(frozen=True)
class Qdisc:
    ifindex: int
    kind: str
    handle: int
    parent: int


def mac_text(data: bytes) -> str:
    return data.hex(":")


class Rtnl(RtnlSocket):
    """Operations in the namespace of this socket; blocking.

    All changes are idempotent unless they say otherwise.
    """

    def links(self, prefix: str = "") -> list[Link]:
        """Interfaces whose name starts with `prefix`."""
        # Statistics would be most of the answer.
        request = Message(rtnl.GETLINK, {}, [("IFLA_EXT_MASK", _EXT_SKIP_STATS)], what="list interfaces")
        wanted = prefix.encode()
        return [
            parse_link(answer) for answer in self.dump(request) if answer.attrs.get(3, b"").startswith(wanted)
        ]

    def link(self, name: str) -> Link | None:
        """One interface by name, None if there is none."""
        index = self.ifindex(name)
        if not index:
            return None
        request = Message(
            rtnl.GETLINK,
            {"index": index},
            [("IFLA_EXT_MASK", _EXT_SKIP_STATS)],
            what=f"read interface {name}",
        )
        try:
            return parse_link(self.get(request))
        except errors.NotFound:  # gone meanwhile
            return None

    def create_veth(
        self, name: str, mac: str, peer: str, peer_mac: str, mtu: int, peer_netns: NetNs | None = None
    ) -> int:
        """Create a veth pair (see veth_add); the index of `name`. AlreadyExists if either name is taken."""
        self.apply([veth_add(name, mac, peer, peer_mac, mtu, peer_netns)])
        return self.ifindex(name)

    def delete_link(self, name: str) -> bool:
        """Delete an interface (a veth goes with its peer); whether it was there."""
        index = self.ifindex(name)
        if index:
            self.apply([link_del(index)])
        return bool(index)

    def addresses(self, ifindex: int = 0) -> list[Address]:
        """Addresses of one interface, or of all."""
        found: list[Address] = []
        for family in (socket.AF_INET, socket.AF_INET6):
            request = Message(rtnl.GETADDR, {"family": family, "index": ifindex}, [], what="list addresses")
            found += map(parse_address, self.dump(request))
        return found

    def routes(self, ifindex: int = 0, proto: int = PROTO_FIBRIL, table: int = TABLE_MAIN) -> list[Route]:
        """Routes of a table, by default ours; proto 0 means any."""
        found = []
        for family in (socket.AF_INET, socket.AF_INET6):
            attrs = [("RTA_OIF", ifindex)] if ifindex else []
            request = Message(
                rtnl.GETROUTE,
                {"family": family, "proto": proto},
                [*attrs, ("RTA_TABLE", table)],
                what="list routes",
            )
            try:
                answers = self.dump(request)
            except errors.NotFound:
                # A table begins to exist with its first route: a new namespace has not even a main one.
                continue
            found += [route for answer in answers if (route := parse_route(answer)) is not None]
        return found

    def neighbours(self, ifindex: int = 0) -> list[Neighbour]:
        """Neighbour entries of one interface, or of all."""
        found = []
        attrs = [("NDA_IFINDEX", ifindex)] if ifindex else []
        for answer in self.dump(Message(rtnl.GETNEIGH, {}, attrs, what="list neighbours")):
            family, index, state = struct.unpack_from("BxxxiH", answer.fixed)
            if family in (socket.AF_INET, socket.AF_INET6) and 1 in answer.attrs:
                found.append(
                    Neighbour(
                        index,
                        ip_address(answer.attrs[1]),
                        mac_text(answer.attrs.get(2, b"")),
                        bool(state & _PERMANENT),
                    )
                )
        return found

    def qdiscs(self, ifindex: int = 0) -> list[Qdisc]:
        """Queueing disciplines of one interface, or of all."""
        request = Message(rtnl.GETQDISC, {"index": ifindex}, [], what="list qdiscs")
        return [qdisc for qdisc in map(parse_qdisc, self.dump(request)) if ifindex in (0, qdisc.ifindex)]

    def route_for(self, destination: IPNetwork) -> Route | None:
        """The route that packets to a network's first address take if it is to exactly this network.

        With its metric, of several; whoever made it.
        """
        request = Message(
            rtnl.GETROUTE,
            {
                "family": family_of(destination),
                "dst_len": destination.max_prefixlen,
                "flags": _RTM_F_FIB_MATCH,
            },
            [("RTA_DST", str(destination.network_address))],
            what=f"look the route to {destination} up",
        )
        try:
            route = parse_route(self.get(request))
        except (errors.NotFound, errors.FailedPrecondition):  # ENETUNREACH
            return None
        return route if route is not None and route.destination == destination else None

    def is_local(self, address: IPAddress) -> bool:
        """Whether packets to an address are taken in: the kernel does so some time after an IPv6 address
        was added.
        """
        request = Message(
            rtnl.GETROUTE,
            {"family": family_of(address), "dst_len": address.max_prefixlen},
            [("RTA_DST", str(address))],
            what=f"look the route to {address} up",
        )
        try:
            route = parse_route(self.get(request))
        except errors.FibrilError:
            return False
        return route is not None and route.type == LOCAL

    def netns_cookie(self) -> int:
        """The cookie of this socket's namespace."""
        from services.common.kernel.netns import socket_cookie

        return socket_cookie(self.raw)


def parse_link(answer: rtnl.Answer) -> Link:
    """A Link out of a NEWLINK or DELLINK message."""
    index, flags = struct.unpack_from("4xiI", answer.fixed)
    attrs = answer.attrs
    info = rtnl.attributes(attrs.get(18, b""))
    xdp = rtnl.attributes(attrs.get(43, b""))
    nsid = attrs.get(37)
    return Link(
        ifindex=index,
        name=attrs[3].rstrip(b"\0").decode(),
        up=bool(flags & IFF_UP),
        xdp_prog_id=struct.unpack("I", xdp[4])[0] if 4 in xdp else 0,
        carrier=attrs.get(33, b"\1")[0] == 1,
        mtu=struct.unpack("I", attrs.get(4, b"\0" * 4))[0],
        mac=mac_text(attrs.get(1, b"")),
        kind=info.get(1, b"").rstrip(b"\0").decode(),
        peer_ifindex=struct.unpack("I", attrs[5])[0] if 5 in attrs else 0,
        peer_nsid=struct.unpack("i", nsid)[0] if nsid else None,
        noarp=bool(flags & IFF_NOARP),
        xdp_mode=xdp[2][0] if 2 in xdp else 0,
    )


def parse_address(answer: rtnl.Answer) -> Address:
    """An Address out of a NEWADDR or DELADDR message."""
    _, prefix, low, scope, index = struct.unpack("BBBBI", answer.fixed)
    attrs = answer.attrs
    flags = struct.unpack("I", attrs[8])[0] if 8 in attrs else low
    return Address(index, ip_address(attrs.get(2) or attrs[1]), prefix, scope, flags)


def parse_route(answer: rtnl.Answer) -> Route | None:
    """A Route out of a NEWROUTE or DELROUTE message; None if it is neither IPv4 nor IPv6."""
    family, length, _, _, table, proto, scope, kind = struct.unpack_from("8B", answer.fixed)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    attrs = answer.attrs
    empty = b"\0" * (4 if family == socket.AF_INET else 16)
    destination = ip_address(attrs.get(1, empty))
    network: IPNetwork = (
        IPv4Network((int(destination), length))
        if destination.version == 4
        else IPv6Network((int(destination), length))
    )
    if 9 in attrs and len(attrs[9]) >= 8:
        # struct rtnexthop: length, flags, hops, interface; then its own attributes.
        length, index = struct.unpack_from("HxxI", attrs[9])
        attrs = {**attrs, 4: struct.pack("I", index), **rtnl.attributes(attrs[9][8:length])}
    # RTA_GATEWAY, or RTA_VIA (family, address) if it is of the other family.
    gateway = attrs.get(5) or attrs.get(18, b"")[2:]
    metrics = rtnl.attributes(attrs.get(8, b""))
    return Route(
        network,
        ip_address(gateway) if gateway else None,
        struct.unpack("I", attrs[4])[0] if 4 in attrs else 0,
        ip_address(attrs[7]) if 7 in attrs else None,
        kind,
        scope,
        proto,
        struct.unpack("I", attrs[15])[0] if 15 in attrs else table,
        struct.unpack("I", attrs[6])[0] if 6 in attrs else 0,
        struct.unpack("I", metrics[2])[0] if 2 in metrics else 0,
    )


def parse_qdisc(answer: rtnl.Answer) -> Qdisc:
    """A Qdisc out of a NEWQDISC or DELQDISC message."""
    index, handle, parent = struct.unpack_from("4xiII", answer.fixed)
    return Qdisc(index, answer.attrs.get(1, b"").rstrip(b"\0").decode(), handle, parent)


class Netlink:
    """The netlink thread of a process: the only one that blocks in netlink or enters other namespaces."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="netlink")
        self._rtnl: Rtnl | None = None

    async def __aenter__(self) -> Self:
        await self.run(rtnl.preload)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Wait for the operation under way, then end the thread."""
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)
        if self._rtnl is not None:
            self._rtnl.close()
            self._rtnl = None

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run any blocking function on the thread. A cancelled caller does not stop it."""
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: function(*args, **kwargs)
        )

    async def call(
        self, operation: Callable[Concatenate[Rtnl, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run an operation of Rtnl, or a function taking one first, in the node's namespace."""
        return await self.run(lambda: operation(self._node(), *args, **kwargs))

    async def call_in(
        self,
        path: Path | str,
        operation: Callable[Concatenate[Rtnl, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """The same in another namespace. NotFound if there is none at `path`."""

        def inside() -> T:
            with NetNs.open(path) as netns, Rtnl(netns) as there:
                return operation(there, *args, **kwargs)

        return await self.run(inside)

    async def apply(self, messages: Sequence[Message]) -> None:
        """Send a batch in the node's namespace; the first failure is raised."""
        await self.call(Rtnl.apply, messages)

    def _node(self) -> Rtnl:
        if self._rtnl is None:
            self._rtnl = Rtnl()
        return self._rtnl
