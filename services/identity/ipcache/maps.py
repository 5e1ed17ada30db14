"""The ipcache in the kernel: the maps of bpf/abi/ipcache.h, written by this process alone.

The kernel's content is what a change is compared with, not a copy of it: a line that is right already is not written,
also not by a process that has just started and finds what its predecessor wrote. Every write counts in `writes`.

A value tells for GRACE_S after it was written what packets under way may still carry: the identity the address had
before, or INIT for a pod, whose first packets may leave before its own node knows its identity. Nothing takes
that back later: the value itself says until when it holds.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

from services.common import errors
from services.common.instance import Instance
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi
from services.common.service import ComponentStatus
from services.identity.ipcache.model import SINGLE_BYTES, Entry, Source
from services.identity.ipcache.table import Change, Table
from services.identity.numbers import Reserved

T = TypeVar("T")
log = logging.getLogger(__name__)

GRACE_S: Final = 5
WARN_SHARE: Final = 0.8
# Lines handled before others get their turn on the event loop.
_CHUNK: Final = 4096
# struct ipcache_entry: identity, before, before_until, node, flags.
_VALUE: Final = struct.Struct("=IIIHH")
_SINGLE_SOURCES: Final = (Source.NODE, Source.POD)


class _Map:
    """One of the two, opened."""

    def __init__(self, instance: Instance, name: str, key: type[Any]) -> None:
        self.name = name
        self._key: Any = key
        self.map: BpfMap[Any, abi.IpcacheEntry] = BpfMap.open(
            instance.pin_dir / abi.MAPS[name], key, abi.IpcacheEntry
        )
        self.capacity = self.map.info.max_entries
        self.count = 0
        self.unwritten: set[bytes] = set()
        """Keys for which there was no room."""

    @property
    def room(self) -> int:
        return max(0, self.capacity - self.count)

    def lookup(self, key: bytes) -> bytes | None:
        value = self.map.lookup(self._key.from_buffer_copy(key))
        return None if value is None else bytes(value)

    def update(self, key: bytes, value: bytes) -> None:
        self.map.update(self._key.from_buffer_copy(key), abi.IpcacheEntry.from_buffer_copy(value))

    def delete(self, key: bytes) -> bool:
        return self.map.delete(self._key.from_buffer_copy(key))

    def delete_many(self, keys: Iterable[bytes]) -> int:
        return self.map.delete_batch(self._key.from_buffer_copy(key) for key in keys)

    async def read(self) -> dict[bytes, bytes]:
        """Everything in it."""
        found: dict[bytes, bytes] = {}
        key_size, value_size = self.map.info.key_size, self.map.info.value_size
        for keys, values in self.map.items_packed():
            for number in range(len(keys) // key_size):
                key = keys[number * key_size : (number + 1) * key_size]
                found[key] = values[number * value_size : (number + 1) * value_size]
            await asyncio.sleep(0)
        return found

    def status(self) -> ComponentStatus:
        missing = len(self.unwritten)
        if missing:
            message = (
                f"map {self.name} holds {self.count} of {self.capacity} entries and lacks {missing}, whose "
                "packets are taken for their block's or the world's; split the cluster"
            )
        elif self.count >= WARN_SHARE * self.capacity:
            message = (
                f"map {self.name} holds {self.count} of {self.capacity} entries; split the cluster in time"
            )
        else:
            return ComponentStatus(
                f"map.{self.name}", "ok", f"{self.count} entries", used=self.count, capacity=self.capacity
            )
        return ComponentStatus(
            f"map.{self.name}", "degraded", message, used=self.count, capacity=self.capacity
        )


class IpcacheMaps:
    """Used on the event loop: a system call here takes microseconds."""

    def __init__(
        self,
        instance: Instance,
        index_of: Callable[[str], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """index_of: a node's index in nd_nodes; may raise a FibrilError when there are too many."""
        self._instance = instance
        self._index_of = index_of
        self._clock = clock
        self._maps: tuple[_Map, ...] = ()
        self._no_index: set[str] = set()
        self.indexes: dict[str, int] = {}
        """Nodes that lines have been made of -> the index these name."""
        self.writes = 0
        """Lines written or deleted in the kernel by this process."""
        self.problem = "the programs are not installed yet"

    # -- life

    def open(self) -> None:
        """Open what is pinned now, in place of what was open. NotFound while nothing is; then nothing changes."""
        made: list[_Map] = []
        try:
            for name, key in (("ipc_addr", abi.FibAddr), ("ipc_prefix", abi.IpcachePrefix)):
                made.append(_Map(self._instance, name, key))
        except errors.FibrilError:
            for each in made:
                each.map.close()
            raise
        self.close()
        self._maps = tuple(made)
        self.problem = ""

    def close(self) -> None:
        """The maps stay pinned."""
        for each in self._maps:
            each.map.close()
        self._maps = ()
        self.problem = "the programs are not installed yet"

    @property
    def attached(self) -> bool:
        """Whether maps are open."""
        return bool(self._maps)

    # -- writing

    async def adopt(self, table: Table) -> None:
        """Make the kernel have exactly what the table has: stale lines go, then what differs is written. What changes in
        the table meanwhile is for `apply` afterwards.
        """
        for each in self._maps:
            single = each is self._maps[0]
            keys = [key for key in table.prefixes() if (len(key) == SINGLE_BYTES) is single]
            present = await each.read()
            await self._remove_stale(each, present, table)
            await self._write_differences(each, keys, present, table)

    async def _remove_stale(self, each: _Map, present: dict[bytes, bytes], table: Table) -> None:
        stale = [key for key in present if table.get(key) is None]
        for chunk in _chunks(stale):
            self.writes += each.delete_many(chunk)
            await asyncio.sleep(0)
        each.count = len(present) - len(stale)

    async def _write_differences(
        self, each: _Map, keys: list[bytes], present: dict[bytes, bytes], table: Table
    ) -> None:
        changed: list[tuple[bytes, bytes]] = []
        new: list[tuple[Source, bytes, bytes]] = []
        each.unwritten = set()
        for chunk in _chunks(keys):
            for key in chunk:
                entry = table.get(key)
                if entry is None:
                    continue
                value = self._value(entry)
                if value is None:
                    each.unwritten.add(key)
                elif (held := present.get(key)) is None:
                    new.append((entry.source, key, value))
                elif not _says(held, value):
                    changed.append((key, value))
            await asyncio.sleep(0)
        await self._write(each, changed)
        room = each.room
        if len(new) > room:
            # What is many and can be told by its block goes without.
            new.sort(key=lambda line: line[0])
            each.unwritten.update(key for _, key, _ in new[room:])
        before = self.writes
        await self._write(each, [(key, value) for _, key, value in new[:room]])
        each.count += self.writes - before

    async def _write(self, each: _Map, lines: list[tuple[bytes, bytes]]) -> None:
        for chunk in _chunks(lines):
            keys, values = b"".join(key for key, _ in chunk), b"".join(value for _, value in chunk)
            done, error = each.map.update_packed(keys, values)
            self.writes += done
            if error is not None:
                self._refused(each, error, [key for key, _ in chunk[done:]])
            await asyncio.sleep(0)

    def apply(self, changes: Iterable[Change], table: Table) -> None:
        """Write what has changed. Only while maps are open, as `adopt` and `add`."""
        for change in changes:
            self._apply(self._map(change.key), change.key, change.new)
        for each in self._maps:
            # Room that has appeared.
            while each.unwritten and each.room:
                key = each.unwritten.pop()
                entry = table.get(key)
                if entry is not None:
                    self._apply(each, key, entry)
                    if key in each.unwritten:
                        break

    def add(self, entry: Entry) -> None:
        """Write a line before it is known what else there is: not over one that names a node."""
        each = self._map(entry.key)
        held = each.lookup(entry.key)
        if held is None or not _VALUE.unpack(held)[3]:
            self._apply(each, entry.key, entry)

    def _map(self, key: bytes) -> _Map:
        return self._maps[len(key) != SINGLE_BYTES]

    def _apply(self, each: _Map, key: bytes, entry: Entry | None) -> None:
        each.unwritten.discard(key)
        if entry is None:
            if each.delete(key):
                self.writes += 1
                each.count -= 1
            return
        value, held = self._value(entry), each.lookup(key)
        if value is None or (held is None and not each.room):
            self._refused(each, None, [key])
        elif held is None or not _says(held, value):
            try:
                each.update(key, value)
            except errors.ResourceExhausted as error:
                self._refused(each, error, [key])
                return
            self.writes += 1
            each.count += held is None

    def _refused(self, each: _Map, error: errors.FibrilError | None, keys: list[bytes]) -> None:
        if not each.unwritten:
            reason = str(error or f"{each.count} of {each.capacity} entries")
            log.error("an ipcache map lacks entries", extra={"map": each.name, "cause": reason})
        each.unwritten.update(keys)

    def _value(self, entry: Entry) -> bytes | None:
        """struct ipcache_entry if written now; None when the node has no index."""
        node = 0
        if entry.node:
            try:
                node = self.indexes[entry.node] = self._index_of(entry.node)
            except errors.FibrilError as error:
                if entry.node not in self._no_index:
                    self._no_index.add(entry.node)
                    log.error("a node has no index", extra={"node": entry.node, "cause": str(error)})
                return None
        before = entry.previous_identity
        if not before and entry.source is Source.POD:
            before = Reserved.INIT
        if before == entry.identity:
            before = 0
        single = entry.source in _SINGLE_SOURCES and entry.single
        return _VALUE.pack(
            entry.identity,
            before,
            int(self._clock()) + GRACE_S + 1 if before else 0,
            node,
            abi.IpcacheFlag.SINGLE if single else 0,
        )

    # -- telling

    def require_room(self, singles: int, prefixes: int) -> None:
        """ResourceExhausted if so many more lines do not fit."""
        for each, more in zip(self._maps, (singles, prefixes), strict=False):
            if more > each.room:
                raise errors.ResourceExhausted(
                    f"map {each.name} holds {each.count} of {each.capacity} entries: {more} more do not fit",
                    field="entries",
                    fix="declare fewer prefixes",
                )

    def usage(self) -> Iterator[tuple[str, int, int, int]]:
        """(map, entries, capacity, entries it lacks)."""
        return ((each.name, each.count, each.capacity, len(each.unwritten)) for each in self._maps)

    def status(self) -> list[ComponentStatus]:
        """One part a map."""
        return [each.status() for each in self._maps]


def _says(held: bytes, wanted: bytes) -> bool:
    """Whether two values differ in nothing but what may be carried for a while."""
    return held[:4] == wanted[:4] and held[12:] == wanted[12:]


def _chunks(items: list[T]) -> Iterator[list[T]]:
    return (items[at : at + _CHUNK] for at in range(0, len(items), _CHUNK))
