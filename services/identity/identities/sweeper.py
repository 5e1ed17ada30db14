"""Collecting identities that nobody holds. One node of the cluster does it, elected by a key under its lease.

Only that node follows the references. When a number has none, it is retired a moment later, in a transaction on condition that
there still is none and the identity has not changed; so it does no harm if two nodes believe to be elected, or if what this one
knows is old. A retired number hangs on a quarantine lease, and is free when that ends.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import aclosing, suppress
from typing import Final

from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.etcd.watch import Delete, Put, Snapshot, Synced, watch_prefix
from services.identity.identities.claims import Lease
from services.identity.identities.store import IdentityStore, Record
from services.identity.identities.table import Table

log = logging.getLogger(__name__)

GRACE_S: Final = 1.0
"""How long a number must have been without a reference; what follows identities and what follows references may be apart."""
ROUND_S: Final = 0.25
RESCAN_S: Final = 30.0
"""How often every identity is looked at: whatever was missed is collected then."""
_AT_ONCE = 400
_SHARED_S = 15
"""Seconds at most during which what is retired shares a quarantine lease: a lease a number would be dear."""
_RETRY_S = 1.0


class Sweeper:
    """Used from one event loop."""

    def __init__(
        self,
        etcd: EtcdClient,
        store: IdentityStore,
        table: Table,
        lease: Lease,
        node: str,
        quarantine_s: int,
        learned: Callable[[Record], None],
    ) -> None:
        """learned: told of each identity retired."""
        self._etcd = etcd
        self._store = store
        self._table = table
        self._lease = lease
        self._node = node
        self._quarantine_s = quarantine_s
        self._learned = learned
        self._quarantine = (0, 0.0)
        self._refs: dict[int, set[str]] = defaultdict(set)
        """Nodes that hold a number."""
        self._due: dict[int, float] = {}
        """Numbers without a reference -> when they are to be retired; soonest first."""
        self._changed = asyncio.Event()
        self.elected = ""
        """Name of the node that collects; empty while there is none or it is not known."""
        self.error = ""
        """Why nothing can be collected; empty when it can, or another node does."""

    async def run(self, synced: asyncio.Event) -> None:
        """Collect whenever elected; until cancelled. synced: set when the table is complete."""
        await synced.wait()
        leading: asyncio.Task[None] | None = None
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_election())
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_RETRY_S):
                        await self._changed.wait()
                self._changed.clear()
                if self.elected == self._node and leading is None:
                    log.info("this node collects identities nobody holds")
                    leading = group.create_task(self._lead())
                elif self.elected != self._node and leading is not None:
                    log.info("another node collects identities nobody holds", extra={"node": self.elected})
                    leading.cancel()
                    leading, self.error = None, ""
                if not self.elected:
                    await self._stand()

    async def resign(self) -> None:
        """Let another node be elected at once, instead of when the lease has ended."""
        if self.elected == self._node and self._etcd.healthy:
            with suppress(errors.FibrilError, TimeoutError):
                found = await self._etcd.get(self._store.sweeper_key)
                if found is not None and found.value == self._node.encode():
                    await self._etcd.delete_if(found.key, found.mod_revision)

    # -- election

    async def _follow_election(self) -> None:
        async with aclosing(watch_prefix(self._etcd, self._store.sweeper_key)) as events:
            async for event in events:
                match event:
                    case Snapshot():
                        self.elected = event.kvs[0].value.decode(errors="replace") if event.kvs else ""
                    case Put():
                        self.elected = event.value.decode(errors="replace")
                    case Delete():
                        self.elected = ""
                self._changed.set()

    async def _stand(self) -> None:
        if self._lease.valid:
            with suppress(errors.FibrilError):  # tried again, and whoever wins is told of by the watch
                await self._etcd.cas(self._store.sweeper_key, 0, self._node.encode(), lease=self._lease.lease)

    # -- collecting

    async def _lead(self) -> None:
        self._refs.clear()
        self._due.clear()
        complete = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_refs(complete))
            await complete.wait()
            rescan, pause = 0.0, ROUND_S
            while True:
                now = time.monotonic()
                if now >= rescan:
                    self._rescan(now)
                    rescan = now + RESCAN_S
                try:
                    more = await self._collect(now)
                    self.error, pause = "", ROUND_S
                except errors.FibrilError as error:
                    if self.error != str(error):
                        log.warning("cannot collect identities", extra={"error": str(error)})
                    self.error, more, pause = str(error), False, min(pause * 2, 5.0)
                if not more:
                    await asyncio.sleep(pause * random.uniform(0.5, 1))

    async def _follow_refs(self, complete: asyncio.Event) -> None:
        async with aclosing(watch_prefix(self._etcd, self._store.refs_prefix)) as events:
            async for event in events:
                match event:
                    case Snapshot():
                        for kv in event.kvs:
                            self._referred(kv.key)
                    case Put():
                        self._referred(event.key)
                    case Delete():
                        self._unreferred(event.key)
                    case Synced():
                        complete.set()

    def _referred(self, key: str) -> None:
        number, node = self._store.of_ref(key)
        self._refs[number].add(node)
        self._due.pop(number, None)

    def _unreferred(self, key: str) -> None:
        number, node = self._store.of_ref(key)
        nodes = self._refs[number]
        nodes.discard(node)
        if not nodes:
            del self._refs[number]
            self._due[number] = time.monotonic() + GRACE_S

    def _rescan(self, now: float) -> None:
        for record in self._table.actives():
            if record.number not in self._refs:
                self._due.setdefault(record.number, now + GRACE_S)

    async def _collect(self, now: float) -> bool:
        """Retire what is due; whether there is more."""
        ripe: list[Record] = []
        for number, due in list(self._due.items()):
            if due > now or len(ripe) == _AT_ONCE:
                break
            del self._due[number]
            record = self._table.get(number)
            if record is not None and not record.retired:
                ripe.append(record)
        if not ripe:
            return False
        try:
            lease = await self._quarantine_lease()
            results = await asyncio.gather(
                *(self._retire(record, lease) for record in ripe), return_exceptions=True
            )
            for failure in results:
                if isinstance(failure, errors.NotFound):
                    self._quarantine = (0, 0.0)
                if isinstance(failure, BaseException):
                    raise failure
        except errors.FibrilError:
            again = time.monotonic() + GRACE_S
            for record in ripe:
                if record.number not in self._refs:
                    self._due.setdefault(record.number, again)
            raise
        return len(ripe) == _AT_ONCE

    async def _retire(self, record: Record, lease: int) -> None:
        retired = await self._store.retire(record, lease)
        if retired is not None:
            self._learned(retired)
        # Else somebody holds it again, or it is not what is known here: then it is looked at again with all others.

    async def _quarantine_lease(self) -> int:
        """One that lasts at least the quarantine from now on."""
        lease, since = self._quarantine
        shared_s = min(_SHARED_S, self._quarantine_s // 4)
        if not lease or time.monotonic() - since >= shared_s:
            since = time.monotonic()
            lease = await self._etcd.grant(self._quarantine_s + shared_s + 1)
            self._quarantine = (lease, since)
        return lease
