"""What IPAM speaks of: pools, blocks, allocations, and the rules a pool must keep."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import IntEnum
from ipaddress import AddressValueError, NetmaskValueError, ip_address, ip_network
from typing import NamedTuple

from services.common import errors
from services.ipam.pools.model import Address, Network, block_count

DEFAULT_POOL = "default"
OWNER_MAX = 255
TTL_MAX_S = 31_536_000.0
BATCH_MAX = 10_000
CIDRS_MAX = 1_000
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_MAX_BLOCK_PREFIX = {4: 30, 6: 126}
_DEFAULT_BLOCK_PREFIX = {4: 24, 6: 112}


class Family(IntEnum):
    """As fibril.ipam.v1.Family, number for number."""

    IPV4 = 1
    IPV6 = 2

    @property
    def version(self) -> int:
        """4 or 6, as the ipaddress module has it."""
        return 4 if self is Family.IPV4 else 6

    @staticmethod
    def of(version: int) -> Family:
        """The family of an IP version."""
        return Family.IPV4 if version == 4 else Family.IPV6


class PoolMode(IntEnum):
    """As fibril.ipam.v1.PoolMode."""

    CLUSTER = 1
    CLOUD = 2


@dataclass(frozen=True, slots=True)
class Pool:
    """A named set of prefixes; see fibril.ipam.v1.Pool. Made by `checked_pool`, so it keeps the rules."""

    name: str
    mode: PoolMode
    cidrs: tuple[Network, ...]
    excluded: tuple[Network, ...]
    block_prefix: dict[int, int]
    revision: int = 0

    def families(self) -> list[Family]:
        """The families it has prefixes of, IPv4 first."""
        return [f for f in Family if any(n.version == f.version for n in self.cidrs)]

    def of(self, family: Family) -> list[Network]:
        """Its prefixes of one family."""
        return [n for n in self.cidrs if n.version == family.version]

    def holds(self, address: Address) -> bool:
        """Whether the address lies in one of its prefixes."""
        return any(n.version == address.version and address in n for n in self.cidrs)

    def blocks_total(self, family: Family) -> int:
        """Blocks of a family in all."""
        return block_count(self.of(family), self.block_prefix[family.version])


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """A block as others see it; texts, as in fibril.ipam.v1.Block."""

    cidr: str
    pool: str
    node: str
    gateway: str


class Allocation(NamedTuple):
    """One address held by one owner; texts, as in fibril.ipam.v1.Allocation. expires is 0 for never."""

    address: str
    family: Family
    pool: str
    owner: str
    gateway: str
    block: str
    expires_unix_seconds: float
    created_unix_seconds: float


def check_name(name: str, field: str) -> str:
    """A pool's name; InvalidArgument otherwise."""
    if not _NAME.fullmatch(name):
        raise errors.InvalidArgument(
            f"pool name {name[:70]!r} is malformed",
            field=field,
            fix="use 1 to 63 of [a-z0-9-], beginning and ending with a letter or digit",
        )
    return name


def check_owner(owner: str) -> str:
    """An owner; InvalidArgument otherwise."""
    if not 0 < len(owner) <= OWNER_MAX or not owner.isprintable() or not owner.strip():
        raise errors.InvalidArgument(
            f"owner {owner[:60]!r} is blank, too long or not printable",
            field="owner",
            fix=f"use 1 to {OWNER_MAX} printable characters",
        )
    return owner


def check_ttl(ttl: float) -> float:
    """A time to live in seconds, 0 for ever; InvalidArgument otherwise."""
    if not 0 <= ttl <= TTL_MAX_S:  # also refuses NaN
        raise errors.InvalidArgument(
            f"time to live {ttl} is out of range",
            field="ttl_seconds",
            fix=f"use 0 (for ever) to {TTL_MAX_S:.0f}",
        )
    return ttl


def check_address(text: str, field: str) -> Address:
    """An address without prefix length or zone; InvalidArgument otherwise."""
    try:
        address = ip_address(text)
    except ValueError:
        raise errors.InvalidArgument(
            f"{text[:60]!r} is not an IP address",
            field=field,
            fix="write it without prefix length, such as 10.244.0.7",
        ) from None
    if getattr(address, "scope_id", None):
        raise errors.InvalidArgument(f"{text[:60]!r} has a zone", field=field, fix="leave out the zone")
    return address


