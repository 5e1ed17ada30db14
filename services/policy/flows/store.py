"""The flows a node remembers: the last so many, as the kernel wrote them. They are made readable only for who asks."""

from __future__ import annotations

import asyncio
import ipaddress
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from services.common import errors

_RECORD: Final = struct.Struct("=Q16s16s IIIIIII H2s2s BBBBBBBB 6x")
_V4: Final = bytes(10) + b"\xff\xff"
assert _RECORD.size == 88  # sizeof(struct pol_event)


@dataclass(frozen=True, slots=True)
class Record:
    """A flow as the kernel wrote it, taken apart. time_ns: CLOCK_MONOTONIC; src, dst: 16 bytes; ports in network order."""

    sequence: int
    time_ns: int
    src: bytes
    dst: bytes
    src_id: int
    dst_id: int
    src_identity: int
    dst_identity: int
    rule: int
    revision: int
    suppressed: int
    reason: int
    sport: int
    dport: int
    type: int
    verdict: int
    direction: int
    family: int
    proto: int
    tcp_flags: int
    icmp_type: int
    icmp_code: int


def parse(sequence: int, raw: bytes) -> Record:
    """A record of the ring buffer."""
    found = _RECORD.unpack(raw)
    ports = (int.from_bytes(found[11], "big"), int.from_bytes(found[12], "big"))
    values: tuple[Any, ...] = (sequence, *found[:11], *ports, *found[13:])
    return Record(*values)


Predicate = Callable[[Record], bool]


class FlowStore:
    """Used from one event loop."""

    def __init__(self, size: int) -> None:
        self._records: deque[bytes] = deque(maxlen=size)
        self.seen = 0
        self._news = asyncio.Event()

    def __len__(self) -> int:
        return len(self._records)

    @property
    def capacity(self) -> int:
        return self._records.maxlen or 0

    def add(self, records: list[bytes]) -> None:
        """What has come."""
        self._records.extend(records)
        self.seen += len(records)
        self._news.set()
        self._news = asyncio.Event()

    @property
    def _first(self) -> int:
        """Sequence number of the oldest; they begin with 1."""
        return self.seen - len(self._records) + 1

    def since(self, after: int = 0) -> Iterator[Record]:
        """Those with larger sequence numbers, oldest first; nothing may come meanwhile."""
        first = self._first
        skip = max(0, after + 1 - first)
        for at in range(skip, len(self._records)):
            yield parse(first + at, self._records[at])

    async def follow(self, after: int, wanted: Predicate) -> AsyncIterator[Record]:
        """Endless: those with larger numbers that are wanted. Aborted when the reader falls too far behind."""
        seen = after
        while True:
            news = self._news
            if seen + 1 < self._first:
                raise errors.Aborted(
                    f"{self._first - seen - 1} flows were forgotten before they were read",
                    fix="follow again, with a narrower filter",
                )
            found = [record for record in self.since(seen) if wanted(record)]
            seen = self.seen
            for record in found:
                yield record
            if seen == self.seen:
                await news.wait()


def address_text(raw: bytes) -> str:
    """An address for people."""
    if raw.startswith(_V4):
        return str(ipaddress.IPv4Address(raw[12:]))
    return str(ipaddress.IPv6Address(raw))
