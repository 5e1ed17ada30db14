"""The host's own routes to pods of other nodes.

    overlay    <block> dev fb<tag>host src <own gateway> mtu <pair's>    a program on fb<tag>host encapsulates
    routed     <block> via <node's address> dev <uplink>

They are told from all others by protocol and metric, which is this instance's own and worse than anybody's: a
route that somebody else has made to the same block is neither replaced nor overruled, whoever came first. It is
found (by asking for the route to the block, not by reading the table, which may be long), and reported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from services.common.instance import Instance
from services.common.kernel import netlink as nl
from services.common.kernel.netlink import IPAddress, IPNetwork, Netlink, Route, Rtnl

log = logging.getLogger(__name__)

METRIC_BASE: Final = 0x0100_0000


def metric_of(instance: Instance) -> int:
    """The metric of the instance's routes to other nodes' pods."""
    return METRIC_BASE | int(instance.tag, 16)


@dataclass(frozen=True)
class RemoteRoute:
    """How the host reaches a block of another node. mtu 0: the interface's."""

    ifindex: int
    gateway: IPAddress | None = None
    source: IPAddress | None = None
    mtu: int = 0


NO_ROUTE: Final = RemoteRoute(0)
"""None of ours leads there; it is known whether somebody else's does."""


class RemoteRoutes:
    """Ops of a reconciler whose keys are blocks."""

    def __init__(
        self, instance: Instance, netlink: Netlink, foreign_changed: Callable[[IPNetwork], None]
    ) -> None:
        """foreign_changed: called with a block when another's route to it has come or gone."""
        self._metric = metric_of(instance)
        self._netlink = netlink
        self._foreign_changed = foreign_changed
        self._foreign: dict[IPNetwork, Route] = {}
        self._without: set[IPNetwork] = set()

    @property
    def foreign(self) -> Mapping[IPNetwork, Route]:
        """Blocks to which somebody else has a route, which packets take."""
        return self._foreign

    def mine(self, route: Route) -> bool:
        """Whether a route is one of this instance's routes to other nodes' pods."""
        return route.proto == nl.PROTO_FIBRIL and route.metric == self._metric

    async def actual(self) -> Mapping[IPNetwork, RemoteRoute]:
        # Those that went with an interface are not announced.
        await self.look(*self._foreign)
        return {**dict.fromkeys(self._without, NO_ROUTE), **await self._netlink.call(self._read)}

    async def same(self, desired: RemoteRoute, actual: RemoteRoute) -> bool:
        return desired == actual

    async def update(self, key: IPNetwork, desired: RemoteRoute) -> None:
        if desired == NO_ROUTE:
            await self._netlink.apply([nl.route_del(key, metric=self._metric)])
            self._without.add(key)
        else:
            self._without.discard(key)
            await self._netlink.call(self._put, key, desired)
        await self.look(key)

    async def delete(self, key: IPNetwork) -> None:
        await self._netlink.apply([nl.route_del(key, metric=self._metric)])
        self._without.discard(key)
        self._foreign.pop(key, None)

    async def look(self, *blocks: IPNetwork) -> None:
        """Find out whether others have routes to these blocks."""
        found = await self._netlink.call(self._others, blocks)
        for block, route in found.items():
            before = self._foreign.get(block)
            if route == before:
                continue
            if route is None:
                del self._foreign[block]
            else:
                self._foreign[block] = route
            if (route is None) is not (before is None):
                what = "gone" if route is None else "kept"
                log.info("route of others to a block", extra={"block": str(block), "it is": what})
                self._foreign_changed(block)

    def _read(self, node: Rtnl) -> dict[IPNetwork, RemoteRoute]:
        return {
            route.destination: RemoteRoute(route.ifindex, route.gateway, route.source, route.mtu)
            for route in node.routes()
            if self.mine(route)
        }

    def _put(self, node: Rtnl, block: IPNetwork, wanted: RemoteRoute) -> None:
        node.apply(
            [
                nl.route_put(
                    block, wanted.ifindex, wanted.gateway, wanted.source, mtu=wanted.mtu, metric=self._metric
                )
            ]
        )

    def _others(self, node: Rtnl, blocks: tuple[IPNetwork, ...]) -> dict[IPNetwork, Route | None]:
        found: dict[IPNetwork, Route | None] = {}
        for block in blocks:
            route = node.route_for(block)
            # A route of ours that is not to another node covers a block that is just changing hands.
            found[block] = route if route is not None and route.proto != nl.PROTO_FIBRIL else None
        return found


def remove(node: Rtnl, instance: Instance) -> list[str]:
    """Delete them all; the blocks."""
    metric = metric_of(instance)
    blocks = [route.destination for route in node.routes() if route.metric == metric]
    node.apply([nl.route_del(block, metric=metric) for block in blocks])
    return [str(block) for block in blocks]
