"""Next hops in backends' lines follow the kernel's routes and neighbours."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.common.kernel import netlink as nl
from services.common.kernel import netns, rtnl
from services.common.kernel.netlink import IPAddress, Netlink, Rtnl
from services.common.kernel.netns import NetNs
from services.common.kernel.rtnl import Message
from services.lb.abi import ServiceFlag
from services.lb.model import BackendKey
from services.lb.xdp.nexthops import NextHops
from tests import session

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
MAC = "02:00:00:00:05:{:02x}"
DIRECT = ServiceFlag.DSR


class Plane:
    """Remembers next hops as the backends' lines would."""

    def __init__(self) -> None:
        self.plans: dict[str, dict[int, Any]] = {}
        self.ids: dict[tuple[str, int], Any] = {}
        self.hops: dict[int, tuple[int, str, int] | None] = {}
        self.tell: Callable[[str], None] = lambda name: None

    def held(self, name: str, family: int) -> Any:
        return self.ids.get((name, family))

    def on_planned(self, callback: Callable[[str], None]) -> None:
        self.tell = callback

    def set_next_hop(self, ident: int, ifindex: int, mac: bytes, mtu: int) -> None:
        self.hops[ident] = (ifindex, mac.hex(":"), mtu)

    def clear_next_hop(self, ident: int) -> None:
        self.hops[ident] = None

    def serve(self, name: str, flags: ServiceFlag, *backends: tuple[int, str], local: str = "") -> None:
        here = {BackendKey(ip_address(local), 80)} if local else set()
        keys = {BackendKey(ip_address(address), 80): ident for ident, address in backends}
        for family in (4, 6):
            self.plans.setdefault(name, {})[family] = SimpleNamespace(flags=flags, local=here)
            own = {key: ident for key, ident in keys.items() if key.address.version == family}
            self.ids[name, family] = SimpleNamespace(backends=own)
        self.tell(name)


@pytest.fixture
def node() -> Iterator[Rtnl]:
    """A namespace with fbx0, 10.5.0.1/24 and fd05::1/64, and fbx2, 10.6.0.1/24; the thread is in it."""
    path = Path(f"/run/netns/{session.name()}")
    netns.add(path)
    try:
        with NetNs.open(path) as there, there.entered(), Rtnl(there) as made:
            messages = []
            pairs = {("fbx0", "fbx1"): ("10.5.0.1/24", "fd05::1/64"), ("fbx2", "fbx3"): ("10.6.0.1/24",)}
            for (first, second), addresses in pairs.items():
                index = made.create_veth(first, MAC.format(index_of(first)), second, MAC.format(index_of(second)), 1500)
                messages += [nl.no_link_local(index), nl.link_up(index), nl.link_up(made.ifindex(second))]
                for text in addresses:
                    address, length = text.split("/")
                    messages.append(nl.address_add(index, ip_address(address), int(length)))
            made.apply(messages)
            yield made
    finally:
        netns.remove(path)


def index_of(name: str) -> int:
    return int(name[3:])


@contextlib.asynccontextmanager
async def running(plane: Plane, *devices: int) -> AsyncIterator[NextHops]:
    async with Netlink() as netlink:
        made = NextHops(netlink, plane, lambda: devices)
        await made.start()
        try:
            yield made
        finally:
            await made.stop()


async def becomes(plane: Plane, wanted: dict[int, tuple[int, str, int] | None]) -> None:
    for _ in range(400):
        if plane.hops == wanted:
            return
        await asyncio.sleep(0.02)
    assert plane.hops == wanted


def neighbour(node: Rtnl, ifindex: int, address: str, number: int) -> IPAddress:
    node.apply([nl.neighbour_put(ifindex, ip_address(address), MAC.format(number))])
    return ip_address(address)


async def test_follows_neighbours_routes_and_services(node: Rtnl) -> None:
    plane, index = Plane(), node.ifindex("fbx0")
    for number, address in ((0xA, "10.5.0.10"), (0xB, "fd05::b"), (0xFE, "10.5.0.254")):
        neighbour(node, index, address, number)
    node.apply([nl.route_put(ip_network("10.77.0.0/16"), index, ip_address("10.5.0.254"), mtu=1400)])
    plane.serve("web", DIRECT, (1, "10.5.0.10"), (2, "fd05::b"), (3, "10.77.3.4"), (4, "10.5.0.99"), (5, "192.0.2.1"))
    plane.serve("plain", ServiceFlag(0), (9, "10.5.0.10"))
    async with running(plane, index):
        known = {1: (index, MAC.format(0xA), 1500), 2: (index, MAC.format(0xB), 1500), 3: (index, MAC.format(0xFE), 1400)}
        await becomes(plane, {**known, 4: None, 5: None})
        # A neighbour gets another card.
        neighbour(node, index, "10.5.0.254", 0xFD)
        known[3] = (index, MAC.format(0xFD), 1400)
        await becomes(plane, {**known, 4: None, 5: None})
        # One that was not known answers, one goes.
        neighbour(node, index, "10.5.0.99", 0x99)
        node.apply([nl.neighbour_del(index, ip_address("10.5.0.10"))])
        known[4], known[1] = (index, MAC.format(0x99), 1500), None  # type: ignore[assignment]
        await becomes(plane, {**known, 5: None})
        # A better route.
        node.apply([nl.route_put(ip_network("10.77.3.0/24"), index, ip_address("10.5.0.99"))])
        known[3] = (index, MAC.format(0x99), 1500)
        await becomes(plane, {**known, 5: None})
        plane.serve("web", ServiceFlag(0))
        plane.serve("more", DIRECT, (7, "fd05::b"))
        await becomes(plane, {**known, 5: None, 7: (index, MAC.format(0xB), 1500)})


async def test_only_devices_with_xdp_count(node: Rtnl) -> None:
    plane, first, second = Plane(), node.ifindex("fbx0"), node.ifindex("fbx2")
    neighbour(node, first, "10.5.0.10", 0xA)
    neighbour(node, second, "10.6.0.10", 0xB)
    plane.serve("web", DIRECT, (1, "10.5.0.10"), (2, "10.6.0.10"), (3, "10.6.0.11"), local="10.6.0.11")
    async with running(plane, second):
        await becomes(plane, {1: None, 2: (second, MAC.format(0xB), 1500)})


async def test_a_neighbour_nobody_speaks_to_is_looked_for(node: Rtnl) -> None:
    plane, index = Plane(), node.ifindex("fbx0")
    path = Path(f"/run/netns/{session.name()}")
    netns.add(path)
    try:
        with NetNs.open(path) as there:
            away = [("IFLA_NET_NS_FD", there.fd)]
            node.apply([Message(rtnl.SETLINK, {"index": node.ifindex("fbx1")}, away, what="move")])
            with Rtnl(there) as other:
                far = other.ifindex("fbx1")
                other.apply([nl.no_link_local(far), nl.link_up(far), nl.address_add(far, ip_address("10.5.0.7"), 24)])
            plane.serve("web", DIRECT, (1, "10.5.0.7"))
            async with running(plane, index):
                await becomes(plane, {1: (index, MAC.format(1), 1500)})
    finally:
        netns.remove(path)
