"""Attach programs for as long as a descriptor is open: the kernel takes them off when this process ends, however it does."""

from __future__ import annotations

import ctypes as ct
import errno
import os
import struct
from pathlib import Path

from services.common import errors
from services.common.kernel import bpf


def raw_tracepoint(name: str, prog_fd: int) -> int:
    """Run a program at a tracepoint, with the tracepoint's own arguments; closing the descriptor ends it.

    FailedPrecondition if the kernel has no such tracepoint, PermissionDenied.
    """
    raw = ct.create_string_buffer(name.encode())
    try:
        return bpf.call(bpf.RAW_TRACEPOINT_OPEN, struct.pack("QIIQ", ct.addressof(raw), prog_fd, 0, 0))[0]
    except OSError as error:
        raise _error(error, f"tracepoint {name}") from None


def cgroup(path: Path | str, attach_type: str, prog_fd: int) -> int:
    """Run a program at a hook (bpf.ATTACH_TYPES) of a cgroup and all below it, besides what others have there.

    FailedPrecondition if the kernel has no such hook or an older program there tolerates no other, NotFound if the cgroup
    is gone, PermissionDenied.
    """
    try:
        group = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise errors.NotFound(f"cgroup {path} does not exist") from None
    try:
        kind = bpf.ATTACH_TYPES[attach_type]
        return bpf.call(bpf.LINK_CREATE, struct.pack("12I", prog_fd, group, kind, *[0] * 9))[0]
    except OSError as error:
        raise _error(error, f"hook {attach_type} of cgroup {path}") from None
    finally:
        os.close(group)


def _error(error: OSError, what: str) -> errors.FibrilError:
    if error.errno == errno.EACCES or (error.errno == errno.EPERM and os.geteuid()):
        return errors.PermissionDenied(
            f"cannot attach to {what}: {error.strerror}", fix="run as root with CAP_BPF and CAP_PERFMON"
        )
    return errors.FailedPrecondition(f"cannot attach to {what}: {error.strerror}")
