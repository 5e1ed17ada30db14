"""The contract of bpf/abi/prefilter.h in ctypes: map family `prefilter`, version 1."""

from __future__ import annotations

import ctypes as ct
import enum
import socket
from ipaddress import IPv4Network, IPv6Network
from typing import Final, Self

from services.common.pipeline.abi import FibAddr

FAMILY: Final = "prefilter/v1"
MAPS: Final = {
    name: f"{FAMILY}/{name}"
    for name in (
        "pf_config", "pf_lines", "pf_wides", "pf_sets", "pf_rules", "pf_limits", "pf_sources", "pf_counters",
    )
}  # fmt: skip
"""Map -> pin path below an instance's pin directory."""

INNER: Final = 1 << 12
MMAPABLE: Final = 1 << 10

TABLES: Final = 4
LINE: Final = 64
WIDE: Final = 128
WIDE_ENTRIES: Final = 5
WIDE_SPILLS: Final = 15
PAGE: Final = 0x80000000
ROOTS: Final = 4096
ROOT_LINES: Final = 256
PAGE_LINES: Final = 128
PAGE_CELLS: Final = 4096
LONG4_SHIFT: Final = 24
LONG4_ENTRIES: Final = 8
HINT_COUNT: Final = 65536
LENGTHS: Final = 64
SETS: Final = 256
RULES: Final = 1024
COUNT_DROPPED: Final = SETS
COUNT_PASSED: Final = SETS + RULES
_WORD: Final = 0xFFFFFFFFFFFFFFFF
_DE_BRUIJN: Final = 0x03F79D71B4CB0A89


class Table(enum.IntEnum):
    """enum pf_table."""

    CELLS = 0
    LONG4 = 1
    HINTS = 2


class Flag(enum.IntFlag):
    """PF_V4, PF_V6, PF_LIMITS of pf_config.flags."""

    V4 = 0x1
    V6 = 0x2
    LIMITS = 0x4


class SetFlag(enum.IntFlag):
    """PF_ALLOW."""

    ALLOW = 0x1


class Length(ct.Structure):
    """struct pf_length."""

    _fields_ = (
        ("hi", ct.c_uint64), ("lo", ct.c_uint64), ("length", ct.c_uint64), ("used", ct.c_uint64),
    )  # fmt: skip

    @classmethod
    def of(cls, length: int) -> Self:
        mask = (1 << 128) - (1 << 128 - length)
        return cls(hi=mask >> 64, lo=mask & _WORD, length=length, used=1)


class Generation(ct.Structure):
    """struct pf_generation."""

    _fields_ = (
        ("lines4", ct.c_uint32), ("lines6", ct.c_uint32), ("always", ct.c_uint64), ("lengths", Length * LENGTHS),
    )  # fmt: skip


class Config(ct.Structure):
    """struct pf_config: the one value of pf_config."""

    _fields_ = (
        ("flags", ct.c_uint32), ("generation", ct.c_uint32), ("stamp", ct.c_uint64), ("zero", ct.c_uint64),
        ("reserved", ct.c_uint64), ("generations", Generation * 2),
    )  # fmt: skip


class SetEntry(ct.Structure):
    """struct pf_set."""

    _fields_ = (("flags", ct.c_uint32),)


class RuleKey(ct.Structure):
    """struct pf_rule_key: the key of pf_rules."""

    _fields_ = (("bits", ct.c_uint32), ("family", ct.c_uint32), ("addr", ct.c_uint8 * 16))

    @classmethod
    def of(cls, prefix: IPv4Network | IPv6Network) -> Self:
        raw = prefix.network_address.packed.ljust(16, b"\0")
        family = socket.htonl(prefix.version)
        return cls(bits=32 + prefix.prefixlen, family=family, addr=(ct.c_uint8 * 16)(*raw))


class Limit(ct.Structure):
    """struct pf_limit."""

    _fields_ = (("interval", ct.c_uint64), ("burst", ct.c_uint64), ("near", ct.c_uint64))


class Source(ct.Structure):
    """struct pf_source: the key of pf_sources' inner map."""

    _fields_ = (("addr", FibAddr), ("rule", ct.c_uint32), ("pad", ct.c_uint32))


class Counter(ct.Structure):
    """struct pf_counter."""

    _fields_ = (("packets", ct.c_uint64), ("bytes", ct.c_uint64))


def hash4(key: int) -> int:
    """The hash of an IPv4 prefix beyond /24: address << 8 | length."""
    return key * 0x9E3779B97F4A7C15 & _WORD


def places(value: int, lines: int) -> tuple[int, int]:
    """The two lines in which an entry with that hash may be, as pf_other() says."""
    other = (value ^ value >> 31) * 0x9FB21C651E98DF25 & _WORD
    return (value >> 32) * lines >> 32, (other >> 32) * lines >> 32


def hash6(address: int, length: int) -> int:
    """The hash of an IPv6 prefix; its lower half is the check."""
    value = ((address >> 64) ^ length) * 0x9FB21C651E98DF25 & _WORD
    value = ((value ^ value >> 35) + (address & _WORD)) * 0x9E3779B97F4A7C15 & _WORD
    return value ^ value >> 32


def hint6(address: int) -> int:
    """The hint for an IPv6 address's first 32 bits."""
    return ((address >> 96) * 0x9E3779B1 & 0xFFFFFFFF) >> 16


def length_at(bit: int) -> int:
    """Where pf_generation.lengths has the length of a bit."""
    return ((1 << bit) * _DE_BRUIJN & _WORD) >> 58
