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
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from google.protobuf.message import DecodeError

from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.etcd.watch import Delete, Put, Snapshot, Synced, watch_prefix
from services.common.feed import Feed
from services.ipam.pools.holdings import Holdings, choose_gateway
from services.ipam.pools.model import REST_S, Address, Block, Network, blocks_from
from services.ipam.pools.store import PoolStore, decode_pool
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

log = logging.getLogger(__name__)

SWEEP_S = 1.0
GIVE_BACK_AFTER_S = 300.0  # an empty block goes back to its pool after this long
RETRY_S = 1.0
_CAP = (1 << 63) - 1


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
        self._etcd = etcd
        self._store = store
        self._node = node
        self._first = first
        self._clock = clock
        self._synced = asyncio.Event()
        self._read = False  # etcd's pools have been read completely
        self._step_wanted = asyncio.Event()
        self._claiming: dict[tuple[str, Family], asyncio.Lock] = {}
        self._empty_since: dict[Network, float] = {}
        self._on_blocks: list[Callable[[], None]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.feed: Feed[Allocation] = Feed(holdings.all)
        self.problem = "etcd has not been read yet"

    # -- life

    async def start(self) -> None:
        """Serve from what the node remembers at once; follow etcd from now on."""
        self._tasks = [
            asyncio.create_task(self._follow(), name="ipam.pools"),
            asyncio.create_task(self._keep_step(), name="ipam.blocks"),
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
        return self._synced.is_set()

    def on_blocks(self, callback: Callable[[], None]) -> None:
        """Call back after every change of this node's blocks."""
        self._on_blocks.append(callback)

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
        now = self._clock()
        found = []
        for family in pool.families():
            blocks = list(self._holdings.shelf(pool.name, family).blocks.values())
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
        pool = self._holdings.pool(name)
        if held := self._holdings.count(name):
            raise errors.FailedPrecondition(
                f"pool {name} is in use: {held} addresses are allocated on this node",
                fix="release them first",
            )
        own = [b.network for held_pool, b in self._holdings.blocks() if held_pool == name]
        await self._store.delete(pool, [str(n) for n in own], self._node)
        for network in own:
            self._holdings.remove_block(name, network)
        self._holdings.drop_pool(name)
        self._changed_blocks(bool(own))

    async def add_cloud(self, name: str, addresses: list[str]) -> list[errors.FibrilError | None]:
        """Addresses a provider gives to this node; per address None or what was wrong."""
        pool = self._cloud(name)
        results: list[errors.FibrilError | None] = []
        good: list[Address] = []
        for i, text in enumerate(addresses):
            try:
                address = check_address(text, f"addresses[{i}]")
                if not pool.holds(address):
                    raise errors.InvalidArgument(
                        f"{address} is outside pool {name}",
                        field=f"addresses[{i}]",
                        fix="add its prefix to the pool first",
                    )
                good.append(address)
                results.append(None)
            except errors.FibrilError as error:
                results.append(error)
        self._holdings.add_cloud(pool, good)
        return results

    async def remove_cloud(self, name: str, addresses: list[str]) -> list[errors.FibrilError | None]:
        """Addresses a provider withdraws; per address None or why not (FailedPrecondition: it is in use)."""
        pool = self._cloud(name)
        results: list[errors.FibrilError | None] = []
        good: list[Address] = []
        for i, text in enumerate(addresses):
            try:
                address = check_address(text, f"addresses[{i}]")
                if (held := self._holdings.at(str(address))) is not None and held.pool == name:
                    raise errors.FailedPrecondition(
                        f"{address} is in use by {held.owner}",
                        field=f"addresses[{i}]",
                        fix="release it first",
                    )
                good.append(address)
                results.append(None)
            except errors.FibrilError as error:
                results.append(error)
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
                grown = await self._grow(pool, family, before)
            except errors.Unavailable as error:
                grown, trouble = False, error
            if grown:
                continue
            if (taken := shelf.take_resting()) is not None:
                return taken
            if trouble is not None:
                raise trouble
            raise self._exhausted(pool, family)

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
            await self._claim_this(pool, network)
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

    def _exhausted(self, pool: str, family: Family) -> errors.ResourceExhausted:
        where = self._holdings.pool(pool)
        blocks = self._holdings.shelf(pool, family).blocks.values()
        used, capacity = sum(len(b.used) for b in blocks), sum(b.capacity() for b in blocks)
        if where.mode is PoolMode.CLOUD:
            return errors.ResourceExhausted(
                f"pool {pool} has no free {family.name} address on this node: {used} of {capacity} are in use",
                fix="let the provider add addresses",
            )
        return errors.ResourceExhausted(
            f"pool {pool} has no free {family.name} address on this node: {used} of {capacity} in its {len(blocks)} blocks"
            f" are in use, and all {where.blocks_total(family)} blocks of the pool are claimed",
            fix=f"add a prefix: fibril ipam pool put {pool} …",
        )

    # -- inside: blocks

    async def _grow(self, pool: str, family: Family, before: int) -> bool:
        """Claim one more block, unless another call has done so since `before` blocks were seen; whether there is one."""
        async with self._claiming.setdefault((pool, family), asyncio.Lock()):
            shelf = self._holdings.shelf(pool, family)
            if len(shelf.blocks) != before:
                return True
            where = self._holdings.pool(pool)
            if where.mode is PoolMode.CLOUD:
                return False
            for _ in range(4):
                taken = {b.cidr for b in await self._store.blocks(pool)}
                start = zlib.crc32(f"{self._node}/{pool}".encode())
                width = where.block_prefix[family.version]
                for network in blocks_from(where.of(family), width, start):
                    if str(network) in taken:
                        continue
                    claimed = await self._claim(where, network)
                    if claimed:
                        return True
                    if claimed is None:
                        break
                else:
                    return False
                where = await self._read_pool(pool)
            return False

    async def _claim_this(self, pool: str, network: Network) -> None:
        async with self._claiming.setdefault((pool, Family.of(network.version)), asyncio.Lock()):
            where = self._holdings.pool(pool)
            if network in self._holdings.shelf(pool, Family.of(network.version)).blocks:
                return
            claimed = await self._claim(where, network)
            if claimed is None:
                claimed = await self._claim(await self._read_pool(pool), network)
        if not claimed:
            raise errors.FailedPrecondition(
                f"block {network} of pool {pool} is held by another node",
                field="address",
                fix="choose an address of another block",
            )

    async def _claim(self, pool: Pool, network: Network) -> bool | None:
        try:
            gateway = choose_gateway(pool, network)
        except ValueError:
            return False  # every address of it is excluded
        claimed = await self._store.claim(pool, network, str(gateway), self._node)
        if claimed:
            self._holdings.add_block(pool, network, gateway)
            log.info("claimed a block", extra={"pool": pool.name, "block": str(network)})
            self._changed_blocks(True)
        return claimed

    async def _read_pool(self, name: str) -> Pool:
        kv = await self._etcd.get(self._store.pools_prefix + name)
        if kv is None:
            raise errors.NotFound(f"pool {name} has been deleted", field="pool")
        pool = decode_pool(kv.value, kv.mod_revision)
        self._holdings.set_pool(pool)
        return pool

    def _changed_blocks(self, changed: bool) -> None:
        if changed:
            for callback in self._on_blocks:
                callback()

    def _check_shrink(self, pool: Pool) -> None:
        for name, block in self._holdings.blocks():
            if name == pool.name and block.used and not any(inside(block.network, n) for n in pool.cidrs):
                raise errors.FailedPrecondition(
                    f"{len(block.used)} addresses of {block.network} are in use on this node",
                    field="pool.cidrs",
                    fix="release them, or keep the prefix",
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

    async def _follow(self) -> None:
        """Keep pools as etcd has them; own blocks are checked after every complete reading."""
        prefix = self._store.pools_prefix
        async for event in watch_prefix(self._etcd, prefix):
            match event:
                case Snapshot():
                    present = {kv.key.removeprefix(prefix) for kv in event.kvs}
                    for name in [n for n in self._holdings.pools if n not in present]:
                        self._lose_pool(name)
                    for kv in event.kvs:
                        self._take_pool(kv.key, kv.value, kv.mod_revision)
                case Put():
                    self._take_pool(event.key, event.value, event.mod_revision)
                    self._step_wanted.set()
                case Delete():
                    self._lose_pool(event.key.removeprefix(prefix))
                case Synced():
                    self._read = True
                    self._step_wanted.set()

    def _take_pool(self, key: str, value: bytes, revision: int) -> None:
        try:
            self._holdings.set_pool(decode_pool(value, revision))
        except (
            errors.FibrilError,
            DecodeError,
        ) as error:  # a newer or damaged record must not stop the others
            log.error("a pool in etcd cannot be read", extra={"key": key, "error": str(error)})

    def _lose_pool(self, name: str) -> None:
        pool = self._holdings.pools.get(name)
        if pool is None:
            return
        if self._holdings.count(name) or any(p == name for p, _ in self._holdings.blocks()):
            log.error("a pool is gone from etcd but in use here; it is kept", extra={"pool": name})
            return
        self._holdings.drop_pool(name)

    async def _keep_step(self) -> None:
        """The first pool exists, own blocks are claimed, the default pool has one a family: whenever etcd or its
        pools have changed, and again and again while it fails.
        """
        while True:
            try:
                async with asyncio.timeout(RETRY_S if self.problem and self._read else None):
                    await self._step_wanted.wait()
            except TimeoutError:
                pass
            self._step_wanted.clear()
            if not self._read:
                continue
            try:
                await self._make_first()
                await self._check_blocks()
                await self._first_blocks()
            except errors.FibrilError as error:
                if self.problem != error.message:
                    log.warning("not in step with etcd", extra={"error": str(error)})
                self.problem = error.message
                continue
            self.problem = ""
            self._synced.set()

    async def _make_first(self) -> None:
        if self._first is None or self._first.name in self._holdings.pools:
            return
        try:
            self._holdings.set_pool(await self._store.put(self._first, 0))
        except errors.Aborted:
            await self._read_pool(self._first.name)  # another node was quicker

    async def _check_blocks(self) -> None:
        """Own blocks are what both etcd and this node say; a difference means that one of them lost something."""
        mine = {b.cidr: b for b in await self._store.blocks() if b.node == self._node}
        for name, block in list(self._holdings.blocks()):
            if str(block.network) not in mine:
                pool = self._holdings.pool(name)
                gateway = str(choose_gateway(pool, block.network))
                if await self._store.claim(pool, block.network, gateway, self._node):
                    log.warning(
                        "claimed a block again that etcd had lost", extra={"block": str(block.network)}
                    )
                elif not block.used:
                    self._holdings.remove_block(name, block.network)
                    self._changed_blocks(True)
                else:
                    raise errors.Aborted(
                        f"block {block.network} of this node is claimed by another node",
                        fix="move the pods of one of the two nodes elsewhere",
                    )
        for cidr, info in mine.items():
            network = ip_network(cidr)
            if (
                info.pool in self._holdings.pools
                and self._holdings.shelf(info.pool, Family.of(network.version)).blocks.get(network) is None
            ):
                self._holdings.add_block(self._holdings.pool(info.pool), network, ip_address(info.gateway))
                self._changed_blocks(True)

    async def _first_blocks(self) -> None:
        pool = self._holdings.pools.get(DEFAULT_POOL)
        if pool is None or pool.mode is PoolMode.CLOUD:
            return
        for family in pool.families():
            if not self._holdings.shelf(pool.name, family).blocks and not await self._grow(
                pool.name, family, 0
            ):
                raise self._exhausted(pool.name, family)

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self._clock()
            if lapsed := self._holdings.expired(now):
                log.info("allocations have lapsed", extra={"addresses": [a.address for a in lapsed]})
                self._release(lapsed)
            self._holdings.forget_rested(now - REST_S)
            try:
                await self._give_back(now)
            except errors.FibrilError as error:
                log.debug("an empty block is not given back yet", extra={"error": str(error)})

    async def _give_back(self, now: float) -> None:
        """Give back blocks that have been empty for long, but keep the default pool's first of each family."""
        empty = {b.network: (pool, b) for pool, b in self._holdings.blocks() if not b.used}
        self._empty_since = {n: self._empty_since.get(n, now) for n in empty}
        for network, (pool, block) in empty.items():
            shelf = self._holdings.shelf(pool, Family.of(network.version))
            first = next(iter(shelf.blocks))
            if self._empty_since[network] + GIVE_BACK_AFTER_S > now or (
                pool == DEFAULT_POOL and network == first
            ):
                continue
            async with self._claiming.setdefault((pool, Family.of(network.version)), asyncio.Lock()):
                if block.used:
                    continue
                # Forgotten first: were etcd told first, another node could claim it while this one still gives out of it.
                self._holdings.remove_block(pool, network)
                self._changed_blocks(True)
                await self._store.release(pool, str(network), self._node)
