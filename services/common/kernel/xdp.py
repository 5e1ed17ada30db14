"""XDP programs of interfaces: which hangs there and how, what the driver can do, and setting one without stealing another's.

Functions block: netlink thread.
"""

from __future__ import annotations

import enum
import os
import socket
import struct
from typing import Final

from services.common import errors
from services.common.kernel import bpf, rtnl
from services.common.kernel.netlink import Rtnl
from services.common.kernel.requests import xdp_set

# XDP_FLAGS_* of linux/if_link.h
_IF_NOEXIST, _SKB, _DRV, _REPLACE = 1, 2, 4, 16
_GENL_CTRL, _GET_FAMILY, _DEV_GET = 0x10, 3, 1


class Mode(enum.IntEnum):
    """XDP_ATTACHED_* (linux/if_link.h)."""

    NONE = 0
    NATIVE = 1
    GENERIC = 2
    HARDWARE = 3
    MANY = 4


class Feature(enum.IntFlag):
    """NETDEV_XDP_ACT_* (linux/netdev.h)."""

    BASIC = 0x1
    REDIRECT = 0x2
    TRANSMIT = 0x4


_FLAG: Final = {Mode.NATIVE: _DRV, Mode.GENERIC: _SKB}


def put(node: Rtnl, ifindex: int, mode: Mode, prog_fd: int, instead_of: int = -1) -> None:
    """Set the program of an interface in the place of `instead_of` (a descriptor), or where there is none.

    FailedPrecondition: the driver cannot, or another program is there. NotFound: no such interface.
    """
    flags = _FLAG[mode] | (_REPLACE if instead_of >= 0 else _IF_NOEXIST)
    what = f"set the {mode.name.lower()} XDP program of interface {ifindex}"
    try:
        node.apply([xdp_set(ifindex, prog_fd, what, flags, instead_of)])
    except errors.NotFound:
        raise
    except errors.FibrilError as error:
        raise errors.FailedPrecondition(str(error)) from None


def take(node: Rtnl, ifindex: int, mode: Mode, prog_fd: int) -> bool:
    """Remove the program, if it is still this one; whether the interface was there."""
    what = f"remove the XDP program of interface {ifindex}"
    try:
        node.apply([xdp_set(ifindex, -1, what, _FLAG[mode] | _REPLACE, prog_fd)])
    except errors.NotFound:
        return False
    return True


def features(ifindex: int) -> Feature | None:
    """What the driver can do; None: this kernel (before 6.3) does not say, or there is no such interface."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 16) as sock:
        sock.settimeout(10)
        family = _ask(sock, _GENL_CTRL, _GET_FAMILY, 2, b"netdev\0").get(1)
        if family is None:
            return None
        number = struct.unpack("H", family)[0]
        answer = _ask(sock, number, _DEV_GET, 1, struct.pack("I", ifindex)).get(3)
    return Feature(struct.unpack("Q", answer)[0] & 7) if answer is not None else None


def _ask(sock: socket.socket, family: int, command: int, kind: int, value: bytes) -> dict[int, bytes]:
    """Attributes of the answer to a generic netlink request with one attribute; none after an error."""
    attribute = struct.pack("HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
    body = struct.pack("BBH", command, 1, 0) + attribute
    sock.send(struct.pack("IHHII", 16 + len(body), family, rtnl.REQUEST, 1, 0) + body)
    for number, _, _, payload in rtnl.parse(sock.recv(1 << 16)):
        if number == family:
            return rtnl.attributes(payload[4:])
    return {}


def name_of(prog_id: int) -> str:
    """For people: "fib_lb_xdp (17)"; the number alone if it is gone meanwhile."""
    try:
        fd = bpf.prog_fd_by_id(prog_id)
    except OSError:
        return str(prog_id)
    try:
        return f"{bpf.prog_info(fd).name} ({prog_id})"
    finally:
        os.close(fd)
