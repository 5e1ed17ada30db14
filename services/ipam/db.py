"""The ipam service's database: what this node has given out."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from services.common import db

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


def open_db(path: Path) -> sqlite3.Connection:
    """See services.common.db.open_db."""
    return db.open_db(
        path, MIGRATIONS, "restore it, or move it away: endpoints that exist are then removed as strangers"
    )
