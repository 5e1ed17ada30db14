"""Pairs as clients see them, and those who watch them.

The kernel tells when a pair is first shortened and when it ends; what it has carried is looked up while somebody watches.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Final

from fibril.sockaccel.v1 import sockaccel_pb2 as pb
from fibril.types.v1 import types_pb2
from services.common.errors import Aborted, InvalidArgument
from services.sockaccel import abi

_BEHIND_MAX: Final = 16_384


def state_of(pair: abi.Pair) -> pb.PairState.ValueType:
    """What it is now."""
    if pair.ended:
        return pb.PAIR_STATE_ENDED
    if pair.flags & abi.PairFlag.OFF:
        return pb.PAIR_STATE_OFF
    if any(end.mode == abi.Mode.SHORT for end in pair.ends):
        return pb.PAIR_STATE_SHORTENED
    return pb.PAIR_STATE_PROVING


def message(pair: abi.Pair, class_name: str, pod: Callable[[int], str], offset_ns: int) -> pb.Pair:
    """pod: name by endpoint. offset_ns: from CLOCK_MONOTONIC to Unix time."""
    shown = pb.Pair(
        id=pair.ends[0].cookie,
        class_name=class_name,
        state=state_of(pair),
        end_reason=pb.EndReason.ValueType(pair.ended) if pair.ended in pb.EndReason.values() else pb.END_REASON_UNSPECIFIED,
        redirected=bool(pair.flags & abi.PairFlag.REDIRECTED),
        made_unix_seconds=(pair.made + offset_ns) / 1e9,
    )
    for end, into in zip(pair.ends, (shown.client, shown.server), strict=True):
        address = end.addr.ip()
        into.address, into.port = str(address) if address is not None else "", end.port
        into.endpoint, into.uid, into.netns_cookie = end.endpoint, end.uid, end.netns
        into.pod = pod(end.endpoint) if end.endpoint else ""
        into.short_bytes, into.short_sends = end.bytes, end.sends
        into.tcp_bytes, into.tcp_sends = end.tcp_bytes, end.tcp_sends
        into.shortened = end.mode == abi.Mode.SHORT and not pair.ended and not pair.flags & abi.PairFlag.OFF
    return shown


def check(wanted: pb.PairFilter) -> None:
    """InvalidArgument names the field of a filter that cannot match."""
    if wanted.state not in pb.PairState.values():
        raise InvalidArgument(f"{wanted.state} is no state", field="filter.state", fix="see enum PairState")
    if wanted.port > 65535:
        raise InvalidArgument(f"{wanted.port} is no port", field="filter.port")


def matches(pair: pb.Pair, wanted: pb.PairFilter) -> bool:
    ends = (pair.client, pair.server)
    return (
        (not wanted.pod or any(end.pod == wanted.pod for end in ends))
        and (not wanted.class_name or pair.class_name == wanted.class_name)
        and wanted.state in (pb.PAIR_STATE_UNSPECIFIED, pair.state)
        and (not wanted.port or any(end.port == wanted.port for end in ends))
    )


class Watch:
    """One watcher. `ended` is told of pairs that ended; the others are looked up."""

    def __init__(self, wanted: pb.PairFilter, interval_s: float) -> None:
        self._wanted, self._interval_s = wanted, interval_s
        self._ended: dict[int, pb.Pair] = {}
        self._lost = False
        self._known: dict[int, bytes] = {}

    def ended(self, pair: pb.Pair) -> None:
        if len(self._ended) >= _BEHIND_MAX:
            self._lost = True
        elif matches(pair, self._wanted) or pair.id in self._known:
            self._ended[pair.id] = pair

    async def run(self, look: Callable[[], Awaitable[Iterable[pb.Pair]]]) -> AsyncIterator[pb.WatchPairsResponse]:
        """Endless. Aborted when the reader is too slow."""
        synced = False
        while True:
            if self._lost:
                raise Aborted("the watcher fell too far behind", fix="watch again, for a new snapshot")
            present = set()
            for pair in [each for each in await look() if matches(each, self._wanted)]:
                present.add(pair.id)
                text = pair.SerializeToString(deterministic=True)
                if self._known.get(pair.id) != text:
                    self._known[pair.id] = text
                    yield pb.WatchPairsResponse(kind=types_pb2.WATCH_KIND_PUT, pair=pair)
            ended, self._ended = self._ended, {}
            for pair in ended.values():
                self._known.pop(pair.id, None)
                if synced:
                    yield pb.WatchPairsResponse(kind=types_pb2.WATCH_KIND_DELETE, pair=pair)
            for number in self._known.keys() - present:
                # It does not match any more, or its report was lost.
                yield pb.WatchPairsResponse(
                    kind=types_pb2.WATCH_KIND_DELETE, pair=pb.Pair.FromString(self._known.pop(number))
                )
            if not synced:
                synced = True
                yield pb.WatchPairsResponse(kind=types_pb2.WATCH_KIND_SYNCED)
            await asyncio.sleep(self._interval_s)
