"""How full a pool is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_network

from services.ipam.pools.holdings import Holdings
from services.ipam.pools.types import BlockInfo, Family, Pool, PoolMode

_CAP = (1 << 63) - 1  # what the contract caps counts at


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of one family of a pool; see fibril.ipam.v1.Usage."""

    family: Family
    total: int
    blocks_claimed: int
    blocks_total: int
    node_allocated: int
    node_free: int
    node_quarantined: int


def usage(holdings: Holdings, pool: Pool, claimed: Iterable[BlockInfo] | None, now: float) -> list[Usage]:
    """Counts by family; claimed: all nodes' blocks, None when they are not known (own blocks are counted then)."""
    found = []
    for family in pool.families():
        blocks = list(holdings.shelf(pool.name, family).blocks.values())
        cloud = pool.mode is PoolMode.CLOUD
        everywhere = (
            len(blocks)
            if claimed is None
            else sum(
                1 for b in claimed if b.pool == pool.name and ip_network(b.cidr).version == family.version
            )
        )
        size = 1 << ((32 if family is Family.IPV4 else 128) - pool.block_prefix[family.version])
        count = pool.blocks_total(family)
        lost = (3 if family is Family.IPV4 else 2) if size > 2 else 1
        total = sum(n.num_addresses for n in pool.of(family)) if cloud else count * (size - lost)
        total -= sum(n.num_addresses for n in pool.excluded if n.version == family.version)
        found.append(
            Usage(
                family,
                min(max(total, 0), _CAP),
                0 if cloud else everywhere,
                0 if cloud else min(count, _CAP),
                sum(len(b.used) for b in blocks),
                min(sum(max(b.free(now), 0) for b in blocks), _CAP),
                sum(b.resting(now) for b in blocks),
            )
        )
    return found
