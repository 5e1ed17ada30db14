"""What this node holds in etcd: one reference a number, under the node's lease.

A number is *held* when this node has seen its reference written in the current epoch, and the lease is valid by our own clock:
then nobody can have collected it, and no round trip is needed to know. Everything else goes through a transaction. Who asks for
labels that are being asked for already waits for that.

    not known            create   on condition that neither labels nor number are taken
    known                take     on condition that it has not changed
    in quarantine        revive   on condition that it has not changed, and that the labels have no other
    condition not met    look at what there is, and again
    outcome not known    look again; if nobody waits any more, begin another epoch and drop what has come of it

Nothing is given back at once: whoever wants it again within a moment finds it held.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Final, Protocol

from services.common import errors
from services.identity.identities.model import digest
from services.identity.identities.store import Epoch, IdentityStore, Record
from services.identity.identities.table import Table

log = logging.getLogger(__name__)

LINGER_S: Final = 0.2
"""How long what nobody holds any more is kept."""
_PATIENCE_S = 2.0
_BACKOFF_S = (0.2, 5.0)


class Lease(Protocol):
    """What is needed of lease.NodeLease."""

    @property
    def lease(self) -> int: ...

    @property
    def valid(self) -> bool: ...

    @property
    def problem(self) -> str: ...

    def suspect(self) -> None: ...


class Owner(Protocol):
    """Who knows what this node's holders have."""

    def wanted(self) -> Iterable[int]:
        """Numbers somebody on this node has."""

    def wants(self, number: int) -> bool:
        """Whether it is one of those."""

    def learned(self, record: Record) -> None:
        """This node has made an identity, or found it."""

    def learned_absent(self, name: str, revision: int) -> None:
        """This node has found that labels have no identity."""

    def begun(self) -> None:
        """What is held has been read anew; something may be missing."""


