"""Which address is next: the pure part of IPAM. No clock, no file, no etcd; times are passed in, in seconds.

A `Block` gives out the addresses of one prefix. Addresses that were never used come first, in ascending order; then released
ones, the longest released first. A released address rests for `REST_S` seconds, so that packets for its last holder do not
reach the next one; only when nothing else is free anywhere is the longest-resting one given out early: a pod that
cannot start is worse than an address that returns soon.

Addresses are plain integers here (`ipaddress` objects cost more than the allocation itself).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Range = tuple[int, int]  # first and last address, both included

REST_S = 30.0


def to_address(version: int, number: int) -> Address:
    """The address object of a number."""
    return IPv4Address(number) if version == 4 else IPv6Address(number)


def to_text(version: int, number: int) -> str:
    """The canonical text of an address; for IPv4 three times as fast as by way of the object."""
    if version == 4:
        return f"{number >> 24}.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
    return str(IPv6Address(number))


def ranges(networks: Iterable[Network]) -> list[Range]:
    """Sorted, merged ranges of prefixes."""
    merged: list[Range] = []
    for first, last in sorted((int(n.network_address), int(n.broadcast_address)) for n in networks):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], last)
        else:
            merged.append((first, last))
    return merged


def within(sorted_ranges: Sequence[Range], number: int) -> Range | None:
    """The range that holds a number, if any."""
    at = bisect_right(sorted_ranges, (number, 1 << 129)) - 1
    return sorted_ranges[at] if at >= 0 and number <= sorted_ranges[at][1] else None


def usable_range(network: Network) -> Range:
    """First and last address that a host may have.

    IPv4: without network and broadcast address (prefixes longer than 30 have neither, RFC 3021). IPv6: without the
    subnet-router anycast address (RFC 4291, 2.6.1), which is the first one.
    """
    first, last = int(network.network_address), int(network.broadcast_address)
    if network.version == 4:
        return (first + 1, last - 1) if network.prefixlen <= 30 else (first, last)
    return (first + 1, last) if network.prefixlen < 127 else (first, last)


def gateway_of(network: Network, excluded: Sequence[Range]) -> int:
    """The node's own address in a block: the first usable one that is not excluded. ValueError if there is none."""
    number, last = usable_range(network)
    while (hit := within(excluded, number)) is not None:
        number = hit[1] + 1
    if number > last:
        raise ValueError(f"every address of {network} is excluded")
    return number


class Block:
    """The addresses of one prefix, in the hands of this node.

    network, gateway: the prefix and the node's address in it (None in a cloud pool, whose addresses are single).
    version, cidr, gateway_text: the same as a number and as texts, for who describes an allocation.
    used: addresses given out.
    """

    __slots__ = (
        "_cursor",
        "_excluded",
        "_last",
        "_resting",
        "cidr",
        "gateway",
        "gateway_text",
        "network",
        "used",
        "version",
    )

    def __init__(self, network: Network, excluded: Sequence[Range] = (), gateway: int | None = None) -> None:
        self.network = network
        self.gateway = gateway
        self.version = network.version
        self.cidr = str(network)
        self.gateway_text = "" if gateway is None else to_text(network.version, gateway)
        self.used: set[int] = set()
        self._cursor, self._last = usable_range(network)
        self._excluded = tuple(r for r in excluded if r[0] <= self._last and r[1] >= self._cursor)
        self._resting: OrderedDict[int, float] = OrderedDict()  # number -> released at, the longest ago first

    def usable(self, number: int) -> bool:
        """Whether the number could ever be given out."""
        first, last = usable_range(self.network)
        return first <= number <= last and number != self.gateway and within(self._excluded, number) is None

    def take(self, now: float) -> int | None:
        """The next address that is free and has rested; None if there is none."""
        used, resting, gateway, excluded = self.used, self._resting, self.gateway, self._excluded
        while self._cursor <= self._last:
            number = self._cursor
            self._cursor = number + 1
            if number == gateway or number in used or number in resting:
                continue
            if excluded and (hit := within(excluded, number)) is not None:
                self._cursor = hit[1] + 1
                continue
            used.add(number)
            return number
        since = self.rested_since()
        return self.take_resting() if since is not None and since + REST_S <= now else None

    def rested_since(self) -> float | None:
        """When the longest-resting address was released; None if none rests."""
        return next(iter(self._resting.values()), None)

    def take_resting(self) -> int | None:
        """The longest-resting address, rested or not."""
        if not self._resting:
            return None
        number, _ = self._resting.popitem(last=False)
        self.used.add(number)
        return number

    def take_this(self, number: int) -> bool:
        """Take one address by name, resting or not; False if it is in use or not usable."""
        if number in self.used or not self.usable(number):
            return False
        self._resting.pop(number, None)
        self.used.add(number)
        return True

    def restore(self, number: int) -> None:
        """Count an address as used that was given out before a restart, whatever the rules say today."""
        self.used.add(number)

    def give(self, number: int, now: float) -> None:
        """Take an address back. Giving back what is not used is nothing."""
        if number in self.used:
            self.used.discard(number)
            self.rest(number, now)

    def rest(self, number: int, since: float) -> None:
        """Let a free address rest; calls come in the order of `since`. An excluded one is not free."""
        if within(self._excluded, number) is None:
            self._resting[number] = since

    def exclude(self, excluded: Sequence[Range]) -> None:
        """Replace the excluded ranges. Addresses that are no longer excluded become free, as if never used."""
        first, last = usable_range(self.network)
        self._excluded = tuple(r for r in excluded if r[0] <= last and r[1] >= first)
        for number in [n for n in self._resting if within(self._excluded, n) is not None]:
            del self._resting[number]
        self._cursor = first  # finds what has become free; used and resting ones are skipped

    def capacity(self) -> int:
        """Addresses that can be given out in all."""
        first, last = usable_range(self.network)
        gone = sum(min(b, last) - max(a, first) + 1 for a, b in self._excluded)
        return (
            last
            - first
            + 1
            - gone
            - (self.gateway is not None and within(self._excluded, self.gateway) is None)
        )

    def resting(self, now: float) -> int:
        """Free addresses that are held back at this moment."""
        return sum(1 for since in self._resting.values() if since + REST_S > now)

    def free(self, now: float) -> int:
        """Addresses that `take` would give now."""
        used = sum(1 for number in self.used if self.usable(number))
        return self.capacity() - used - self.resting(now)


def block_count(cidrs: Sequence[Network], block_prefix: int) -> int:
    """How many blocks the prefixes of one family hold."""
    return sum(1 << max(0, block_prefix - n.prefixlen) for n in cidrs)


def blocks_from(cidrs: Sequence[Network], block_prefix: int, start: int) -> Iterator[Network]:
    """All blocks of the prefixes, once each, from a starting point on, so that nodes begin at different places.

    start: any number; it is the same node's same start that makes its choice repeatable.
    """
    total = block_count(cidrs, block_prefix)
    for step in range(total):
        index = (start + step) % total
        for network in cidrs:
            inside = 1 << max(0, block_prefix - network.prefixlen)
            if index < inside:
                if block_prefix <= network.prefixlen:
                    yield network
                    break
                width = 1 << (network.max_prefixlen - block_prefix)
                base = int(network.network_address) + index * width
                yield (
                    IPv4Network((base, block_prefix))
                    if network.version == 4
                    else IPv6Network((base, block_prefix))
                )
                break
            index -= inside
