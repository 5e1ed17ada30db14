"""MonitorService: drops and forwarded packets live, and counters.

The ring buffer is read, and the programs write to it, only while somebody watches: the first watcher sets
the flags in pl_config, the last one clears them, and a start clears what a killed process left set. Each
watcher has a bounded queue; what does not fit is counted and told. In a flood the reader takes a batch at a
time and lets the rest of the process go first, so what exceeds its pace is lost in the kernel, where the
counters still have it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable

from fibril.monitor.v1 import monitor_pb2 as pb
from fibril.monitor.v1 import monitor_pb2_grpc
from fibril.types.v1 import reasons_pb2
from services.common import errors
from services.common.instance import Instance
from services.common.kernel.ringbuf import MAX_BATCH, RingBuffer
from services.common.pipeline import abi, counters, events, install
from services.ipam.config import MonitorConfig

log = logging.getLogger(__name__)

_FLOOD_PAUSE_S = 0.02
"""Pause after a full batch: bounds the share of the event loop that a flood takes."""


class Watcher:
    """One reader: what it asked for, and a bounded queue of what has come."""

    def __init__(self, forwarded: bool, endpoint_id: int, size: int) -> None:
        self.forwarded = forwarded
        self._endpoint_id = endpoint_id
        self._size = size
        self._queue: deque[pb.Event] = deque()
        self._lost = 0
        self._news = asyncio.Event()

    def wants(self, event: events.Event) -> bool:
        if event.verdict != abi.Verdict.DROPPED and not self.forwarded:
            return False
        return not self._endpoint_id or self._endpoint_id in (
            event.source_endpoint,
            event.destination_endpoint,
        )

    def put(self, message: pb.Event) -> None:
        if len(self._queue) < self._size:
            self._queue.append(message)
        else:
            self._lost += 1
        self._news.set()

    async def take(self) -> tuple[list[pb.Event], int]:
        """What has come since the last time, and how many events were lost meanwhile."""
        await self._news.wait()
        self._news.clear()
        messages, lost = list(self._queue), self._lost
        self._queue.clear()
        self._lost = 0
        return messages, lost


class Monitor:
    """Distributes the node's events to watchers. `pod_name(endpoint number)` gives "" for an unknown one."""

    def __init__(self, instance: Instance, cfg: MonitorConfig, pod_name: Callable[[int], str]) -> None:
        self._instance = instance
        self._cfg = cfg
        self._pod_name = pod_name
        self._watchers: list[Watcher] = []
        self._reader: asyncio.Task[None] | None = None
        self._offset_ns = 0

    def start(self) -> None:
        """Clear flags that an earlier process left. NotFound if there is no pipeline."""
        self._set_flags()

    async def stop(self) -> None:
        """Nobody watches any more."""
        self._watchers.clear()
        await self._adjust()

    async def watch(self, forwarded: bool, endpoint_id: int) -> AsyncGenerator[pb.WatchEventsResponse, None]:
        """Endless. FailedPrecondition if there is no pipeline or the ring buffer cannot be read."""
        watcher = Watcher(forwarded, endpoint_id, self._cfg.queue)
        self._watchers.append(watcher)
        try:
            await self._adjust()
            while True:
                messages, lost = await watcher.take()
                for message in messages:
                    yield pb.WatchEventsResponse(event=message, lost=lost)
                    lost = 0
                if lost:
                    yield pb.WatchEventsResponse(lost=lost)
        finally:
            with contextlib.suppress(ValueError):
                self._watchers.remove(watcher)
            await self._adjust()

    async def _adjust(self) -> None:
        """Bring flags and reader in line with the watchers there are."""
        if self._watchers and self._reader is None:
            try:
                ring = RingBuffer.open(install.map_path(self._instance, "pl_events"))
            except errors.NotFound as error:
                raise _no_pipeline(error) from None
            # What lies there is from before anybody watched.
            while ring.poll():
                pass
            self._offset_ns = events.clock_offset()
            self._reader = asyncio.get_running_loop().create_task(self._read(ring), name="monitor")
        self._set_flags()
        if not self._watchers and self._reader is not None:
            reader, self._reader = self._reader, None
            reader.cancel()
            await asyncio.wait([reader])

    def _set_flags(self) -> None:
        forwarded = any(watcher.forwarded for watcher in self._watchers)
        try:
            with events.open_config(self._instance) as config:
                events.watch(
                    config,
                    drops=bool(self._watchers),
                    forward_every=self._cfg.sample_forwarded if forwarded else 0,
                )
        except errors.NotFound as error:
            if self._watchers:
                raise _no_pipeline(error) from None

    async def _read(self, ring: RingBuffer) -> None:
        with ring:
            while True:
                batch = await ring.read()
                for sample in batch:
                    self._distribute(events.decode(sample, self._offset_ns))
                await asyncio.sleep(_FLOOD_PAUSE_S if len(batch) >= MAX_BATCH else 0)

    def _distribute(self, event: events.Event) -> None:
        wanting = [watcher for watcher in self._watchers if watcher.wants(event)]
        if wanting:
            message = self._message(event)
            for watcher in wanting:
                watcher.put(message)

    def _message(self, event: events.Event) -> pb.Event:
        return pb.Event(
            time_unix_nanos=event.time_unix_ns,
            verdict=pb.Verdict.ValueType(event.verdict),
            reason=reasons_pb2.DropReason.ValueType(event.reason),
            direction=pb.Direction.ValueType(event.direction),
            source_endpoint=event.source_endpoint,
            destination_endpoint=event.destination_endpoint,
            source_identity=event.source_identity,
            destination_identity=event.destination_identity,
            source_pod=self._pod_name(event.source_endpoint),
            destination_pod=self._pod_name(event.destination_endpoint),
            source=event.source,
            destination=event.destination,
            source_port=event.source_port,
            destination_port=event.destination_port,
            protocol=event.protocol,
            ethertype=event.ethertype,
            length=event.length,
            tcp_flags=event.tcp_flags,
            ifindex=event.ifindex,
        )


class MonitorApi(monitor_pb2_grpc.MonitorServiceServicer):
    """fibril.monitor.v1 to the monitor and back."""

    def __init__(self, instance: Instance, monitor: Monitor) -> None:
        self._instance = instance
        self._monitor = monitor

    async def WatchEvents(
        self, request: pb.WatchEventsRequest, context: object
    ) -> AsyncGenerator[pb.WatchEventsResponse, None]:
        async with contextlib.aclosing(self._monitor.watch(request.forwarded, request.endpoint_id)) as stream:
            async for message in stream:
                yield message

    async def GetCounters(self, request: pb.GetCountersRequest, context: object) -> pb.GetCountersResponse:
        try:
            with counters.open_counters(self._instance) as table:
                found = counters.read_counters(table)
        except errors.NotFound as error:
            raise _no_pipeline(error) from None
        return pb.GetCountersResponse(
            counters=[
                pb.Counter(
                    reason=reasons_pb2.DropReason.ValueType(reason),
                    direction=pb.Direction.ValueType(direction),
                    packets=packets,
                    bytes=size,
                )
                for (reason, direction), (packets, size) in sorted(found.items())
            ]
        )


def _no_pipeline(error: errors.FibrilError) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(
        f"there is no data path to look at: {error.message}", fix="`fibril status` says what it lacks"
    )
