"""Label sets to numbers and back: what the other parts of the service and the API use.

    holders (database) ──▶ Claims ──▶ etcd, references of this node
    watch of etcd ───────▶ Table ───▶ feed, get, find
                           Sweeper ─▶ etcd, what nobody holds; on one node

What a holder has must be what its labels stand for, by the filter of now and by etcd of now. That is looked at whenever
either may have changed, and mended in the background: a filter was replaced, or this node was without a lease for so long
that somebody has collected what it held. A holder whose number had to change is told of by `on_moved`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.feed import Feed
from services.common.locks import KeyLocks
from services.common.service import ComponentStatus
from services.common.telemetry import Reading, metrics
from services.identity import numbers
from services.identity.identities.claims import Claims
from services.identity.identities.config import WARN_AT, IdentitiesConfig
from services.identity.identities.filter import LabelFilter
from services.identity.identities.follow import Follower
from services.identity.identities.holders import Held, Holders
from services.identity.identities.local import LocalIdentities
from services.identity.identities.model import (
    INIT,
    RESERVED,
    Identity,
    Scope,
    canonical,
    digest,
    labels_of,
    scope_of,
)
from services.identity.identities.store import IdentityStore, Record
from services.identity.identities.sweeper import Sweeper
from services.identity.identities.table import Change, Table
from services.identity.lease import NodeLease

log = logging.getLogger(__name__)

HISTORY: Final = 16384
"""Changes a watcher may fall behind."""
_RESERVED: Final = {identity.number: identity for identity in RESERVED.values()}
_AT_ONCE = 64
_BACKOFF_S = (0.2, 5.0)


class Usage(NamedTuple):
    """As fibril.identity.v1.GetUsageResponse."""

    cluster_id: int
    used: int
    quarantined: int
    capacity: int
    holders: int
    local: int


class Allocator:
    """Used from one event loop. To be made before the lease is started."""

    def __init__(
        self,
        etcd: EtcdClient,
        cluster: str,
        cluster_id: int,
        node: str,
        lease: NodeLease,
        db: sqlite3.Connection,
        cfg: IdentitiesConfig,
        *,
        space: int = numbers.NUMBERS - 1,
    ) -> None:
        """Reads the database, nothing else. space: how many numbers a cluster has."""
        self._cluster_id = cluster_id
        self._lease = lease
        self._filter = cfg.filter()
        self._store = IdentityStore(etcd, cluster, node)
        self._table = Table(cluster_id, space)
        self._follower = Follower(etcd, self._store, self._table, self._told)
        self._holders = Holders(db)
        self._local = LocalIdentities(db, self._holders.numbers())
        self._claims = Claims(self._store, self._table, lease, cluster_id, self)
        self._sweeper = Sweeper(etcd, self._store, self._table, lease, node, cfg.quarantine_s, self.learned)
        self._locks: KeyLocks[str] = KeyLocks()
        self._moved: list[Callable[[str, Identity], None]] = []
        self._unsettled: set[str] = set()
        """Holders whose number may not be right any more."""
        self._mend = asyncio.Event()
        self._mend_error = ""
        self._scarce = False
        self._scarce_from = WARN_AT * space
        self._tasks: list[asyncio.Task[None]] = []
        self.feed: Feed[Identity] = Feed(self.list, HISTORY)
        self.synced = self._follower.synced
        """Set when the cluster's identities are known."""
        lease.on_grant(self._granted)

    # -- life

    async def start(self) -> None:
        """Begin to follow etcd; holders of an earlier process are known already."""
        meter = metrics()
        self._store.measure(meter)
        meter.gauge("fibril.identity.numbers", self._gauge, description="identity numbers by state")
        meter.gauge(
            "fibril.identity.capacity", lambda: [(self._table.space, {})], description="numbers of a cluster"
        )
        meter.gauge(
            "fibril.identity.holders", lambda: [(len(self._holders), {})], description="holders on this node"
        )
        self._tasks = [
            asyncio.create_task(self._follower.run(), name="identity.follow"),
            asyncio.create_task(self._claims.keep(), name="identity.claims"),
            asyncio.create_task(self._settle(), name="identity.settle"),
            asyncio.create_task(self._sweeper.run(self.synced), name="identity.sweeper"),
        ]

    async def stop(self) -> None:
        """Stop; what is held stays held for as long as the lease lasts."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._claims.stop()
        await self._sweeper.resign()

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Background work; none ever ends by itself."""
        return self._tasks

    @property
    def problem(self) -> str:
        """One sentence; empty when all is well."""
        if not self.synced.is_set() and not self._claims.problem:
            return "the cluster's identities are not known yet"
        return self._claims.problem or self._mend_error or self._sweeper.error

    def status(self) -> ComponentStatus:
        """Of this part of the service; warns from 80 % of the numbers on."""
        taken, space, message = self._table.taken, self._table.space, self.problem
        if not message and taken >= self._scarce_from:
            message = (
                f"{taken} of {space} identity numbers are taken, {self._table.quarantined} of them in quarantine; "
                "let fewer labels count (identities.exclude)"
            )
        return ComponentStatus(
            "identities", "degraded" if message else "ok", message, used=taken, capacity=space
        )

    # -- what callers do

    async def allocate(self, labels: Mapping[str, str], holder: str) -> Identity:
        """The identity of these labels, made if need be, recorded as the holder's. No label that counts: init.

        InvalidArgument, ResourceExhausted, FailedPrecondition, and Unavailable for what this node does not hold while etcd
        is away; what it holds already needs no etcd while the lease lasts, and asking for the same again never does.
        """
        given = canonical(labels)
        async with self._locks.hold(holder):
            held = self._holders.get(holder)
            same = held is not None and held.given == given
            if held is not None and same and (holder not in self._unsettled or not self._claims.ready):
                return Identity(held.number, held.key)
            try:
                identity = await self._find_or_make(labels, held)
            except errors.Unavailable:
                if held is None or not same:
                    raise
                return Identity(held.number, held.key)  # moved as soon as that can be done
            await self._record(holder, identity, given)
        return identity

    async def release(self, holder: str) -> int:
        """End what a holder holds; its number, 0 if it had none. Needs no etcd."""
        async with self._locks.hold(holder):
            held = self._holders.remove(holder)
            if held is None:
                return 0
            try:
                await self._holders.saved()
                self._unsettled.discard(holder)
            finally:
                self._let_go(held.number)
        return held.number

    def get(self, number: int) -> Identity | None:
        """The identity with a number."""
        known = _RESERVED.get(number) or self._local.get(number)
        if known is not None:
            return known
        record = self._table.get(number)
        if record is not None and not record.retired:
            return record.identity
        held = None if self.synced.is_set() else self._holders.any_of(number)
        return None if held is None else Identity(number, held.key)

    def find(self, labels: Mapping[str, str]) -> Identity | None:
        """The identity of these labels, if it is known. InvalidArgument for labels none can have."""
        scope = scope_of(labels)
        if scope is not Scope.CLUSTER:
            key = canonical(labels)
            return RESERVED[key] if scope is Scope.RESERVED else self._local.find(key)
        counting = self._filter.apply(labels)
        if not counting:
            return INIT
        key = canonical(counting)
        record = self._table.of(digest(key))
        if record is not None and not record.retired:
            return Identity(record.number, key)
        if not self.synced.is_set():
            return next(
                (Identity(held.number, key) for _, held in self._holders.items() if held.key == key), None
            )
        return None

    def list(self) -> list[Identity]:
        """All identities, by number."""
        return list(self.above(0))

    def above(self, number: int) -> Iterator[Identity]:
        """Those with numbers above this one, by number. To be read at one go."""
        yield from (identity for identity in _RESERVED.values() if identity.number > number)
        yield from (record.identity for record in self._table.actives(number))
        yield from self._local.above(number)

    def holders(self, prefix: str = "") -> dict[str, Identity]:
        """What each holder has whose name begins so; known from the start."""
        return {holder: Identity(held.number, held.key) for holder, held in self._holders.items(prefix)}

    def usage(self) -> Usage:
        """How much of the number space is used."""
        return Usage(
            self._cluster_id,
            self._table.used,
            self._table.quarantined,
            self._table.space,
            len(self._holders),
            len(self._local),
        )

    def on_moved(self, callback: Callable[[str, Identity], None]) -> None:
        """Have `callback(holder, identity)` called when a holder has another number without having asked."""
        self._moved.append(callback)

    @property
    def filter(self) -> LabelFilter:
        """Which labels count."""
        return self._filter

    def set_filter(self, value: LabelFilter) -> None:
        """Let other labels count from now on; holders are moved in the background."""
        if value != self._filter:
            self._filter = value
            self.begun()

    # -- holders

    async def _find_or_make(self, labels: Mapping[str, str], held: Held | None) -> Identity:
        scope = scope_of(labels)
        if scope is Scope.CLUSTER:
            counting = self._filter.apply(labels)
            if not counting:
                return INIT
            key = canonical(counting)
            prefer = held.number if held is not None and held.key == key else 0
            if numbers.cluster_of(prefer) != self._cluster_id:
                prefer = 0
            return Identity(await self._claims.hold(key, prefer), key)
        key = canonical(labels)
        if scope is Scope.RESERVED:
            return RESERVED[key]
        identity = self._local.find(key)
        if identity is None:
            identity = self._local.make(key)
            self.feed.publish("put", identity)
        return identity

    async def _record(self, holder: str, identity: Identity, given: str) -> None:
        """What was found is the holder's from now on. Nothing may be awaited between the two."""
        old = self._holders.put(holder, Held(identity.number, identity.key, given))
        try:
            await self._holders.saved()
            self._look_at(holder)
        finally:
            self._let_go(identity.number)  # if it was undone
            if old is not None:
                self._let_go(old.number)

    def _let_go(self, number: int) -> None:
        if self._holders.of(number):
            return
        cluster = numbers.cluster_of(number)
        if cluster == numbers.LOCAL_CLUSTER:
            identity = self._local.get(number)
            if identity is not None:
                self._local.forget(number)
                self.feed.publish("delete", identity)
        elif cluster:
            self._claims.let_go(number)

    def _settled(self, held: Held) -> bool:
        """Whether a holder has what it should have."""
        labels = labels_of(held.given)
        if scope_of(labels) is not Scope.CLUSTER:
            return True
        counting = self._filter.apply(labels)
        if not counting:
            return held.number == INIT.number
        return held.key == canonical(counting) and held.number == self._claims.held(held.key)

    def _look_at(self, holder: str) -> None:
        """It has been given what was right when that was asked for; labels may count otherwise since."""
        held = self._holders.get(holder)
        if held is None or self._settled(held):
            self._unsettled.discard(holder)
        else:
            self._unsettled.add(holder)
            self._mend.set()

    async def _settle(self) -> None:
        """Mend what is not as it should be, whenever that may be so."""
        pause = _BACKOFF_S[0]
        while True:
            await self._mend.wait()
            self._mend.clear()
            # While not ready, later: should the lease come back to life as it is, no epoch begins that looks at all of them.
            if self._claims.ready:
                gate = asyncio.Semaphore(_AT_ONCE)
                moves = (self._settle_one(holder, gate) for holder in list(self._unsettled))
                failures = [failure for failure in await asyncio.gather(*moves) if failure is not None]
                if not failures:
                    self._mend_error, pause = "", _BACKOFF_S[0]
                    continue
                self._mend_error = f"{len(failures)} holders wait for their identity: {failures[0]}"
                log.warning(
                    "holders wait for their identity",
                    extra={"count": len(failures), "error": str(failures[0])},
                )
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(pause * 2, _BACKOFF_S[1])
            self._mend.set()

    async def _settle_one(self, holder: str, gate: asyncio.Semaphore) -> errors.FibrilError | None:
        async with gate, self._locks.hold(holder):
            held = self._holders.get(holder)
            if held is None or self._settled(held):
                self._unsettled.discard(holder)
                return None
            try:
                identity = await self._find_or_make(labels_of(held.given), held)
                await self._record(holder, identity, held.given)
            except errors.FibrilError as error:
                return error
        if identity.number != held.number:
            log.warning(
                "a holder has another identity",
                extra={"holder": holder, "before": held.number, "identity": identity.number},
            )
            for callback in self._moved:
                callback(holder, identity)
        return None

    # -- for Claims

    def wanted(self) -> Iterable[int]:
        """Numbers of the cluster that somebody on this node has."""
        return (n for n in self._holders.numbers() if numbers.cluster_of(n) == self._cluster_id)

    def wants(self, number: int) -> bool:
        """Whether it is one of those."""
        return bool(self._holders.of(number))

    def learned(self, record: Record) -> None:
        """This node has made, found or retired an identity."""
        self._told(self._table.learn(record))

    def learned_absent(self, name: str, revision: int) -> None:
        """This node has found that labels have no identity."""
        self._told(self._table.learn_absent(name, revision))

    def begun(self) -> None:
        """What is held has been read anew, or means something else: look at every holder."""
        self._unsettled = {holder for holder, held in self._holders.items() if not self._settled(held)}
        if self._unsettled:
            self._mend.set()

    async def _granted(self, lease: int) -> None:
        await self.synced.wait()
        await self._claims.begin(lease)

    # -- what etcd says

    def _told(self, changes: Sequence[Change]) -> None:
        """Something has changed in the table."""
        for number, before, now in changes:
            was = "" if before is None or before.retired else before.name
            is_now = "" if now is None or now.retired else now.name
            if was != is_now:
                if now is not None and is_now:
                    self.feed.publish("put", now.identity)
                elif before is not None:
                    self.feed.publish("delete", before.identity)
            if number in self._holders.numbers():
                self._check(number, is_now)
        self._warn()

    def _check(self, number: int, name: str) -> None:
        """A number held here stands for these labels now, or for none."""
        held = self._holders.any_of(number)
        if held is not None and digest(held.key) != name:
            # Nobody may do so while it is held; so it was not, and this node has been away.
            self._claims.lost(number)
            self._unsettled |= self._holders.of(number)
            self._mend.set()

    def _warn(self) -> None:
        taken = self._table.taken
        if taken >= self._scarce_from and not self._scarce:
            self._scarce = True
            log.warning("identity numbers run short", extra={"taken": taken, "capacity": self._table.space})
        elif self._scarce and taken < 0.9 * self._scarce_from:
            self._scarce = False

    def _gauge(self) -> Sequence[Reading]:
        return [
            (self._table.used, {"state": "used"}),
            (self._table.quarantined, {"state": "quarantined"}),
            (len(self._local), {"state": "local"}),
        ]
