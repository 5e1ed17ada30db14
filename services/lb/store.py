"""Changes to services, in etcd. See keys.py for what is where.

A change rests on what etcd has just said, and is made on condition that this has not changed; whoever loses a race reads again.
Whatever changes a service's own key or takes a backend away writes that key anew, so its revision tells of it.

Services that are upserted at the same time go together in few transactions (upserts.py). The other changes touch the keys
of their backends only, at most a hundred at a time: should etcd go away in between, what was written stays, and the same
call again completes it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import replace
from typing import Final

from services.common.errors import NotFound
from services.common.etcd.client import EtcdClient
from services.lb import keys
from services.lb.abi import BackendState
from services.lb.model import BackendKey, Backends, Spec
from services.lb.reading import Known, Reader
from services.lb.services import Services
from services.lb.upserts import ROOM, Upserted, Upserts, raced

RETRIES: Final = 12
"""Races lost in a row after which a change is given up."""


class Store:
    """Used from one event loop. All calls raise Unavailable while etcd is away."""

    def __init__(self, etcd: EtcdClient, cluster: str, services: Services) -> None:
        self._etcd = etcd
        self._reader = Reader(etcd, cluster)
        self._upserts = Upserts(etcd, self._reader)
        self._services = services
        self._written = (services.seen.restarts, 0)
        """To which etcd, as `seen` counts them, and its revision: those of one before may be far ahead of what it gets to."""

    async def settle(self) -> None:
        """Wait until what was written here is known here too (Services), so that who asks next is told of it."""
        began, revision = self._written
        if self._services.synced.is_set() and began == self._services.seen.restarts:
            await self._services.seen.wait(revision)

    # ---- services -------------------------------------------------------------------------------------------
    async def upsert(self, spec: Spec, backends: Backends, revision: int = 0) -> Upserted:
        """Have exactly this service. revision: 0, or the one that must be the present one.

        AlreadyExists names the service that has one of the frontends; FailedPrecondition: another revision; Aborted: too
        many others change the same.
        """
        began = self._services.seen.restarts
        done = await self._upserts.upsert(spec, backends, revision)
        self._wrote(done.revision, began)
        return done

    async def upsert_many(self, services: Iterable[tuple[Spec, Backends]]) -> tuple[int, int, int]:
        """Upsert all; how many were created, changed, unchanged. When one is refused, others may have been written."""
        began = self._services.seen.restarts
        jobs = [self._upserts.upsert(spec, backends) for spec, backends in services]
        results = await asyncio.gather(*jobs, return_exceptions=True)
        counts = [0, 0, 0]
        for result in results:
            if isinstance(result, BaseException):
                raise result
            self._wrote(result.revision, began)
            counts[0 if result.created else 1 if result.changed else 2] += 1
        return counts[0], counts[1], counts[2]

    async def delete(self, name: str) -> None:
        """With all that belongs to it, at once. NotFound, Aborted."""
        async for _ in _attempts(name):
            known = await self._reader.service(name)
            if not known.own:
                raise self._services.missing(name, "name")
            reader = self._reader
            expect = {reader.key(name): known.own}
            put, gone = {}, [reader.key(name)]
            for place, (revision, there) in known.claims.items():
                expect[reader.vip(place)] = revision
                there.set(name, ())
                if there:
                    put[reader.vip(place)] = keys.encode_claims(there)
                elif revision:
                    gone.append(reader.vip(place))
            below = [reader.backends(name)]
            began = self._services.seen.restarts
            done = await self._etcd.transact(expect, put=put, delete=gone, delete_below=below)
            if done is not None:
                return self._wrote(done, began)

    # ---- backends -------------------------------------------------------------------------------------------
    async def add_backends(
        self, name: str, backends: Backends, check: Callable[[Spec], None]
    ) -> tuple[int, int]:
        """How many were not there, and how many were other than given. `check` may refuse by the service. NotFound."""
        added = changed = 0
        for part in _parts(list(backends)):
            async for _ in _attempts(name):
                known = await self._some(name, part)
                if known.spec is not None:
                    check(known.spec)
                put = {key: backends[key] for key in part if known.backends.get(key) != backends[key]}
                if await self._write(name, known, put):
                    new = sum(key not in known.revisions for key in put)
                    added, changed = added + new, changed + len(put) - new
                    break
        return added, changed

    async def remove_backends(self, name: str, gone: Iterable[BackendKey]) -> int:
        """How many were there. NotFound: the service."""
        count = 0
        for part in _parts(list(gone)):
            async for _ in _attempts(name):
                known = await self._some(name, part)
                if await self._write(name, known, {}, list(known.revisions)):
                    count += len(known.revisions)
                    break
        return count

    async def set_state(self, name: str, wanted: Iterable[BackendKey], state: BackendState) -> int:
        """How many were in another state. name "": of all services that have them. NotFound: one of them is not there, and
        none was changed.
        """
        given = list(wanted)
        if name:
            members = {name: given}
            await self._require(name, given)
        else:
            members = {
                each: mine
                for each, there in self._services.backends.items()
                if each in self._services.specs and (mine := [key for key in given if key in there])
            }
            _require_all(given, {key for mine in members.values() for key in mine}, "any service")
        count = 0
        for each, mine in members.items():
            for part in _parts(mine):
                count += await self._set_state(each, part, state)
        return count

    async def _set_state(self, name: str, part: Sequence[BackendKey], state: BackendState) -> int:
        async for _ in _attempts(name):
            known = await self._some(name, part)
            put = {
                key: replace(backend, state=state)
                for key, backend in known.backends.items()
                if backend is not None and backend.state is not state
            }
            if await self._write(name, known, put):
                return len(put)
        raise AssertionError("attempts end with an error")

    async def _require(self, name: str, given: Sequence[BackendKey]) -> None:
        there: set[BackendKey] = set()
        for part in _parts(given):
            there |= (await self._some(name, part)).revisions.keys()
        _require_all(given, there, f"service {name}")

    async def _some(self, name: str, part: Sequence[BackendKey]) -> Known:
        """A service with these backends. NotFound."""
        known = await self._reader.some(name, part)
        if not known.own:
            raise self._services.missing(name, "service")
        return known

    async def _write(self, name: str, known: Known, put: Backends, gone: Sequence[BackendKey] = ()) -> bool:
        """False if the service or one of the backends has changed since it was read."""
        if not put and not gone:
            return True
        reader = self._reader
        own = reader.key(name)
        expect = {own: known.own}
        expect |= {reader.backend(name, key): known.revisions.get(key, 0) for key in (*put, *gone)}
        values = {reader.backend(name, key): keys.encode_backend(backend) for key, backend in put.items()}
        if gone:
            # Its revision must not fall behind.
            values[own] = known.value
        began = self._services.seen.restarts
        done = await self._etcd.transact(
            expect, put=values, delete=[reader.backend(name, key) for key in gone]
        )
        if done is not None:
            self._wrote(done, began)
        return done is not None

    def _wrote(self, revision: int, began: int) -> None:
        """began: `seen.restarts` when that was begun to be written."""
        self._written = max(self._written, (began, revision))


async def _attempts(name: str) -> AsyncIterator[int]:
    """Aborted after the last."""
    for attempt in range(RETRIES):
        yield attempt
        await asyncio.sleep(random.uniform(0, 0.002 * 2 ** min(attempt, 6)))
    raise raced(name)


def _parts(given: Sequence[BackendKey]) -> Iterable[Sequence[BackendKey]]:
    return (given[at : at + ROOM] for at in range(0, len(given), ROOM))


def _require_all(given: Iterable[BackendKey], there: set[BackendKey], where: str) -> None:
    for at, key in enumerate(given):
        if key not in there:
            raise NotFound(
                f"{key.address} port {key.port} is no backend of {where}",
                field=f"backends[{at}]",
                fix="nothing was changed",
            )
