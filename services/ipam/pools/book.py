"""The address book: who may have which address. Everything that gives out addresses goes through one AddressBook.

How an address is found: by what the owner has already; in the blocks of this node; in a block claimed now in etcd; at last,
when no block is left either, the longest-released address that still rests. While etcd is away the second and the last
step go on alone.

All methods run on one event loop. Between an `await` and the next everything is atomic; claims of one pool and
family are one at a time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from ipaddress import ip_address, ip_network

from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.feed import Feed
from services.ipam.pools.blocks import Blocks
from services.ipam.pools.holdings import Holdings
from services.ipam.pools.model import REST_S, Address, Block
from services.ipam.pools.store import PoolStore
from services.ipam.pools.types import (
    DEFAULT_POOL,
    Allocation,
    BlockInfo,
    Family,
    Pool,
    PoolMode,
    check_address,
    check_change,
    check_owner,
    check_ttl,
    inside,
    keep_block_size,
)
from services.ipam.pools.usage import Usage, usage

log = logging.getLogger(__name__)

SWEEP_S = 1.0


def _checked(
    addresses: list[str], check: Callable[[Address, str], None]
) -> tuple[list[Address], list[errors.FibrilError | None]]:
    """Those that are right, and per address None or what is wrong. check: gets the field's name too, and raises that."""
    good: list[Address] = []
    results: list[errors.FibrilError | None] = []
    for i, text in enumerate(addresses):
        try:
            address = check_address(text, f"addresses[{i}]")
            check(address, f"addresses[{i}]")
            good.append(address)
            results.append(None)
        except errors.FibrilError as error:
            results.append(error)
    return good, results


