"""The contract of bpf/abi/sockaccel.h in ctypes, version 2."""

from __future__ import annotations

import ctypes as ct
import enum
from typing import Final

from services.common.pipeline.abi import FibAddr

FAMILY: Final = "sockaccel/v2"
MAPS: Final = {
    name: f"{FAMILY}/{name}"
    for name in (
        "sa_socks", "sa_pairs", "sa_mine", "sa_opening", "sa_config", "sa_spaces", "sa_ports", "sa_uids", "sa_groups",
        "sa_hosts", "sa_off", "sa_blocking", "sa_splicers", "sa_programs", "sa_splicing", "sa_stats", "sa_events",
    )
}  # fmt: skip
"""Map -> pin path below an instance's pin directory."""

CLASSES: Final = 32
PAIRS_MAX: Final = 65536
PORTS_MAX: Final = 65536
UIDS_MAX: Final = 1024
GROUPS_MAX: Final = 4096
HOSTS_MAX: Final = 4096
OFF_MAX: Final = 65536
EVENTS_BYTES: Final = 1 << 20


class ConfigFlag(enum.IntFlag):
    """SA_CFG_*."""

    ON = 0x1
    GROUPS = 0x2
    CALLS = 0x4
    NONBLOCKING = 0x8


class SpaceFlag(enum.IntFlag):
    """SA_SPACE_*."""

    PROXIED = 0x1


class PairFlag(enum.IntFlag):
    """SA_PAIR_*."""

    REDIRECTED = 0x1
    OFF = 0x4


class Mode(enum.IntEnum):
    """enum sa_mode."""

    TCP = 0
    SHORT = 1


class EndReason(enum.IntEnum):
    """enum sa_end_reason; numbers as in fibril.sockaccel.v1.EndReason."""

    NOT_ENDED = 0
    CLOSED = 1
    BULK = 2
    READS = 3
    SENDS = 4
    OPTION = 5
    BEHIND = 6


class EventKind(enum.IntEnum):
    """enum sa_event_kind."""

    SHORT = 1
    ENDED = 2
    STUCK = 3


class Stuck(enum.IntEnum):
    """enum sa_stuck."""

    FREE = 0
    STUCK = 1
    DOUBT = 2
    OVERTAKEN = 3


class Stat(enum.IntEnum):
    """enum sa_stat: elements of sa_stats."""

    PAIRS = 0
    SHORTENED = 1
    BYTES = 2
    SENDS = 3
    TCP_BYTES = 4
    TCP_SENDS = 5
    ALONE = 6
    FULL = 7
    TAKEN = 8
    LOST = 9
    ENDED = 10


STATS: Final = 24


class Config(ct.Structure):
    """struct sa_config: the one element of sa_config."""

    _fields_ = (
        ("flags", ct.c_uint32), ("epoch", ct.c_uint32), ("classes", ct.c_uint32), ("any_port", ct.c_uint32),
        ("any_group", ct.c_uint32), ("proxies", ct.c_uint32), ("same", ct.c_uint32), ("pods", ct.c_uint32),
        ("host", ct.c_uint32), ("within", ct.c_uint32), ("run_bytes", ct.c_uint32), ("proofs", ct.c_uint32),
        ("beat_ns", ct.c_uint64), ("nonblocking", ct.c_uint32), ("pad", ct.c_uint32),
    )  # fmt: skip


class Space(ct.Structure):
    """struct sa_space: a value of sa_spaces."""

    _fields_ = (
        ("client", ct.c_uint32), ("server", ct.c_uint32), ("endpoint", ct.c_uint32), ("flags", ct.c_uint32),
    )  # fmt: skip


class Port(ct.Structure):
    """struct sa_port: a value of sa_ports."""

    _fields_ = (("classes", ct.c_uint32), ("proxy", ct.c_uint32))


class End(ct.Structure):
    """struct sa_end."""

    _fields_ = (
        ("cookie", ct.c_uint64), ("sock", ct.c_uint64), ("netns", ct.c_uint64), ("addr", FibAddr), ("port", ct.c_uint32),
        ("endpoint", ct.c_uint32), ("uid", ct.c_uint32), ("mode", ct.c_uint32), ("tcp_bytes", ct.c_uint64),
        ("tcp_sends", ct.c_uint64), ("bytes", ct.c_uint64), ("sends", ct.c_uint64), ("policy", ct.c_uint64),
        ("policy_flags", ct.c_uint32), ("reads", ct.c_uint32), ("unread", ct.c_uint32), ("settled", ct.c_uint32),
        ("task", ct.c_uint64), ("tasks", ct.c_uint32), ("judged", ct.c_uint32),
        ("reader", ct.c_uint32), ("stuck", ct.c_uint32), ("seq", ct.c_uint32), ("readers", ct.c_uint32),
    )  # fmt: skip


class Pair(ct.Structure):
    """struct sa_pair: a value of sa_pairs."""

    _fields_ = (
        ("ends", End * 2), ("made", ct.c_uint64), ("beat", ct.c_uint64), ("class_", ct.c_uint32), ("epoch", ct.c_uint32),
        ("ended", ct.c_uint32), ("speaker", ct.c_uint32), ("run", ct.c_uint32), ("proofs", ct.c_uint32),
        ("flags", ct.c_uint32), ("splicers", ct.c_uint32),
    )  # fmt: skip


class Program(ct.Structure):
    """struct sa_program: a key of sa_programs."""

    _fields_ = (("netns", ct.c_uint64), ("uid", ct.c_uint32), ("name", ct.c_char * 16), ("pad", ct.c_uint32))


class Event(ct.Structure):
    """struct sa_event: a record of sa_events."""

    _fields_ = (("time", ct.c_uint64), ("kind", ct.c_uint32), ("pad", ct.c_uint32), ("pair", Pair))


SIZES: Final = {Config: 64, Space: 16, Port: 8, End: 144, Pair: 336, Program: 32, Event: 352}
assert all(ct.sizeof(kind) == size for kind, size in SIZES.items())
