"""The contract of bpf/abi/lb.h in ctypes: map family `lb`, version 2.

Structures carry the C names' fields, sizes and offsets; tests/datapath compares them with what the compiler
made. Fields the C header calls __be16 or __be32 hold network order.
"""

from __future__ import annotations

import ctypes as ct
import enum
import hashlib
import ipaddress
import socket
import struct
from typing import Final, Self

from services.common.pipeline.abi import FibAddr, IPAddress, addr_bytes

FAMILY: Final = "lb/v2"
MAPS: Final = {
    name: f"{FAMILY}/{name}"
    for name in (
        "lb_lines", "lb_fronts", "lb_nats", "lb_nats_new", "lb_ranges", "lb_sources", "lb_socks", "lb_socks_near",
        "lb_affinity", "lb_frags", "lb_config", "lb_stats", "lb_exhausted",
    )
}  # fmt: skip
"""Map -> pin path below an instance's pin directory."""

INNER: Final = 1 << 12
MMAPABLE: Final = 1 << 10
NO_PREALLOC: Final = 1
"""Flags of inner maps: lines have INNER | MMAPABLE, frontends NO_PREALLOC, translations none."""

LINE: Final = 64
SERVICE_MAX: Final = 65536
BACKEND_INDEX: Final = 0xFFFFF
SLOTS_A_LINE: Final = 16
FLOWS_A_LINE: Final = 4
HINTS: Final = 65536
NATS_NEW: Final = 16384
HINT_LINES: Final = HINTS // LINE
STAT_COUNT: Final = 16
SOCK_NEAR: Final = 16384
STAMP: Final = 0x1FFF


class Table(enum.IntEnum):
    """enum lb_table: inner arrays of lb_lines."""

    SERVICES = 0
    BACKENDS = 1
    SLOTS = 2
    FLOWS = 3
    FLOWS_BEFORE = 4
    HINT = 5


class ServiceFlag(enum.IntFlag):
    """LB_SVC_*."""

    MAGLEV = 0x1
    AFFINITY = 0x2
    SOURCES = 0x4
    DROP = 0x8
    DSR = 0x10
    DSR_UDP = 0x20
    LOCAL_OUTSIDE = 0x40


class BackendState(enum.IntEnum):
    """enum lb_backend_state."""

    FREE = 0
    ACTIVE = 1
    TERMINATING = 2
    QUARANTINED = 3
    MAINTENANCE = 4


class BackendFlag(enum.IntFlag):
    """LB_BE_*."""

    TX = 0x1
    LOCAL = 0x2


class Hint(enum.IntFlag):
    """LB_HINT_*."""

    VIP = 0x1
    RANGE = 0x2
    BACKEND = 0x4
    NODE = 0x8


class FrontFlag(enum.IntFlag):
    """LB_FRONT_*."""

    OUTSIDE = 0x1
    NODE = 0x2
    EVERY = 0x4


class FlowFlag(enum.IntFlag):
    """LB_FLOW_* of a stamp."""

    CONFIRMED = 0x8000
    CLOSING = 0x4000
    TCP = 0x2000


class NatFlag(enum.IntFlag):
    """LB_NAT_*."""

    SNAT = 0x1
    HAIRPIN = 0x2
    OUTSIDE = 0x4


class SockKind(enum.IntEnum):
    """LB_SOCK_*: kinds of keys."""

    OWN = 0
    TO = 1
    FROM = 2


class SockFlag(enum.IntFlag):
    """LB_SOCK_*."""

    CONNECTED = 0x1
    DIRECT = 0x2
    FURTHER = 0x4


class ConfigFlag(enum.IntFlag):
    """LB_CFG_*."""

    NETNS = 0x1


class Stat(enum.IntEnum):
    """enum lb_stat."""

    NEW = 0
    EVICTED = 1
    NAT_FULL = 2
    NO_PORT = 3
    REPAIRED = 4
    REVERSED = 5
    XDP_TX = 6
    SOCK_FULL = 7
    SOCK = 8


class Stretch(ct.Structure):
    """struct lb_stretch."""

    _fields_ = (("first", ct.c_uint32), ("count", ct.c_uint32))


class Service(ct.Structure):
    """struct lb_service: a line of Table.SERVICES."""

    _fields_ = (
        ("name", ct.c_uint64), ("flags", ct.c_uint32), ("affinity_s", ct.c_uint32), ("inside", Stretch),
        ("outside", Stretch), ("connections", ct.c_uint64), ("reserved", ct.c_uint64 * 3),
    )  # fmt: skip


