"""Numbers for the cluster's nodes in the BPF maps of this machine: small, persistent, never two nodes' at once.

A number must mean the same node after a restart, since the maps still hold it. One that was forgotten rests for a
while: ipcache entries that name it may not be gone yet.
"""

from __future__ import annotations

import heapq
import sqlite3
import time
from collections.abc import Callable
from typing import Final

from services.common import errors
from services.common.pipeline.abi import ND_MAX

REST_S: Final = 600.0


class NodeIndex:
    """Used from one event loop."""

    def __init__(self, db: sqlite3.Connection, clock: Callable[[], float] = time.monotonic) -> None:
        self._db = db
        self._clock = clock
        self._by_name: dict[str, int] = dict(db.execute("SELECT name, idx FROM node_indexes"))
        self._by_index = {index: name for name, index in self._by_name.items()}
        self._free = [index for index in range(1, ND_MAX) if index not in self._by_index]
        self._resting: list[tuple[float, int]] = []

    def of(self, name: str) -> int:
        """The node's number, given to it if it has none. ResourceExhausted when all are taken."""
        index = self._by_name.get(name)
        if index is not None:
            return index
        while self._resting and self._resting[0][0] <= self._clock():
            heapq.heappush(self._free, heapq.heappop(self._resting)[1])
        if not self._free:
            raise errors.ResourceExhausted(
                f"{len(self._by_name)} nodes are known and {len(self._resting)} were deleted lately, "
                f"of {ND_MAX - 1} that the map of nodes can hold",
                fix="delete nodes that are gone for good: fibril node rm NAME",
            )
        index = self._free[0]
        with self._db:
            self._db.execute("INSERT INTO node_indexes (name, idx) VALUES (?, ?)", (name, index))
        heapq.heappop(self._free)
        self._by_name[name] = index
        self._by_index[index] = name
        return index

    def name_of(self, index: int) -> str:
        """The node that has a number; "" if none has."""
        return self._by_index.get(index, "")

    def names(self) -> frozenset[str]:
        """All that have one."""
        return frozenset(self._by_name)

    def forget(self, name: str) -> None:
        """The node is gone for good; one that has no number is fine."""
        index = self._by_name.get(name)
        if index is None:
            return
        with self._db:
            self._db.execute("DELETE FROM node_indexes WHERE name = ?", (name,))
        del self._by_name[name], self._by_index[index]
        heapq.heappush(self._resting, (self._clock() + REST_S, index))
