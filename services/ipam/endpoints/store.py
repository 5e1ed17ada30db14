"""Endpoint records in the node's sqlite database. Every call commits: a killed process loses nothing it
recorded.

The connection belongs to the event loop's thread; one write costs about 50 µs (write-ahead log, no fsync).
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable

from services.ipam.endpoints.model import EndpointRecord

log = logging.getLogger(__name__)


class Store:
    """Table `endpoints` of the database that services.ipam.db opens."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def load(self) -> list[EndpointRecord]:
        """All records by number. One that cannot be read is logged and removed: its kernel side is then an
        orphan.
        """
        records = []
        for number, data in self._db.execute("SELECT id, record FROM endpoints ORDER BY id").fetchall():
            try:
                records.append(EndpointRecord.decode(data))
            except ValueError as error:
                log.error(
                    "unreadable endpoint record removed", extra={"endpoint": number, "cause": str(error)}
                )
                self.delete(number)
        return records

    def put(self, record: EndpointRecord) -> None:
        """Insert or replace."""
        self.put_all([record])

    def put_all(self, records: Iterable[EndpointRecord]) -> None:
        """Insert or replace, in one transaction."""
        with self._db:
            self._db.executemany(
                "INSERT INTO endpoints(id, container_id, ifname, record, state) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT(id) DO UPDATE SET container_id=excluded.container_id, ifname=excluded.ifname, "
                "record=excluded.record, state=excluded.state",
                [(r.id, r.container_id, r.ifname, r.encode(), r.state.name) for r in records],
            )

    def delete(self, number: int) -> None:
        """Absent is success."""
        with self._db:
            self._db.execute("DELETE FROM endpoints WHERE id = ?", (number,))
