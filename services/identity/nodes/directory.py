"""All nodes of the cluster, followed in etcd:

/fibril/v1/<cluster>/nodes/<name>            fibril.node.v1.StoredNode, without lease
/fibril/v1/<cluster>/alive/<name>            fibril.node.v1.StoredAlive, under the node's lease
/fibril/v1/<cluster>/blocks/<pool>/<block>   fibril.ipam.v1.Block, written by the ipam service
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Final

from google.protobuf.message import DecodeError

from fibril.node.v1 import node_pb2 as pb
from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.etcd.watch import Delete, Put, Snapshot, Synced, watch_prefix
from services.common.feed import Feed
from services.common.telemetry import metrics
from services.identity.nodes.index import NodeIndex
from services.identity.nodes.model import Node, NodeState
from services.identity.nodes.roster import Alive, Roster, decode_block, decode_node

log = logging.getLogger(__name__)

NODES, ALIVE, BLOCKS = "nodes/", "alive/", "blocks/"
HISTORY: Final = 16384
RETRY_S: Final = 30.0


def root_of(cluster: str) -> str:
    """What all keys of a cluster begin with."""
    return f"/fibril/v1/{cluster}/"


class Directory:
    """Used from one event loop."""

    def __init__(self, etcd: EtcdClient, cluster: str, own: str, index: NodeIndex) -> None:
        """own: this node's name."""
        self._etcd = etcd
        self._own = own
        self._index = index
        self.root = root_of(cluster)
        self._roster = Roster(own, index.of)
        self._callbacks: list[Callable[[str], None]] = []
        self._unread = {NODES, ALIVE, BLOCKS}
        self._tasks: list[asyncio.Task[None]] = []
        self._unusable: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self.feed: Feed[Node] = Feed(lambda: self._roster.nodes.values(), HISTORY)
        self.synced = asyncio.Event()
        """Set when all there is has been read once; nobody is told of anything before, and no node is known."""

    # -- life

    async def start(self) -> None:
        """Begin to follow."""
        metrics().gauge("fibril.node.count", self._gauge, description="nodes by state")
        self._tasks.append(asyncio.create_task(self._try_again(), name="nodes.refused"))
        for part in (NODES, ALIVE, BLOCKS):
            self._tasks.append(asyncio.create_task(self._follow(part), name=f"nodes.{part.rstrip('/')}"))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Endless; one that ends is a failure."""
        return tuple(self._tasks)

    @property
    def problem(self) -> str:
        """One sentence, empty when all that etcd says of nodes is understood and taken in."""
        if self._refused:
            name, why = min(self._refused.items())
            return f"node {name}{_others(self._refused)} cannot be taken in: {why}"
        if self._unusable:
            key, why = min(self._unusable.items())
            return f"etcd's key {self.root}{key}{_others(self._unusable)} is not usable: {why}"
        return ""

    # -- reading

    def nodes(self) -> Mapping[str, Node]:
        """Every node by name; not to be changed."""
        return self._roster.nodes

    def get(self, name: str) -> Node | None:
        return self._roster.nodes.get(name)

    def alive(self, name: str) -> Alive | None:
        """The node's sign of life; it may be there without a record."""
        return self._roster.alive(name)

    @property
    def local(self) -> Node | None:
        """This node, once it is registered."""
        return self._roster.nodes.get(self._own)

    def on_change(self, callback: Callable[[str], None]) -> None:
        """Call back with the name of a node that has come, changed or gone."""
        self._callbacks.append(callback)

    # -- following

    async def _follow(self, part: str) -> None:
        prefix = self.root + part
        async with aclosing(watch_prefix(self._etcd, prefix)) as events:
            async for event in events:
                match event:
                    case Snapshot(kvs):
                        for kv in kvs:
                            self._put(part, kv.key.removeprefix(prefix), kv.value, kv.mod_revision)
                    case Put(key, value, revision):
                        self._changed(self._put(part, key.removeprefix(prefix), value, revision))
                    case Delete(key):
                        self._changed(self._deleted(part, key.removeprefix(prefix)))
                    case Synced():
                        self._read(part)

    def _read(self, part: str) -> None:
        if part not in self._unread:
            return
        self._unread.discard(part)
        if self._unread:
            return
        self.synced.set()
        self._changed(self._known)

    @property
    def _known(self) -> set[str]:
        return self._roster.names() | self._index.names()

    def _put(self, part: str, key: str, value: bytes, revision: int) -> set[str]:
        roster = self._roster
        try:
            if part == NODES:
                changed = {roster.put_record(decode_node(key, value, revision))}
            elif part == ALIVE:
                changed = {roster.put_alive(key, Alive(pb.StoredAlive.FromString(value).token, revision))}
            else:
                changed = roster.put_block(key, decode_block(value))
        except (ValueError, DecodeError) as error:
            log.warning("a key of a node is not usable", extra={"key": part + key, "error": str(error)})
            # What it said before counts no longer.
            changed = self._deleted(part, key)
            self._unusable[part + key] = str(error)
        else:
            self._unusable.pop(part + key, None)
        return changed

    def _deleted(self, part: str, key: str) -> set[str]:
        self._unusable.pop(part + key, None)
        if part == NODES:
            return {self._roster.delete_record(key)}
        if part == ALIVE:
            return {self._roster.delete_alive(key)}
        return self._roster.delete_block(key)

    def _changed(self, names: Iterable[str]) -> None:
        if not self.synced.is_set():
            return
        for name in names:
            before, changed = self._roster.nodes.get(name), False
            try:
                changed = self._roster.refresh(name)
                self._refused.pop(name, None)
                if name not in self._roster.nodes:
                    # For good: a node that only died keeps its record.
                    self._index.forget(name)
            except errors.FibrilError as error:
                if self._refused.get(name) != str(error):
                    log.error("a node cannot be taken in", extra={"node": name, "error": str(error)})
                self._refused[name] = str(error)
            if changed:
                self._tell(name, before)

    def _tell(self, name: str, before: Node | None) -> None:
        node = self._roster.nodes.get(name)
        if node is not None:
            self.feed.publish("put", node)
        elif before is not None:
            self.feed.publish("delete", before)
        for callback in self._callbacks:
            callback(name)

    async def _try_again(self) -> None:
        """Numbers that were forgotten become free, and so does a disk."""
        while True:
            await asyncio.sleep(RETRY_S)
            self._changed(tuple(self._refused))

    def _gauge(self) -> Iterable[tuple[float, dict[str, str]]]:
        states = Counter(node.state for node in list(self._roster.nodes.values()))
        return [(states[state], {"state": state.name.lower()}) for state in NodeState]


def _others(all_of: Mapping[str, str]) -> str:
    return f" (and {len(all_of) - 1} more)" if len(all_of) > 1 else ""
