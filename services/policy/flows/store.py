"""The flows a node remembers: the last so many, as the kernel wrote them, with the names that their numbers had then: pods,
identities and rules go, and others get their numbers. They are made readable only for who asks.
"""

from __future__ import annotations

import asyncio
import ipaddress
import struct
import sys
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from itertools import islice
from socket import ntohs
from typing import Final, NamedTuple, Protocol

from services.common import errors

_RECORD: Final = struct.Struct("=Q16s16s IIIIIII HHH BBBBBBBB 6x")
V4: Final = bytes(10) + b"\xff\xff"
assert _RECORD.size == 88  # sizeof(struct pol_event)
_NUMBERED: Final = slice(40, 60)
_NUMBERS: Final = struct.Struct("=5I")
_REASON: Final = slice(68, 70)
_VERDICT: Final = slice(75, 76)
BUNCH: Final = 256
"""Records to look at before others have their turn."""


class Names(Protocol):
    """Who knows what numbers stand for."""

    def labels(self, identity: int) -> Mapping[str, str]:
        """Of an identity; none if it is not known."""

    def pod(self, endpoint: int) -> str:
        """Name of an endpoint of this node; empty if it is not known."""

    def rule(self, number: int) -> tuple[str, str]:
        """Policy and rule with that number; empty if it is no policy's."""


class Named(NamedTuple):
    """What a record's numbers stood for when it was read."""

    source_pod: str
    destination_pod: str
    source_labels: Mapping[str, str]
    destination_labels: Mapping[str, str]
    policy: str
    rule: str


def named(names: Names, raw: bytes) -> Named:
    """Of a record of the ring buffer."""
    source, destination, source_identity, destination_identity, rule = _NUMBERS.unpack(raw[_NUMBERED])
    return Named(
        names.pod(source) if source else "",
        names.pod(destination) if destination else "",
        names.labels(source_identity),
        names.labels(destination_identity),
        *names.rule(rule),
    )


class Record(NamedTuple):
    """A flow as the kernel wrote it, taken apart. time_ns: CLOCK_MONOTONIC; src, dst: 16 bytes; ports in host order."""

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
    names: Named


def parse(sequence: int, raw: bytes, names: Named) -> Record:
    """A record of the ring buffer."""
    found = _RECORD.unpack(raw)
    return Record._make((sequence, *found[:11], ntohs(found[11]), ntohs(found[12]), *found[13:], names))


Predicate = Callable[[Record], bool]


class FlowStore:
    """Used from one event loop."""

    def __init__(self, size: int, names: Names) -> None:
        self._names = names
        self._records: deque[tuple[bytes, Named]] = deque(maxlen=size)
        self.seen = 0
        self._kinds: Counter[bytes] = Counter()
        self._news = asyncio.Event()

    def __len__(self) -> int:
        return len(self._records)

    @property
    def capacity(self) -> int:
        return self._records.maxlen or 0

    def add(self, records: list[bytes]) -> None:
        """What has come."""
        known: dict[bytes, Named] = {}
        for raw in records:
            numbers = raw[_NUMBERED]
            names = known.get(numbers)
            if names is None:
                names = known[numbers] = named(self._names, raw)
            self._records.append((raw, names))
        self.seen += len(records)
        self._kinds.update(raw[_VERDICT] + raw[_REASON] for raw in records)
        self._news.set()
        self._news = asyncio.Event()

    def counts(self) -> Mapping[tuple[int, int], int]:
        """Flows seen by verdict and drop reason. Also from other threads."""
        return {(kind[0], int.from_bytes(kind[1:], sys.byteorder)): n for kind, n in list(self._kinds.items())}

    @property
    def _first(self) -> int:
        """Sequence number of the oldest; they begin with 1."""
        return self.seen - len(self._records) + 1

    def since(self, after: int = 0) -> Iterator[Record]:
        """Those there are now with larger sequence numbers, oldest first, whatever comes meanwhile."""
        first = min(max(after + 1, self._first), self.seen + 1)
        raws = list(islice(self._records, first - self._first, None))
        return (parse(first + at, raw, names) for at, (raw, names) in enumerate(raws))

    async def select(self, wanted: Predicate, after: int = 0) -> AsyncIterator[Record]:
        """As since: those that are wanted; others have their turn meanwhile."""
        for count, record in enumerate(self.since(after), 1):
            if wanted(record):
                yield record
            if count % BUNCH == 0:
                await asyncio.sleep(0)

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
            before, seen = seen, self.seen
            async for record in self.select(wanted, before):
                yield record
            if seen == self.seen:
                await news.wait()


def address_text(raw: bytes) -> str:
    """An address for people."""
    if raw.startswith(V4):
        return str(ipaddress.IPv4Address(raw[12:]))
    return str(ipaddress.IPv6Address(raw))
