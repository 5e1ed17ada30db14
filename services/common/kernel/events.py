"""What changes among interfaces, qdiscs, addresses and routes, as it happens.

with Events() as events:            # in the thread's namespace
    links = ...list everything...   # after subscribing, so that nothing falls between
    async for event in events: ...
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, Literal, Self

from services.common.kernel import netlink, rtnl

_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
GROUP_LINK, GROUP_NEIGHBOUR, GROUP_TC = 1, 3, 4
GROUP_IPV4_ADDRESS, GROUP_IPV4_ROUTE, GROUP_IPV6_ADDRESS, GROUP_IPV6_ROUTE = 5, 7, 9, 11
_RECEIVE_BUFFER: Final = 4 << 20
Kind = Literal[
    "link",
    "link-gone",
    "qdisc",
    "qdisc-gone",
    "filter-gone",
    "address",
    "address-gone",
    "route",
    "route-gone",
    "neighbour",
    "lost",
]
_KINDS: Final[dict[int, Kind]] = {
    rtnl.NEWLINK: "link",
    rtnl.DELLINK: "link-gone",
    rtnl.NEWQDISC: "qdisc",
    rtnl.DELQDISC: "qdisc-gone",
    rtnl.DELTFILTER: "filter-gone",
    rtnl.NEWADDR: "address",
    rtnl.DELADDR: "address-gone",
    rtnl.NEWROUTE: "route",
    rtnl.DELROUTE: "route-gone",
    rtnl.NEWNEIGH: "neighbour",
    rtnl.DELNEIGH: "neighbour",
}


@dataclass(frozen=True)
class Event:
    """One change. "lost": the kernel dropped events because nobody read; list everything again.

    IPv4 routes that go with their interface, or because it goes down, are not announced.
    ifindex: of the interface that lost a tc filter, or of a neighbour that came, changed or went.
    """

    kind: Kind
    link: netlink.Link | None = None
    qdisc: netlink.Qdisc | None = None
    address: netlink.Address | None = None
    route: netlink.Route | None = None
    ifindex: int = 0


class Events:
    """A subscription, used from the event loop's thread, in the namespace of the thread that makes it.
    Iterate it once.
    """

    def __init__(self, groups: tuple[int, ...] = (GROUP_LINK, GROUP_TC)) -> None:
        self._sock = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
            socket.NETLINK_ROUTE,
        )
        # Beyond net.core.rmem_max this needs CAP_NET_ADMIN (option 33, SO_RCVBUFFORCE).
        self._sock.setsockopt(socket.SOL_SOCKET, 33, _RECEIVE_BUFFER)
        self._sock.bind((0, 0))
        for group in groups:
            self._sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        pending: deque[Event] = deque()
        while True:
            while pending:
                yield pending.popleft()
            ready = asyncio.Event()
            loop.add_reader(self._sock, ready.set)
            try:
                await ready.wait()
            finally:
                loop.remove_reader(self._sock)
            try:
                data = self._sock.recv(1 << 18)
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                pending.append(Event("lost"))
                continue
            pending.extend(decode(data))


def decode(data: bytes) -> list[Event]:
    """The events of one datagram; messages of other kinds are left out."""
    found = []
    for number, _, _, payload in rtnl.parse(data):
        kind = _KINDS.get(number)
        if kind is None:
            continue
        answer = rtnl.answer(number, payload)
        if kind.startswith("link"):
            # Bridges and IPv6 announce their own, nameless, kind of link message here.
            if 3 in answer.attrs and answer.fixed[0] == socket.AF_UNSPEC:
                found.append(Event(kind, link=netlink.parse_link(answer)))
        elif kind.startswith("qdisc"):
            found.append(Event(kind, qdisc=netlink.parse_qdisc(answer)))
        elif kind in ("filter-gone", "neighbour"):
            found.append(Event(kind, ifindex=struct.unpack_from("4xi", answer.fixed)[0]))
        elif kind.startswith("address"):
            found.append(Event(kind, address=netlink.parse_address(answer)))
        elif (route := netlink.parse_route(answer)) is not None:
            found.append(Event(kind, route=route))
    return found
