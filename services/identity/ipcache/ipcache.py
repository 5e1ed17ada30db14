"""The node's ipcache: everything that is known of addresses, in one table and, of that, in the kernel.

    etcd ip/ (pods) ──────┐
    Directory (nodes) ────┼──▶ Table ──▶ feed, lookup
    host's addresses ─────┤         └──▶ IpcacheMaps
    local declarations ───┘

The kernel is made to agree, and stale lines are removed, only once every source has told all it has: until then
what an earlier process wrote stays, and only what this node itself knows is added.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final, Protocol

from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.feed import Feed
from services.common.hostaddrs import HostAddresses
from services.common.instance import Instance
from services.common.kernel.netlink import IPAddress, Netlink
from services.common.service import ComponentStatus
from services.common.telemetry import metrics
from services.identity.ipcache.follow import AddressFollower
from services.identity.ipcache.local import LocalEntries
from services.identity.ipcache.maps import IpcacheMaps
from services.identity.ipcache.model import SINGLE_BYTES, Entry, Source, address_key
from services.identity.ipcache.table import Change, Table
from services.identity.nodes.model import Node
from services.identity.numbers import Reserved

log = logging.getLogger(__name__)

RESYNC_S: Final = 300.0
"""How often the kernel is compared with the table although nothing has changed."""
HISTORY: Final = 16384
"""Changes a watcher may fall behind: a relisting or a large declaration tells many at once."""


class Nodes(Protocol):
    """What is needed of nodes.directory.Directory."""

    synced: asyncio.Event

    def nodes(self) -> Mapping[str, Node]: ...

    def get(self, name: str) -> Node | None: ...

    def on_change(self, callback: Callable[[str], None]) -> None: ...


class Indexes(Protocol):
    """What is needed of nodes.index.NodeIndex."""

    def of(self, name: str) -> int: ...


class Watcher(Protocol):
    """Who follows what is published of pods, besides; see `Ipcache.tell`."""

    def seen(self, key: bytes, entry: Entry | None, revision: int) -> None:
        """What etcd has for an address since `revision`; None: nothing any more."""

    def replaced(self) -> None:
        """Revisions told from now on are of another etcd than before."""


class Ipcache:
    """Used from one event loop."""

    def __init__(
        self,
        etcd: EtcdClient,
        cluster: str,
        node: str,
        index: Indexes,
        directory: Nodes,
        instance: Instance,
        db: sqlite3.Connection,
        netlink: Netlink,
    ) -> None:
        """node: this node's name. Reads the database, nothing else."""
        self._node = node
        self._directory = directory
        self._table = Table(node)
        self._local = LocalEntries(db, self._table)
        self._maps = IpcacheMaps(instance, index.of)
        self._host = HostAddresses(netlink, self._own_changed)
        self._follower = AddressFollower(etcd, cluster, self)
        self._watchers: list[Watcher] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._compare_now = asyncio.Event()
        # Held while the kernel is compared as a whole; single changes wait for the end of it.
        self._comparing = asyncio.Lock()
        self.feed: Feed[Entry] = Feed(self._table.entries, HISTORY)
        """Tells nothing before `synced`."""
        self.synced = asyncio.Event()
        """Set when every source has told all it has; until then the table is not complete."""
        self.addresses_synced = self._follower.synced
        """Set when all that is published of pods has been told to those who `tell` names."""

    # -- life

    async def start(self) -> None:
        """Begin to follow all sources. Maps are used from `use_maps` on."""
        meter = metrics()
        meter.gauge("fibril.ipcache.entries", self._entries, description="entries in an ipcache map")
        meter.gauge(
            "fibril.ipcache.capacity", self._capacities, description="entries an ipcache map can hold"
        )
        meter.gauge("fibril.ipcache.unwritten", self._unwritten, description="entries without room in a map")
        meter.sum("fibril.ipcache.writes", lambda: [(self._maps.writes, {})], description="entries written")
        self._directory.on_change(self._node_changed)
        await self._host.start()
        self._tasks = [
            asyncio.create_task(self._follower.run(), name="ipcache.follow"),
            asyncio.create_task(self._host.run(), name="ipcache.addresses"),
            asyncio.create_task(self._keep(), name="ipcache.sync"),
        ]

    async def stop(self) -> None:
        """Stop following; the maps stay as they are."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._host.close()
        self._maps.close()

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Background work; none ever ends by itself."""
        return self._tasks

    def tell(self, watcher: Watcher) -> None:
        """Also tell this one what etcd has of pods; to be called before `start`."""
        self._watchers.append(watcher)

    async def use_maps(self) -> None:
        """Use the maps that are pinned now: to be called when the programs have been installed, also again. NotFound
        while there are none.
        """
        async with self._comparing:
            self._maps.open()
            if self.synced.is_set():
                await self._compare()
        if not self.synced.is_set():
            self._write_own()
        self._flush()

    async def compare(self) -> None:
        """Make the kernel agree with the table, whatever somebody did to it."""
        async with self._comparing:
            if self._maps.attached and self.synced.is_set():
                await self._compare()
        self._flush()

    async def settled(self) -> None:
        """Wait until a comparison that is under way has ended."""
        async with self._comparing:
            pass

    # -- asking

    def lookup(self, address: IPAddress) -> Entry | None:
        """The entry of the longest prefix that holds an address; None: the world."""
        return self._table.lookup(address)

    def entries(self) -> Iterable[Entry]:
        """All, in no order, as of now."""
        return list(self._table.entries())

    @property
    def version(self) -> int:
        """Grows with every change of an entry."""
        return self._table.version

    @property
    def writes(self) -> int:
        """Entries this process has written to or deleted from the kernel."""
        return self._maps.writes

    @property
    def problem(self) -> str:
        """Why the kernel may not agree with the cluster, one sentence; empty when nothing is wrong."""
        if not self.synced.is_set():
            missing = "nodes" if self.addresses_synced.is_set() else "the pods' addresses"
            return f"waiting for {missing} from etcd; the kernel keeps what it had"
        return self._maps.problem

    def status(self) -> list[ComponentStatus]:
        """Parts of the process's status."""
        problem = self.problem
        part = ComponentStatus(
            "ipcache", "degraded" if problem else "ok", problem or f"{len(self._table)} entries"
        )
        return [part, *self._maps.status()]

    # -- local declarations

    def put_local(self, owner: str, entries: Mapping[bytes, int]) -> None:
        """Declare prefixes (key -> identity) on this node, all or none. FailedPrecondition, ResourceExhausted."""
        new = self._local.new(entries)
        singles = sum(len(key) == SINGLE_BYTES for key in new)
        self._maps.require_room(singles, len(new) - singles)
        self._local.put(owner, entries)
        self._declared(entries)

    def delete_local(self, owner: str, keys: Collection[bytes] | None) -> int:
        """Take declarations of an owner back (None: all); how many there were."""
        deleted = self._local.delete(owner, keys)
        self._flush()
        return deleted

    def _declared(self, keys: Iterable[bytes]) -> None:
        if self._maps.attached and not self.synced.is_set() and not self._comparing.locked():
            for key in keys:
                entry = self._table.get(key)
                if entry is not None and entry.source is Source.LOCAL:
                    self._maps.add(entry)
        self._flush()

    # -- pods: what the follower tells (follow.Sink)

    def published(self, entry: Entry) -> None:
        self._table.put(entry)
        for watcher in self._watchers:
            watcher.seen(entry.key, entry, entry.revision)

    def withdrawn(self, key: bytes, revision: int) -> None:
        self._table.delete(Source.POD, key, revision)
        for watcher in self._watchers:
            watcher.seen(key, None, revision)

    def replaced(self) -> None:
        log.warning("etcd is another than before; its addresses are taken as they are now")
        self._table.forget_revisions(Source.POD)
        for watcher in self._watchers:
            watcher.replaced()

    def pause(self) -> None:
        self._flush()

    # -- nodes

    def _node_changed(self, name: str) -> None:
        node = self._directory.get(name)
        self._table.set_node(name, self._entries_of(name, node))
        if node is not None and self._maps.indexes.get(name, node.index) != node.index:
            # It was forgotten and is back while its pods have not changed.
            self._compare_now.set()
        self._flush()

    def _own_changed(self) -> None:
        self._node_changed(self._node)
        self._write_own()

    def _entries_of(self, name: str, node: Node | None) -> list[Entry]:
        own = name == self._node
        identity = Reserved.HOST if own else Reserved.REMOTE_NODE
        addresses: set[IPAddress] = set(self._host.taken) if own else set()
        revision = 0
        entries = []
        if node is not None:
            revision = node.revision
            addresses |= {a for a in (node.ipv4, node.ipv6) if a is not None} | node.gateways
            for block in node.blocks:
                entries.append(Entry.of(block, Reserved.UNMANAGED, name, Source.BLOCK, revision))
        for address in addresses:
            key = address_key(address)
            entries.append(Entry(key, identity, name, Source.NODE, revision=revision))
        return entries

    def _write_own(self) -> None:
        """While the sources are not in step: what this node itself knows, without taking anything away."""
        if self.synced.is_set() or not self._maps.attached or self._comparing.locked():
            return
        for entry in list(self._table.entries()):
            if entry.source is Source.LOCAL or (entry.source is Source.NODE and entry.node == self._node):
                self._maps.add(entry)

    # -- the kernel

    async def _keep(self) -> None:
        await self._follower.synced.wait()
        await self._directory.synced.wait()
        for name in self._directory.nodes():
            self._node_changed(name)
        async with self._comparing:
            self._table.take()  # nobody has been told anything yet
            self.synced.set()
            log.info("the ipcache is in step", extra={"entries": len(self._table)})
            if self._maps.attached:
                await self._compare()
        self._flush()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESYNC_S):
                    await self._compare_now.wait()
            self._compare_now.clear()
            await self.compare()

    async def _compare(self) -> None:
        self._publish()
        try:
            await self._maps.adopt(self._table)
        except errors.FibrilError as error:
            log.error("cannot compare the ipcache maps", extra={"cause": str(error)})

    def _flush(self) -> None:
        """Bring what has changed to those who watch and to the kernel."""
        if not self.synced.is_set() or self._comparing.locked():
            return
        changes = self._publish()
        if changes and self._maps.attached:
            self._maps.apply(changes, self._table)

    def _publish(self) -> list[Change]:
        changes = self._table.take()
        for change in changes:
            if change.new is not None:
                self.feed.publish("put", change.new)
            elif change.old is not None:
                self.feed.publish("delete", change.old)
        return changes

    # -- metrics; called on another thread

    def _entries(self) -> list[tuple[float, dict[str, str]]]:
        return [(count, {"map": name}) for name, count, _, _ in self._maps.usage()]

    def _capacities(self) -> list[tuple[float, dict[str, str]]]:
        return [(capacity, {"map": name}) for name, _, capacity, _ in self._maps.usage()]

    def _unwritten(self) -> list[tuple[float, dict[str, str]]]:
        return [(missing, {"map": name}) for name, _, _, missing in self._maps.usage()]
