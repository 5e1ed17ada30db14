"""Executions and connections, live, for whoever watches.

The programs hang in the kernel, and the ring buffer is read, only while there is a watcher. The kernel leaves out what no
watcher wants; each watcher then takes its own from the rest into a bounded queue. What does not fit there, or found
the ring buffer full, is counted as lost. In a flood the reader takes a batch at a time and lets the rest of the process go
first.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes as ct
import logging
import os
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fibril.endpoint.v1 import endpoint_pb2 as ep
from services.common import errors
from services.common.instance import Instance
from services.common.kernel.maps import BpfMap
from services.common.kernel.ringbuf import MAX_BATCH, RingBuffer
from services.common.service import ComponentStatus
from services.identity.workload import abi, programs
from services.identity.workload.abi import Kind
from services.identity.workload.endpoints import Endpoints

log = logging.getLogger(__name__)

QUEUE: Final = 4096
"""Events a watcher may be behind; as many as one batch of the reader."""
_FLOOD_PAUSE_S: Final = 0.02
"""Pause after a full batch: bounds the share of the event loop that a flood takes."""

Event = abi.Exec | abi.Connect


@dataclass(frozen=True)
class Sight:
    """An event, and the pod as it was known then: numbers of endpoints are given anew."""

    event: Event
    pod: ep.Endpoint | None


class Watcher:
    """One reader: what it asked for, and a bounded queue of what has come."""

    def __init__(self, kind: Kind, host: bool, endpoint: int, size: int = QUEUE) -> None:
        """`endpoint` 0: all pods; `host`: processes of no pod, too."""
        self.kind, self.host, self.endpoint = kind, host, endpoint
        self.lost = 0
        self._size = size
        self._queue: deque[Sight] = deque()
        self._news = asyncio.Event()
        self._failure: errors.FibrilError | None = None

    def wants(self, endpoint: int) -> bool:
        """Whether events of this pod (0: none) are for this watcher."""
        if self.endpoint:
            return endpoint == self.endpoint
        return endpoint != 0 or self.host

    def put(self, sight: Sight) -> None:
        if len(self._queue) < self._size:
            self._queue.append(sight)
            self._news.set()
        else:
            self.lost += 1

    def fail(self, error: errors.FibrilError) -> None:
        """There will be no more events."""
        self._failure = error
        self._news.set()

    async def take(self) -> list[Sight]:
        """What has come since the last time, at least one. Raises what it was failed with."""
        await self._news.wait()
        self._news.clear()
        sights = list(self._queue)
        self._queue.clear()
        if self._failure is not None:
            if not sights:
                raise self._failure
            self._news.set()
        return sights


def joint(watchers: Iterable[Watcher]) -> abi.Wanted:
    """The least the kernel must report so that every one of these watchers gets its own."""
    asked = list(watchers)
    endpoints = {watcher.endpoint for watcher in asked}
    if len(endpoints) == 1 and 0 not in endpoints:
        return abi.Wanted(host=0, endpoint=endpoints.pop())
    return abi.Wanted(host=int(any(watcher.wants(0) for watcher in asked)), endpoint=0)


class Tracer:
    """Traces what is watched. One event loop."""

    def __init__(self, instance: Instance, endpoints: Endpoints) -> None:
        self._instance = instance
        self._endpoints = endpoints
        self._watchers: list[Watcher] = []
        self._loaded: set[Kind] = set()
        self._attached: dict[Kind, list[int]] = {}
        self._lost_seen: dict[Kind, int] = {}
        self._loading = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None

    async def follow(self, watcher: Watcher) -> AsyncGenerator[list[Sight], None]:
        """Yields an empty list once tracing runs, then the watcher's events without end.

        FailedPrecondition says what the kernel lacks; PermissionDenied.
        """
        self._watchers.append(watcher)
        try:
            async with self._loading:
                await self._begin(watcher.kind)
            yield []
            while True:
                yield await watcher.take()
        finally:
            with contextlib.suppress(ValueError):
                self._watchers.remove(watcher)
            self._release()

    def stop(self) -> None:
        """Nobody watches any more."""
        self._watchers.clear()
        self._release()

    def status(self) -> Sequence[ComponentStatus]:
        count = len(self._watchers)
        traced = " and ".join(sorted(kind.name.lower() for kind in self._attached))
        message = f"{count} watchers of {traced}" if traced else "nobody watches"
        return [ComponentStatus("trace", "ok", message)]

    async def _begin(self, kind: Kind) -> None:
        """Load and attach as far as that is not done, and let the kernel report what is wanted."""
        if kind not in self._attached:
            pins = programs.pins(self._instance, kind)
            if kind not in self._loaded or not all(path.exists() for path in pins):
                await programs.load(self._instance, kind)
                self._loaded.add(kind)
            self._read_from(kind)
            self._set_wanted(kind)
            self._attached[kind] = programs.attach(self._instance, kind)
            log.info("tracing begins", extra={"kind": kind.name.lower()})
        else:
            self._set_wanted(kind)

    def _release(self) -> None:
        """Let go of what nobody watches; awaits nothing, so that a cancelled watcher does it all the same."""
        watched = {watcher.kind for watcher in self._watchers}
        for kind in list(self._attached):
            if kind in watched:
                self._set_wanted(kind)
                continue
            for fd in self._attached.pop(kind):
                os.close(fd)
            log.info("tracing ends", extra={"kind": kind.name.lower()})
        if not self._attached and self._reader is not None:
            self._reader.cancel()
            self._reader = None

    def _set_wanted(self, kind: Kind) -> None:
        path = programs.map_path(self._instance, "tr_wanted")
        with BpfMap.open(path, ct.c_uint32, abi.Wanted) as wanted:
            wanted.update(int(kind), joint(w for w in self._watchers if w.kind is kind))

    def _read_from(self, kind: Kind) -> None:
        """Begin to read the ring buffer, unless that is done already for another kind."""
        with self._lost_map() as lost:
            self._lost_seen[kind] = sum(value.value for value in lost.lookup_percpu(int(kind)) or ())
        if self._reader is None or self._reader.done():
            ring = RingBuffer.open(programs.map_path(self._instance, "tr_events"))
            # What lies there is from before anybody watched.
            while ring.poll():
                pass
            self._reader = asyncio.get_running_loop().create_task(self._read(ring), name="trace")

    def _lost_map(self) -> BpfMap[ct.c_uint32, ct.c_uint64]:
        return BpfMap.open(programs.map_path(self._instance, "tr_lost"), ct.c_uint32, ct.c_uint64)

    async def _read(self, ring: RingBuffer) -> None:
        try:
            with ring, self._lost_map() as lost:
                while True:
                    batch = await ring.read()
                    self._count_lost(lost)
                    for record in batch:
                        self._distribute(record)
                    await asyncio.sleep(_FLOOD_PAUSE_S if len(batch) >= MAX_BATCH else 0)
        except Exception as error:
            log.exception("tracing broke")
            for watcher in self._watchers:
                watcher.fail(errors.Internal(f"tracing broke: {error}", fix="see the log of the service"))

    def _count_lost(self, lost: BpfMap[ct.c_uint32, ct.c_uint64]) -> None:
        for kind in self._attached:
            total = sum(value.value for value in lost.lookup_percpu(int(kind)) or ())
            more = total - self._lost_seen[kind]
            if more:
                self._lost_seen[kind] = total
                for watcher in self._watchers:
                    if watcher.kind is kind:
                        watcher.lost += more

    def _distribute(self, record: bytes) -> None:
        kind, endpoint = abi.head(record)
        wanting = [w for w in self._watchers if w.kind is kind and w.wants(endpoint)]
        if wanting:
            sight = Sight(complete(abi.decode(record)), self._endpoints.by_id(endpoint))
            for watcher in wanting:
                watcher.put(sight)


def complete(event: Event) -> Event:
    """With the arguments from /proc, if the kernel could not read them and the process still runs that program."""
    if not isinstance(event, abi.Exec) or event.arguments or not event.who.pid:
        return event
    try:
        raw = Path(f"/proc/{event.who.pid}/cmdline").read_bytes()[: abi.ARGS_MAX]
    except OSError:
        return event
    return abi.Exec(event.who, event.path, abi.arguments(raw))
