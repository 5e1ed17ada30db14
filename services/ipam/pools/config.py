"""Configuration of address pools."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.ipam.pools.types import DEFAULT_POOL, Pool, checked_pool


@dataclass(frozen=True)
class PoolsConfig:
    """The pool that is made when the cluster has none called "default". Later changes go through the API."""

    ipv4: str = field(
        default="10.244.0.0/16", metadata={"help": "IPv4 prefix of the default pool; empty: none"}
    )
    ipv6: str = field(
        default="fd00:10:244::/48", metadata={"help": "IPv6 prefix of the default pool; empty: none"}
    )
    block_prefix_v4: int = field(
        default=24, metadata={"help": "prefix length of the IPv4 block a node claims"}
    )
    block_prefix_v6: int = field(
        default=112, metadata={"help": "prefix length of the IPv6 block a node claims"}
    )

    def __post_init__(self) -> None:
        self.first()

    def first(self) -> Pool | None:
        """The default pool, None when both prefixes are empty. InvalidArgument names the field."""
        cidrs = [cidr for cidr in (self.ipv4, self.ipv6) if cidr]
        if not cidrs:
            return None
        return checked_pool(
            DEFAULT_POOL,
            0,
            cidrs,
            [],
            self.block_prefix_v4 if self.ipv4 else 0,
            self.block_prefix_v6 if self.ipv6 else 0,
        )
