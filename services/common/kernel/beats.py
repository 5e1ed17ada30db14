"""The kernel's clock as programs read it cheapest: its ticks, shifted to about a second each."""

from __future__ import annotations

import time
from typing import Final

# Linux's number of it; time has no name for it.
_MONOTONIC_COARSE: Final = 6
# The kernel begins to count its ticks so many seconds before they no longer fit 32 bits.
_TICKS_BEGIN_S: Final = -300


def beat_shift() -> int:
    """What makes about a second of the kernel's ticks."""
    return max(0, _hertz().bit_length() - 1)


def _hertz() -> int:
    """The kernel's ticks a second."""
    return round(1 / time.clock_getres(_MONOTONIC_COARSE))


def beat(shift: int) -> int:
    """The beat programs read now."""
    return (1 << 32) + int((time.monotonic() + _TICKS_BEGIN_S) * _hertz()) >> shift
