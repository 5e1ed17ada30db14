"""Which ports of an address belong to which service. Pure.

A service claims its frontends, and the port of its health checks as a port of every node. Ports of one node only collide with
those of the same node and with those of all.

Claims are kept by *place*, a block of an address's ports: an address that many services share, as that of node ports, would
else be one large value that is written with each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from services.common.pipeline.abi import IPAddress
from services.lb.model import ANY_V4, ANY_V6, TCP, Spec

BLOCK: Final = 4096
"""Ports of a place."""


class Place(NamedTuple):
    """Ports `block` * BLOCK and those that follow, of an address."""

    address: IPAddress
    block: int


class Claim(NamedTuple):
    """Ports `first` to `last` of an address; node: of that node only, "" for all."""

    proto: int
    first: int
    last: int
    node: str = ""

    def meets(self, other: Claim) -> bool:
        """Whether both want a port that only one can have."""
        return (
            self.proto == other.proto
            and self.first <= other.last
            and other.first <= self.last
            and (self.node == other.node or not (self.node and other.node))
        )


class Claims:
    """Of one place: who has what. Single ports are found by number, of which there may be thousands."""

    def __init__(self, claims: Mapping[str, Iterable[Claim]] | None = None) -> None:
        """claims: by service."""
        self._of: dict[str, tuple[Claim, ...]] = {}
        self._ports: dict[tuple[int, int], list[tuple[Claim, str]]] = {}
        self._ranges: list[tuple[Claim, str]] = []
        for service, wanted in (claims or {}).items():
            self.set(service, wanted)

    def __bool__(self) -> bool:
        return bool(self._of)

    def __iter__(self) -> Iterator[tuple[str, Claim]]:
        return ((service, claim) for service, claims in self._of.items() for claim in claims)

    def of(self, service: str) -> tuple[Claim, ...]:
        return self._of.get(service, ())

    def copy(self) -> Claims:
        """One that can be changed by itself."""
        return Claims(self._of)

    def set(self, service: str, claims: Iterable[Claim]) -> None:
        """What a service has from now on, instead of what it had."""
        for claim in self._of.pop(service, ()):
            self._place(claim).remove((claim, service))
        wanted = tuple(claims)
        if wanted:
            self._of[service] = wanted
        for claim in wanted:
            self._place(claim).append((claim, service))

    def taken(self, service: str, claim: Claim) -> str:
        """Who else has any of it; "" if nobody has."""
        for theirs, owner in self._near(claim):
            if owner != service and theirs.meets(claim):
                return owner
        return ""

    def _place(self, claim: Claim) -> list[tuple[Claim, str]]:
        if claim.first == claim.last:
            return self._ports.setdefault((claim.proto, claim.first), [])
        return self._ranges

    def _near(self, claim: Claim) -> Iterator[tuple[Claim, str]]:
        if claim.last - claim.first < len(self._ports):
            for port in range(claim.first, claim.last + 1):
                yield from self._ports.get((claim.proto, port), ())
        else:
            for found in self._ports.values():
                yield from found
        yield from self._ranges


def wanted(spec: Spec) -> dict[Place, tuple[Claim, ...]]:
    """What a service claims. A range is claimed at every place it reaches into."""
    found: dict[Place, list[Claim]] = {}

    def claim(address: IPAddress, wants: Claim) -> None:
        for block in range(wants.first // BLOCK, wants.last // BLOCK + 1):
            found.setdefault(Place(address, block), []).append(wants)

    for front in spec.frontends:
        claim(front.address, Claim(front.proto, front.port, front.port_last, front.node))
    port = spec.health_check_node_port
    if port:
        for anywhere in (ANY_V4, ANY_V6):
            claim(anywhere, Claim(TCP, port, port))
    return {place: tuple(claims) for place, claims in found.items()}


def collision(spec: Spec) -> tuple[int, int] | None:
    """Two frontends of a service that want the same port, by their positions; -1: the port of health checks."""
    seen: dict[IPAddress, Claims] = {}
    for number, front in enumerate(spec.frontends):
        claims = seen.setdefault(front.address, Claims())
        claim = Claim(front.proto, front.port, front.port_last, front.node)
        other = claims.taken("", claim)
        if other:
            return int(other), number
        claims.set(str(number), [claim])
    port = spec.health_check_node_port
    if port:
        for anywhere in (ANY_V4, ANY_V6):
            other = seen.get(anywhere, Claims()).taken("", Claim(TCP, port, port))
            if other:
                return int(other), -1
    return None
