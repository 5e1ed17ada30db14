"""One line of the ipcache, and the keys lines go by. Pure.

A key is what the BPF maps have: the 16 bytes of an address (IPv4 as ::ffff:a.b.c.d), or, for a prefix that is more than
one address, the 20 bytes of struct ipcache_prefix. There are as many lines as pods in the cluster, so a line is a
plain tuple and its prefix is made for those who ask.
"""

from __future__ import annotations

import enum
import socket
import struct
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Final, NamedTuple

from services.common.kernel.netlink import IPAddress, IPNetwork

_V4: Final = bytes(10) + b"\xff\xff"
_BITS: Final = struct.Struct("=I")
SINGLE_BYTES: Final = 16
"""Length of the key of one address."""


class Source(enum.IntEnum):
    """As in fibril.ipcache.v1.EntrySource: of several entries for one prefix the lowest counts."""

    NODE = 1
    POD = 2
    LOCAL = 3
    BLOCK = 4


class Entry(NamedTuple):
    """node: name, "" when it is no node's. previous_identity: what packets under way may still carry, 0: none.

    revision: etcd's at its last change; 0 for local declarations.
    """

    key: bytes
    identity: int
    node: str
    source: Source
    pod: str = ""
    previous_identity: int = 0
    revision: int = 0

    @classmethod
    def of(cls, prefix: IPNetwork, identity: int, node: str, source: Source, revision: int = 0) -> Entry:
        """Of a prefix."""
        return cls(prefix_key(prefix), identity, node, source, revision=revision)

    @property
    def prefix(self) -> IPNetwork:
        """The prefix; /32 or /128 for one address."""
        return network_of(self.key)

    @property
    def single(self) -> bool:
        """Whether it is one address."""
        return len(self.key) == SINGLE_BYTES


def address_key(address: IPAddress) -> bytes:
    """The key of one address."""
    return _V4 + address.packed if address.version == 4 else address.packed


def text_key(text: str) -> bytes:
    """The key of an address in its one usual spelling. ValueError for anything else, and for an IPv4 address dressed up
    as IPv6, which would have the key of the IPv4 address itself.
    """
    try:
        if ":" not in text:
            return _V4 + socket.inet_pton(socket.AF_INET, text)
        raw = socket.inet_pton(socket.AF_INET6, text)
    except OSError:
        raise ValueError(f"{text!r} is no address") from None
    if raw.startswith(_V4) or (
        socket.inet_ntop(socket.AF_INET6, raw) != text and str(IPv6Address(raw)) != text
    ):
        raise ValueError(f"{text!r} is not how this address is written")
    return raw


def prefix_key(prefix: IPNetwork) -> bytes:
    """The key of a prefix. ValueError for a part of ::ffff:0:0/96, which stands for IPv4."""
    raw = address_key(prefix.network_address)
    if prefix.prefixlen == prefix.max_prefixlen:
        if prefix.version == 6 and raw.startswith(_V4):
            raise ValueError(f"{prefix} stands for an IPv4 address")
        return raw
    bits = prefix.prefixlen + (96 if prefix.version == 4 else 0)
    if prefix.version == 6 and bits >= 96 and raw.startswith(_V4):
        raise ValueError(f"{prefix} stands for an IPv4 prefix")
    return _BITS.pack(bits) + raw


def bits_of(key: bytes) -> int:
    """Length of a key's prefix, of 128."""
    return 128 if len(key) == SINGLE_BYTES else int(_BITS.unpack_from(key)[0])


def network_of(key: bytes) -> IPNetwork:
    """The prefix of a key."""
    bits, raw = bits_of(key), key[-SINGLE_BYTES:]
    if bits >= 96 and raw.startswith(_V4):
        return IPv4Network((raw[12:], bits - 96))
    return IPv6Network((raw, bits))


def address_of(key: bytes) -> IPAddress:
    """The (first) address of a key."""
    raw = key[-SINGLE_BYTES:]
    return IPv4Address(raw[12:]) if raw.startswith(_V4) else IPv6Address(raw)


def sort_key(key: bytes) -> bytes:
    """What keys are sorted by: family, address, length."""
    raw = key[-SINGLE_BYTES:]
    bits = bits_of(key)
    family = b"\4" if bits >= 96 and raw.startswith(_V4) else b"\6"
    return family + raw + bytes((bits,))


def shorter(raw: bytes, bits: int) -> bytes:
    """The key of the prefix of `bits` (below 128) that holds the address `raw`."""
    keep = int.from_bytes(raw) >> 128 - bits << 128 - bits
    return _BITS.pack(bits) + keep.to_bytes(SINGLE_BYTES)


def spans_ipv4(key: bytes) -> bool:
    """Whether an IPv6 prefix is so wide that the trie finds it for IPv4 addresses, too."""
    bits = bits_of(key)
    return bits < 96 and shorter(_V4 + bytes(4), bits) == key


ALL_IPV4: Final = prefix_key(ip_network("0.0.0.0/0"))
