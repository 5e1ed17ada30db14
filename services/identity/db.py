"""The identity service's database: what this node holds and must find again after a restart."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from services.common import db

MIGRATIONS = (
    """
    CREATE TABLE lease (id INTEGER NOT NULL, owner TEXT NOT NULL);
    CREATE TABLE holders (
        holder TEXT PRIMARY KEY, number INTEGER NOT NULL, labels TEXT NOT NULL, given TEXT NOT NULL);
    CREATE TABLE local_identities (number INTEGER PRIMARY KEY, labels TEXT NOT NULL UNIQUE);
    CREATE TABLE local_entries (
        prefix TEXT NOT NULL, owner TEXT NOT NULL, identity INTEGER NOT NULL, PRIMARY KEY (prefix, owner));
    CREATE TABLE node_indexes (name TEXT PRIMARY KEY, idx INTEGER NOT NULL UNIQUE);
    """,
)


def open_db(path: Path) -> sqlite3.Connection:
    """See services.common.db.open_db. Labels are JSON with sorted keys.

    holders.labels: those that count, which the number stands for; given: all that the holder has.
    """
    return db.open_db(path, MIGRATIONS, "restore it, or move it away: holders must then ask again")
