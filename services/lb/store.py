"""Changes to services, in etcd. See keys.py for what is where.

Each change is one transaction under the condition that nothing it rests on has changed since it was read; whoever loses a
race reads again. A service with more backends than a transaction has room for (128 keys) is written in several: those that
come first add backends, which count for nothing until their service is there; the one with the service and its claims
decides; those that come last take backends away. So a failure in between leaves the service as it was, with some of the
new backends if it had been there before, or as it should be, with some of the old ones; the same call again completes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from services.common.errors import Aborted, AlreadyExists, FailedPrecondition, FibrilError, NotFound
from services.common.etcd.batch import Batcher, Txn
from services.common.etcd.client import TXN_OPS_MAX, EtcdClient
from services.common.pipeline.abi import IPAddress
from services.lb import claims as claiming
from services.lb import keys
from services.lb.abi import BackendState
from services.lb.claims import Claims
from services.lb.model import Backend, BackendKey, Backends, Spec
from services.lb.services import Services

log = logging.getLogger(__name__)

RETRIES: Final = 8
IN_FLIGHT: Final = 4
"""Transactions of bulk work under way at once."""
_ROOM: Final = TXN_OPS_MAX - 8

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Upserted:
    revision: int
    created: bool
    changed: bool


@dataclass(slots=True)
class _Known:
    """What a change rests on: as remembered, or as etcd has just said. Revisions are 0 for what is not there."""

    spec: Spec | None
    revision: int
    backends: Mapping[BackendKey, Backend]
    claims: Mapping[IPAddress, tuple[int, Claims]]


class Store:
    """Used from one event loop. All calls raise Unavailable while etcd is away."""

    def __init__(self, etcd: EtcdClient, cluster: str, services: Services) -> None:
        self._etcd = etcd
        self._root = keys.root(cluster)
        self._services = services
        self._batcher = Batcher(etcd, IN_FLIGHT)
        # So that services of one process that share an address do not race each other.
        self._busy: dict[IPAddress, asyncio.Lock] = {}

    # ---- services -------------------------------------------------------------------------------------------
    async def upsert(self, spec: Spec, backends: Backends, revision: int = 0) -> Upserted:
        """Have exactly this service. revision: 0, or the one that must be the present one.

        AlreadyExists names the service that has one of the frontends; FailedPrecondition: another revision; Aborted: too
        many others change the same.
        """
        addresses = set(claiming.wanted(spec))
        async with contextlib.AsyncExitStack() as stack:
            for address in sorted(addresses, key=lambda a: (a.version, int(a))):
                await stack.enter_async_context(self._busy.setdefault(address, asyncio.Lock()))
            return await self._upsert_alone(spec, backends, revision, addresses)

    async def _upsert_alone(
        self, spec: Spec, backends: Backends, revision: int, addresses: set[IPAddress]
    ) -> Upserted:
        known = self._remembered(spec.name, addresses)
        for attempt in range(RETRIES):
            if revision and revision != self._services.revisions.get(spec.name, 0):
                raise FailedPrecondition(
                    f"service {spec.name} has revision {self._services.revisions.get(spec.name, 0)}, not {revision}",
                    field="service.revision",
                    fix="read it again and change that",
                )
            try:
                done = await self._upsert(spec, backends, known)
            except AlreadyExists:
                # What is remembered may be old.
                if attempt:
                    raise
                done = None
            if done is not None:
                return done
            known = await self._read(spec.name, addresses)
        raise _raced(spec.name)

    async def _upsert(self, spec: Spec, backends: Backends, known: _Known) -> Upserted | None:
        """None: something has changed meanwhile."""
        claims = self._claims(spec, known)
        put = {key: b for key, b in backends.items() if known.backends.get(key) != b}
        gone = [key for key in known.backends if key not in backends]
        same = known.spec == spec
        if same and not put and not gone and not claims:
            return Upserted(self._services.revisions.get(spec.name, 0), False, False)
        expect = {self._root + keys.service_key(spec.name): known.revision}
        expect |= {self._root + keys.vip_key(a): known.claims[a][0] for a in claims}
        core = {} if same else {self._root + keys.service_key(spec.name): keys.encode_spec(spec)}
        core |= {self._root + keys.vip_key(a): keys.encode_claims(c) for a, c in claims.items() if c}
        empty = [self._root + keys.vip_key(a) for a, c in claims.items() if not c]
        puts = {self._backend(spec.name, key): keys.encode_backend(b) for key, b in put.items()}
        deletes = [self._backend(spec.name, key) for key in gone]
        if len(core) + len(empty) + len(puts) + len(deletes) > _ROOM:
            await self._batches(puts)
            late, puts, deletes = deletes, {}, []
        else:
            late = []
        done = await self._batcher.transact(Txn(expect, put=core | puts, delete=[*empty, *deletes]))
        if done is None:
            return None
        for address, there in claims.items():
            self._services.note_claims(address, done, there)
        await self._batches_gone(late)
        return Upserted(done, not known.revision, True)

    def _claims(self, spec: Spec, known: _Known) -> dict[IPAddress, Claims]:
        """Addresses whose claims change, with the new ones. AlreadyExists."""
        changed: dict[IPAddress, Claims] = {}
        wanted = claiming.wanted(spec)
        before = claiming.wanted(known.spec) if known.spec is not None else {}
        for address in before.keys() | wanted.keys():
            _, there = known.claims.get(address, (0, Claims()))
            mine = wanted.get(address, ())
            for claim in mine:
                if other := there.taken(spec.name, claim):
                    raise AlreadyExists(
                        f"{address} port {claim.first} belongs to service {other}",
                        field=_field_of(spec, address, claim),
                        fix="use another port or address, or remove it from that service first",
                    )
            if set(there.of(spec.name)) != set(mine):
                changed[address] = there.copy()
                changed[address].set(spec.name, mine)
        return changed

    async def delete(self, name: str) -> None:
        """NotFound, Aborted."""
        for _ in range(RETRIES):
            known = await self._read(name, ())
            if known.spec is None:
                raise NotFound(f"there is no service {name!r}", field="name", fix="see: fibril service ls")
            claims = {address: there.copy() for address, (_, there) in known.claims.items()}
            for each in claims.values():
                each.set(name, ())
            expect = {self._root + keys.service_key(name): known.revision}
            expect |= {self._root + keys.vip_key(a): known.claims[a][0] for a in claims}
            put = {self._root + keys.vip_key(a): keys.encode_claims(c) for a, c in claims.items() if c}
            gone = [self._root + keys.vip_key(a) for a, c in claims.items() if not c]
            gone.append(self._root + keys.service_key(name))
            backends = [self._backend(name, key) for key in known.backends]
            room = max(0, _ROOM - len(put) - len(gone))
            if await self._etcd.transact(expect, put=put, delete=[*gone, *backends[:room]]) is not None:
                await self._batches_gone(backends[room:])
                return
        raise _raced(name)

    async def upsert_many(self, services: Iterable[tuple[Spec, Backends]]) -> tuple[int, int, int]:
        """Upsert all, a few at a time; how many were created, changed, unchanged. What precedes a failing one is done."""
        counts = [0, 0, 0]
        limit = asyncio.Semaphore(256)

        async def one(spec: Spec, backends: Backends) -> None:
            async with limit:
                done = await self.upsert(spec, backends)
            counts[0 if done.created else 1 if done.changed else 2] += 1

        results = await asyncio.gather(*(one(*each) for each in services), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return counts[0], counts[1], counts[2]

    # ---- backends -------------------------------------------------------------------------------------------
    async def add_backends(
        self, name: str, backends: Backends, check: Callable[[Spec], None]
    ) -> tuple[int, int]:
        """How many were not there, and how many were other than given. `check` may refuse by the service. NotFound."""

        async def once(known: _Known, spec: Spec) -> tuple[int, int] | None:
            check(spec)
            new = [key for key in backends if key not in known.backends]
            put = {
                self._backend(name, key): keys.encode_backend(backend)
                for key, backend in backends.items()
                if known.backends.get(key) != backend
            }
            if not await self._batches(put, {self._root + keys.service_key(name): known.revision}):
                return None
            return len(new), len(put) - len(new)

        return await self._on_service(name, once)

    async def remove_backends(self, name: str, gone: Iterable[BackendKey]) -> int:
        """How many were there. NotFound: the service."""
        wanted = list(gone)

        async def once(known: _Known, spec: Spec) -> int | None:
            there = [key for key in wanted if key in known.backends]
            await self._batches_gone([self._backend(name, key) for key in there])
            return len(there)

        return await self._on_service(name, once)

    async def set_state(self, name: str, wanted: Iterable[BackendKey], state: BackendState) -> int:
        """How many were in another state. name "": of all services that have them. NotFound: one of them is not there, and
        none was changed.
        """
        given = list(wanted)
        if name:
            return await self._set_state(name, given, state)
        services = [
            each
            for each in self._services.specs
            if not self._services.backends.get(each, {}).keys().isdisjoint(given)
        ]
        found = {key for each in services for key in self._services.backends[each]}
        _require_all(given, found, "any service")
        count = 0
        for each in services:
            mine = [key for key in given if key in self._services.backends.get(each, {})]
            count += await self._set_state(each, mine, state)
        return count

    async def _set_state(self, name: str, given: list[BackendKey], state: BackendState) -> int:
        async def once(known: _Known, spec: Spec) -> int | None:
            _require_all(given, known.backends, f"service {name}")
            put = {}
            for key in given:
                before = known.backends[key]
                if before.state is not state:
                    after = Backend(key, before.weight, before.zone, before.node, before.cluster, state)
                    put[self._backend(name, key)] = keys.encode_backend(after)
            if not await self._batches(put, {self._root + keys.service_key(name): known.revision}):
                return None
            return len(put)

        return await self._on_service(name, once)

    async def _on_service(self, name: str, once: Callable[[_Known, Spec], Awaitable[R | None]]) -> R:
        """Do something with a service as etcd has it, again if it changes meanwhile."""
        for _ in range(RETRIES):
            known = await self._read(name, ())
            if known.spec is None:
                raise NotFound(f"there is no service {name!r}", field="service", fix="see: fibril service ls")
            done = await once(known, known.spec)
            if done is not None:
                return done
        raise _raced(name)

    # ---- etcd -----------------------------------------------------------------------------------------------
    def _backend(self, name: str, key: BackendKey) -> str:
        return self._root + keys.backend_key(name, key)

    def _remembered(self, name: str, addresses: Iterable[IPAddress]) -> _Known:
        services = self._services
        spec = services.specs.get(name)
        old = claiming.wanted(spec) if spec is not None else {}
        return _Known(
            spec,
            services.own_revisions.get(name, 0),
            services.backends.get(name, {}),
            {address: services.claimed(address) for address in {*addresses, *old}},
        )

    async def _read(self, name: str, addresses: Iterable[IPAddress]) -> _Known:
        """From etcd itself."""
        kv = await self._etcd.get(self._root + keys.service_key(name))
        spec = keys.decode_spec(kv.value) if kv is not None else None
        listing = await self._etcd.get_prefix(self._root + keys.backends_prefix(name))
        backends = [keys.decode_backend(each.value) for each in listing.kvs]
        wanted = {*addresses, *(claiming.wanted(spec) if spec is not None else ())}
        claims: dict[IPAddress, tuple[int, Claims]] = {}
        for address in wanted:
            found = await self._etcd.get(self._root + keys.vip_key(address))
            claims[address] = (
                (found.mod_revision, keys.decode_claims(found.value)) if found is not None else (0, Claims())
            )
        return _Known(spec, kv.mod_revision if kv is not None else 0, {b.key: b for b in backends}, claims)

    async def _batches(self, put: Mapping[str, bytes], expect: Mapping[str, int] | None = None) -> bool:
        """Write, at most a transaction's room at a time; False: a condition does not hold (any more)."""
        items = list(put.items())
        for at in range(0, len(items), _ROOM):
            part = dict(items[at : at + _ROOM])
            if await self._batcher.transact(Txn(expect or {}, put=part)) is None:
                return False
        return True

    async def _batches_gone(self, gone: list[str]) -> None:
        for at in range(0, len(gone), _ROOM):
            await self._batcher.transact(Txn(delete=gone[at : at + _ROOM]))


def _require_all(given: Iterable[BackendKey], known: Iterable[BackendKey], where: str) -> None:
    there = set(known)
    for at, key in enumerate(given):
        if key not in there:
            raise NotFound(
                f"{key.address} port {key.port} is no backend of {where}",
                field=f"backends[{at}]",
                fix="nothing was changed",
            )


def _field_of(spec: Spec, address: IPAddress, claim: claiming.Claim) -> str:
    """What of a service wants a claim."""
    for at, front in enumerate(spec.frontends):
        if (front.address, front.proto, front.port) == (address, claim.proto, claim.first):
            return f"service.frontends[{at}]"
    return "service.health_check_node_port"


def _raced(name: str) -> FibrilError:
    return Aborted(f"service {name} is being changed by others all the time", fix="try again")