class Backend(ct.Structure):
    """struct lb_backend: a line of Table.BACKENDS."""

    _fields_ = (
        ("addr", FibAddr), ("id", ct.c_uint32), ("service", ct.c_uint32), ("port", ct.c_uint16),
        ("state", ct.c_uint8), ("flags", ct.c_uint8), ("ifindex", ct.c_uint32), ("mac", ct.c_uint8 * 6),
        ("mtu", ct.c_uint16), ("reserved", ct.c_uint64 * 3),
    )  # fmt: skip


_FRONT_KEY: Final = struct.Struct("=16sHB5x")
_FRONT: Final = struct.Struct("=IHH")


def front_key(address: IPAddress, port: int, proto: int) -> bytes:
    """struct lb_front_key; port in host order."""
    return _FRONT_KEY.pack(addr_bytes(address), socket.htons(port), proto)


def front(service: int, first: int, flags: int) -> bytes:
    """struct lb_front."""
    return _FRONT.pack(service, first, flags)


class FrontKey(ct.Structure):
    """struct lb_front_key."""

    _fields_ = (("addr", FibAddr), ("port", ct.c_uint16), ("proto", ct.c_uint8), ("pad", ct.c_uint8 * 5))

    @classmethod
    def of(cls, address: IPAddress, port: int, proto: int) -> Self:
        """Port in host order."""
        return cls.from_buffer_copy(front_key(address, port, proto))


class Front(ct.Structure):
    """struct lb_front."""

    _fields_ = (("service", ct.c_uint32), ("first", ct.c_uint16), ("flags", ct.c_uint16))


class RangeKey(ct.Structure):
    """struct lb_range_key: the key of lb_ranges."""

    _fields_ = (
        ("bits", ct.c_uint32),
        ("addr", ct.c_uint8 * 16),
        ("proto", ct.c_uint16),
        ("port", ct.c_uint16),
    )

    @classmethod
    def of(cls, address: IPAddress, proto: int, port: int, bits: int) -> Self:
        """A prefix of `bits` bits of port (host order)."""
        raw = addr_bytes(address)
        return cls(
            bits=144 + bits, addr=(ct.c_uint8 * 16)(*raw), proto=socket.htons(proto), port=socket.htons(port)
        )


class SourceKey(ct.Structure):
    """struct lb_source_key: the key of lb_sources."""

    _fields_ = (("bits", ct.c_uint32), ("service", ct.c_uint32), ("addr", ct.c_uint8 * 16))

    @classmethod
    def of(cls, service: int, prefix: ipaddress.IPv4Network | ipaddress.IPv6Network) -> Self:
        raw = addr_bytes(prefix.network_address)
        bits = 32 + prefix.prefixlen + (96 if prefix.version == 4 else 0)
        return cls(bits=bits, service=socket.htonl(service), addr=(ct.c_uint8 * 16)(*raw))


class Admitted(ct.Structure):
    """The value of lb_sources: 1."""

    _fields_ = (("yes", ct.c_uint8),)


class Flow(ct.Structure):
    """struct lb_flow: four a line of Table.FLOWS. `backend` is XORed with the upper half of sig."""

    _fields_ = (("sig", ct.c_uint64), ("backend", ct.c_uint32), ("port", ct.c_uint16), ("stamp", ct.c_uint16))


class Tuple(ct.Structure):
    """struct lb_tuple: the key of lb_nats' inner maps."""

    _fields_ = (
        ("remote", FibAddr), ("local", FibAddr), ("rport", ct.c_uint16), ("lport", ct.c_uint16),
        ("proto", ct.c_uint8), ("pad", ct.c_uint8 * 3),
    )  # fmt: skip


class Nat(ct.Structure):
    """struct lb_nat."""

    _fields_ = (
        ("client", FibAddr), ("vip", FibAddr), ("cport", ct.c_uint16), ("vport", ct.c_uint16),
        ("backend", ct.c_uint32), ("stamp", ct.c_uint16), ("flags", ct.c_uint8), ("pad", ct.c_uint8 * 5),
    )  # fmt: skip


class SockKey(ct.Structure):
    """struct lb_sock_key: the key of lb_socks."""

    _fields_ = (
        ("cookie", ct.c_uint64), ("addr", FibAddr), ("port", ct.c_uint16), ("proto", ct.c_uint8),
        ("kind", ct.c_uint8), ("pad", ct.c_uint8 * 4),
    )  # fmt: skip


