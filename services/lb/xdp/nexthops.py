"""Where packets go next on their way to backends that answer clients directly: kept in the backends' own lines, so that
XDP looks nothing up.

For backends of services with direct server return that are reached by a device XDP hangs on. The kernel's routes and
neighbours say; what changes in them is followed. What only XDP uses would go stale unnoticed, so the kernel is asked from
time to time to see whether a neighbour is still there. A backend without an entry, and all beyond BACKENDS_MAX, costs XDP
a lookup in the routes and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import islice
from typing import Final, NamedTuple, Protocol

from services.common import errors
from services.common.kernel import events as ev
from services.common.kernel import netlink as nl
from services.common.kernel import rtnl
from services.common.kernel.following import Following
from services.common.kernel.netlink import IPAddress, Netlink, Rtnl
from services.common.kernel.rtnl import Message
from services.lb.abi import ServiceFlag
from services.lb.kernel.program import Held
from services.lb.plan import FamilyPlan

log = logging.getLogger(__name__)

BACKENDS_MAX: Final = 16384
RESYNC_S: Final = 30.0
_SETTLE_S: Final = 0.1
_DIRECT: Final = ServiceFlag.DSR | ServiceFlag.DSR_UDP
_GROUPS: Final = (
    ev.GROUP_LINK, ev.GROUP_NEIGHBOUR, ev.GROUP_IPV4_ADDRESS, ev.GROUP_IPV6_ADDRESS,
    ev.GROUP_IPV4_ROUTE, ev.GROUP_IPV6_ROUTE,
)  # fmt: skip
# NUD_* in which a neighbour's MAC holds: reachable, stale, delay, probe, permanent, no ARP.
_FIXED: Final = 0x80 | 0x40
_HOLDS: Final = 0x02 | 0x04 | 0x08 | 0x10 | _FIXED
_NTF_USE: Final = 0x01
_MTU_MAX: Final = 0xFFFF


class Plane(Protocol):
    """The part of the writer that is needed here (services.lb.kernel.writer)."""

    @property
    def plans(self) -> Mapping[str, Mapping[int, FamilyPlan]]: ...

    def held(self, name: str, family: int) -> Held | None: ...

    def on_planned(self, callback: Callable[[str], None]) -> None: ...

    def set_next_hop(self, ident: int, ifindex: int, mac: bytes, mtu: int) -> None: ...

    def clear_next_hop(self, ident: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Way:
    """A route: whom a packet goes to next, by which device, and how long it may be."""

    ifindex: int
    hop: IPAddress
    mtu: int


class Known(NamedTuple):
    """A neighbour's MAC. fixed: somebody has set it, and the kernel asks nobody."""

    mac: bytes
    fixed: bool


