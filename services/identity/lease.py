"""The one lease of a node: all it has in etcd that shall vanish with it hangs on this.

Its id is kept in the node's database, so that a restarted process goes on with it and nobody sees it go.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3

from services.common.errors import FibrilError
from services.common.etcd.client import EtcdClient
from services.common.etcd.lease import LeaseKeeper, OnGrant

log = logging.getLogger(__name__)


class NodeLease:
    """See services.common.etcd.lease.LeaseKeeper. Used from one event loop.

    Everyone who keeps keys under the lease registers a callback, which makes etcd have exactly what it shall have:
    it reads what is there and writes the differences.
    """

    def __init__(self, etcd: EtcdClient, db: sqlite3.Connection, ttl_s: int, owner: str = "") -> None:
        """ttl_s: how long the others wait before they take the node for dead. owner: cluster and node; the lease that the
        database has of another one is not used, since its keys are that one's.
        """
        self._db = db
        self._owner = owner
        row = db.execute("SELECT id FROM lease WHERE owner = ?", (owner,)).fetchone()
        self._keeper = LeaseKeeper(etcd, ttl_s, lease=row[0] if row else 0, remember=self._remember)
        self._gate: OnGrant | None = None
        self._passed = 0
        self._passing = asyncio.Lock()

    def on_grant(self, callback: OnGrant) -> None:
        """Have `callback(lease)` called at the start and for each new lease, before or while `run` runs; see LeaseKeeper."""

        async def told(lease: int) -> None:
            await self._pass(lease)
            await callback(lease)

        self._keeper.on_grant(told)

    def first(self, gate: OnGrant) -> None:
        """Have `gate(lease)` succeed before anybody else is told of a lease: it makes sure that this node is the one of its
        name. Two of one name would take each other's keys for their own, and away.
        """
        self._gate = gate
        self._keeper.on_grant(self._pass)

    async def _pass(self, lease: int) -> None:
        async with self._passing:
            if self._gate is not None and self._passed != lease:
                await self._gate(lease)
            self._passed = lease

    @property
    def lease(self) -> int:
        """The lease's id; 0 while there is none that may be used."""
        lease = self._keeper.lease
        return lease if self._gate is None or lease == self._passed else 0

    @property
    def valid(self) -> bool:
        """Whether etcd must still have the lease, by our own clock."""
        return self._keeper.valid and self.lease != 0

    @property
    def problem(self) -> str:
        """One sentence; empty while all is well."""
        return self._keeper.problem

    def suspect(self) -> None:
        """Ask etcd at once whether it still has the lease: for whoever was told that it has not."""
        self._keeper.suspect()

    def replace(self) -> None:
        """Go on with another lease, since etcd has been put back to an earlier state; see LeaseKeeper."""
        self._keeper.replace()

    async def run(self) -> None:
        """Keep the lease until cancelled; it lasts some seconds longer, for the next process."""
        await self._keeper.run()

    async def revoke(self) -> None:
        """End the lease, and with it all that hangs on it: the node leaves. Raises Unavailable; it ends by itself then."""
        with self._db:
            self._db.execute("DELETE FROM lease")
        await self._keeper.revoke()

    def _remember(self, lease: int) -> None:
        try:
            with self._db:
                self._db.execute("DELETE FROM lease")
                self._db.execute("INSERT INTO lease (id, owner) VALUES (?, ?)", (lease, self._owner))
        except FibrilError as error:
            # Then the next process needs a lease of its own, which is no loss but of time.
            log.warning("cannot record the lease", extra={"error": str(error)})
