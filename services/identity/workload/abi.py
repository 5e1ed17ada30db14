"""The contract of bpf/abi/trace.h in ctypes, and its records made readable. tests/datapath compares it with the compiler's."""

from __future__ import annotations

import ctypes as ct
import enum
import struct
from dataclasses import dataclass
from typing import Final

from services.common.pipeline import abi

FAMILY: Final = "trace/v1"
MAPS: Final = {
    **{name: path for name, path in abi.MAPS.items() if path.startswith(f"{abi.ENDPOINT_FAMILY}/")},
    **{
        name: f"{FAMILY}/{name}" for name in ("tr_events", "tr_wanted", "tr_lost", "tr_opening", "tr_scratch")
    },
}
"""Map -> pin path below an instance's pin directory, of all maps that bpf/identity/trace.c declares."""

PATH_MAX: Final = 1024
ARGS_MAX: Final = 4096


class Kind(enum.IntEnum):
    """enum trace_kind: index of tr_wanted and tr_lost."""

    EXEC = 0
    CONNECT = 1


class Who(ct.Structure):
    """struct trace_who."""

    _fields_ = (
        ("time", ct.c_uint64), ("cgroup", ct.c_uint64), ("netns", ct.c_uint64), ("kind", ct.c_uint32),
        ("endpoint", ct.c_uint32), ("pid", ct.c_uint32), ("parent", ct.c_uint32), ("uid", ct.c_uint32),
        ("pad", ct.c_uint32), ("comm", ct.c_char * 16),
    )  # fmt: skip


class ExecRecord(ct.Structure):
    """struct trace_exec."""

    _fields_ = (
        ("who", Who), ("path_len", ct.c_uint16), ("args_len", ct.c_uint16), ("pad", ct.c_uint32),
        ("data", ct.c_char * (PATH_MAX + ARGS_MAX)),
    )  # fmt: skip


class ConnectRecord(ct.Structure):
    """struct trace_connect."""

    _fields_ = (
        ("who", Who), ("src", abi.FibAddr), ("dst", abi.FibAddr), ("sport", ct.c_uint16), ("dport", ct.c_uint16),
        ("proto", ct.c_uint8), ("pad", ct.c_uint8 * 3),
    )  # fmt: skip


class Wanted(ct.Structure):
    """struct trace_wanted: a value of tr_wanted."""

    _fields_ = (("host", ct.c_uint32), ("endpoint", ct.c_uint32))


@dataclass(frozen=True)
class Actor:
    """The process behind an event; numbers as the service sees them, 0 where it cannot."""

    time_ns: int
    """CLOCK_MONOTONIC."""
    endpoint: int
    """0: of no pod of this node."""
    pid: int
    parent: int
    uid: int
    command: str


@dataclass(frozen=True)
class Exec:
    """A program was executed."""

    who: Actor
    path: str
    arguments: tuple[str, ...]
    """Empty: they could not be read."""


@dataclass(frozen=True)
class Connect:
    """A connection is being opened, or a UDP socket connected. Addresses: "" for none."""

    who: Actor
    protocol: int
    source: str
    source_port: int
    destination: str
    destination_port: int


def head(record: bytes) -> tuple[Kind, int]:
    """Kind and endpoint number of a record of tr_events. ValueError if it is none."""
    raw = Who.from_buffer_copy(record)
    return Kind(raw.kind), raw.endpoint


def decode(record: bytes) -> Exec | Connect:
    """A record of tr_events. ValueError if it is none."""
    raw = Who.from_buffer_copy(record)
    who = Actor(raw.time, raw.endpoint, raw.pid, raw.parent, raw.uid, raw.comm.decode(errors="replace"))
    if Kind(raw.kind) is Kind.CONNECT:
        event = ConnectRecord.from_buffer_copy(record)
        source, destination = _address(event.src), _address(event.dst)
        return Connect(who, event.proto, source, event.sport, destination, event.dport)
    path_len, args_len = struct.unpack_from("HH", record, ExecRecord.path_len.offset)
    data = record[ExecRecord.data.offset :]
    path, rest = data[:path_len], data[path_len : path_len + args_len]
    return Exec(who, path.decode(errors="replace"), arguments(rest))


def arguments(raw: bytes) -> tuple[str, ...]:
    """Zero-terminated words, as a process's memory and /proc/PID/cmdline have them; the last may be cut."""
    return (
        tuple(word.decode(errors="replace") for word in raw.removesuffix(b"\0").split(b"\0")) if raw else ()
    )


def _address(address: abi.FibAddr) -> str:
    found = address.ip()
    return str(found) if found is not None else ""
