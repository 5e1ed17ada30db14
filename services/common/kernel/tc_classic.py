"""tc programs on kernels before 6.6: direct-action filters of a clsact qdisc. Use it through `attach`.

Our filter is the one of priority PRIORITY; replacing it is atomic. Netlink thread, as for all netlink.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Final

from services.common import errors
from services.common.kernel import bpf, rtnl
from services.common.kernel.rtnl import Message, RtnlSocket

PRIORITY: Final = 0xF1B
_CLSACT: Final = 0xFFFFFFF1
_HANDLE: Final = 0xFFFF0000
_PARENT: Final = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
_ETH_P_ALL: Final = 3
_TCA_OPTIONS, _TCA_BPF_ID = 2, 11
_GONE: Final = frozenset({errno.ENOENT, errno.ENODEV, errno.EINVAL})


def _filter(kind: int, ifindex: int, direction: str, attrs: list[tuple[str, object]], flags: int,
            tolerate: frozenset[int] = frozenset()) -> Message:
    info = PRIORITY << 16 | socket.htons(_ETH_P_ALL)
    return Message(kind, {"family": socket.AF_UNSPEC, "index": ifindex, "handle": 1 if kind != rtnl.GETTFILTER else 0,
                          "parent": _PARENT[direction], "info": info}, attrs, flags,
                   f"tc filter on {direction} of interface {ifindex}", tolerate)


def attach(ifindex: int, direction: str, prog_fd: int) -> None:
    """Add the clsact qdisc if it is missing and put the program in our filter."""
    name = bpf.prog_info(prog_fd).name or "fibril"
    options = {"attrs": [("TCA_BPF_FD", prog_fd), ("TCA_BPF_NAME", name), ("TCA_BPF_FLAGS", 1)]}
    with RtnlSocket() as netlink:
        netlink.apply([
            Message(rtnl.NEWQDISC, {"family": socket.AF_UNSPEC, "index": ifindex, "handle": _HANDLE,
                                    "parent": _CLSACT}, [("TCA_KIND", "clsact")], rtnl.CREATE | rtnl.EXCL,
                    f"clsact qdisc of interface {ifindex}", frozenset({errno.EEXIST})),
            _filter(rtnl.NEWTFILTER, ifindex, direction, [("TCA_KIND", "bpf"), ("TCA_OPTIONS", options)],
                    rtnl.CREATE | rtnl.REPLACE)])


def detach(ifindex: int, direction: str) -> bool:
    """Remove our filter; whether it was there. The qdisc stays: others may use it."""
    try:
        present = bool(attached(ifindex, direction))
    except errors.NotFound:
        return False
    with RtnlSocket() as netlink:
        netlink.apply([_filter(rtnl.DELTFILTER, ifindex, direction, [("TCA_KIND", "bpf")], 0, _GONE)])
    return present


def attached(ifindex: int, direction: str) -> list[int]:
    """Ids of the programs in all filters of the hook."""
    with RtnlSocket() as netlink:
        try:
            found = netlink.dump(_filter(rtnl.GETTFILTER, ifindex, direction, [], 0))
        except errors.FailedPrecondition:  # no clsact qdisc there
            return []
    ids = (rtnl.attributes(entry.attrs.get(_TCA_OPTIONS, b"")).get(_TCA_BPF_ID) for entry in found)
    return list(dict.fromkeys(struct.unpack("I", ident)[0] for ident in ids if ident))
