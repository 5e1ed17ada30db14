"""Prefixes as bytes, and sorted tables of them.

A key is the packed address and one byte of length: 5 bytes for IPv4, 17 for IPv6. Keys sort by address, then length, so
all prefixes within a prefix are next to each other, behind it. A table is one immutable string of keys: a million IPv4
prefixes are 5 MB, and are written to disk as they are.
"""

from __future__ import annotations

import bisect
import ipaddress
import socket
from array import array
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from services.common import errors

SIZE: Final = {4: 5, 6: 17}
_LENGTH: Final = [bytes((number,)) for number in range(256)]
_HOST4: Final = [(1 << 32 - length) - 1 for length in range(33)]
_HOST6: Final = [(1 << 128 - length) - 1 for length in range(129)]
_NO_DIGITS: Final = frozenset("0123456789")


def parse(text: str) -> bytes:
    """The key of "192.0.2.0/24" or "2001:db8::1". ValueError says what is wrong."""
    address, slash, length = text.partition("/")
    try:
        if ":" in address:
            raw, bits, hosts = socket.inet_pton(socket.AF_INET6, address), 128, _HOST6
        else:
            raw, bits, hosts = socket.inet_pton(socket.AF_INET, address), 32, _HOST4
    except (OSError, ValueError):
        raise ValueError(f"{text[:60]!r} is no prefix") from None
    if slash:
        if not length or len(length) > 3 or not _NO_DIGITS.issuperset(length) or int(length) > bits:
            raise ValueError(f"{text[:60]!r} is no prefix")
        count = int(length)
        if count < bits and int.from_bytes(raw) & hosts[count]:
            raise ValueError(f"{text[:60]!r} has host bits set")
        bits = count
    return raw + _LENGTH[bits]


def parse_all(texts: Iterable[str], field: str = "prefixes") -> list[bytes]:
    """Their keys. InvalidArgument names the first that is none."""
    found: list[bytes] = []
    try:
        for text in texts:
            found.append(parse(text))
    except ValueError as error:
        raise errors.InvalidArgument(
            str(error), field=f"{field}[{len(found)}]", fix='write "192.0.2.0/24" or "2001:db8::1"'
        ) from None
    return found


def text_of(key: bytes) -> str:
    family = socket.AF_INET if len(key) == SIZE[4] else socket.AF_INET6
    return f"{socket.inet_ntop(family, key[:-1])}/{key[-1]}"


def family_of(key: bytes) -> int:
    return 4 if len(key) == SIZE[4] else 6


def covering(address: IPv4Address | IPv6Address, longest: int = 128) -> Iterator[bytes]:
    """Keys of all prefixes that hold an address, longest first, from `longest` bits on."""
    bits, number = address.max_prefixlen, int(address)
    for length in range(min(bits, longest), -1, -1):
        masked = number >> bits - length << bits - length
        yield masked.to_bytes(bits // 8) + _LENGTH[length]


def address_of(text: str, field: str) -> IPv4Address | IPv6Address:
    """InvalidArgument if it is none."""
    try:
        if "%" in text:
            raise ValueError
        address = ipaddress.ip_address(text)
    except ValueError:
        raise errors.InvalidArgument(f"{text[:60]!r} is no address", field=field) from None
    return getattr(address, "ipv4_mapped", None) or address


def _sorted(keys: Iterable[bytes]) -> list[bytes]:
    """In parts: one sort of a million would hold up every other thread meanwhile."""
    parts: dict[bytes, list[bytes]] = {}
    for key in keys:
        parts.setdefault(key[:2], []).append(key)
    ordered: list[bytes] = []
    for start in sorted(parts):
        ordered += sorted(parts[start])
    return ordered


class Keys:
    """An immutable sorted table of keys of one family, with an expiry each (seconds since 1970; 0: never)."""

    __slots__ = ("_expiry", "_raw", "size")

    def __init__(self, family: int, raw: bytes = b"", expiry: array[int] | None = None) -> None:
        """expiry: as many as keys; None: no key has one."""
        self.size = SIZE[family]
        self._raw = raw
        self._expiry = expiry

    @property
    def raw(self) -> bytes:
        return self._raw

    @property
    def expiry(self) -> bytes:
        """Empty if no key has one."""
        return self._expiry.tobytes() if self._expiry else b""

    def __len__(self) -> int:
        return len(self._raw) // self.size

    def __iter__(self) -> Iterator[bytes]:
        raw, size = self._raw, self.size
        return (raw[at : at + size] for at in range(0, len(raw), size))

    def at(self, index: int) -> bytes:
        return self._raw[index * self.size : (index + 1) * self.size]

    def expiry_at(self, index: int) -> int:
        return self._expiry[index] if self._expiry else 0

    def find(self, key: bytes, first: int = 0) -> int:
        """Index of the first key that is not smaller."""
        return bisect.bisect_left(range(len(self)), key, lo=first, key=self.at)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and len(key) == self.size and self.index(key) >= 0

    def index(self, key: bytes) -> int:
        """-1: it is not there."""
        index = self.find(key)
        return index if self.at(index) == key else -1

    def within(self, first: bytes, last: bytes) -> bytes:
        """The raw keys whose addresses (packed) are between the two."""
        return self._raw[self.find(first) * self.size : self.find(last + b"\xff") * self.size]

    def expiring(self) -> int:
        """How many have an expiry."""
        return len(self) - self._expiry.count(0) if self._expiry else 0

    def next_expiry(self) -> int:
        """0: none."""
        return min(filter(None, self._expiry), default=0) if self._expiry else 0

    def expired(self, now: int) -> list[bytes]:
        return (
            [self.at(index) for index, when in enumerate(self._expiry) if when and when <= now]
            if self._expiry
            else []
        )

    def items(self) -> Iterator[tuple[bytes, int]]:
        return zip(self, self._expiry, strict=True) if self._expiry else ((key, 0) for key in self)

    @classmethod
    def of(cls, family: int, entries: Mapping[bytes, int]) -> Keys:
        """Of keys with their expiry."""
        ordered = _sorted(entries)
        expiry = array("I", map(entries.__getitem__, ordered)) if any(entries.values()) else None
        return cls(family, b"".join(ordered), expiry)

    def merged(self, put: Mapping[bytes, int], drop: Iterable[bytes] = ()) -> Keys:
        """With these put and those dropped: quick for few, by sorting for many."""
        gone = set(drop)
        family = 4 if self.size == SIZE[4] else 6
        if (len(put) + len(gone)) * 16 > len(self):
            entries = dict(self.items())
            for key in gone:
                entries.pop(key, None)
            entries.update(put)
            return Keys.of(family, entries)
        expiry = self._expiry
        if expiry is None and any(put.values()):
            expiry = array("I", bytes(4 * len(self)))
        raws: list[bytes] = []
        whens: array[int] = array("I")
        done = 0
        for key in sorted(gone | put.keys()):
            index = self.find(key, done)
            raws.append(self._raw[done * self.size : index * self.size])
            if expiry:
                whens += expiry[done:index]
            done = index + (self.at(index) == key)
            if key in put:
                raws.append(key)
                if expiry is not None:
                    whens.append(put[key])
        raws.append(self._raw[done * self.size :])
        if expiry:
            whens += expiry[done:]
        return Keys(family, b"".join(raws), whens if expiry is not None else None)
