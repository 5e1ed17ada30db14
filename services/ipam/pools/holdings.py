"""What this node holds: its blocks or provider-given addresses of each pool, and who has which address.

In memory, backed by sqlite: every change is committed before the method returns. No etcd here, no waiting; the book
(book.py) adds blocks when these say there is nothing left.
"""

from __future__ import annotations

import heapq
import logging
import sqlite3
from collections.abc import Iterable, Iterator
from ipaddress import ip_address, ip_network

from fibril.ipam.v1 import ipam_pb2 as pb
from services.common import errors
from services.ipam.pools.model import Address, Block, Network, Range, gateway_of, ranges, to_address, to_text
from services.ipam.pools.store import from_proto, to_proto
from services.ipam.pools.types import Allocation, Family, Pool, PoolMode

log = logging.getLogger(__name__)

_Key = tuple[str, str, Family]  # owner, pool, family


class Shelf:
    """The blocks of one family of one pool on this node, in the order they came. A cloud address is a block of one."""

    __slots__ = ("_index", "blocks")

    def __init__(self) -> None:
        self.blocks: dict[Network, Block] = {}
        self._index: dict[int, Block] = {}  # single addresses, of which there may be thousands

    def add(self, block: Block) -> None:
        """Put a block on the shelf."""
        self.blocks[block.network] = block
        if block.network.num_addresses == 1:
            self._index[int(block.network.network_address)] = block

    def remove(self, network: Network) -> None:
        """Take a block off; absent is fine."""
        self.blocks.pop(network, None)
        if network.num_addresses == 1:
            self._index.pop(int(network.network_address), None)

    def holder(self, number: int) -> Block | None:
        """The block an address lies in."""
        if (block := self._index.get(number)) is not None:
            return block
        return next(
            (
                b
                for n, b in self.blocks.items()
                if int(n.network_address) <= number <= int(n.broadcast_address)
            ),
            None,
        )

    def take(self, now: float) -> tuple[Block, int] | None:
        """The next free, rested address."""
        for block in self.blocks.values():
            if (number := block.take(now)) is not None:
                return block, number
        return None

    def take_resting(self) -> tuple[Block, int] | None:
        """The longest-resting address, for when nothing else is left."""
        waiting = [
            (since, i, b)
            for i, b in enumerate(self.blocks.values())
            if (since := b.rested_since()) is not None
        ]
        if not waiting:
            return None
        block = min(waiting)[2]
        number = block.take_resting()
        return None if number is None else (block, number)


