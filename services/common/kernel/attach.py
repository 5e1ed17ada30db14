"""Attach programs to interfaces and cgroups. What is attached here outlives this process.

tc programs: through tcx where the kernel has it (6.6), which needs no qdisc, replaces atomically and leaves
other programs of the same hook alone; else as a direct-action filter of a clsact qdisc, under a priority of
our own. Both need the interface to be in the calling thread's network namespace.
"""

from __future__ import annotations

import ctypes as ct
import errno
import functools
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from services.common import errors
from services.common.kernel import bpf

Direction = Literal["ingress", "egress"]

_TCX: Final = {"ingress": bpf.ATTACH_TYPES["tcx_ingress"], "egress": bpf.ATTACH_TYPES["tcx_egress"]}


@dataclass(frozen=True)
class Attached:
    """A program on a hook. Other plugins' programs are listed as well."""

    prog_id: int
    name: str


@functools.cache
def has_tcx() -> bool:
    """Whether this kernel has tcx: asks the hook of a device that is always there, the loopback."""
    try:
        _query(1, _TCX["ingress"])
    except OSError as error:
        return error.errno not in (errno.EINVAL, errno.EOPNOTSUPP)
    return True


def attach_tc(ifindex: int, direction: Direction, prog_fd: int) -> None:
    """Put a program on the hook, in place of one with the same name if there is one; idempotent.

    NotFound if the interface is gone, FailedPrecondition if the kernel refuses the program.
    """
    if not has_tcx():
        from services.common.kernel import tc_classic
        tc_classic.attach(ifindex, direction, prog_fd)
        return
    mine = bpf.prog_info(prog_fd)
    try:
        present = attached(ifindex, direction)
        if any(entry.prog_id == mine.id for entry in present):
            return
        old = [entry.prog_id for entry in present if entry.name == mine.name]
        if not old:
            _attach(ifindex, prog_fd, _TCX[direction])
            return
        with _program(old[0]) as old_fd:
            _attach(ifindex, prog_fd, _TCX[direction], bpf.F_REPLACE, old_fd)
    except OSError as error:
        raise _error(error, f"attach {mine.name} to {direction} of interface {ifindex}") from None


def detach_tc(ifindex: int, direction: Direction, name: str) -> bool:
    """Take the program called `name` off; whether it was there. A vanished interface is fine too."""
    if not has_tcx():
        from services.common.kernel import tc_classic
        return tc_classic.detach(ifindex, direction)
    try:
        for entry in attached(ifindex, direction):
            if entry.name == name:
                with _program(entry.prog_id) as fd:
                    bpf.call(bpf.PROG_DETACH, struct.pack("IIIIIIQ", ifindex, fd, _TCX[direction], 0, 0, 0, 0))
                return True
    except errors.NotFound:
        return False
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENOENT):
            return False
        raise _error(error, f"detach {name} from {direction} of interface {ifindex}") from None
    return False


def attached(ifindex: int, direction: Direction) -> list[Attached]:
    """Programs on the hook in the order they run, other owners' included. NotFound if the interface is gone."""
    if not has_tcx():
        from services.common.kernel import tc_classic
        return [_named(ident) for ident in tc_classic.attached(ifindex, direction)]
    try:
        return [_named(ident) for ident in _query(ifindex, _TCX[direction])]
    except OSError as error:
        raise _error(error, f"list programs on {direction} of interface {ifindex}") from None


def attach_cgroup(path: Path | str, attach_type: str, prog_fd: int) -> None:
    """Attach to a cgroup (names of bpf.ATTACH_TYPES), beside others' programs, in place of our older one."""
    kind = bpf.ATTACH_TYPES[attach_type]
    mine = bpf.prog_info(prog_fd)
    with _cgroup(path) as cgroup:
        try:
            old = [entry for entry in map(_named, _query(cgroup, kind)) if entry.name == mine.name]
            if any(entry.prog_id == mine.id for entry in old):
                return
            if not old:
                _attach(cgroup, prog_fd, kind, bpf.F_ALLOW_MULTI)
                return
            with _program(old[0].prog_id) as old_fd:
                _attach(cgroup, prog_fd, kind, bpf.F_ALLOW_MULTI | bpf.F_REPLACE, old_fd)
        except OSError as error:
            raise _error(error, f"attach {mine.name} to {attach_type} of cgroup {path}") from None


def detach_cgroup(path: Path | str, attach_type: str, name: str) -> bool:
    """Take the program called `name` off a cgroup; whether it was there."""
    kind = bpf.ATTACH_TYPES[attach_type]
    with _cgroup(path) as cgroup:
        for entry in attached_cgroup(path, attach_type):
            if entry.name == name:
                with _program(entry.prog_id) as fd:
                    bpf.call(bpf.PROG_DETACH, struct.pack("IIIIIIQ", cgroup, fd, kind, 0, 0, 0, 0))
                return True
    return False


def attached_cgroup(path: Path | str, attach_type: str) -> list[Attached]:
    """Programs attached to this very cgroup (not to its parents). NotFound if it is gone."""
    with _cgroup(path) as cgroup:
        return [_named(ident) for ident in _query(cgroup, bpf.ATTACH_TYPES[attach_type])]


def _query(target: int, kind: int) -> list[int]:
    ids = (ct.c_uint32 * 64)()
    _, back = bpf.call(bpf.PROG_QUERY, struct.pack("IIIIQIIQQQQ", target, kind, 0, 0, ct.addressof(ids), len(ids), 0,
                                                   0, 0, 0, 0))
    return list(ids[:struct.unpack_from("I", back, 24)[0]])


def _attach(target: int, prog_fd: int, kind: int, flags: int = 0, replaced_fd: int = 0) -> None:
    bpf.call(bpf.PROG_ATTACH, struct.pack("IIIIIIQ", target, prog_fd, kind, flags, replaced_fd, 0, 0))


@contextmanager
def _program(ident: int) -> Iterator[int]:
    fd = bpf.prog_fd_by_id(ident)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _cgroup(path: Path | str) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise errors.NotFound(f"cgroup {path} does not exist") from None
    try:
        yield fd
    finally:
        os.close(fd)


def _named(ident: int) -> Attached:
    try:
        with _program(ident) as fd:
            return Attached(ident, bpf.prog_info(fd).name)
    except FileNotFoundError:  # detached and freed since it was listed
        return Attached(ident, "")


def _error(error: OSError, what: str) -> errors.FibrilError:
    if error.errno == errno.ENODEV:
        return errors.NotFound(f"{what}: no such interface here")
    if error.errno in (errno.EPERM, errno.EACCES):
        return errors.PermissionDenied(f"{what}: {error.strerror}",
                                       fix="run as root with CAP_BPF and CAP_NET_ADMIN")
    return errors.FailedPrecondition(f"{what}: {error.strerror}")