class NextHops:
    """Used from one event loop, in the node's network namespace."""

    def __init__(self, netlink: Netlink, plane: Plane, devices: Callable[[], Collection[int]]) -> None:
        """devices: interface indexes that XDP hangs on; `wake` says that they have changed."""
        self._netlink, self._plane, self._devices = netlink, plane, devices
        self._targets: dict[str, dict[int, IPAddress]] = {}
        self._ways: dict[IPAddress, Way | None] = {}
        self._set: dict[int, tuple[int, bytes, int] | None] = {}
        self._asked: set[tuple[int, IPAddress]] = set()
        self._following = Following(
            "lb.nexthops", _GROUPS, self._concerns, self._look, resync_s=RESYNC_S, settle_s=_SETTLE_S
        )
        self._routes_changed = False
        self._refresh_at = 0.0

    def wake(self) -> None:
        """Look again soon."""
        self._following.wake()

    async def start(self) -> None:
        self._plane.on_planned(self._planned)
        for name in self._plane.plans:
            self._planned(name)
        await self._following.start()

    async def stop(self) -> None:
        """What is written stays."""
        await self._following.stop()

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Tasks that run until `stop`; the end of one is a failure."""
        return self._following.tasks()

    def _planned(self, name: str) -> None:
        """A service was put into the kernel, or is gone."""
        found: dict[int, IPAddress] = {}
        for family, plan in self._plane.plans.get(name, {}).items():
            held = self._plane.held(name, family) if plan.flags & _DIRECT else None
            for key, ident in held.backends.items() if held is not None else ():
                if key not in plan.local:
                    found[ident] = key.address
        if found != self._targets.get(name, {}):
            self._targets[name] = found
            if not found:
                del self._targets[name]
            self._following.wake()

    def _concerns(self, event: ev.Event) -> bool:
        if event.kind == "neighbour":
            return event.ifindex in self._devices()
        self._routes_changed = True
        return True

    async def _look(self) -> None:
        try:
            await self._agree()
        except (errors.FibrilError, OSError) as error:
            log.warning("next hops cannot be read", extra={"cause": str(error)})

    async def _agree(self) -> None:
        devices = set(self._devices())
        every = ((ident, address) for found in self._targets.values() for ident, address in found.items())
        targets = dict(islice(every, BACKENDS_MAX))
        addresses = set(targets.values()) if devices else set()
        now = asyncio.get_running_loop().time()
        refresh = self._routes_changed or now >= self._refresh_at
        if refresh:
            self._routes_changed, self._refresh_at = False, now + RESYNC_S
            self._ways.clear()
            self._asked.clear()
        unknown = [address for address in addresses if address not in self._ways]
        if unknown:
            self._ways.update(await self._netlink.call(ways, unknown))
        found = {
            address: way for address in addresses if (way := self._ways[address]) and way.ifindex in devices
        }
        macs = await self._netlink.call(neighbours, devices) if found else {}
        hops = {(way.ifindex, way.hop) for way in found.values()} - self._asked
        hops = {hop for hop in hops if hop not in macs or not macs[hop].fixed}
        if hops:
            self._asked |= hops
            await self._netlink.call(use, hops)
        for ident, address in targets.items():
            way = found.get(address)
            known = macs.get((way.ifindex, way.hop)) if way is not None else None
            self._put(
                ident, (way.ifindex, known.mac, way.mtu) if way is not None and known is not None else None
            )
        for ident in self._set.keys() - targets.keys():
            del self._set[ident]

    def _put(self, ident: int, hop: tuple[int, bytes, int] | None) -> None:
        # Also once where there is none: an earlier process may have written one.
        if ident in self._set and self._set[ident] == hop:
            return
        self._set[ident] = hop
        if hop is None:
            self._plane.clear_next_hop(ident)
        else:
            self._plane.set_next_hop(ident, *hop)


def ways(node: Rtnl, addresses: Iterable[IPAddress]) -> dict[IPAddress, Way | None]:
    """How packets to each address leave; None: not by a neighbour."""
    mtus = {link.ifindex: link.mtu for link in node.links()}
    found: dict[IPAddress, Way | None] = {}
    for address in addresses:
        request = Message(
            rtnl.GETROUTE,
            {"family": nl.family_of(address), "dst_len": address.max_prefixlen},
            [("RTA_DST", str(address))],
            what=f"look the route to {address} up",
        )
        try:
            route = nl.parse_route(node.get(request))
        except errors.FibrilError:
            route = None
        if route is None or route.type != nl.UNICAST or route.ifindex not in mtus:
            found[address] = None
            continue
        mtu = min(route.mtu or _MTU_MAX, mtus[route.ifindex], _MTU_MAX)
        found[address] = Way(route.ifindex, route.gateway or address, mtu)
    return found


def neighbours(node: Rtnl, devices: Collection[int]) -> dict[tuple[int, IPAddress], Known]:
    """By interface and address, those whose MAC holds."""
    found: dict[tuple[int, IPAddress], Known] = {}
    for ifindex in devices:
        request = Message(rtnl.GETNEIGH, {}, [("NDA_IFINDEX", ifindex)], what="list neighbours")
        for answer in node.dump(request):
            index, state = struct.unpack_from("4xiH", answer.fixed)
            mac = answer.attrs.get(2, b"")
            if index == ifindex and state & _HOLDS and len(mac) == 6 and 1 in answer.attrs:
                with contextlib.suppress(ValueError):
                    found[index, ip_address(answer.attrs[1])] = Known(mac, bool(state & _FIXED))
    return found


def use(node: Rtnl, hops: Iterable[tuple[int, IPAddress]]) -> None:
    """Have the kernel resolve neighbours, and see whether those it knows are still there. None that is fixed: it
    would be so no longer.
    """
    for failure in node.try_apply([_use(ifindex, address) for ifindex, address in hops]):
        log.debug("a neighbour cannot be asked for", extra={"cause": str(failure)})


def _use(ifindex: int, address: IPAddress) -> Message:
    return Message(
        rtnl.NEWNEIGH,
        {"family": nl.family_of(address), "ifindex": ifindex, "flags": _NTF_USE},
        [("NDA_DST", str(address))],
        rtnl.CREATE,
        f"ask for neighbour {address} of interface {ifindex}",
        frozenset({errno.EEXIST}),
    )
