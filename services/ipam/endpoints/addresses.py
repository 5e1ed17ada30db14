"""Where endpoints meet the address book: their addresses, and what the node needs so that those work."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Iterable
from typing import Final

from services.common import errors
from services.common.kernel.netlink import IPAddress, IPNetwork
from services.ipam.endpoints.model import OWNER_PREFIX, EndpointRecord, Lease
from services.ipam.endpoints.node import NodeNet, NodeSetup, network_of
from services.ipam.pools.book import AddressBook
from services.ipam.pools.types import Allocation, Family, PoolMode

log = logging.getLogger(__name__)

CLOUD_GATEWAY: Final = {Family.IPV4: "169.254.77.1", Family.IPV6: "fd00:f1b:1::1"}
"""Gateways of addresses a provider handed in: those belong to no block of which the node has an address.
Only the node's own pods ever see them."""


class BookAddresses:
    """The manager's Addresses. `gateways_in_use` names gateways of existing endpoints."""

    def __init__(
        self, book: AddressBook, node: NodeSetup, gateways_in_use: Callable[[], Iterable[str]]
    ) -> None:
        self._book = book
        self._node = node
        self._in_use = gateways_in_use

    async def lease(self, record: EndpointRecord) -> Lease:
        """See manager.Addresses. All or nothing; errors are the address book's."""
        spec = record.spec
        families = self._book.pool(spec.pool).families()
        wanted = {Family.IPV4: spec.ipv4, Family.IPV6: spec.ipv6}
        for family, address in wanted.items():
            if address and family not in families:
                raise errors.InvalidArgument(
                    f"pool {spec.pool} has no {family.name} prefix",
                    field="ipv4" if family is Family.IPV4 else "ipv6",
                )
        if any(wanted.values()):
            found: list[Allocation] = []
            for family in families:
                found += await self._book.allocate(record.owner, spec.pool, family, wanted[family] or None)
        else:
            found = await self._book.allocate(record.owner, spec.pool)
        lease = _lease(found)
        gateways = {ipaddress.ip_address(text) for text in (lease.ipv4_gateway, lease.ipv6_gateway) if text}
        if not gateways <= self._node.applied.gateways:
            # A block claimed just now: its gateway must exist before a route can name it as source.
            await self._node.apply(self.node_net(gateways))
        return lease

    async def release(self, owner: str) -> None:
        await self._book.release(owner)

    async def sweep(self, live: set[str]) -> None:
        await self._book.sweep(OWNER_PREFIX, live)

    def node_net(self, more_gateways: Iterable[IPAddress] = ()) -> NodeNet:
        """What the node shall have now: for its blocks, and for endpoints whose block went meanwhile."""
        blocks = self._book.blocks()
        gateways: set[IPAddress] = {ipaddress.ip_address(block.gateway) for block in blocks}
        gateways |= {ipaddress.ip_address(text) for text in self._in_use() if text}
        gateways |= {
            ipaddress.ip_address(CLOUD_GATEWAY[family])
            for pool in self._book.pools()
            if pool.mode is PoolMode.CLOUD
            for family in pool.families()
        }
        cluster: set[IPNetwork] = {
            cidr for pool in self._book.pools() for cidr in pool.cidrs if pool.mode is PoolMode.CLUSTER
        }
        return NodeNet(
            frozenset(network_of(block.cidr) for block in blocks),
            frozenset(gateways | set(more_gateways)),
            frozenset(cluster),
        )


def _lease(found: Iterable[Allocation]) -> Lease:
    by_family = {allocation.family: allocation for allocation in found}

    def pair(family: Family) -> tuple[str, str]:
        allocation = by_family.get(family)
        return (allocation.address, allocation.gateway or CLOUD_GATEWAY[family]) if allocation else ("", "")

    return Lease(*pair(Family.IPV4), *pair(Family.IPV6))