class Claims:
    """Used from one event loop."""

    def __init__(
        self, store: IdentityStore, table: Table, lease: Lease, cluster_id: int, owner: Owner
    ) -> None:
        self._store = store
        self._table = table
        self._lease = lease
        self._cluster_id = cluster_id
        self._owner = owner
        self._epoch: Epoch | None = None
        """None while another is begun: nothing can be taken then, and what is held stays so."""
        self._first = True
        self._beginning = asyncio.Lock()
        self._begun = asyncio.Event()
        self._refs: dict[int, int] = {}
        """Held numbers -> revision of the reference; certain as long as the lease `_refs_lease` is valid."""
        self._refs_lease = 0
        self._drops: dict[int, int] = {}
        """As above, of those to be given back. They may be gone already."""
        self._idle: set[int] = set()
        """Numbers that may have become nobody's."""
        self._underway: set[int] = set()
        self._doubtful: set[int] = set()
        """Numbers whose reference may or may not have been written."""
        self._flights: dict[str, _Flight] = {}
        self._wake = asyncio.Event()
        self._refusal: errors.FibrilError | None = None
        self._error = ""

    @property
    def ready(self) -> bool:
        """Whether what is held is certainly held."""
        return self._lease.valid and self._lease.lease == self._refs_lease

    @property
    def problem(self) -> str:
        """One sentence; empty when all is well."""
        if self._refusal is not None:
            return str(self._refusal)
        return self._error or ("" if self.ready else self._why())

    def held(self, key: str) -> int:
        """The number of these labels, if this node certainly holds it; else 0."""
        return self._held(digest(key))

    def _held(self, name: str) -> int:
        record = self._table.of(name)
        return record.number if record is not None and record.number in self._refs and self.ready else 0

    async def hold(self, key: str, prefer: int = 0) -> int:
        """The number of these labels, which this node holds from now on for as long as the owner wants it.

        prefer: the number to make it with, if it must be made and that is free.

        Unavailable without etcd or lease, ResourceExhausted when there is no number, FailedPrecondition when this node is
        configured for another cluster.
        """
        name = digest(key)
        while not (number := self._held(name)):
            flight = self._flights.get(name)
            if flight is None:
                flight = self._flights[name] = _Flight()
                flight.task = asyncio.create_task(self._fly(flight, key, name, prefer), name="identity.hold")
            await flight.landing()
        return number

    def let_go(self, number: int) -> None:
        """Somebody does not want it any more. If nobody does, it is given back soon."""
        self._idle.add(number)
        self._wake.set()

    def lost(self, number: int) -> None:
        """The owner has seen that somebody else has changed it: it is not held, whatever was known here."""
        revision = self._refs.pop(number, None)
        if revision is not None:
            self._drops[number] = revision
            self._wake.set()

    # -- epochs

    async def begin(self, lease: int) -> None:
        """Have references under this lease to what is wanted and still there, and to nothing else. For NodeLease."""
        async with self._beginning:
            self._epoch = None
            self._begun.clear()
            try:
                await self._store.claim(self._cluster_id)
            except errors.FailedPrecondition as error:
                if self._refusal is None:
                    log.error("identities cannot be allocated", extra={"error": str(error)})
                self._refusal = error
                self._begun.set()
                raise
            self._refusal = None
            asked = {*self._refs, *self._drops, *self._underway, *self._doubtful, *self._owner.wanted()}
            if self._first:
                # What a process before this one may have taken and not recorded.
                asked |= await self._store.refs_under(lease)
            epoch = await self._store.begin(lease)
            found = await self._store.refs(asked)
            self._first = False
            self._doubtful -= asked
            self._refs, self._drops = {}, {}
            for number, reference in found.items():
                if not self._owner.wants(number):
                    self._drops[number] = reference.revision
                elif reference.lease == lease:
                    self._refs[number] = reference.revision
                # Else it goes with another lease; the owner takes it anew.
            self._epoch, self._refs_lease = epoch, lease
            self._begun.set()
        self._owner.begun()
        self._wake.set()

    async def _right(self, deadline: float) -> Epoch:
        """The epoch, waited for where it is about to begin. Unavailable, FailedPrecondition."""
        while True:
            if self._refusal is not None:
                raise self._refusal
            if self._epoch is not None and self.ready:
                return self._epoch  # of the same lease
            left = deadline - time.monotonic()
            if left <= 0 or not (self._first or self._lease.valid):
                raise errors.Unavailable(
                    f"identities cannot be allocated: {self._why()}", fix="check etcd; it is tried again"
                )
            if self._epoch is not None and self._lease.valid:
                self._epoch = None  # of the lease before this one
                self._begun.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._begun.wait()

    def _why(self) -> str:
        if self._lease.valid:
            return "what this node holds has yet to be read from etcd"
        return self._lease.problem or "this node has no lease in etcd"

    def _end(self, epoch: Epoch) -> None:
        """It turned out that it has ended."""
        if self._epoch == epoch:
            self._epoch, self._refs_lease = None, 0
            self._begun.clear()
            self._lease.suspect()
            self._wake.set()

    # -- taking

    async def _fly(self, flight: _Flight, key: str, name: str, prefer: int) -> None:
        error: Exception | None = None
        try:
            await self._acquire(key, name, prefer)
        except Exception as failure:
            error = failure
        finally:
            del self._flights[name]
            flight.land(error)

    async def _acquire(self, key: str, name: str, prefer: int) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        last: errors.FibrilError | None = None
        while True:
            epoch = await self._right(deadline)
            record = self._table.of(name)
            number = self._pick(prefer) if record is None else record.number
            self._underway.add(number)
            try:
                if not await self._attempt(key, number, record, epoch):
                    await self._look(name, number, epoch)
                elif epoch == self._epoch:
                    self.let_go(number)
                    return
                else:
                    self._doubtful.add(number)
            except errors.NotFound:
                self._end(epoch)
            except errors.Unavailable as error:
                self._doubtful.add(number)
                self._wake.set()
                last = error
            finally:
                self._underway.discard(number)
            if time.monotonic() > deadline:
                raise last or errors.Unavailable(
                    "labels cannot be given an identity: it keeps changing", fix="try again"
                )

    def _pick(self, prefer: int) -> int:
        if prefer and self._table.get(prefer) is None and prefer not in self._underway:
            return prefer
        return self._table.pick(self._underway)

    async def _attempt(self, key: str, number: int, record: Record | None, epoch: Epoch) -> bool:
        """Try to get a reference; whether there is one now. Raises NotFound when the lease has ended."""
        revision: int | None = None
        if record is not None and not record.retired:
            revision = await self._store.take(record, epoch)
        else:
            if record is None:
                made = await self._store.create(number, key, epoch)
            else:
                made = await self._store.revive(record, epoch)
            if made is not None:
                self._owner.learned(made)
                revision = made.revision
        if revision is None:
            return False
        if epoch == self._epoch:
            self._refs[number] = revision
            self._drops.pop(number, None)
        return True

    async def _look(self, name: str, number: int, epoch: Epoch) -> None:
        """Learn why something was not as it was supposed to be."""
        look = await self._store.look(name, number)
        if look.occupant is not None:
            self._owner.learned(look.occupant)
        if look.theirs is not None:
            self._owner.learned(look.theirs)
        else:
            self._owner.learned_absent(name, look.revision)
        if look.epoch != epoch.revision and self._epoch == epoch:
            log.warning("what this node holds is read anew: its lease was lost, or another node has its name")
            self._end(epoch)

    # -- giving back

    async def keep(self) -> None:
        """Give back what nobody wants, and clear up doubts; until cancelled."""
        pause = _BACKOFF_S[0]
        while True:
            await self._wake.wait()
            await asyncio.sleep(LINGER_S)
            self._wake.clear()
            try:
                if not self._first and (self._epoch is None or self._doubtful):
                    if not self._lease.valid:
                        # It may come back to life as it is, and then nobody else begins.
                        raise errors.Unavailable(self._why())
                    await self.begin(self._lease.lease)
                await self._give_back()
            except errors.FibrilError as error:
                if isinstance(error, errors.NotFound):
                    self._lease.suspect()
                if self._error != str(error):
                    log.warning("cannot give back identities", extra={"error": str(error)})
                self._error = str(error)
                await asyncio.sleep(pause * random.uniform(0.5, 1))
                pause = min(pause * 2, _BACKOFF_S[1])
                self._wake.set()
            else:
                self._error, pause = "", _BACKOFF_S[0]

    async def _give_back(self) -> None:
        idle, self._idle = self._idle, set()
        for number in idle:
            if number in self._refs and not self._owner.wants(number):
                self._drops[number] = self._refs.pop(number)
        drops = list(self._drops.items())
        results = await asyncio.gather(*(self._drop(*drop) for drop in drops), return_exceptions=True)
        for failure in results:
            if failure is not None:
                raise failure

    async def _drop(self, number: int, revision: int) -> None:
        await self._store.drop(number, revision)
        if self._drops.get(number) == revision:
            del self._drops[number]

    async def stop(self) -> None:
        """End what is under way."""
        flights = [flight.task for flight in self._flights.values() if flight.task is not None]
        for task in flights:
            task.cancel()
        await asyncio.gather(*flights, return_exceptions=True)


class _Flight:
    """An attempt to hold what some wait for. It goes on when they give up."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None
        self._waiting: list[asyncio.Future[None]] = []

    def landing(self) -> asyncio.Future[None]:
        """To be awaited; raises what the attempt has raised."""
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        return waiting

    def land(self, error: Exception | None) -> None:
        for waiting in self._waiting:
            if waiting.done():
                continue
            if error is None:
                waiting.set_result(None)
            else:
                waiting.set_exception(error)
