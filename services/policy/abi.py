"""The contract of bpf/abi/policy.h in ctypes: map family `policy`, version 1.

Structures carry the C names' fields, sizes and offsets; tests/datapath compares them with what the compiler
made. Fields the C header calls __be16 or __be32 hold network order.
"""

from __future__ import annotations

import ctypes as ct
import enum
from typing import Final, Self

from services.common.pipeline.abi import FibAddr, addr_bytes
from services.common.pipeline.abi import PolicyEp as Ep
from services.policy.model import IPNetwork

FAMILY: Final = "policy/v1"
MAPS: Final = {
    name: f"{FAMILY}/{name}"
    for name in (
        "pol_eps", "pol_lines", "pol_peers", "pol_prefixes", "pol_config", "ct_flows", "ct_new", "pol_frags",
        "pol_told", "pol_stats", "pol_events",
    )
}  # fmt: skip
"""Map -> pin path below an instance's pin directory."""

PEERS_MAX: Final = 1 << 20
PREFIXES_MAX: Final = 1 << 17
CT_NEW_MAX: Final = 65536
STATS: Final = 16
CELLS_A_LINE: Final = 8
EVENTS_BYTES: Final = 1 << 21
KNOWN: Final = 0
"""Table of pol_peers: which identities exist."""
RULE_NONE: Final = 0
RULE_HOST: Final = 1
RULE_FIRST: Final = 16
"""Numbers of rules below are no policy's."""


class Table(enum.IntEnum):
    """enum pol_table: inner arrays of pol_lines."""

    POLICIES = 0
    CELLS = 1


class EpFlag(enum.IntFlag):
    """POL_EP_*."""

    AUDIT = 0x1
    LOCKDOWN = 0x2


ENFORCED: Final = 0x1
__all__ = ["Ep"]


class Verdict(enum.IntFlag):
    """Of a range; the upper bits say what else."""

    ALLOW = 1
    DENY = 2
    DEFAULT = 3
    REJECT = 0x10
    KEEP = 0x20


VERDICT: Final = 0x0F


class ConfigFlag(enum.IntFlag):
    """POL_CFG_*."""

    AUDIT = 0x1
    HOST = 0x2
    FLOWS = 0x4


class Stat(enum.IntEnum):
    """enum pol_stat."""

    NEW = 0
    ESTABLISHED = 1
    DENIED = 2
    REVOKED = 3
    AUDITED = 4
    RELATED = 5
    TABLE = 6
    LOST = 7
    SUPPRESSED = 8
    CHECKED = 9


class CtFlag(enum.IntFlag):
    """CT_*."""

    CLIENT_LOW = 0x1
    ANSWERED = 0x2
    CLIENT_FIN = 0x4
    SERVER_FIN = 0x8
    RESET = 0x10
    TOLD_CLOSED = 0x20
    ALLOWED_INGRESS = 0x40
    ALLOWED_EGRESS = 0x80
    PASSES = 0x100


PASSES_S: Final = 30
"""CT_PASSES_S."""


class Side(ct.Structure):
    """struct pol_side."""

    _fields_ = (("cells", ct.c_uint32), ("prefixes", ct.c_uint16), ("flags", ct.c_uint16))


class Policy(ct.Structure):
    """struct pol_policy: a line of Table.POLICIES."""

    _fields_ = (
        ("peers", ct.c_uint32), ("prefixes", ct.c_uint32), ("sides", Side * 2), ("unknown", ct.c_uint32),
        ("first", ct.c_uint32), ("count", ct.c_uint32), ("reserved", ct.c_uint32 * 7),
    )  # fmt: skip


class Peer(ct.Structure):
    """struct pol_peer: the key of pol_peers."""

    _fields_ = (("table", ct.c_uint32), ("identity", ct.c_uint32))


class Prefix(ct.Structure):
    """struct pol_prefix: the key of pol_prefixes."""

    _fields_ = (("bits", ct.c_uint32), ("table", ct.c_uint32), ("addr", ct.c_uint8 * 16))

    @classmethod
    def of(cls, table: int, prefix: IPNetwork) -> Self:
        bits = 32 + prefix.prefixlen + (96 if prefix.version == 4 else 0)
        return cls(bits=bits, table=table, addr=(ct.c_uint8 * 16)(*addr_bytes(prefix.network_address)))


class CtKey(ct.Structure):
    """struct ct_key."""

    _fields_ = (
        ("low", FibAddr), ("high", FibAddr), ("low_port", ct.c_uint16), ("high_port", ct.c_uint16),
        ("proto", ct.c_uint8), ("pad", ct.c_uint8 * 3),
    )  # fmt: skip


class CtEntry(ct.Structure):
    """struct ct_entry."""

    _fields_ = (
        ("revision", ct.c_uint32 * 2), ("rule", ct.c_uint32 * 2), ("client", ct.c_uint32),
        ("server", ct.c_uint32), ("seen", ct.c_uint32), ("flags", ct.c_uint32), ("room", ct.c_uint64),
    )  # fmt: skip


class Event(ct.Structure):
    """struct pol_event."""

    _fields_ = (
        ("time", ct.c_uint64), ("src", FibAddr), ("dst", FibAddr), ("src_id", ct.c_uint32), ("dst_id", ct.c_uint32),
        ("src_identity", ct.c_uint32), ("dst_identity", ct.c_uint32), ("rule", ct.c_uint32),
        ("revision", ct.c_uint32), ("suppressed", ct.c_uint32), ("reason", ct.c_uint16), ("sport", ct.c_uint16),
        ("dport", ct.c_uint16), ("type", ct.c_uint8), ("verdict", ct.c_uint8), ("direction", ct.c_uint8),
        ("family", ct.c_uint8), ("proto", ct.c_uint8), ("tcp_flags", ct.c_uint8), ("icmp_type", ct.c_uint8),
        ("icmp_code", ct.c_uint8), ("pad", ct.c_uint8 * 6),
    )  # fmt: skip


class Config(ct.Structure):
    """struct pol_config."""

    _fields_ = (
        ("beat_shift", ct.c_uint32), ("flags", ct.c_uint32), ("syn_s", ct.c_uint32), ("close_s", ct.c_uint32),
        ("tcp_s", ct.c_uint32), ("any_s", ct.c_uint32), ("revision", ct.c_uint32), ("probe_port", ct.c_uint32),
        ("reserved", ct.c_uint32 * 8),
    )  # fmt: skip


def cell_class(first: int, count: int) -> int:
    """A cell of a class table."""
    return count << 32 | first


def cell_range(proto: int, port: int, verdict: int, rule: int) -> int:
    """A cell of ranges: POL_RANGE."""
    return proto << 56 | port << 40 | verdict << 32 | rule
