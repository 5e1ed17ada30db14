"""Tables for the kernel, and bpf/policy/lookup.h, in plain Python: a Writer that keeps what it is given to write."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from services.common.errors import ResourceExhausted
from services.common.pipeline.abi import FibAddr
from services.policy import abi
from services.policy.model import Direction, IPNetwork
from services.policy.resolve.resolved import Resolved, Tables
from tests.policy.reference import Address


@dataclass(frozen=True)
class Answer:
    """Of a range."""

    verdict: int
    rule: int
    enforced: bool

    @property
    def allowed(self) -> bool:
        return self.verdict & abi.VERDICT == abi.Verdict.ALLOW

    @property
    def reject(self) -> bool:
        return bool(self.verdict & abi.Verdict.REJECT)

    @property
    def keep(self) -> bool:
        return bool(self.verdict & abi.Verdict.KEEP)


def bits_of(address: Address) -> int:
    """As the kernel's tables have it: IPv4 within IPv6."""
    return int.from_bytes(bytes(FibAddr.of(address)), "big")


class Prefixes:
    """A longest-prefix match."""

    def __init__(self, classes: Mapping[IPNetwork, int]) -> None:
        self._lengths: dict[int, dict[int, int]] = {}
        for prefix, found in classes.items():
            length = prefix.prefixlen + (96 if prefix.version == 4 else 0)
            bits = bits_of(prefix.network_address)
            self._lengths.setdefault(length, {})[bits >> 128 - length] = found

    def find(self, address: Address | None) -> int:
        """Class of an address."""
        if address is not None:
            bits = bits_of(address)
            for length in sorted(self._lengths, reverse=True):
                found = self._lengths[length].get(bits >> 128 - length)
                if found is not None:
                    return found
        return 0


def look_up(
    tables: Tables, direction: Direction, peer_class: int, prefix_class: int, protocol: int, port: int
) -> Answer:
    """lookup_verdict, once the classes are known."""
    start, enforced = tables.sides[direction]
    if not enforced:
        return Answer(abi.Verdict.ALLOW, abi.RULE_NONE, False)
    cell = tables.cells[start + peer_class * tables.prefix_classes + prefix_class]
    count, first = cell >> 32, cell & 0xFFFFFFFF
    wanted = abi.cell_range(protocol, port, 0xFF, 0xFFFFFFFF)
    ranges = tables.cells[first : first + count]
    assert ranges == sorted(ranges) and ranges[0] >> 40 == 0
    found = max(each for each in ranges if each <= wanted)
    return Answer(found >> 32 & 0xFF, found & 0xFFFFFFFF, True)


@dataclass(frozen=True)
class Published:
    """As services.policy.kernel.writer has it."""

    line: int
    revision: int
    peers: int
    tables: Tables
    prefixes: Prefixes


@dataclass
class FakeWriter:
    """In the place of services.policy.kernel.writer.Writer."""

    lines: dict[int, Published] = field(default_factory=dict)
    peers: dict[int, dict[int, int]] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)
    endpoints: dict[int, Published] = field(default_factory=dict)
    writes: int = 0
    """Lines, peers, identities."""
    full: bool = False
    """Nothing more fits."""
    freed: int = 0
    left: bool = False

    def __post_init__(self) -> None:
        self._next = itertools.count(1)

    def answer(
        self,
        endpoint: int,
        direction: Direction,
        identity: int,
        address: Address | None,
        protocol: int,
        port: int,
    ) -> Answer:
        """lookup_verdict of an endpoint."""
        published = self.endpoints[endpoint]
        if identity in self.peers[published.peers]:
            found = self.peers[published.peers][identity]
        else:
            found = 0 if identity in self.known else published.tables.unknown
        prefix = published.prefixes.find(address)
        return look_up(published.tables, direction, found, prefix, protocol, port)

    # ---- what an Enforcer asks for --------------------------------------------------------------------------
    def publish(self, resolved: Resolved, before: Published | None, same_peers: bool) -> Published:
        if self.full:
            raise ResourceExhausted("nothing fits")
        made = resolved.tables()
        if same_peers and before is not None:
            peers = before.peers
        else:
            peers = next(self._next)
            self.peers[peers] = dict(resolved.classes)
            self.writes += len(resolved.classes)
        published = Published(next(self._next), next(self._next), peers, made, Prefixes(made.prefixes))
        self.lines[published.line] = published
        self.writes += 1
        return published

    def retire(self, published: Published, after: Published | None = None) -> None:
        del self.lines[published.line]
        if after is None or after.peers != published.peers:
            del self.peers[published.peers]

    def rest(self) -> None:
        for published in self.endpoints.values():
            assert self.lines.get(published.line) is published, "an endpoint has what is given up"
        for published in self.lines.values():
            assert published.peers in self.peers

    def put_peer(self, published: Published, number: int, found: int) -> None:
        self.peers[published.peers][number] = found
        self.writes += 1

    def drop_peer(self, published: Published, number: int) -> None:
        if self.peers.get(published.peers, {}).pop(number, None) is not None:
            self.writes += 1

    def know(self, numbers: Iterable[int]) -> None:
        new = set(numbers) - self.known
        self.known |= new
        self.writes += len(new)

    def forget(self, number: int) -> None:
        if number in self.known:
            self.known.remove(number)
            self.writes += 1

    def set_endpoint(self, number: int, owner: int, published: Published, flags: int) -> None:
        if self.endpoints.get(number) != published:
            self.endpoints[number] = published
            self.writes += 1

    def set_flags(self, number: int, owner: int, flags: int) -> None:
        pass

    def clear_endpoint(self, number: int) -> None:
        self.endpoints.pop(number, None)

    def prune(self, endpoints: Iterable[int]) -> None:
        self.endpoints = {number: self.endpoints[number] for number in endpoints if number in self.endpoints}


def as_writer(fake: FakeWriter) -> Any:
    """For those who want to see the class."""
    return fake
