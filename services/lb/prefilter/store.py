"""What is declared on this node, on its disk.

A set is one blob a family, as keys.Keys has it, and the changes since it was written: adding one prefix to a million writes one
line. `stamp` is another number after each change, and the kernel's tables carry it too: so a restarted process knows
whether they are what is declared.
"""

from __future__ import annotations

import secrets
import sqlite3
from array import array
from collections.abc import Iterable, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Final

from services.common import db
from services.lb.prefilter.keys import Keys, family_of
from services.lb.prefilter.limits import Limit
from services.lb.prefilter.model import PrefixSet

MIGRATIONS: Final = (
    """
    CREATE TABLE stamp (value INTEGER NOT NULL);
    INSERT INTO stamp VALUES (0);
    CREATE TABLE sets (
        name TEXT PRIMARY KEY, ident INTEGER NOT NULL UNIQUE, allow INTEGER NOT NULL,
        v4 BLOB NOT NULL, expiry4 BLOB NOT NULL, v6 BLOB NOT NULL, expiry6 BLOB NOT NULL);
    CREATE TABLE changes (
        number INTEGER PRIMARY KEY, ident INTEGER NOT NULL, key BLOB NOT NULL, expiry INTEGER);
    CREATE INDEX changes_of ON changes (ident);
    CREATE TABLE limits (
        prefix TEXT PRIMARY KEY, ident INTEGER NOT NULL UNIQUE, rate INTEGER NOT NULL, burst INTEGER NOT NULL);
    """,
)
_CHANGES_MAX: Final = 20_000
"""Lines of changes of a set beyond which it is written anew."""


class PrefilterDb:
    """Used by one thread. Nothing is kept before `commit`."""

    def __init__(self, path: Path) -> None:
        """FailedPrecondition when the file cannot be used."""
        remedy = "restore it, or move it away and declare the prefilter's sets anew"
        self._db: sqlite3.Connection = db.open_db(path, MIGRATIONS, remedy)

    def close(self) -> None:
        self._db.close()

    def stamp(self) -> int:
        """0: nothing was ever declared."""
        return int(self._db.execute("SELECT value FROM stamp").fetchone()[0])

    def sets(self) -> list[PrefixSet]:
        """All, with their changes."""
        rows = self._db.execute("SELECT name, ident, allow, v4, expiry4, v6, expiry6 FROM sets").fetchall()
        found = []
        for name, ident, allow, v4, expiry4, v6, expiry6 in rows:
            put: dict[int, dict[bytes, int]] = {4: {}, 6: {}}
            drop: dict[int, set[bytes]] = {4: set(), 6: set()}
            for key, expiry in self._db.execute(
                "SELECT key, expiry FROM changes WHERE ident = ? ORDER BY number", (ident,)
            ):
                family = family_of(key)
                put[family].pop(key, None)
                drop[family].discard(key)
                if expiry is None:
                    drop[family].add(key)
                else:
                    put[family][key] = expiry
            keys4, keys6 = _keys(4, v4, expiry4), _keys(6, v6, expiry6)
            found.append(
                PrefixSet(
                    name, ident, bool(allow), keys4.merged(put[4], drop[4]), keys6.merged(put[6], drop[6])
                )
            )
        return found

    def limits(self) -> list[Limit]:
        rows = self._db.execute("SELECT prefix, rate, burst, ident FROM limits")
        return [Limit(ip_network(prefix), rate, burst, ident) for prefix, rate, burst, ident in rows]

    def write_set(self, each: PrefixSet) -> None:
        """All of it."""
        self._db.execute("DELETE FROM changes WHERE ident = ?", (each.ident,))
        self._db.execute(
            "INSERT OR REPLACE INTO sets VALUES (?, ?, ?, ?, ?, ?, ?)",
            (each.name, each.ident, each.allow, each.v4.raw, each.v4.expiry, each.v6.raw, each.v6.expiry),
        )

    def write_changes(self, each: PrefixSet, put: Mapping[bytes, int], drop: Iterable[bytes]) -> None:
        """What differs from what is there."""
        lines: list[tuple[int, bytes, int | None]] = [(each.ident, key, None) for key in drop]
        lines += [(each.ident, key, expiry) for key, expiry in put.items()]
        there = self._db.execute("SELECT count(*) FROM changes WHERE ident = ?", (each.ident,)).fetchone()[0]
        if there + len(lines) > _CHANGES_MAX:
            self.write_set(each)
        else:
            self._db.executemany("INSERT INTO changes (ident, key, expiry) VALUES (?, ?, ?)", lines)

    def delete_set(self, each: PrefixSet) -> None:
        self._db.execute("DELETE FROM changes WHERE ident = ?", (each.ident,))
        self._db.execute("DELETE FROM sets WHERE name = ?", (each.name,))

    def write_limit(self, limit: Limit) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO limits VALUES (?, ?, ?, ?)",
            (str(limit.prefix), limit.ident, limit.rate, limit.burst),
        )

    def delete_limit(self, limit: Limit) -> None:
        self._db.execute("DELETE FROM limits WHERE prefix = ?", (str(limit.prefix),))

    def commit(self) -> int:
        """Keep all that was written; the new stamp."""
        stamp = secrets.randbits(62) + 1
        self._db.execute("UPDATE stamp SET value = ?", (stamp,))
        with self._db:
            pass
        return stamp

    def rollback(self) -> None:
        self._db.rollback()


def _keys(family: int, raw: bytes, expiry: bytes) -> Keys:
    return Keys(family, raw, array("I", expiry) if expiry else None)
