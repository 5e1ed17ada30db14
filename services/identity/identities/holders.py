"""Who on this node holds what; in the node's database, so that a restarted process knows.

A change counts at once and is written with all others of the same moment: a commit costs as much as ten changes. Whoever has
made one waits for `saved` before anybody is told of it.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator, Set
from typing import NamedTuple

from services.common.errors import FibrilError


class Held(NamedTuple):
    """What a holder has.

    key: the labels the number stands for, in canonical form; given: all labels of the holder, of which some may not count.
    """

    number: int
    key: str
    given: str


class Holders:
    """By name and by number. Used from one event loop."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._held: dict[str, Held] = {}
        self._of: dict[int, set[str]] = {}
        self._unsaved: dict[str, Held | None] = {}
        """Holders that have changed -> what they had."""
        self._waiting: list[asyncio.Future[None]] | None = None
        for holder, number, key, given in db.execute("SELECT holder, number, labels, given FROM holders"):
            self._link(holder, Held(number, key, given))

    def __len__(self) -> int:
        return len(self._held)

    def get(self, holder: str) -> Held | None:
        """What a holder has."""
        return self._held.get(holder)

    def of(self, number: int) -> Set[str]:
        """Who holds a number."""
        return self._of.get(number, frozenset())

    def numbers(self) -> Set[int]:
        """All numbers somebody holds."""
        return self._of.keys()

    def any_of(self, number: int) -> Held | None:
        """What any of the holders of a number has."""
        return next((self._held[holder] for holder in self.of(number)), None)

    def items(self, prefix: str = "") -> Iterator[tuple[str, Held]]:
        """All holders whose names begin so."""
        return ((holder, held) for holder, held in self._held.items() if holder.startswith(prefix))

    def put(self, holder: str, held: Held) -> Held | None:
        """Let a holder have this from now on; what it had."""
        old = self._unlink(holder)
        self._link(holder, held)
        self._save(holder, old)
        return old

    def remove(self, holder: str) -> Held | None:
        """Forget a holder; what it had."""
        old = self._unlink(holder)
        if old is not None:
            self._save(holder, old)
        return old

    async def saved(self) -> None:
        """Wait until all changes made so far are written. ResourceExhausted when the disk is full: they are undone then."""
        if self._waiting is not None:
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(done)
            await done

    def _save(self, holder: str, old: Held | None) -> None:
        self._unsaved.setdefault(holder, old)
        if self._waiting is None:
            self._waiting = []
            asyncio.get_running_loop().call_soon(self._write)

    def _write(self) -> None:
        changed, self._unsaved = self._unsaved, {}
        waiting, self._waiting = self._waiting or [], None
        failure: FibrilError | None = None
        gone = [(holder,) for holder in changed if holder not in self._held]
        now = [(holder, *self._held[holder]) for holder in changed if holder in self._held]
        try:
            with self._db:
                if gone:
                    self._db.executemany("DELETE FROM holders WHERE holder = ?", gone)
                if now:
                    self._db.executemany(
                        "INSERT OR REPLACE INTO holders (holder, number, labels, given) VALUES (?, ?, ?, ?)",
                        now,
                    )
        except FibrilError as error:
            for holder, old in changed.items():
                self._unlink(holder)
                if old is not None:
                    self._link(holder, old)
            failure = error
        for done in waiting:
            if done.done():
                continue
            if failure is None:
                done.set_result(None)
            else:
                done.set_exception(failure)

    def _link(self, holder: str, held: Held) -> None:
        self._held[holder] = held
        self._of.setdefault(held.number, set()).add(holder)

    def _unlink(self, holder: str) -> Held | None:
        old = self._held.pop(holder, None)
        if old is not None:
            others = self._of[old.number]
            others.discard(holder)
            if not others:
                del self._of[old.number]
        return old
