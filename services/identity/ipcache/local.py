"""Declarations of this node only, kept in the node's database until their owner takes them back."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Mapping
from ipaddress import ip_network

from services.common import errors
from services.identity.ipcache.model import ALL_IPV4, Entry, Source, network_of, prefix_key, spans_ipv4
from services.identity.ipcache.table import Table
from services.identity.numbers import Reserved


class LocalEntries:
    """The only user of table `local_entries`; used on the event loop.

    Several owners may declare the same prefix if they mean the same identity; it lasts until the last of them has taken
    it back.
    """

    def __init__(self, db: sqlite3.Connection, table: Table) -> None:
        """Declares in `table` what the database has."""
        self._db = db
        self._table = table
        self._owners: dict[bytes, dict[str, int]] = {}
        self._spanning: set[bytes] = set()
        for prefix, owner, identity in db.execute("SELECT prefix, owner, identity FROM local_entries"):
            self._owners.setdefault(prefix_key(ip_network(prefix)), {})[owner] = identity
        for key in self._owners:
            self._declare(key)
        self._keep_ipv4_apart()

    def __len__(self) -> int:
        return len(self._owners)

    def new(self, keys: Collection[bytes]) -> set[bytes]:
        """Those of the keys that nobody has declared yet."""
        return set(keys) - self._owners.keys()

    def put(self, owner: str, entries: Mapping[bytes, int]) -> None:
        """Declare all of them (key -> identity) or, by FailedPrecondition, none."""
        for number, (key, identity) in enumerate(entries.items()):
            for other, theirs in self._owners.get(key, {}).items():
                if other != owner and theirs != identity:
                    raise errors.FailedPrecondition(
                        f"{network_of(key)} has been declared by {other!r} with identity {theirs}",
                        field=f"entries[{number}]",
                        fix="use that identity, or have the other owner delete its entry",
                    )
        with self._db:
            self._db.executemany(
                "INSERT OR REPLACE INTO local_entries (prefix, owner, identity) VALUES (?, ?, ?)",
                [(str(network_of(key)), owner, identity) for key, identity in entries.items()],
            )
        for key, identity in entries.items():
            self._owners.setdefault(key, {})[owner] = identity
            self._declare(key)
        self._keep_ipv4_apart()

    def delete(self, owner: str, keys: Collection[bytes] | None) -> int:
        """Take these back, or all of the owner's; how many there were."""
        chosen = self._owners if keys is None else keys
        held = [key for key in chosen if owner in self._owners.get(key, {})]
        with self._db:
            self._db.executemany(
                "DELETE FROM local_entries WHERE prefix = ? AND owner = ?",
                [(str(network_of(key)), owner) for key in held],
            )
        for key in held:
            owners = self._owners[key]
            del owners[owner]
            if not owners:
                del self._owners[key]
            self._declare(key)
        self._keep_ipv4_apart()
        return len(held)

    def _declare(self, key: bytes) -> None:
        owners = self._owners.get(key)
        if owners:
            self._table.declare(Entry(key, next(iter(owners.values())), "", Source.LOCAL))
            if spans_ipv4(key):
                self._spanning.add(key)
        else:
            self._table.withdraw(Source.LOCAL, key)
            self._spanning.discard(key)

    def _keep_ipv4_apart(self) -> None:
        """To programs IPv4 is a part of IPv6, so ::/0 would also say what unknown IPv4 addresses are: the world."""
        if self._spanning and ALL_IPV4 not in self._owners:
            self._table.declare(Entry(ALL_IPV4, Reserved.WORLD, "", Source.LOCAL))
        elif ALL_IPV4 not in self._owners:
            self._table.withdraw(Source.LOCAL, ALL_IPV4)
