"""Identities that mean something on this node only: those of CIDRs and names. No etcd is needed for them."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Collection, Iterator
from typing import Final

from services.common import errors
from services.identity import numbers
from services.identity.identities.model import Identity

SPACE: Final = numbers.NUMBERS - 1


class LocalIdentities:
    """Numbers of cluster 4095, in the node's database."""

    def __init__(self, db: sqlite3.Connection, held: Collection[int]) -> None:
        """held: the numbers somebody holds; others of an earlier process are forgotten."""
        self._db = db
        rows = db.execute("SELECT number, labels FROM local_identities").fetchall()
        self._numbers: dict[str, int] = {key: number for number, key in rows}
        self._keys: dict[int, str] = dict(rows)
        for number in self._keys.keys() - held:
            self.forget(number)

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, number: int) -> Identity | None:
        """The identity with a number."""
        key = self._keys.get(number)
        return None if key is None else Identity(number, key)

    def find(self, key: str) -> Identity | None:
        """The identity of labels."""
        number = self._numbers.get(key)
        return None if number is None else Identity(number, key)

    def above(self, after: int) -> Iterator[Identity]:
        """Those with numbers above `after`, by number."""
        return (Identity(number, self._keys[number]) for number in sorted(self._keys) if number > after)

    def make(self, key: str) -> Identity:
        """A new identity, with a number at random: what was just freed may still be in some map. ResourceExhausted."""
        if len(self._keys) >= SPACE:
            raise errors.ResourceExhausted(
                f"all {SPACE} node-local identity numbers are used", fix="name fewer CIDRs and domain names"
            )
        at = random.randint(1, SPACE)
        while (number := numbers.make(numbers.LOCAL_CLUSTER, at)) in self._keys:
            at = at % SPACE + 1
        with self._db:
            self._db.execute("INSERT INTO local_identities (number, labels) VALUES (?, ?)", (number, key))
        self._numbers[key], self._keys[number] = number, key
        return Identity(number, key)

    def forget(self, number: int) -> None:
        """Nobody holds it any more."""
        with self._db:
            self._db.execute("DELETE FROM local_identities WHERE number = ?", (number,))
        del self._numbers[self._keys.pop(number)]
