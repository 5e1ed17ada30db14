"""FlowService: reads what the kernel reports, remembers it, serves it.

The kernel wakes nobody for a flow: the ring is emptied twenty times a second, which costs a busy node less than being woken
for each connection would.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Final

from fibril.flow.v1 import flow_pb2 as pb
from fibril.flow.v1 import flow_pb2_grpc
from fibril.types.v1 import reasons_pb2, types_pb2
from services.common.errors import FibrilError, InvalidArgument
from services.common.instance import Instance
from services.common.kernel.ringbuf import RingBuffer
from services.common.pipeline.events import clock_offset
from services.common.service import ComponentStatus
from services.common.telemetry import Reading, metrics
from services.policy import abi
from services.policy.flows.filters import selected
from services.policy.flows.store import FlowStore, Names, Record, address_text

PAUSE_S: Final = 0.05
_RETRY_S: Final = 2.0
NAMES_S: Final = 10.0
"""How long a process that has just begun leaves what the kernel has told in the ring, which has room for some 20,000 flows."""


class FlowsPart(flow_pb2_grpc.FlowServiceServicer):
    """One a process; the only reader of the ring."""

    def __init__(
        self, instance: Instance, size: int, node: str, names: Names, known: asyncio.Event, stat: Callable[[abi.Stat], int]
    ) -> None:
        """node: this one's name. known: names are known. stat: a counter of the programs'."""
        self._path = instance.pin_dir / abi.MAPS["pol_events"]
        self._node, self._known, self._stat = node, known, stat
        self.store = FlowStore(size, names)
        self._offset_ns = 0
        self._problem = "not begun yet"

    async def run(self) -> None:
        """Until cancelled."""
        metrics().sum("fibril.policy.flows", self._counts, description="flows by verdict and reason")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NAMES_S):
                await self._known.wait()
        while True:
            try:
                with RingBuffer.open(self._path) as ring:
                    self._problem = ""
                    await self._read(ring)
            except FibrilError as error:
                self._problem = str(error)
            await asyncio.sleep(_RETRY_S)

    async def _read(self, ring: RingBuffer) -> None:
        while True:
            self._offset_ns = clock_offset()
            records = ring.poll()
            if records:
                self.store.add(records)
            await asyncio.sleep(PAUSE_S)

    def _counts(self) -> list[Reading]:
        verdicts, reasons = pb.FlowVerdict.DESCRIPTOR.values_by_number, reasons_pb2.DropReason.DESCRIPTOR.values_by_number
        return [
            (
                count,
                {
                    "verdict": _label(verdicts, verdict, "FLOW_VERDICT_"),
                    "reason": _label(reasons, reason, "DROP_REASON_") if reason else "",
                },
            )
            for (verdict, reason), count in self.store.counts().items()
        ]

    def status(self) -> list[ComponentStatus]:
        store = self.store
        if self._problem:
            return [ComponentStatus("flows", "degraded", f"not recorded: {self._problem}", capacity=store.capacity)]
        return [ComponentStatus("flows", "ok", f"{store.seen} seen", used=len(store), capacity=store.capacity)]

    def allowed(self, seconds: float) -> Iterator[pb.Flow]:
        """Different connections that were allowed within so many seconds; 0: all that are remembered."""
        oldest = time.monotonic_ns() - int(seconds * 1e9) if seconds else 0
        seen: set[tuple[bytes, bytes, int, int, int]] = set()
        for record in self.store.since():
            if record.verdict != pb.FLOW_VERDICT_FORWARDED or record.type != pb.FLOW_TYPE_NEW or record.time_ns < oldest:
                continue
            key = record.src, record.dst, record.proto, record.dport, record.icmp_type
            if key not in seen:
                seen.add(key)
                yield self.message(record)

    def message(self, record: Record) -> pb.Flow:
        """A flow with names for its numbers."""
        names = record.names
        flow = pb.Flow(
            sequence=record.sequence,
            time_unix_seconds=(record.time_ns + self._offset_ns) / 1e9,
            verdict=pb.FlowVerdict.ValueType(record.verdict),
            type=pb.FlowType.ValueType(record.type),
            direction=pb.FlowDirection.ValueType(record.direction + 1),
            protocol=record.proto,
            icmp_type=record.icmp_type,
            icmp_code=record.icmp_code,
            tcp_flags=record.tcp_flags,
            drop_reason=reasons_pb2.DropReason.ValueType(record.reason),
            policy=names.policy,
            rule=names.rule,
            rule_id=record.rule,
            generation=record.revision,
            node=self._node,
            suppressed=record.suppressed,
        )
        ends = (
            (flow.source, record.src, record.sport, record.src_identity, record.src_id, names.source_pod, names.source_labels),
            (flow.destination, record.dst, record.dport, record.dst_identity, record.dst_id, names.destination_pod,
             names.destination_labels),
        )  # fmt: skip
        for end, address, port, identity, endpoint, pod, labels in ends:
            end.address, end.port, end.identity, end.endpoint = address_text(address), port, identity, endpoint
            end.pod = pod
            end.labels.update(labels)
        return flow

    # ---- RPCs -----------------------------------------------------------------------------------------------
    async def GetFlows(self, request: pb.GetFlowsRequest, context: object) -> AsyncIterator[pb.GetFlowsResponse]:
        since, until = request.since_unix_seconds, request.until_unix_seconds
        for name, value in (("since_unix_seconds", since), ("until_unix_seconds", until)):
            if not 0 <= value < 1e12:
                raise InvalidArgument(f"{value:g} is no time", field=name)
        if until and request.follow:
            raise InvalidArgument("what is followed has no end", field="until_unix_seconds", fix="leave one out")
        wanted = selected(request.allow, request.deny)

        def timely(record: Record) -> bool:
            at = (record.time_ns + self._offset_ns) / 1e9
            return (not since or at >= since) and (not until or at < until) and wanted(record)

        seen = self.store.seen
        found: deque[Record] = deque(maxlen=request.last or None)
        async for record in self.store.select(timely, request.after_sequence):
            found.append(record)
        for count, record in enumerate(found):
            if count % 64 == 63:
                await asyncio.sleep(0)
            yield pb.GetFlowsResponse(kind=types_pb2.WATCH_KIND_PUT, flow=self.message(record))
        yield pb.GetFlowsResponse(kind=types_pb2.WATCH_KIND_SYNCED)
        if request.follow:
            async for record in self.store.follow(seen, timely):
                yield pb.GetFlowsResponse(kind=types_pb2.WATCH_KIND_PUT, flow=self.message(record))

    async def GetFlowStatus(self, request: pb.GetFlowStatusRequest, context: object) -> pb.GetFlowStatusResponse:
        store = self.store
        return pb.GetFlowStatusResponse(
            remembered=len(store),
            capacity=store.capacity,
            seen=store.seen,
            lost=self._stat(abi.Stat.LOST),
            suppressed=self._stat(abi.Stat.SUPPRESSED),
        )


def _label(known: Mapping[int, Any], number: int, prefix: str) -> str:
    """An enum's value as metrics write it."""
    return str(known[number].name).removeprefix(prefix).lower() if number in known else str(number)
