"""Programs at functions of programs and libraries: uprobes, by perf events (perf_event_open(2)).

Such a probe is in every process that has the file mapped, of any mount namespace, and goes with its descriptor.
"""

from __future__ import annotations

import ctypes as ct
import fcntl
import functools
import os
import platform
import struct
from pathlib import Path
from typing import Final

from services.common import errors

_DEVICE: Final = Path("/sys/bus/event_source/devices/uprobe")
_CALLS: Final = {"x86_64": 298, "aarch64": 241}
_CLOEXEC: Final = 8
_SET_BPF, _ENABLE = 0x40042408, 0x2400
_SIZE: Final = 112

_libc = ct.CDLL(None, use_errno=True)


@functools.cache
def _kind() -> tuple[int, int]:
    """Number of the event source, and the bit that asks for returns."""
    try:
        number = int((_DEVICE / "type").read_text())
        bit = int((_DEVICE / "format/retprobe").read_text().removeprefix("config:"))
    except (OSError, ValueError):
        raise errors.FailedPrecondition(
            "this kernel has no uprobes", fix="it takes CONFIG_UPROBE_EVENTS and a mounted /sys"
        ) from None
    if platform.machine() not in _CALLS:
        raise errors.FailedPrecondition(f"uprobes are not supported on {platform.machine()} machines")
    return number, 1 << bit


def attach(program: int, path: Path, offset: int, returning: bool = False) -> int:
    """Have a loaded program (descriptor, type kprobe) run at a place in a file, or where the function there returns.

    The descriptor that holds it there. FailedPrecondition: no uprobes, or the kernel refuses this place.
    """
    kind, bit = _kind()
    where = ct.create_string_buffer(os.fsencode(path))
    attr = ct.create_string_buffer(
        struct.pack("IIQQQQQIIQQ", kind, _SIZE, bit if returning else 0, 0, 0, 0, 0, 0, 0, ct.addressof(where), offset), _SIZE
    )
    event = _libc.syscall(_CALLS[platform.machine()], ct.byref(attr), -1, 0, -1, _CLOEXEC)
    if event < 0:
        raise errors.FailedPrecondition(f"cannot probe {path} at {offset:#x}: {os.strerror(ct.get_errno())}")
    try:
        fcntl.ioctl(event, _SET_BPF, program)
        fcntl.ioctl(event, _ENABLE, 0)
    except OSError as error:
        os.close(event)
        raise errors.FailedPrecondition(f"cannot probe {path} at {offset:#x}: {error.strerror}") from None
    return int(event)
