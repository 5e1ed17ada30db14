"""Kernel parameters. Those below net/ are of the calling thread's network namespace."""

from __future__ import annotations

from pathlib import Path

from services.common import errors

_ROOT = Path("/proc/sys")


def _path(name: str) -> Path:
    """`name` with slashes, or with dots if no part has a dot itself (an interface called eth0.5 has)."""
    return _ROOT / (name if "/" in name else name.replace(".", "/"))


def read(name: str) -> str | None:
    """The value, None if this kernel or namespace has no such parameter."""
    try:
        return _path(name).read_text().strip()
    except FileNotFoundError:
        return None


def ensure(name: str, value: str | int) -> str | None:
    """Set a parameter if it differs; the former value if it did, for undoing. NotFound, PermissionDenied, or
    FailedPrecondition if the kernel refuses the value."""
    before = read(name)
    if before is None:
        raise errors.NotFound(f"the kernel has no parameter {name}")
    if before == str(value):
        return None
    try:
        _path(name).write_text(str(value))
    except PermissionError:
        raise errors.PermissionDenied(
            f"may not set {name}", fix=f"run as root, or `sysctl -w {name}={value}`"
        ) from None
    except OSError as error:
        raise errors.FailedPrecondition(f"cannot set {name} to {value}: {error.strerror}") from None
    return before
