"""Changes for watchers: a snapshot, a mark, then every change, resumable for a while.

Revisions begin at the clock (µs), so one of an earlier process is older than all that this process
remembers, and whoever resumes with it gets a snapshot.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from services.common import errors

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Change(Generic[T]):
    kind: Literal["put", "delete", "synced"]
    item: T | None
    revision: int


class Feed(Generic[T]):
    """Used from one event loop."""

    def __init__(self, snapshot: Callable[[], Iterable[T]], history: int = 1024) -> None:
        self._snapshot = snapshot
        self._changes: deque[Change[T]] = deque(maxlen=history)
        self.revision = time.time_ns() // 1000
        # Changes with a revision above this are all in `_changes`.
        self._oldest = self.revision
        self._news = asyncio.Event()
        self._waiting = 0

    def publish(self, kind: Literal["put", "delete"], item: T) -> None:
        """Tell everyone who watches."""
        self.revision += 1
        if len(self._changes) == self._changes.maxlen:
            self._oldest = self._changes[0].revision
        self._changes.append(Change(kind, item, self.revision))
        if self._waiting:
            self._news.set()
            self._news = asyncio.Event()

    async def watch(self, after: int = 0) -> AsyncIterator[Change[T]]:
        """Endless. With an `after` still remembered: only what followed it, else snapshot, "synced", what
        follows.

        Aborted when the reader falls further behind than the history reaches.
        """
        if self._oldest <= after <= self.revision:
            seen = after
        else:
            seen = self.revision
            for item in list(self._snapshot()):
                yield Change("put", item, seen)
            yield Change("synced", None, seen)
        while True:
            news, behind = self._news, self.revision - seen
            if seen < self._oldest:
                raise errors.Aborted(
                    f"the watcher fell {behind} changes behind", fix="watch again, for a new snapshot"
                )
            if not behind:
                self._waiting += 1
                try:
                    await news.wait()
                finally:
                    self._waiting -= 1
                continue
            for change in list(self._changes)[-behind:]:
                seen = change.revision
                yield change
