"""What etcd says of identities, into the table."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing

from services.common.etcd.client import EtcdClient
from services.common.etcd.watch import Delete, Event, Put, Snapshot, watch_prefix
from services.identity.identities.store import IdentityStore, decode
from services.identity.identities.table import Change, Table


class Follower:
    """Used from one event loop."""

    def __init__(
        self, etcd: EtcdClient, store: IdentityStore, table: Table, told: Callable[[Sequence[Change]], None]
    ) -> None:
        """told: called with what has changed in the table."""
        self._etcd = etcd
        self._prefix = store.labels_prefix
        self._table = table
        self._told = told
        self.synced = asyncio.Event()
        """Set when the table has everything."""

    async def run(self) -> None:
        """Until cancelled."""
        async with aclosing(watch_prefix(self._etcd, self._prefix, self._table.renew)) as events:
            async for event in events:
                self._apply(event)

    def _apply(self, event: Event) -> None:
        match event:
            case Snapshot():
                for kv in event.kvs:
                    self._put(kv.key, kv.value, kv.mod_revision)
            case Put():
                self._put(event.key, event.value, event.mod_revision)
            case Delete():
                name = event.key.removeprefix(self._prefix)
                self._told(self._table.delete(name, event.mod_revision))
            case _:
                self.synced.set()

    def _put(self, key: str, value: bytes, revision: int) -> None:
        name = key.removeprefix(self._prefix)
        if not self._table.knows(name, revision):
            record = decode(name, value, revision)
            if record is not None:
                self._told(self._table.put(record))
