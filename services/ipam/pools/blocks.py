"""This node's blocks and the cluster's pools, kept in step with etcd.

Blocks are claimed when the node has nothing left to give, one at a time for each pool and family, and given back when they
have been empty for long. Pools are followed by a watch; what the node holds is checked against etcd whenever that has been
read anew.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Callable
from ipaddress import ip_address, ip_network

from google.protobuf.message import DecodeError

from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.etcd.watch import Delete, Put, Snapshot, Synced, watch_prefix
from services.ipam.pools.holdings import Holdings, choose_gateway
from services.ipam.pools.model import Network, blocks_from
from services.ipam.pools.store import PoolStore, decode_pool
from services.ipam.pools.types import DEFAULT_POOL, Family, Pool, PoolMode

log = logging.getLogger(__name__)

GIVE_BACK_AFTER_S = 300.0  # an empty block goes back to its pool after this long
RETRY_S = 1.0


class Blocks:
    """See the module's text. problem: why not in step with etcd, one sentence; "" when in step."""

    def __init__(
        self, holdings: Holdings, etcd: EtcdClient, store: PoolStore, node: str, first: Pool | None
    ) -> None:
        """first: the pool to create when the cluster has none of its name; None: none."""
        self._holdings = holdings
        self._etcd = etcd
        self._store = store
        self._node = node
        self._first = first
        self.synced = asyncio.Event()
        self._read = False  # etcd's pools have been read completely
        self._step_wanted = asyncio.Event()
        # Claiming, giving back and comparing blocks exclude each other: a block that is on its way back must not be adopted.
        self._lock = asyncio.Lock()
        self._lost: set[str] = set()  # pools in use here that etcd has no longer
        self._empty_since: dict[Network, float] = {}
        self._on_change: list[Callable[[], None]] = []
        self.problem = "etcd has not been read yet"

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call back after every change of this node's blocks."""
        self._on_change.append(callback)

    async def grow(self, pool: str, family: Family, before: int) -> bool:
        """Claim one more block, unless another call has done so since `before` blocks were seen; whether there is one."""
        async with self._lock:
            where = self._holdings.pool(pool)
            shelf = self._holdings.shelf(pool, family)
            if len(shelf.blocks) != before:
                return True
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

    async def claim_this(self, pool: str, network: Network) -> None:
        """Claim a certain block. FailedPrecondition when another node has it."""
        async with self._lock:
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

    def exhausted(self, pool: str, family: Family) -> errors.ResourceExhausted:
        """The error that says how full the pool is."""
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

    async def give_back(self, now: float) -> None:
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
            async with self._lock:
                if block.used:
                    continue
                # Forgotten first: were etcd told first, another node could claim it while this one still gives out of it.
                self._holdings.remove_block(pool, network)
                self.changed()
                await self._store.release(pool, str(network), self._node)

    async def delete_pool(self, name: str) -> None:
        """Delete a pool nothing is allocated from. NotFound, FailedPrecondition, Unavailable."""
        async with self._lock:
            pool = self._holdings.pool(name)
            if held := len(self._holdings.taken(name)):
                raise errors.FailedPrecondition(
                    f"pool {name} is in use: {held} addresses are allocated on this node",
                    fix="release them first",
                )
            own = [block for held_pool, block in self._holdings.blocks() if held_pool == name]
            # Forgotten first: while etcd is asked, nobody here may get an address of a pool that is about to go, and the
            # watch, which may tell of its end before the answer comes, must not take it for lost and put it back.
            for block in own:
                self._holdings.remove_block(name, block.network)
            try:
                await self._store.delete(pool, [b.cidr for b in own], self._node)
            except BaseException:
                if name in self._holdings.pools:
                    for block in own:
                        self._holdings.add_block(pool, block.network, ip_address(block.gateway_text))
                    self._step_wanted.set()  # etcd may have given back some of them
                raise
            self._holdings.drop_pool(name)
        if own:
            self.changed()

    def changed(self) -> None:
        """Tell everyone who asked that this node's blocks are others than before."""
        for callback in self._on_change:
            callback()

    async def follow(self) -> None:
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
                    self._step_wanted.set()
                case Synced():
                    self._read = True
                    self._step_wanted.set()

    async def keep_step(self) -> None:
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
                await self._put_back()
                await self._make_first()
                async with self._lock:
                    await self._check_blocks()
                await self._first_blocks()
            except errors.FibrilError as error:
                if self.problem != error.message:
                    log.warning("not in step with etcd", extra={"error": str(error)})
                self.problem = error.message
                continue
            self.problem = ""
            self.synced.set()

    async def _claim(self, pool: Pool, network: Network) -> bool | None:
        try:
            gateway = choose_gateway(pool, network)
        except ValueError:
            return False  # every address of it is excluded
        claimed = await self._store.claim(pool, network, str(gateway), self._node)
        if claimed:
            self._holdings.add_block(pool, network, gateway)
            log.info("claimed a block", extra={"pool": pool.name, "block": str(network)})
            self.changed()
        return claimed

    async def _read_pool(self, name: str) -> Pool:
        kv = await self._etcd.get(self._store.pools_prefix + name)
        if kv is None:
            raise errors.NotFound(f"pool {name} has been deleted", field="pool")
        pool = decode_pool(kv.value, kv.mod_revision)
        self._holdings.set_pool(pool)
        return pool

    def _take_pool(self, key: str, value: bytes, revision: int) -> None:
        try:
            self._holdings.set_pool(decode_pool(value, revision))
        except (errors.FibrilError, DecodeError) as error:
            # A newer or damaged record must not stop the others.
            log.error("a pool in etcd cannot be read", extra={"key": key, "error": str(error)})

    def _lose_pool(self, name: str) -> None:
        pool = self._holdings.pools.get(name)
        if pool is None:
            return
        if self._holdings.taken(name) or any(p == name for p, _ in self._holdings.blocks()):
            log.error("a pool in use here is gone from etcd and will be put back", extra={"pool": name})
            self._lost.add(name)
            return
        self._holdings.drop_pool(name)

    async def _put_back(self) -> None:
        """Pools in use cannot be deleted; one that is gone nevertheless was lost with etcd's data."""
        for name in sorted(self._lost):
            try:
                self._holdings.set_pool(await self._store.put(self._holdings.pool(name), 0))
            except errors.Aborted:
                await self._read_pool(name)  # another node was quicker
            self._lost.discard(name)

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
                if await self._store.claim(pool, block.network, block.gateway_text, self._node):
                    log.warning(
                        "claimed a block again that etcd had lost", extra={"block": str(block.network)}
                    )
                elif not block.used:
                    self._holdings.remove_block(name, block.network)
                    self.changed()
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
                self.changed()

    async def _first_blocks(self) -> None:
        pool = self._holdings.pools.get(DEFAULT_POOL)
        if pool is None or pool.mode is PoolMode.CLOUD:
            return
        for family in pool.families():
            if not self._holdings.shelf(pool.name, family).blocks and not await self.grow(
                pool.name, family, 0
            ):
                raise self.exhausted(pool.name, family)
