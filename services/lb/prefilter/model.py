"""Which set decides about a source: pure rules, no kernel.

The longest prefix that any set has wins; of sets with the same prefix one that allows, then the one with the lower number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import Final

from services.lb.prefilter.keys import Keys, covering

CLUSTER: Final = "cluster"
"""The set of the cluster's own addresses."""
CLUSTER_IDENT: Final = 255
LINK_LOCAL: Final = IPv6Network("fe80::/10")


@dataclass
class PrefixSet:
    """A named set. ident: its number in the kernel."""

    name: str
    ident: int
    allow: bool
    v4: Keys = field(default_factory=lambda: Keys(4))
    v6: Keys = field(default_factory=lambda: Keys(6))

    def keys(self, family: int) -> Keys:
        return self.v4 if family == 4 else self.v6

    def __len__(self) -> int:
        return len(self.v4) + len(self.v6)


class Sets:
    """All sets, best first."""

    def __init__(self, sets: Iterable[PrefixSet]) -> None:
        self.ranked = sorted(sets, key=lambda each: (not each.allow, each.ident))

    def decide(self, key: bytes) -> int:
        """Number of the set that a prefix counts for; 0: no set has it."""
        for each in self.ranked:
            keys = each.v4 if len(key) == each.v4.size else each.v6
            if key in keys:
                return each.ident
        return 0

    def longest(self, address: IPv4Address | IPv6Address, bits: int = 128) -> int:
        """Number of the set whose prefix of at most `bits` is the longest that holds an address; 0: none."""
        for key in covering(address, bits):
            ident = self.decide(key)
            if ident:
                return ident
        return 0

    def matches(self, address: IPv4Address | IPv6Address) -> list[tuple[PrefixSet, bytes]]:
        """Everything that holds an address and counts for it, what decides first."""
        least = LINK_LOCAL.prefixlen if address in LINK_LOCAL else 0
        family = address.version
        return [
            (each, key)
            for key in covering(address)
            if key[-1] >= least
            for each in self.ranked
            if key in each.keys(family)
        ]

    def count(self, family: int) -> int:
        return sum(len(each.keys(family)) for each in self.ranked)