class Sock(ct.Structure):
    """struct lb_sock."""

    _fields_ = (
        ("vip", FibAddr), ("addr", FibAddr), ("netns", ct.c_uint64, 48), ("flags", ct.c_uint64, 8),
        ("proto", ct.c_uint64, 8), ("backend", ct.c_uint32), ("vport", ct.c_uint16), ("port", ct.c_uint16),
        ("next", FibAddr), ("nport", ct.c_uint16), ("pad", ct.c_uint16), ("further", ct.c_uint32),
    )  # fmt: skip


class SockNear(ct.Structure):
    """struct lb_sock_near: an element of lb_socks_near."""

    _fields_ = (
        ("cookie", ct.c_uint64), ("claims", ct.c_uint32), ("crowd", ct.c_uint32), ("entry", Sock), ("pad", ct.c_uint64 * 5),
    )  # fmt: skip


class Client(ct.Structure):
    """struct lb_client: the key of lb_affinity."""

    _fields_ = (("addr", FibAddr), ("service", ct.c_uint32), ("pad", ct.c_uint32))


class Sticky(ct.Structure):
    """struct lb_sticky."""

    _fields_ = (("backend", ct.c_uint32), ("beat", ct.c_uint32))


class FragKey(ct.Structure):
    """struct lb_frag_key."""

    _fields_ = (
        ("src", FibAddr), ("dst", FibAddr), ("id", ct.c_uint32), ("proto", ct.c_uint8), ("pad", ct.c_uint8 * 3),
    )  # fmt: skip


class Frag(ct.Structure):
    """struct lb_frag."""

    _fields_ = (("sport", ct.c_uint16), ("dport", ct.c_uint16))


class FullKey(ct.Structure):
    """struct lb_full_key: the key of lb_exhausted."""

    _fields_ = (("addr", FibAddr), ("port", ct.c_uint16), ("proto", ct.c_uint8), ("pad", ct.c_uint8 * 5))


class Full(ct.Structure):
    """struct lb_full."""

    _fields_ = (("times", ct.c_uint64), ("beat", ct.c_uint32), ("pad", ct.c_uint32))


class Config(ct.Structure):
    """struct lb_config: the one value of lb_config."""

    _fields_ = (
        ("seed", ct.c_uint64), ("host_netns", ct.c_uint64), ("flow_mask", ct.c_uint32), ("before_mask", ct.c_uint32),
        ("beat_shift", ct.c_uint32), ("flags", ct.c_uint32), ("syn_s", ct.c_uint16), ("close_s", ct.c_uint16),
        ("tcp_s", ct.c_uint16), ("any_s", ct.c_uint16), ("snat_v4", ct.c_uint32), ("snat_ports", ct.c_uint32 * 2),
        ("uplink_ifindex", ct.c_uint32), ("snat_v6", FibAddr), ("uplink_mtu", ct.c_uint32),
        ("epoch", ct.c_uint32), ("reserved", ct.c_uint32 * 12),
    )  # fmt: skip


_WORDS: Final = struct.Struct("<4I")


def name_hash(name: str) -> int:
    """lb_service.name of a service: never 0 in practice, and different for different names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def hint_of(address: IPAddress) -> int:
    """The index of an address's hint, as lb_hint() computes it."""
    return hint_at(addr_bytes(address))


def hint_at(address: bytes) -> int:
    """The same for an address as struct fib_addr."""
    w0, w1, w2, w3 = _WORDS.unpack(address)
    fold: int = (w3 ^ w2 * 3 ^ w1 * 5 ^ w0 * 7) & 0xFFFFFFFF
    return (fold * 0x9E3779B1 & 0xFFFFFFFF) >> 16


_MASK: Final = 0xFFFFFFFFFFFFFFFF


def _mix(value: int, word: int) -> int:
    value = (value ^ word) * 0x9FB21C651E98DF25 & _MASK
    return value ^ value >> 35


def flow_hash(seed: int, client: IPAddress, cport: int, vip: IPAddress, vport: int, proto: int) -> int:
    """lb_hash() of a connection; ports in host order, `cport` 0 with affinity."""
    value = 0
    for start, address in ((seed, client), (~seed & _MASK, vip)):
        raw = addr_bytes(address)
        part = _mix(start, int.from_bytes(raw[:8], "little"))
        value += _mix(part, int.from_bytes(raw[8:], "little"))
    value &= _MASK
    value = _mix(value, socket.htons(cport) << 32 | socket.htons(vport) << 16 | proto)
    value = _mix(value, value >> 32)
    return value or 1
