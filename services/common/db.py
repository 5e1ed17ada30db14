"""A service's local database on a node. One file, opened by one process, used on its event loop.

WAL with synchronous=NORMAL: a commit costs some 30 µs, survives the death of any process, and after a power
cut the file is consistent but may miss the last commits (the containers they were for are gone then, too).
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.common import errors

log = logging.getLogger(__name__)

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_REFUSED = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)


class NodeDb(sqlite3.Connection):
    """A connection that says what is wrong with file or disk as callers and reconcilers expect it: ResourceExhausted when
    the disk is full or fails, Unavailable when somebody else has locked the file, FailedPrecondition when it cannot be
    written or is damaged.
    """

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
    except sqlite3.DatabaseError as error:
        # A mistake of the caller has no code, or one of its own.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        why = f"the node's database cannot be written: {error}"
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            raise errors.ResourceExhausted(why, fix="free space in the state directory") from error
        if code in _LOCKED:
            raise errors.Unavailable(why, fix="end whatever else has opened it") from error
        if code in _REFUSED:
            raise errors.FailedPrecondition(why, fix="make the state directory writable") from error
        if code in _DAMAGED:
            raise errors.FailedPrecondition(
                f"the node's database is damaged: {error}", fix="restart the service, which says what to do"
            ) from error
        raise


def open_db(path: Path, migrations: Sequence[str], remedy: str) -> sqlite3.Connection:
    """Open the database, made or migrated as needed.

    migrations: step n (SQL) brings a database from version n-1 to n; steps are only ever added.
    remedy: what to do about a file that cannot be used, as an imperative clause.

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
        _migrate(db, path, migrations)
    except sqlite3.DatabaseError as error:
        db.close()
        raise _unusable(path, error, remedy) from None
    except errors.FailedPrecondition as error:
        db.close()
        if isinstance(error.__cause__, sqlite3.DatabaseError):
            raise _unusable(path, error.__cause__, remedy) from None
        raise
    except BaseException:
        db.close()
        raise
    return db


def _unusable(path: Path, error: sqlite3.DatabaseError, remedy: str) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(f"the node's database {path} cannot be used: {error}", fix=remedy)


def _migrate(db: sqlite3.Connection, path: Path, migrations: Sequence[str]) -> None:
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(migrations):
        raise errors.FailedPrecondition(
            f"the node's database {path} has version {version}, this Fibril knows {len(migrations)}",
            fix="install the newer Fibril again",
        )
    for number in range(version, len(migrations)):
        log.info("migrating the node's database", extra={"path": str(path), "to_version": number + 1})
        db.executescript(f"BEGIN; {migrations[number]} PRAGMA user_version={number + 1}; COMMIT;")
