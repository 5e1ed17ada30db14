"""The contract of bpf/abi/xdp.h in ctypes: a part of map family `lb`."""

from __future__ import annotations

import ctypes as ct
from collections.abc import Sequence
from typing import Final, Self

from services.lb import abi

TAILS_MAP: Final = "lb_xdp_tails"
MAPS: Final = {name: f"{abi.FAMILY}/{name}" for name in ("lb_xdp", "lb_xdp_ports", TAILS_MAP)}
"""Map -> pin path below an instance's pin directory."""
MACS: Final = 4


def mac_word(mac: str) -> int:
    """A MAC as programs keep it: first byte lowest."""
    return int.from_bytes(bytes.fromhex(mac.replace(":", "")), "little")


class Own(ct.Structure):
    """struct lb_xdp: the one value of lb_xdp."""

    _fields_ = (("macs", ct.c_uint64 * MACS), ("redirect", ct.c_uint32), ("pad", ct.c_uint32))

    @classmethod
    def of(cls, macs: Sequence[str], redirect: bool = False) -> Self:
        """At most MACS of them."""
        return cls(macs=(ct.c_uint64 * MACS)(*map(mac_word, macs)), redirect=redirect)


class Port(ct.Structure):
    """struct lb_xdp_port: a value of lb_xdp_ports."""

    _fields_ = (("mac", ct.c_uint64),)
