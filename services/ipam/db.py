"""The node's local database: what this node has given out. One file, opened by one process, used on its
event loop.

WAL with synchronous=NORMAL: a commit costs some 30 µs, survives the death of any process, and after a power
cut the file is consistent but may miss the last commits (the containers they were for are gone then, too).
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.common import errors

log = logging.getLogger(__name__)

# Step n brings a database from version n-1 to n. Steps are only ever added.
MIGRATIONS = (
    """
    CREATE TABLE pools (name TEXT PRIMARY KEY, revision INTEGER NOT NULL, value BLOB NOT NULL);
    CREATE TABLE blocks (cidr TEXT PRIMARY KEY, pool TEXT NOT NULL, gateway TEXT NOT NULL);
    CREATE TABLE cloud_addresses (address TEXT PRIMARY KEY, pool TEXT NOT NULL);
    CREATE TABLE allocations (
        address TEXT PRIMARY KEY, pool TEXT NOT NULL, owner TEXT NOT NULL, created REAL NOT NULL, expires REAL NOT NULL);
    CREATE TABLE released (address TEXT PRIMARY KEY, pool TEXT NOT NULL, at REAL NOT NULL);
    CREATE TABLE endpoints (
        id INTEGER PRIMARY KEY, container_id TEXT NOT NULL, ifname TEXT NOT NULL, record BLOB NOT NULL, state TEXT NOT NULL,
        UNIQUE (container_id, ifname));
    """,
)


class NodeDb(sqlite3.Connection):
    """A connection that says what the disk lacks as callers and reconcilers expect it: ResourceExhausted."""

    def execute(self, *args: Any) -> sqlite3.Cursor:
        with _disk():
            return super().execute(*args)

    def executemany(self, *args: Any) -> sqlite3.Cursor:
        with _disk():
            return super().executemany(*args)

    def __exit__(self, *args: Any) -> Any:
        with _disk():
            return super().__exit__(*args)


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            raise
        raise errors.ResourceExhausted(
            f"the node's database cannot be written: {error}", fix="free space in the state directory"
        ) from error


def open_db(path: Path) -> sqlite3.Connection:
    """Open the database, made or migrated as needed.

    FailedPrecondition when the file is damaged or comes from a newer Fibril; nothing is changed then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o700)  # which pods run here, with which labels, is nobody else's business
    db = sqlite3.connect(path, isolation_level="DEFERRED", factory=NodeDb)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("integrity check failed")
        _migrate(db, path)
    except sqlite3.DatabaseError as error:
        db.close()
        raise errors.FailedPrecondition(
            f"the node's database {path} cannot be used: {error}",
            fix="restore it, or move it away: endpoints that exist are then removed as strangers",
        ) from None
    except BaseException:
        db.close()
        raise
    return db


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise errors.FailedPrecondition(
            f"the node's database {path} has version {version}, this Fibril knows {len(MIGRATIONS)}",
            fix="install the newer Fibril again",
        )
    for number in range(version, len(MIGRATIONS)):
        log.info("migrating the node's database", extra={"path": str(path), "to_version": number + 1})
        db.executescript(f"BEGIN; {MIGRATIONS[number]} PRAGMA user_version={number + 1}; COMMIT;")
