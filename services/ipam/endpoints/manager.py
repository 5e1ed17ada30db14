"""The life of endpoints: one at a time for each key, each step recorded before the kernel sees it.

    create: number -> addresses -> record CREATING -> kernel -> record READY
    delete: record DELETING -> kernel -> addresses -> record gone -> number

What fails is undone in reverse before the caller hears of it. A process killed anywhere leaves a record in
CREATING (undone at the next start), in DELETING (finished), or addresses without a record (released). Work
goes on in a task of its own, so a caller that gives up cannot leave half of it: a creation nobody waits for
any more is undone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from services.common import errors
from services.common.feed import Change, Feed
from services.common.locks import KeyLocks
from services.ipam.endpoints import model
from services.ipam.endpoints.index import Index
from services.ipam.endpoints.model import (
    EndpointRecord,
    EndpointSpec,
    Heirs,
    Ids,
    Key,
    Place,
    Recovery,
    State,
)
from services.ipam.endpoints.ports import Addresses, Kernel

log = logging.getLogger(__name__)
T = TypeVar("T")

IDENTIFY_CHUNK: Final = 500
"""Identities that are set in one visit of the netlink thread (some 5 ms)."""


@dataclass
class _Call:
    abandoned: bool = False

    def require(self) -> None:
        """Cancelled, if nobody waits any more."""
        if self.abandoned:
            raise errors.Cancelled("the caller gave up; the endpoint is undone")


class EndpointManager:
    """All endpoints of the node; used from the event loop. `changed(id)` hears of every record that
    changed.
    """

    def __init__(
        self,
        store: Any,
        addresses: Addresses,
        kernel: Kernel,
        instance_ifname: Callable[[int], str],
        changed: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._addresses = addresses
        self._kernel = kernel
        self._ifname = instance_ifname
        self._changed = changed
        self._index = Index()
        self._ids = Ids()
        self._locks: KeyLocks[Key] = KeyLocks()
        self._feed: Feed[EndpointRecord] = Feed(self._index.records)
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Take over what was recorded: adopt what was ready, undo or finish what was not."""
        records = self._store.load()
        self._ids = Ids(record.id for record in records)
        for record in records:
            self._index.put(record)
        for record in records:
            recovery = model.RECOVERY[record.state]
            if recovery is not Recovery.ADOPT:
                log.info(
                    "endpoint left half done is removed",
                    extra={
                        "endpoint": record.id,
                        "state": record.state.name,
                        "container": record.container_id,
                    },
                )
                try:
                    await self._remove(record)
                except errors.FibrilError as error:
                    log.error(
                        "removal failed, to be tried again",
                        extra={"endpoint": record.id, "cause": str(error)},
                    )
        await self._addresses.sweep({record.owner for record in self._index.records()})

    async def stop(self, grace_s: float = 5.0) -> None:
        """Wait for what is under way; what takes longer is completed or undone by the next start."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=grace_s)

    # ---- reading ----------------------------------------------------------------------------------------
    def get(self, container_id: str, ifname: str = "") -> EndpointRecord | None:
        return self._index.by_key((container_id, ifname or model.DEFAULT_IFNAME))

    def list(self) -> Sequence[EndpointRecord]:
        """All, sorted by id."""
        return self._index.records()

    def by_number(self) -> Mapping[int, EndpointRecord]:
        """All, live: changes with every call of this manager."""
        return self._index.by_number()

    def by_id(self, number: int) -> EndpointRecord | None:
        return self._index.by_id(number)

    def by_address(self, address: str) -> EndpointRecord | None:
        """By an address in canonical text."""
        return self._index.by_address(address)

    def by_cookie(self, cookie: int) -> EndpointRecord | None:
        """The endpoint ep_netns names for a namespace: the first that was created there."""
        return self._index.by_cookie(cookie)

    def by_cgroup(self, cgroup_id: int) -> EndpointRecord | None:
        return self._index.by_cgroup(cgroup_id)

    def by_ifindex(self, ifindex: int) -> EndpointRecord | None:
        return self._index.by_ifindex(ifindex)

    def in_use(self, number: int) -> bool:
        """Whether a number belongs to an endpoint, being made or removed ones included."""
        return number in self._ids

    def watch(self, after: int = 0) -> AsyncIterator[Change[EndpointRecord]]:
        """See Feed.watch."""
        return self._feed.watch(after)

    async def check(self, container_id: str, ifname: str = "") -> Sequence[str]:
        """Differences between record and kernel, one sentence each. NotFound."""
        key = model.check_key(container_id, ifname)
        async with self._locks.hold(key):
            record = self._index.by_key(key)
            if record is None:
                raise errors.NotFound(f"no endpoint {key[1]} of container {key[0]}")
            return await self._kernel.check(record)

    # ---- changing ---------------------------------------------------------------------------------------
    async def create(self, wanted: EndpointSpec) -> EndpointRecord:
        """The endpoint, READY: a new one, or the one there is when it was asked for with the same options.

        Errors as fibril.endpoint.v1.EndpointService says.
        """
        spec = wanted.checked()
        if (reason := self._kernel.unavailable()) is not None:
            raise reason
        call = _Call()
        return await self._carry_through(self._create(spec, call), call)

    async def delete(self, container_id: str, ifname: str = "") -> int:
        """Remove one interface, or with an empty `ifname` all of the container's; how many there were."""
        model.check_key(container_id, ifname)
        if ifname:
            keys = [(container_id, ifname)]
        else:
            # Held keys too: a creation under way has no record yet.
            keys = sorted(
                {key for key in (*self._index.keys(), *self._locks.keys()) if key[0] == container_id}
            )
        return sum([await self._carry_through(self._delete(key), _Call()) for key in keys])

    async def repair(self, number: int) -> None:
        """Bring one endpoint in line with its record; delete it if its namespace is gone. Errors: as the
        kernel's.
        """
        record = self._index.by_id(number)
        if record is not None:
            await self._carry_through(self._repair(record.key, number), _Call())

    async def relabel(self, container_id: str, ifname: str, labels: Mapping[str, str]) -> EndpointRecord:
        """Replace the labels; the identity stays until somebody sets another. NotFound, InvalidArgument."""
        key = model.check_key(container_id, ifname)
        model.check_labels(labels)
        async with self._locks.hold(key):
            record = self._index.by_key(key)
            if record is None or record.state is State.DELETING:
                raise errors.NotFound(f"no endpoint {key[1]} of container {key[0]}")
            if record.labels != labels:
                record = self._record(replace(record, relabelled=dict(labels)))
            return record

    async def set_identities(self, identities: Iterable[tuple[int, str, int]]) -> Sequence[int]:
        """(number, container id, identity) each: recorded, then told to programs; numbers nobody has any more.

        Takes no lock, so that no creation under way holds the others up: see `_record` and `_settled`.
        """
        wanted = {number: (container_id, identity) for number, container_id, identity in identities}
        numbers = [
            number for number, (container_id, _) in wanted.items() if self._is_of(number, container_id)
        ]
        for start in range(0, len(numbers), IDENTIFY_CHUNK):
            # Looked at chunk by chunk: between two, anything may happen to those that follow.
            chunk = [n for n in numbers[start : start + IDENTIFY_CHUNK] if self._is_of(n, wanted[n][0])]
            before = [self._index.by_number()[number] for number in chunk]
            records = [replace(record, identity=wanted[record.id][1]) for record in before]
            news = [now for was, now in zip(before, records, strict=True) if was != now]
            self._store.put_all(news)
            for record in news:
                self._publish(record)
            # All of them: who repeats a call that failed here means the programs.
            await self._kernel.identify([r for r in records if r.state is not State.CREATING])
        return sorted(wanted.keys() - set(numbers))

    def _is_of(self, number: int, container_id: str) -> bool:
        """Whether a number is that of an endpoint of this container, one that is not being removed."""
        record = self._index.by_id(number)
        return (
            record is not None and record.container_id == container_id and record.state is not State.DELETING
        )

    async def _carry_through(self, work: Coroutine[Any, Any, T], call: _Call) -> T:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            call.abandoned = True
            raise

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if (
            not task.cancelled()
            and (error := task.exception()) is not None
            and not isinstance(error, errors.FibrilError)
        ):
            log.error("work on an endpoint failed", exc_info=error)

    async def _create(self, spec: EndpointSpec, call: _Call) -> EndpointRecord:
        async with self._locks.hold(spec.key):
            place = await self._kernel.place(spec)
            existing = self._index.by_key(spec.key)
            if existing is not None and (usable := await self._reuse(existing, spec, place)) is not None:
                # Who made it may have ended before its policy was there.
                await self._kernel.admitted(usable)
                return usable
            if call.abandoned:
                raise errors.Cancelled("the caller gave up")
            if len(self._ids) >= self._kernel.capacity():
                raise errors.ResourceExhausted(
                    f"{len(self._ids)} endpoints, and the maps hold {self._kernel.capacity()}",
                    fix="delete endpoints",
                )
            record = EndpointRecord(
                id=self._ids.take(),
                spec=spec,
                state=State.CREATING,
                created_unix_seconds=time.time(),
                netns_cookie=place.netns_cookie,
                cgroup_id=place.cgroup_id,
                mac=model.random_mac(),
                host_mac=model.random_mac(),
                mtu=spec.mtu or self._kernel.mtu(),
            )
            try:
                return await self._make(replace(record, host_ifname=self._ifname(record.id)), call)
            except BaseException as cause:
                await self._undo(record.id, spec.key, cause)
                raise

    async def _make(self, record: EndpointRecord, call: _Call) -> EndpointRecord:
        lease = await self._addresses.lease(record)
        record = replace(
            record,
            ipv4=lease.ipv4,
            ipv4_gateway=lease.ipv4_gateway,
            ipv6=lease.ipv6,
            ipv6_gateway=lease.ipv6_gateway,
        )
        record = self._record(record)
        ifindex = await self._kernel.wire(record)
        call.require()
        ready = await self._settled(record, record.to(State.READY, host_ifindex=ifindex))
        # Whoever makes policies has been told by now.
        await self._kernel.admitted(ready)
        call.require()
        return ready

    async def _undo(self, number: int, key: Key, cause: BaseException) -> None:
        """After a failed creation. What cannot be undone now stays recorded as DELETING and is tried
        again.
        """
        log.info(
            "endpoint creation failed", extra={"endpoint": number, "container": key[0], "cause": str(cause)}
        )
        record = self._index.by_id(number)
        try:
            if record is not None:
                await self._remove(record)
            else:
                await self._addresses.release(model.owner_of(key))
                self._ids.give_back(number)
        except errors.FibrilError as error:
            log.error("undoing a failed endpoint failed", extra={"endpoint": number, "cause": str(error)})

    async def _reuse(
        self, existing: EndpointRecord, spec: EndpointSpec, place: Place
    ) -> EndpointRecord | None:
        """The existing endpoint if it is what is asked for; None if it was a leftover, which is then
        removed.
        """
        if existing.state is State.DELETING:
            await self._remove(existing)
            return None
        if existing.netns_cookie != place.netns_cookie:
            if await self._lives(existing):
                raise errors.AlreadyExists(
                    f"endpoint {spec.ifname} of container {spec.container_id} is in another network "
                    f"namespace, {existing.netns}",
                    field="netns",
                    fix="delete it first",
                )
            await self._remove(existing)
            return None
        if different := model.differing_options(existing.spec, spec):
            raise errors.AlreadyExists(
                f"endpoint {spec.ifname} of container {spec.container_id} exists with other options "
                f"({', '.join(different)})",
                field=different[0],
                fix="delete it first",
            )
        if existing.state is State.DEGRADED:
            return await self._mend(existing)
        return existing

    async def _lives(self, record: EndpointRecord) -> bool:
        """Whether the namespace of an endpoint can still be found where it was."""
        try:
            place = await self._kernel.place(EndpointSpec(*record.key, netns=record.netns))
        except (errors.FailedPrecondition, errors.InvalidArgument):
            return False
        return place.netns_cookie == record.netns_cookie

    async def _delete(self, key: Key) -> int:
        async with self._locks.hold(key):
            record = self._index.by_key(key)
            if record is None:
                return 0
            await self._remove(record)
            return 1

    async def _remove(self, record: EndpointRecord) -> None:
        """From any state to gone. On failure the record stays DELETING; the error says what is left."""
        if record.state is not State.DELETING:
            record = self._record(record.to(State.DELETING))
        try:
            await self._kernel.unwire(record, self._heirs(record))
            await self._addresses.release(record.owner)
        except errors.FibrilError as error:
            self._record(replace(record, message=f"not removed yet: {error.message}"))
            raise
        self._store.delete(record.id)
        self._index.remove(record)
        self._ids.give_back(record.id)
        self._feed.publish("delete", record)
        self._changed(record.id)

    def _heirs(self, record: EndpointRecord) -> Heirs:
        def heir(others: Iterable[int]) -> int:
            return next((number for number in others if number != record.id), 0)

        return Heirs(
            heir(self._index.sharing_cookie(record.netns_cookie)),
            heir(self._index.sharing_cgroup(record.cgroup_id)),
        )

    async def _repair(self, key: Key, number: int) -> None:
        async with self._locks.hold(key):
            record = self._index.by_id(number)
            if record is None:
                return
            if record.state is State.DELETING:
                await self._remove(record)
            elif record.state in (State.READY, State.DEGRADED):
                try:
                    await self._mend(record)
                except errors.NotFound as gone:
                    log.info(
                        "endpoint removed, its namespace is gone",
                        extra={
                            "endpoint": record.id,
                            "container": record.container_id,
                            "cause": gone.message,
                        },
                    )
                    await self._remove(self._index.by_id(number) or record)

    async def _mend(self, record: EndpointRecord) -> EndpointRecord:
        try:
            ifindex = await self._kernel.repair(record)
        except errors.NotFound:
            raise
        except errors.FibrilError as error:
            self._record(record.to(State.DEGRADED, error.message))
            raise
        return await self._settled(record, record.to(State.READY, host_ifindex=ifindex))

    async def _settled(self, before: EndpointRecord, after: EndpointRecord) -> EndpointRecord:
        """Record what the kernel was brought to from `before`; an identity set meanwhile may have missed it."""
        now = self._record(after)
        if now.identity != before.identity:
            await self._kernel.identify([now])
        return now

    def _record(self, record: EndpointRecord) -> EndpointRecord:
        """Record a step of whoever holds the endpoint's lock; the record as it is now, with the identity that
        `set_identities` may have given it meanwhile.
        """
        now = self._index.by_id(record.id)
        if now is not None:
            record = replace(record, identity=now.identity)
        if record != now:
            self._store.put(record)
            self._publish(record)
        return record

    def _publish(self, record: EndpointRecord) -> None:
        self._index.put(record)
        self._feed.publish("put", record)
        self._changed(record.id)
