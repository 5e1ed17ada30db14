"""The yardstick: 1 Y is the ns a packet of a fixed small program (calibration.c), on this machine, in this run."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

from services.common.kernel import loader

SOURCE: Final = Path(__file__).with_name("calibration.c")
SERVICE: Final = "calibration"
YARDSTICK: Final = "fib_calibration"
NOTHING: Final = "fib_nothing"
RESET: Final = "fib_reset"
TUNNEL: Final = "fib_tunnel"
SPREAD: Final = "fib_spread"
PORTS: Final = "fib_ports"
PROGRAMS: Final = (YARDSTICK, NOTHING, RESET, TUNNEL, SPREAD, PORTS)
NEXT: Final = "calibration/next"
"""Where the array is pinned that fib_reset (0), fib_tunnel and fib_spread (1) go on with."""
TUNNEL_FROM: Final = "192.168.7.2"
TUNNEL_IDENTITY: Final = 0x100007


def spec() -> loader.ProgramSpec:
    """What to load; the programs have no map in common with anything."""
    return loader.ProgramSpec(source=SOURCE, service=SERVICE, maps={"next": NEXT},
                              functions=dict.fromkeys(PROGRAMS, "sched_cls"))


def packet() -> bytes:
    """A TCP acknowledgement of 64 bytes from 10.0.0.1:40000 to 10.0.0.2:80."""
    return (b"\x02" * 12 + b"\x08\x00"
            + struct.pack(">BBHHHBBH4s4s", 0x45, 0, 50, 0, 0, 64, 6, 0, b"\x0a\0\0\x01", b"\x0a\0\0\x02")
            + struct.pack(">HHIIBBHHH", 40000, 80, 0, 0, 0x50, 0x10, 0, 0, 0) + b"x" * 10)