def checked_pool(
    name: str,
    mode: int,
    cidrs: list[str],
    excluded: list[str],
    block_v4: int,
    block_v6: int,
    revision: int = 0,
) -> Pool:
    """The one place where a pool's rules are kept. InvalidArgument names the field and the fix."""
    check_name(name, "pool.name")
    if mode not in (0, *PoolMode):
        raise errors.InvalidArgument(
            f"pool mode {mode} is unknown", field="pool.mode", fix="use POOL_MODE_CLUSTER or POOL_MODE_CLOUD"
        )
    if not cidrs:
        raise errors.InvalidArgument(
            f"pool {name} has no prefix", field="pool.cidrs", fix="name at least one prefix"
        )
    if len(cidrs) > CIDRS_MAX or len(excluded) > CIDRS_MAX:
        raise errors.InvalidArgument(
            f"pool {name} has more than {CIDRS_MAX} prefixes",
            field="pool.cidrs",
            fix="use fewer, shorter prefixes",
        )
    networks = [_prefix(text, f"pool.cidrs[{i}]") for i, text in enumerate(cidrs)]
    for i, network in enumerate(networks):
        if network.is_multicast or network.is_unspecified or network.is_loopback or network.is_link_local:
            raise errors.InvalidArgument(
                f"{network} cannot be given to pods",
                field=f"pool.cidrs[{i}]",
                fix="use unicast addresses that are neither loopback nor link-local",
            )
        for other in networks[:i]:
            if _overlap(network, other):
                raise errors.InvalidArgument(
                    f"{network} overlaps {other}", field=f"pool.cidrs[{i}]", fix="name each address once"
                )
    out = [_prefix(text, f"pool.excluded[{i}]") for i, text in enumerate(excluded)]
    for i, network in enumerate(out):
        if not any(inside(network, pool) for pool in networks):
            raise errors.InvalidArgument(
                f"{network} is outside the pool",
                field=f"pool.excluded[{i}]",
                fix="exclude only what lies within pool.cidrs",
            )
    blocks = {4: _block_prefix(networks, 4, block_v4), 6: _block_prefix(networks, 6, block_v6)}
    return Pool(name, PoolMode(mode or PoolMode.CLUSTER), tuple(networks), tuple(out), blocks, revision)


def check_change(old: Pool, new: Pool) -> None:
    """What may not change in a pool that exists; FailedPrecondition or InvalidArgument otherwise."""
    if new.mode != old.mode:
        raise errors.InvalidArgument(
            f"the mode of pool {new.name} cannot be changed", field="pool.mode", fix="make another pool"
        )
    for version, name in ((4, "pool.block_prefix_v4"), (6, "pool.block_prefix_v6")):
        if old.of(Family.of(version)) and old.block_prefix[version] != new.block_prefix[version]:
            raise errors.InvalidArgument(
                f"the block size of pool {new.name} cannot be changed from /{old.block_prefix[version]}",
                field=name,
                fix="keep it, or make another pool",
            )


def check_overlap(new: Pool, others: list[Pool]) -> None:
    """AlreadyExists when a prefix belongs to another pool."""
    for other in others:
        if other.name == new.name:
            continue
        for i, network in enumerate(new.cidrs):
            if (hit := next((n for n in other.cidrs if _overlap(n, network)), None)) is not None:
                raise errors.AlreadyExists(
                    f"{network} overlaps {hit} of pool {other.name}",
                    field=f"pool.cidrs[{i}]",
                    fix="choose a prefix no pool has",
                )


def keep_block_size(pool: Pool, old: Pool | None, given_v4: int, given_v6: int) -> Pool:
    """With 0 for "as it is", an existing pool keeps the block size it has."""
    if old is None:
        return pool
    blocks = {
        4: pool.block_prefix[4] if given_v4 or not old.of(Family.IPV4) else old.block_prefix[4],
        6: pool.block_prefix[6] if given_v6 or not old.of(Family.IPV6) else old.block_prefix[6],
    }
    return replace(pool, block_prefix=blocks)


def _prefix(text: str, field: str) -> Network:
    try:
        return ip_network(text)
    except (AddressValueError, NetmaskValueError, ValueError) as error:
        hint = (
            "clear the host bits"
            if "host bits" in str(error)
            else "write it as 10.244.0.0/16 or fd00:10:244::/48"
        )
        raise errors.InvalidArgument(f"{text[:60]!r} is not a prefix", field=field, fix=hint) from None


def _block_prefix(networks: list[Network], version: int, given: int) -> int:
    lengths = [n.prefixlen for n in networks if n.version == version]
    field = f"pool.block_prefix_v{version}"
    longest = _MAX_BLOCK_PREFIX[version]
    if not lengths:
        return given or _DEFAULT_BLOCK_PREFIX[version]
    if given == 0:
        return max(_DEFAULT_BLOCK_PREFIX[version], min(max(lengths), longest))
    if not min(lengths) <= given <= longest:
        raise errors.InvalidArgument(
            f"block size /{given} does not fit", field=field, fix=f"use {min(lengths)} to {longest}"
        )
    return given


def _overlap(a: Network, b: Network) -> bool:
    return (
        a.version == b.version
        and int(a.network_address) <= int(b.broadcast_address)
        and int(b.network_address) <= int(a.broadcast_address)
    )


def inside(inner: Network, outer: Network) -> bool:
    """Whether a prefix lies wholly within another; of different families: no."""
    return (
        inner.version == outer.version
        and int(outer.network_address) <= int(inner.network_address)
        and int(inner.broadcast_address) <= int(outer.broadcast_address)
    )