class AddressBook:
    """See the module's text."""

    def __init__(
        self,
        holdings: Holdings,
        etcd: EtcdClient,
        store: PoolStore,
        node: str,
        first: Pool | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """first: the pool to create when the cluster has no pool called "default"; None: none."""
        self._holdings = holdings
        self._store = store
        self._node = node
        self._clock = clock
        self._blocks = Blocks(holdings, etcd, store, node, first)
        self._tasks: list[asyncio.Task[None]] = []
        self.feed: Feed[Allocation] = Feed(holdings.all)

    # -- life

    async def start(self) -> None:
        """Serve from what the node remembers at once; follow etcd from now on."""
        self._tasks = [
            asyncio.create_task(self._blocks.follow(), name="ipam.pools"),
            asyncio.create_task(self._blocks.keep_step(), name="ipam.blocks"),
            asyncio.create_task(self._sweep_for_ever(), name="ipam.sweep"),
        ]

    async def stop(self) -> None:
        """Stop following; nothing is given back."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def tasks(self) -> list[asyncio.Task[None]]:
        """Background work; none ever ends by itself."""
        return self._tasks

    @property
    def synced(self) -> bool:
        """Whether etcd has been read completely since the start."""
        return self._blocks.synced.is_set()

    @property
    def problem(self) -> str:
        """Why this node is not in step with etcd, one sentence; empty when it is."""
        return self._blocks.problem

    def on_blocks(self, callback: Callable[[], None]) -> None:
        """Call back after every change of this node's blocks."""
        self._blocks.on_change(callback)

    # -- allocations

    async def allocate(
        self,
        owner: str,
        pool: str = DEFAULT_POOL,
        family: Family | None = None,
        address: str | None = None,
        ttl: float = 0.0,
    ) -> list[Allocation]:
        """One address a family asked for (all that the pool has if None), IPv4 first; all or none.

        The same owner gets the same addresses again. InvalidArgument, NotFound (pool), AlreadyExists (address held by
        another, or the owner holds another one), ResourceExhausted, Unavailable.
        """
        check_owner(owner)
        check_ttl(ttl)
        wanted = check_address(address, "address") if address else None
        where = self._holdings.pool(pool or DEFAULT_POOL)
        families = self._families(where, family, wanted)
        done: list[Allocation] = []
        fresh: list[tuple[Block, int]] = []
        try:
            for each in families:
                allocation, taken = await self._one(owner, where.name, each, wanted)
                done.append(allocation)
                if taken is not None:
                    fresh.append(taken)
            now = self._clock()
            for allocation in done:  # a twin call may have been quicker while this one waited for etcd
                held = self._holdings.find(owner, where.name, allocation.family)
                if held is not None and held.address != allocation.address:
                    return await self._retry(fresh, owner, where.name, family, address, ttl)
            expires = now + ttl if ttl else 0.0
            done = [a._replace(expires_unix_seconds=expires) for a in done]
            changed = [a for a in done if self._holdings.at(a.address) != a]
            if changed:
                self._holdings.commit(changed)
        except BaseException:
            self._give(fresh)
            raise
        for allocation in changed:
            self.feed.publish("put", allocation)
        return done

    async def release(self, owner: str, address: str = "") -> list[str]:
        """Give up one address of an owner, or all; the addresses that are free now. Nothing held is success."""
        check_owner(owner)
        wanted = str(check_address(address, "address")) if address else ""
        held = [a for a in self._holdings.of(owner) if wanted in ("", a.address)]
        self._release(held)
        return [a.address for a in held]

    async def renew(self, owner: str, ttl: float) -> list[Allocation]:
        """Move the expiry of all an owner holds. NotFound when that is nothing."""
        check_owner(owner)
        check_ttl(ttl)
        held = self._holdings.of(owner)
        if not held:
            raise errors.NotFound(f"owner {owner!r} holds no address", field="owner", fix="allocate again")
        expires = self._clock() + ttl if ttl else 0.0
        changed = [a._replace(expires_unix_seconds=expires) for a in held]
        self._holdings.commit(changed)
        for allocation in changed:
            self.feed.publish("put", allocation)
        return changed

    def allocation(self, address: str) -> Allocation:
        """Who has an address. NotFound."""
        text = str(check_address(address, "address"))
        if (held := self._holdings.at(text)) is None:
            raise errors.NotFound(f"{text} is not allocated on this node", field="address")
        return held

    def allocations(self, owner: str = "") -> list[Allocation]:
        """All allocations of this node, or of one owner, sorted by family and address."""
        return self._holdings.of(owner) if owner else self._holdings.all()

    async def sweep(self, prefix: str, live: set[str]) -> None:
        """Release what owners hold whose name begins with a prefix and who are not alive."""
        for owner in self._holdings.owners():
            if owner.startswith(prefix) and owner not in live:
                held = self._holdings.of(owner)
                log.warning(
                    "releasing addresses of an owner that is gone",
                    extra={"owner": owner, "addresses": [a.address for a in held]},
                )
                self._release(held)

    # -- pools and blocks

    def blocks(self) -> list[BlockInfo]:
        """This node's blocks, in the order they were claimed."""
        return [BlockInfo(b.cidr, pool, self._node, b.gateway_text) for pool, b in self._holdings.blocks()]

    async def all_blocks(self) -> list[BlockInfo]:
        """Blocks of all nodes. Unavailable."""
        return await self._store.blocks()

    def pools(self) -> list[Pool]:
        """All pools, by name."""
        return [self._holdings.pools[name] for name in sorted(self._holdings.pools)]

    def pool(self, name: str) -> Pool:
        """One pool. NotFound."""
        return self._holdings.pool(name)

    def usage(self, pool: Pool, claimed: Iterable[BlockInfo] | None) -> list[Usage]:
        """Counts by family; claimed: all nodes' blocks, None when etcd is away (own blocks are counted then)."""
        return usage(self._holdings, pool, claimed, self._clock())

    async def put_pool(self, pool: Pool, given_v4: int = 0, given_v6: int = 0) -> Pool:
        """Create or change a pool. See PoolStore.put; a revision in it must be the pool's present one (Aborted)."""
        old = self._holdings.pools.get(pool.name)
        if pool.revision and (old is None or old.revision != pool.revision):
            raise errors.Aborted(
                f"pool {pool.name} is at revision {old.revision if old else 0}, not {pool.revision}",
                field="pool.revision",
                fix="read it again and repeat",
            )
        pool = keep_block_size(pool, old, given_v4, given_v6)
        if old is not None:
            check_change(old, pool)
            self._check_shrink(pool)
        stored = await self._store.put(pool, old.revision if old else 0)
        self._holdings.set_pool(stored)
        return stored

    async def delete_pool(self, name: str) -> None:
        """Delete a pool nothing is allocated from. NotFound, FailedPrecondition, Unavailable."""
        await self._blocks.delete_pool(name)

    async def add_cloud(self, name: str, addresses: list[str]) -> list[errors.FibrilError | None]:
        """Addresses a provider gives to this node; per address None or what was wrong."""
        pool = self._cloud(name)

        def is_inside(address: Address, field: str) -> None:
            if not pool.holds(address):
                raise errors.InvalidArgument(
                    f"{address} is outside pool {name}", field=field, fix="add its prefix to the pool first"
                )

        good, results = _checked(addresses, is_inside)
        self._holdings.add_cloud(pool, good)
        return results

    async def remove_cloud(self, name: str, addresses: list[str]) -> list[errors.FibrilError | None]:
        """Addresses a provider withdraws; per address None or why not (FailedPrecondition: it is in use)."""
        pool = self._cloud(name)

        def is_free(address: Address, field: str) -> None:
            if (held := self._holdings.at(str(address))) is not None and held.pool == name:
                raise errors.FailedPrecondition(
                    f"{address} is in use by {held.owner}", field=field, fix="release it first"
                )

        good, results = _checked(addresses, is_free)
        self._holdings.remove_cloud(pool, good)
        return results

    # -- inside: one allocation

    async def _one(
        self, owner: str, pool: str, family: Family, wanted: Address | None
    ) -> tuple[Allocation, tuple[Block, int] | None]:
        held = self._holdings.find(owner, pool, family)
        if held is not None:
            if wanted is not None and held.address != str(wanted):
                raise errors.AlreadyExists(
                    f"owner {owner!r} holds {held.address} of pool {pool} already",
                    field="address",
                    fix="release it first, or leave the address out",
                )
            return held, None
        taken = await self._specific(owner, pool, wanted) if wanted else await self._any(pool, family)
        return self._holdings.make(taken[0], taken[1], pool, owner, 0.0, self._clock()), taken

    async def _any(self, pool: str, family: Family) -> tuple[Block, int]:
        shelf = self._holdings.shelf(pool, family)
        while True:
            if (taken := shelf.take(self._clock())) is not None:
                return taken
            before = len(shelf.blocks)
            trouble: errors.FibrilError | None = None
            try:
                grown = await self._blocks.grow(pool, family, before)
            except errors.Unavailable as error:
                grown, trouble = False, error
            if grown:
                continue
            if (taken := shelf.take_resting()) is not None:
                return taken
            if trouble is not None:
                raise trouble
            raise self._blocks.exhausted(pool, family)

    async def _specific(self, owner: str, pool: str, wanted: Address) -> tuple[Block, int]:
        text, family = str(wanted), Family.of(wanted.version)
        where = self._holdings.pool(pool)
        if not where.holds(wanted):
            raise errors.InvalidArgument(
                f"{text} is outside pool {pool}",
                field="address",
                fix=f"choose one of {', '.join(map(str, where.of(family)))}",
            )
        if (held := self._holdings.at(text)) is not None:
            raise errors.AlreadyExists(
                f"{text} is held by {held.owner!r}", field="address", fix="choose another address"
            )
        shelf = self._holdings.shelf(pool, family)
        if shelf.holder(int(wanted)) is None and where.mode is PoolMode.CLUSTER:
            width = where.block_prefix[wanted.version]
            cidr = next(n for n in where.of(family) if wanted in n)
            network = cidr if cidr.prefixlen >= width else ip_network((int(wanted), width), strict=False)
            await self._blocks.claim_this(pool, network)
        block = shelf.holder(int(wanted))
        if block is None:
            raise errors.FailedPrecondition(
                f"{text} has not been given to this node",
                field="address",
                fix="let the provider add it first (AddAddresses)",
            )
        if not block.take_this(int(wanted)):
            if int(wanted) in block.used:
                raise errors.AlreadyExists(
                    f"{text} is being given to another owner", field="address", fix="choose another address"
                )
            raise errors.InvalidArgument(
                f"{text} is reserved (gateway, network, broadcast or excluded)",
                field="address",
                fix="choose another address",
            )
        return block, int(wanted)

    async def _retry(
        self,
        fresh: list[tuple[Block, int]],
        owner: str,
        pool: str,
        family: Family | None,
        address: str | None,
        ttl: float,
    ) -> list[Allocation]:
        self._give(fresh)
        fresh.clear()
        return await self.allocate(owner, pool, family, address, ttl)

    def _families(self, pool: Pool, family: Family | None, wanted: Address | None) -> list[Family]:
        present = pool.families()
        if wanted is not None:
            if family is not None and family.version != wanted.version:
                raise errors.InvalidArgument(
                    f"{wanted} is not of family {family.name}", field="address", fix="leave the family out"
                )
            return [Family.of(wanted.version)]
        if family is None:
            return present
        if family not in present:
            raise errors.InvalidArgument(
                f"pool {pool.name} has no {family.name} prefix",
                field="family",
                fix="choose another pool or family",
            )
        return [family]

    def _give(self, fresh: list[tuple[Block, int]]) -> None:
        for block, number in fresh:
            block.give(number, self._clock())

    def _release(self, held: list[Allocation]) -> None:
        if held:
            self._holdings.release(held, self._clock())
            for allocation in held:
                self.feed.publish("delete", allocation)

    def _check_shrink(self, pool: Pool) -> None:
        for name, block in self._holdings.blocks():
            if name == pool.name and block.used and not any(inside(block.network, n) for n in pool.cidrs):
                raise errors.FailedPrecondition(
                    f"{len(block.used)} addresses of {block.network} are in use on this node",
                    field="pool.cidrs",
                    fix="release them, or keep the prefix",
                )
        if pool.mode is PoolMode.CLOUD:
            out = [a for a in self._holdings.taken(pool.name) if not pool.holds(ip_address(a))]
            if out:
                raise errors.FailedPrecondition(
                    f"{out[0]} of pool {pool.name} is in use on this node",
                    field="pool.cidrs",
                    fix="release it, or keep its prefix",
                )
        for i, network in enumerate(pool.excluded):
            hit = next(
                (a for a in self._holdings.all() if a.pool == pool.name and ip_address(a.address) in network),
                None,
            )
            if hit is not None:
                raise errors.FailedPrecondition(
                    f"{hit.address} is in use by {hit.owner}",
                    field=f"pool.excluded[{i}]",
                    fix="release it first",
                )

    def _cloud(self, name: str) -> Pool:
        pool = self._holdings.pool(name)
        if pool.mode is not PoolMode.CLOUD:
            raise errors.FailedPrecondition(
                f"pool {name} is not a cloud pool", field="pool", fix="its nodes carve blocks by themselves"
            )
        return pool

    # -- inside: background

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self._clock()
            try:
                if lapsed := self._holdings.expired(now):
                    self._release(lapsed)
                    log.info("allocations have lapsed", extra={"addresses": [a.address for a in lapsed]})
                self._holdings.forget_rested(now - REST_S)
                await self._blocks.give_back(now)
            except errors.FibrilError as error:
                log.debug("what is over is not given back yet", extra={"error": str(error)})
