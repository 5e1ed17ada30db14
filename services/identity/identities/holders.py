"""Who on this node holds what; in the node's database, so that a restarted process knows."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Set
from typing import NamedTuple


class Held(NamedTuple):
    """What a holder has.

    key: the labels the number stands for, in canonical form; given: all labels of the holder, of which some may not count.
    """

    number: int
    key: str
    given: str


class Holders:
    """By name and by number. Methods that write raise ResourceExhausted when the disk is full; nothing has changed then."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._held: dict[str, Held] = {}
        self._of: dict[int, set[str]] = {}
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
        """Record what a holder has; what it had."""
        with self._db:
            self._db.execute(
                "INSERT INTO holders (holder, number, labels, given) VALUES (?, ?, ?, ?) ON CONFLICT (holder) "
                "DO UPDATE SET number = excluded.number, labels = excluded.labels, given = excluded.given",
                (holder, *held),
            )
        old = self._unlink(holder)
        self._link(holder, held)
        return old

    def remove(self, holder: str) -> Held | None:
        """Forget a holder; what it had."""
        if holder not in self._held:
            return None
        with self._db:
            self._db.execute("DELETE FROM holders WHERE holder = ?", (holder,))
        return self._unlink(holder)

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
