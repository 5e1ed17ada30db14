"""Pinned programs: open, inspect, run on a made-up packet, install in a program array."""

from __future__ import annotations

import ctypes as ct
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from services.common import errors
from services.common.kernel import bpf


class TestRun(NamedTuple):
    """What BPF_PROG_TEST_RUN gives: the program's return value, the packet after it, ns a run (mean)."""

    retval: int
    data: bytes
    ns: int


@contextmanager
def opened(path: Path | str) -> Iterator[int]:
    """The descriptor of a pinned program, closed at the end. Raises as open_prog."""
    fd = open_prog(path)
    try:
        yield fd
    finally:
        os.close(fd)


def open_prog(path: Path | str) -> int:
    """The descriptor of a pinned program; the caller closes it. NotFound if there is no such pin."""
    try:
        return bpf.get(str(path))
    except FileNotFoundError:
        raise errors.NotFound(
            f"no BPF program pinned at {path}", fix="start the service that loads it"
        ) from None
    except PermissionError as error:
        raise errors.PermissionDenied(
            f"may not open BPF program {path}: {error.strerror}", fix="run as root with CAP_BPF"
        ) from None


def test_run(
    prog_fd: int, data: bytes, repeat: int = 1, ctx: bytes | None = None, out_size: int = 4096
) -> TestRun:
    """Run a program on `data` `repeat` times; `ctx` is a struct __sk_buff or xdp_md.

    OSError from the kernel: EINVAL for a packet shorter than 14 bytes, ENOSPC if the result exceeds out_size.
    """
    packet = ct.create_string_buffer(data, len(data))
    out = ct.create_string_buffer(out_size)
    context = ct.create_string_buffer(ctx, len(ctx)) if ctx else None
    attr = struct.pack(
        "IIIIQQIIIIQQ",
        prog_fd,
        0,
        len(data),
        out_size,
        ct.addressof(packet),
        ct.addressof(out),
        repeat,
        0,
        len(ctx) if ctx else 0,
        0,
        ct.addressof(context) if context else 0,
        0,
    )
    _, back = bpf.call(bpf.PROG_TEST_RUN, attr, "test run")
    _, retval, _, size, _, _, _, duration = struct.unpack_from("IIIIQQII", back)
    return TestRun(retval, out.raw[:size], duration)


def info(path: Path | str) -> bpf.ProgInfo:
    """What the kernel knows of the program pinned at `path`."""
    with opened(path) as fd:
        return bpf.prog_info(fd)


def set_slot(array: Path | str, index: int, prog_fd: int) -> None:
    """Install a program in a slot of the program array pinned at `array`; atomic for packets.

    FailedPrecondition if the array is absent, too small, or belongs to another type of program.
    """
    with _array(array) as fd:
        try:
            bpf.slot_set(fd, index, prog_fd)
        except OSError as error:
            raise errors.FailedPrecondition(
                f"slot {index} of {array} refused the program: {error.strerror}",
                fix="all programs of one array must have one type, and the index must be in range",
            ) from None


def clear_slot(array: Path | str, index: int) -> None:
    """Empty a slot (one already empty is fine)."""
    with _array(array) as fd:
        bpf.slot_clear(fd, index)


def slots(array: Path | str) -> dict[int, int]:
    """Filled slots of a program array: {index: program id}."""
    with _array(array) as fd:
        found = {index: bpf.slot_get(fd, index) for index in range(bpf.map_info(fd).max_entries)}
    return {index: ident for index, ident in found.items() if ident}


@contextmanager
def _array(path: Path | str) -> Iterator[int]:
    try:
        fd = bpf.get(str(path))
    except FileNotFoundError:
        raise errors.FailedPrecondition(
            f"no program array pinned at {path}", fix="start the service that loads the pipeline"
        ) from None
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def statistics() -> Iterator[None]:
    """Have the kernel count run_time_ns and run_cnt of all programs while inside (costs ~20 ns a run)."""
    fd, _ = bpf.call(bpf.ENABLE_STATS, struct.pack("I", 0), "enable statistics")
    try:
        yield
    finally:
        os.close(fd)
