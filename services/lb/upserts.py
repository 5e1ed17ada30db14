"""Upserts of services, gathered: those of the same moment go together, many in a transaction.

A service that changes more keys than a transaction has room for is written in several: those that come first add backends,
which count for nothing until their service is there; the one with the service and its claims decides; those that come last
take backends away. So a failure in between leaves the service as it was, with some of the new backends if it had been there
before, or as it should be, with some of the old ones; the same call again completes it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from services.common.errors import Aborted, AlreadyExists, FailedPrecondition, FibrilError
from services.common.etcd.client import TXN_OPS_MAX, EtcdClient
from services.lb import claims as claiming
from services.lb import keys
from services.lb.claims import Claim, Claims, Place
from services.lb.model import Backends, Spec
from services.lb.reading import Known, Reader

log = logging.getLogger(__name__)

ROOM: Final = TXN_OPS_MAX - 8
RETRIES: Final = 12
BYTES: Final = 512 << 10
"""Of values in a transaction; etcd takes 1.5 MiB."""
TOGETHER: Final = 512
"""Services read at once."""


@dataclass(frozen=True, slots=True)
class Upserted:
    revision: int
    created: bool
    changed: bool


@dataclass(slots=True)
class _Job:
    spec: Spec
    backends: Backends
    revision: int
    done: asyncio.Future[Upserted]

    def answer(self, result: Upserted | BaseException) -> None:
        if self.done.done():
            return
        if isinstance(result, BaseException):
            self.done.set_exception(result)
        else:
            self.done.set_result(result)


@dataclass(slots=True)
class _Change:
    """What a job changes, but for claims."""

    put: dict[str, bytes]
    delete: list[str]
    claims: dict[Place, tuple[Claim, ...]]

    @property
    def size(self) -> int:
        return 1 + len(self.put) + len(self.delete) + len(self.claims)


class _Transaction:
    """Jobs that go together. claims: as they are in etcd, with revisions; written to as jobs are taken in."""

    def __init__(self, reader: Reader, claims: dict[Place, tuple[int, Claims]]) -> None:
        self._reader = reader
        self._claims = claims
        self.jobs: list[tuple[_Job, Known]] = []
        self._places: dict[Place, None] = {}
        self._expect: dict[str, int] = {}
        self._put: dict[str, bytes] = {}
        self._delete: list[str] = []
        self._bytes = 0

    def fits(self, change: _Change) -> bool:
        """Whether it has room for this too."""
        return not self.jobs or (
            len(self._put) + len(self._delete) + len(self._places) + change.size <= ROOM
            and self._bytes < BYTES
        )

    def take(self, job: _Job, known: Known, change: _Change) -> None:
        name = job.spec.name
        self.jobs.append((job, known))
        self._expect[self._reader.key(name)] = known.own
        value = keys.encode_spec(job.spec)
        self._put |= change.put
        self._put[self._reader.key(name)] = value
        self._delete += change.delete
        self._bytes += len(value) + sum(map(len, change.put.values()))
        for place, mine in change.claims.items():
            self._places[place] = None
            self._claims[place][1].set(name, mine)

    async def write(self, etcd: EtcdClient) -> int | None:
        """The revision; None: something has changed meanwhile, and nothing was written."""
        if not self.jobs:
            return 0
        expect, put, delete = dict(self._expect), dict(self._put), list(self._delete)
        for place in self._places:
            revision, there = self._claims[place]
            expect[self._reader.vip(place)] = revision
            if there:
                put[self._reader.vip(place)] = keys.encode_claims(there)
            else:
                delete.append(self._reader.vip(place))
        done = await etcd.transact(expect, put=put, delete=delete)
        if done is not None:
            for place in self._places:
                there = self._claims[place][1]
                self._claims[place] = (done if there else 0), there
        return done

    def answer(self, revision: int) -> None:
        """Tell all that it is done."""
        for job, known in self.jobs:
            job.answer(Upserted(revision, not known.own, True))


class Upserts:
    """Used from one event loop."""

    def __init__(self, etcd: EtcdClient, reader: Reader) -> None:
        self._etcd = etcd
        self._reader = reader
        self._queue: deque[_Job] = deque()
        self._work: asyncio.Task[None] | None = None

    async def upsert(self, spec: Spec, backends: Backends, revision: int = 0) -> Upserted:
        """See Store.upsert. Goes on when the caller is cancelled."""
        done: asyncio.Future[Upserted] = asyncio.get_running_loop().create_future()
        self._queue.append(_Job(spec, backends, revision, done))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._drain(), name="lb.upserts")
        return await done

    async def _drain(self) -> None:
        while self._queue:
            jobs: dict[str, _Job] = {}
            # One service is changed once at a time.
            while self._queue and len(jobs) < TOGETHER and self._queue[0].spec.name not in jobs:
                job = self._queue.popleft()
                jobs[job.spec.name] = job
            try:
                await self._upsert(list(jobs.values()))
            except FibrilError as error:
                for job in jobs.values():
                    job.answer(error)
            except BaseException:
                for job in jobs.values():
                    job.done.cancel()
                raise

    async def _upsert(self, jobs: list[_Job]) -> None:
        for attempt in range(RETRIES):
            wanted = {job.spec.name: claiming.wanted(job.spec).keys() for job in jobs}
            found, claims = await self._reader.services(wanted)
            await self._write(jobs, found, claims)
            jobs = [job for job in jobs if not job.done.done()]
            if not jobs:
                return
            await asyncio.sleep(random.uniform(0, 0.002 * 2 ** min(attempt, 6)))
        for job in jobs:
            job.answer(raced(job.spec.name))

    async def _write(
        self, jobs: list[_Job], found: dict[str, Known], claims: dict[Place, tuple[int, Claims]]
    ) -> None:
        """As many as go; those that have lost a race, and what comes after, are not answered."""
        txn = _Transaction(self._reader, claims)
        for job in jobs:
            known = found[job.spec.name]
            try:
                change = self._change(job, known, claims)
            except FibrilError as error:
                # It may be for something that is about to be written, or not.
                if not await self._end(txn):
                    return
                txn = _Transaction(self._reader, claims)
                job.answer(error)
                continue
            if change is None:
                job.answer(Upserted(known.latest, False, False))
                continue
            if not txn.fits(change):
                if not await self._end(txn):
                    return
                txn = _Transaction(self._reader, claims)
            late = await self._early(change)
            txn.take(job, known, change)
            if late:
                if not await self._end(txn, late):
                    return
                txn = _Transaction(self._reader, claims)
        await self._end(txn)

    async def _end(self, txn: _Transaction, late: Sequence[str] = ()) -> bool:
        """Write, then remove what is `late`, of the only job or the last; False: a race was lost."""
        done = await txn.write(self._etcd)
        if done is None:
            return False
        for at in range(0, len(late), ROOM):
            expect = {self._reader.key(txn.jobs[-1][0].spec.name): done}
            if await self._etcd.transact(expect, delete=late[at : at + ROOM]) is None:
                break  # whoever has changed the service meanwhile knows what belongs to it
        txn.answer(done)
        return True

    def _change(self, job: _Job, known: Known, claims: dict[Place, tuple[int, Claims]]) -> _Change | None:
        """None if there is nothing to do. AlreadyExists, FailedPrecondition."""
        name = job.spec.name
        if job.revision and job.revision != known.latest:
            raise FailedPrecondition(
                f"service {name} has revision {known.latest}, not {job.revision}"
                if known.own
                else f"service {name} is no longer there",
                field="service.revision",
                fix="read it again and change that",
            )
        wanted = claiming.wanted(job.spec)
        # Of one that is not usable, what it has.
        before = (
            claiming.wanted(known.spec).keys()
            if known.spec is not None
            else {place for place, (_, there) in claims.items() if there.of(name)}
        )
        for place, mine in wanted.items():
            for claim in mine:
                owner = claims[place][1].taken(name, claim)
                if owner:
                    raise AlreadyExists(
                        f"{_port(claim)} of {place.address} belongs to service {owner}",
                        field=_field_of(job.spec, place, claim),
                        fix="use another port or address, or remove it from that service first",
                    )
        put = {
            self._reader.backend(name, key): keys.encode_backend(backend)
            for key, backend in job.backends.items()
            if known.backends.get(key) != backend
        }
        delete = [self._reader.backend(name, key) for key in known.revisions if key not in job.backends]
        changed = {
            place: wanted.get(place, ())
            for place in wanted.keys() | before
            if set(claims[place][1].of(name)) != set(wanted.get(place, ()))
        }
        if known.spec == job.spec and not put and not delete and not changed:
            return None
        return _Change(put, delete, changed)

    async def _early(self, change: _Change) -> list[str]:
        """Write backends that do not fit; gives those that are to be removed afterwards."""
        if change.size <= ROOM:
            return []
        items = list(change.put.items())
        for at in range(0, len(items), ROOM):
            await self._etcd.transact({}, put=dict(items[at : at + ROOM]))
        late, change.put, change.delete = change.delete, {}, []
        return late


def raced(name: str) -> FibrilError:
    """A change was given up."""
    return Aborted(f"service {name} is being changed by others all the time", fix="try again")


def _port(claim: Claim) -> str:
    return f"port {claim.first}" if claim.first == claim.last else f"a port of {claim.first} to {claim.last}"


def _field_of(spec: Spec, place: Place, claim: Claim) -> str:
    """What of a service wants a claim."""
    for front in spec.frontends:
        if (front.address, claim) == (
            place.address,
            Claim(front.proto, front.port, front.port_last, front.node),
        ):
            return f"service.frontends[{front.at}]"
    return "service.health_check_node_port"