class Holdings:
    """Pools as last seen in etcd, this node's blocks, and allocations. `now` is Unix time in seconds."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.pools: dict[str, Pool] = {}
        self._shelves: dict[tuple[str, Family], Shelf] = {}
        self._by_address: dict[str, Allocation] = {}
        self._by_key: dict[_Key, Allocation] = {}
        self._by_owner: dict[str, list[Allocation]] = {}
        self._expiries: list[tuple[float, str]] = []
        self._load()

    # -- pools and blocks

    def set_pool(self, pool: Pool) -> None:
        """Record a pool as etcd has it. Not compared by revision: an etcd that lost its data begins anew."""
        old = self.pools.get(pool.name)
        if old == pool:  # a start on a full disk writes nothing
            return
        with self._db:
            self._db.execute(
                "INSERT OR REPLACE INTO pools(name, revision, value) VALUES (?, ?, ?)",
                (pool.name, pool.revision, to_proto(pool).SerializeToString()),
            )
        self.pools[pool.name] = pool
        if old is not None and pool.mode is PoolMode.CLOUD and old.cidrs != pool.cidrs:
            self.remove_cloud(pool, self._cloud_outside(pool))
        if old is not None and old.excluded != pool.excluded:
            for family in Family:
                for block in self.shelf(pool.name, family).blocks.values():
                    block.exclude(_excluded(pool, family.version))

    def drop_pool(self, name: str) -> None:
        """Forget a pool that is gone from etcd, with the addresses a provider gave; its blocks must be gone before."""
        with self._db:
            # A later pool of that name, perhaps of the other mode, must not find what this one left.
            for table, column in (("pools", "name"), ("cloud_addresses", "pool"), ("released", "pool")):
                self._db.execute(f"DELETE FROM {table} WHERE {column} = ?", (name,))
        for key in [key for key in self._shelves if key[0] == name]:
            del self._shelves[key]
        self.pools.pop(name, None)

    def pool(self, name: str) -> Pool:
        """A pool by name. NotFound."""
        try:
            return self.pools[name]
        except KeyError:
            known = ", ".join(sorted(self.pools)) or "none exists"
            raise errors.NotFound(f"there is no pool {name[:64]!r}", field="pool", fix=f"pools: {known}") from None

    def shelf(self, pool: str, family: Family) -> Shelf:
        """This node's blocks of a pool and family."""
        return self._shelves.setdefault((pool, family), Shelf())

    def add_block(self, pool: Pool, network: Network, gateway: Address) -> Block:
        """Record a claimed block; one that is there already is returned."""
        shelf = self.shelf(pool.name, Family.of(network.version))
        if (present := shelf.blocks.get(network)) is not None:
            return present
        with self._db:
            self._db.execute(
                "INSERT OR REPLACE INTO blocks(cidr, pool, gateway) VALUES (?, ?, ?)",
                (str(network), pool.name, str(gateway)),
            )
        return self._shelve(pool, network, gateway)

    def remove_block(self, pool: str, network: Network) -> None:
        """Forget a block in which nothing is used."""
        with self._db:
            self._db.execute("DELETE FROM blocks WHERE cidr = ?", (str(network),))
        self.shelf(pool, Family.of(network.version)).remove(network)

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """(pool, block) of every block of cluster pools."""
        for (pool, _), shelf in self._shelves.items():
            # Who still works on a pool that has just gone may have left an empty shelf of it.
            if pool in self.pools and self.pools[pool].mode is PoolMode.CLUSTER:
                for block in shelf.blocks.values():
                    yield pool, block

    def add_cloud(self, pool: Pool, addresses: Iterable[Address]) -> None:
        """Record addresses a provider gave to this node."""
        wanted = list(addresses)
        with self._db:
            self._db.executemany(
                "INSERT OR IGNORE INTO cloud_addresses(address, pool) VALUES (?, ?)",
                [(str(a), pool.name) for a in wanted],
            )
        for address in wanted:
            network = ip_network(address)
            if network not in self.shelf(pool.name, Family.of(address.version)).blocks:
                self._shelve(pool, network)

    def remove_cloud(self, pool: Pool, addresses: Iterable[Address]) -> None:
        """Forget addresses a provider withdrew; none is in use."""
        gone = list(addresses)
        with self._db:
            self._db.executemany(
                "DELETE FROM cloud_addresses WHERE address = ? AND pool = ?",
                [(str(a), pool.name) for a in gone],
            )
        for address in gone:
            self.shelf(pool.name, Family.of(address.version)).remove(ip_network(address))

    # -- allocations

    def find(self, owner: str, pool: str, family: Family) -> Allocation | None:
        """What an owner has of a pool and family."""
        return self._by_key.get((owner, pool, family))

    def at(self, address: str) -> Allocation | None:
        """Who has an address (canonical text)."""
        return self._by_address.get(address)

    def of(self, owner: str) -> list[Allocation]:
        """All an owner has, IPv4 first."""
        return sorted(self._by_owner.get(owner, ()), key=lambda a: (a.family, a.pool))

    def owners(self) -> list[str]:
        """Everyone who holds something."""
        return list(self._by_owner)

    def all(self) -> list[Allocation]:
        """All allocations, by family and address."""
        return sorted(self._by_address.values(), key=lambda a: (a.family, int(ip_address(a.address))))

    def taken(self, pool: str) -> list[str]:
        """Addresses of a pool that are allocated or just being allocated."""
        return [
            to_text(block.version, number)
            for family in Family
            if (shelf := self._shelves.get((pool, family))) is not None
            for block in shelf.blocks.values()
            for number in block.used
        ]

    def make(
        self, block: Block, number: int, pool: str, owner: str, expires: float, now: float
    ) -> Allocation:
        """Describe an address just taken from a block; `commit` records it."""
        return Allocation(
            to_text(block.version, number),
            Family.IPV4 if block.version == 4 else Family.IPV6,
            pool,
            owner,
            block.gateway_text,
            "" if block.gateway is None else block.cidr,  # a cloud address is a block of one
            expires,
            now,
        )

    def commit(self, allocations: list[Allocation]) -> None:
        """Record new or changed allocations, all of them or none."""
        with self._db:
            self._db.executemany(
                "INSERT OR REPLACE INTO allocations(address, pool, owner, created, expires) VALUES (?, ?, ?, ?, ?)",
                [
                    (a.address, a.pool, a.owner, a.created_unix_seconds, a.expires_unix_seconds)
                    for a in allocations
                ],
            )
            self._db.executemany(
                "DELETE FROM released WHERE address = ?", [(a.address,) for a in allocations]
            )
        for allocation in allocations:
            self._enter(allocation)

    def release(self, allocations: list[Allocation], now: float) -> None:
        """Give addresses back; they rest for a while."""
        with self._db:
            self._db.executemany(
                "DELETE FROM allocations WHERE address = ?", [(a.address,) for a in allocations]
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO released(address, pool, at) VALUES (?, ?, ?)",
                [(a.address, a.pool, now) for a in allocations],
            )
        for a in allocations:
            self._leave(a)
            block = self.shelf(a.pool, a.family).holder(int(ip_address(a.address)))
            if block is not None:
                block.give(int(ip_address(a.address)), now)

    def expired(self, now: float) -> list[Allocation]:
        """Allocations whose time is over; again each time until they are released."""
        found = []
        while self._expiries and self._expiries[0][0] <= now:
            _, address = heapq.heappop(self._expiries)
            held = self._by_address.get(address)
            if held is not None and 0 < held.expires_unix_seconds <= now:
                found.append(held)
        for held in found:
            heapq.heappush(self._expiries, (held.expires_unix_seconds, held.address))
        return found

    def forget_rested(self, before: float) -> None:
        """Drop the records of addresses released before a moment: they have rested."""
        with self._db:
            self._db.execute("DELETE FROM released WHERE at < ?", (before,))

    # -- inside

    def _cloud_outside(self, pool: Pool) -> list[Address]:
        """Unused addresses a provider gave that lie in none of the pool's prefixes any more."""
        return [
            network.network_address
            for family in Family
            for network, block in self.shelf(pool.name, family).blocks.items()
            if not block.used and not pool.holds(network.network_address)
        ]

    def _load(self) -> None:
        for name, revision, value in self._db.execute("SELECT name, revision, value FROM pools"):
            self.pools[name] = from_proto(pb.Pool.FromString(value), revision)
        for cidr, name, gateway in self._db.execute("SELECT cidr, pool, gateway FROM blocks ORDER BY rowid"):
            if name in self.pools:
                self._shelve(self.pools[name], ip_network(cidr), ip_address(gateway))
        for text, name in self._db.execute("SELECT address, pool FROM cloud_addresses ORDER BY rowid"):
            if name in self.pools:
                self._shelve(self.pools[name], ip_network(text))
        for text, name, since in self._db.execute("SELECT address, pool, at FROM released ORDER BY at"):
            address = ip_address(text)
            holder = self.shelf(name, Family.of(address.version)).holder(int(address))
            if holder is not None:
                holder.rest(int(address), since)
        rows = self._db.execute("SELECT address, pool, owner, created, expires FROM allocations").fetchall()
        for text, name, owner, created, expires in rows:
            address = ip_address(text)
            block = self.shelf(name, Family.of(address.version)).holder(int(address))
            if block is None:
                log.error(
                    "an allocation lies in no block of this node and is dropped",
                    extra={"address": text, "owner": owner, "pool": name},
                )
                with self._db:
                    self._db.execute("DELETE FROM allocations WHERE address = ?", (text,))
                continue
            block.restore(int(address))
            made = self.make(block, int(address), name, owner, expires, created)
            self._enter(made)

    def _shelve(self, pool: Pool, network: Network, gateway: Address | None = None) -> Block:
        block = Block(network, _excluded(pool, network.version), None if gateway is None else int(gateway))
        self.shelf(pool.name, Family.of(network.version)).add(block)
        return block

    def _enter(self, allocation: Allocation) -> None:
        if (old := self._by_address.get(allocation.address)) is not None:
            self._leave(old)
        self._by_address[allocation.address] = allocation
        self._by_key[allocation.owner, allocation.pool, allocation.family] = allocation
        self._by_owner.setdefault(allocation.owner, []).append(allocation)
        if allocation.expires_unix_seconds:
            heapq.heappush(self._expiries, (allocation.expires_unix_seconds, allocation.address))

    def _leave(self, allocation: Allocation) -> None:
        del self._by_address[allocation.address]
        self._by_key.pop((allocation.owner, allocation.pool, allocation.family), None)
        left = [a for a in self._by_owner[allocation.owner] if a.address != allocation.address]
        if left:
            self._by_owner[allocation.owner] = left
        else:
            del self._by_owner[allocation.owner]


def choose_gateway(pool: Pool, network: Network) -> Address:
    """The node's own address in a block it is about to claim. ValueError when all of it is excluded."""
    return to_address(network.version, gateway_of(network, _excluded(pool, network.version)))


def _excluded(pool: Pool, version: int) -> list[Range]:
    return ranges(n for n in pool.excluded if n.version == version)
