"""What connects this node with the others: one interface, at most one address a family, the networks these are on.

    underlay = Underlay(cfg.network, instance, netlink)
    await underlay.start()                # raises nothing for what the host lacks: see `facts.problem`
    underlay.on_change(lambda: ...)

Followed as it changes. An address that goes while none takes its place may be on its way back (a DHCP client, a
link that flaps): the loss is believed when it has lasted LOSS_S, since all nodes would cut their routes to us.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Final

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import events as ev
from services.common.kernel import netlink as nl
from services.common.kernel.following import Following
from services.common.kernel.netlink import Address, IPAddress, IPNetwork, Link, Netlink, Route, Rtnl
from services.common.network import NetworkConfig

log = logging.getLogger(__name__)

LOSS_S: Final = 3.0
RESYNC_S: Final = 60.0
_GROUPS: Final = (
    ev.GROUP_LINK, ev.GROUP_IPV4_ADDRESS, ev.GROUP_IPV6_ADDRESS, ev.GROUP_IPV4_ROUTE, ev.GROUP_IPV6_ROUTE,
)  # fmt: skip
# IFA_F_SECONDARY or _TEMPORARY, _DADFAILED, _DEPRECATED, _TENTATIVE
_SECONDARY, _DAD_FAILED, _DEPRECATED, _TENTATIVE = 0x01, 0x08, 0x20, 0x40


@dataclass(frozen=True)
class Facts:
    """All empty: there is no underlay, and `problem` says why. With `problem` and a device: one part is missing."""

    device: str = ""
    ifindex: int = 0
    mtu: int = 0
    ipv4: IPv4Address | None = None
    ipv6: IPv6Address | None = None
    networks: tuple[IPNetwork, ...] = ()
    problem: str = ""
    ethernet: bool = True
    """Whether frames of the device have an Ethernet header, as programs expect."""

    def address(self, family: int) -> IPAddress | None:
        """The address of family 4 or 6."""
        return self.ipv4 if family == 4 else self.ipv6


class Underlay:
    """Used from one event loop."""

    def __init__(self, cfg: NetworkConfig, instance: Instance, netlink: Netlink) -> None:
        self._cfg = cfg
        self._own_prefix = f"fb{instance.tag}"
        self._netlink = netlink
        self._callbacks: list[Callable[[], None]] = []
        self._following = Following("underlay", _GROUPS, self._concerns, self._look, resync_s=self._pause)
        self._lost_at: float | None = None
        self.facts = Facts(problem="not looked at yet")

    @property
    def device(self) -> str:
        return self.facts.device

    @property
    def ifindex(self) -> int:
        return self.facts.ifindex

    @property
    def ipv4(self) -> IPv4Address | None:
        return self.facts.ipv4

    @property
    def ipv6(self) -> IPv6Address | None:
        return self.facts.ipv6

    @property
    def networks(self) -> tuple[IPNetwork, ...]:
        """Networks of the two addresses."""
        return self.facts.networks

    @property
    def mtu(self) -> int:
        """Of the device, bytes; 0 without one."""
        return self.facts.mtu

    @property
    def problem(self) -> str:
        """Empty when nothing is missing."""
        return self.facts.problem

    def on_change(self, callback: Callable[[], None]) -> None:
        """To be called after each change of any of the above, on the event loop."""
        self._callbacks.append(callback)

    async def start(self) -> None:
        """Look once, and follow what changes. To be called in the node's network namespace."""
        await self._following.start()

    async def stop(self) -> None:
        await self._following.stop()

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Tasks that run until `stop`; the end of one is a failure."""
        return self._following.tasks()

    def _concerns(self, event: ev.Event) -> bool:
        """Pods come and go: their links, addresses and routes are not looked at."""
        if event.link is not None:
            return not event.link.name.startswith(self._own_prefix)
        if event.route is not None:
            return event.route.destination.prefixlen == 0
        if event.address is not None:
            return event.address.scope == nl.SCOPE_UNIVERSE
        return event.kind == "lost"

    def _pause(self) -> float:
        if self._lost_at is None:
            return RESYNC_S
        return max(0.0, self._lost_at + LOSS_S - asyncio.get_running_loop().time())

    async def _look(self) -> None:
        try:
            found = await self._netlink.call(self._read)
        except (errors.FibrilError, OSError) as error:
            log.warning("cannot read interfaces", extra={"cause": str(error)})
            return
        now = asyncio.get_running_loop().time()
        if self._following.running and loses(self.facts, found):
            self._lost_at = now if self._lost_at is None else self._lost_at
            if now < self._lost_at + LOSS_S:
                return
        self._lost_at = None
        if found == self.facts:
            return
        log.info("underlay", extra={"was": str(self.facts), "now": str(found)})
        self.facts = found
        for callback in self._callbacks:
            callback()

    def _read(self, node: Rtnl) -> Facts:
        links = [link for link in node.links() if not link.name.startswith(self._own_prefix)]
        return choose(self._cfg, links, node.addresses(), [] if self._cfg.device else node.routes(proto=0))


def loses(before: Facts, now: Facts) -> bool:
    """Whether an address went and none took its place."""
    return any(before.address(family) is not None and now.address(family) is None for family in (4, 6))


def choose(
    cfg: NetworkConfig, links: Sequence[Link], addresses: Sequence[Address], routes: Sequence[Route]
) -> Facts:
    """The underlay of a node with these interfaces, addresses (in the kernel's order) and routes. Pure."""
    link, problem = _device(cfg, links, addresses, routes)
    if link is None:
        return Facts(problem=problem)
    picked = [
        entry for family in (4, 6) if (entry := _address(cfg, family, link.ifindex, addresses)) is not None
    ]
    by_family = {entry.address.version: entry.address for entry in picked}
    ipv4, ipv6 = by_family.get(4), by_family.get(6)
    for family, wanted in ((4, cfg.ipv4), (6, cfg.ipv6)):
        if wanted and family not in by_family:
            problem = f"network.ipv{family} {wanted} is not an address of this host"
    if not picked and not problem:
        problem = f"interface {link.name} has no address that other nodes could use"
    networks = tuple(ip_network(f"{entry.address}/{entry.prefix}", strict=False) for entry in picked)
    return Facts(
        link.name,
        link.ifindex,
        link.mtu,
        ipv4 if isinstance(ipv4, IPv4Address) else None,
        ipv6 if isinstance(ipv6, IPv6Address) else None,
        networks,
        problem,
        # Tunnels have none or a short one.
        len(link.mac) == len("00:00:00:00:00:00"),
    )


def _device(
    cfg: NetworkConfig, links: Sequence[Link], addresses: Sequence[Address], routes: Sequence[Route]
) -> tuple[Link | None, str]:
    by_index = {link.ifindex: link for link in links}
    if cfg.device:
        named = next((link for link in links if link.name == cfg.device), None)
        return named, "" if named else f"interface {cfg.device} (network.device) does not exist"
    for text in filter(None, (cfg.ipv4, cfg.ipv6)):
        for entry in addresses:
            if entry.address == ip_address(text) and entry.ifindex in by_index:
                return by_index[entry.ifindex], ""
    defaults = [
        route
        for route in routes
        if route.destination.prefixlen == 0 and route.type == nl.UNICAST and route.ifindex in by_index
    ]
    if not defaults:
        return None, "there is no default route; other nodes can be reached when network.device is set"
    best = min(defaults, key=lambda route: (route.destination.version, route.metric))
    return by_index[best.ifindex], ""


def _address(cfg: NetworkConfig, family: int, ifindex: int, addresses: Sequence[Address]) -> Address | None:
    """The configured address, wherever it is; else the oldest of the device that lasts."""
    wanted = cfg.ipv4 if family == 4 else cfg.ipv6
    own = [entry for entry in addresses if entry.address.version == family]
    if wanted:
        return next((entry for entry in own if entry.address == ip_address(wanted)), None)
    # The kernel lists IPv6 addresses newest first. The oldest stays the choice when another is added.
    for entry in own if family == 4 else reversed(own):
        if entry.ifindex == ifindex and _lasts(entry):
            return entry
    return None


def _lasts(entry: Address) -> bool:
    unfit = _SECONDARY | _DAD_FAILED | _DEPRECATED | _TENTATIVE
    return (
        entry.scope == nl.SCOPE_UNIVERSE
        and not entry.flags & unfit
        and not entry.address.is_link_local
        and not entry.address.is_loopback
    )
