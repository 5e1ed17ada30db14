"""tc programs as direct-action filters of a clsact qdisc. Use it through `attach`.

Our filter is the one of priority PRIORITY; replacing it is atomic. Netlink thread, as for all netlink.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Mapping
from typing import Final, Literal

from services.common import errors
from services.common.kernel import bpf, rtnl
from services.common.kernel.rtnl import Message, RtnlSocket

PRIORITY: Final = 0xF1B
_CLSACT: Final = 0xFFFFFFF1
_HANDLE: Final = 0xFFFF0000
_PARENT: Final = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
_ETH_P_ALL: Final = 3
_TCA_OPTIONS, _TCA_BPF_ID = 2, 11
Direction = Literal["ingress", "egress"]
_GONE: Final = frozenset({errno.ENOENT, errno.ENODEV, errno.EINVAL})


def _filter(
    kind: int,
    ifindex: int,
    direction: Direction,
    attrs: list[tuple[str, object]],
    flags: int,
    tolerate: frozenset[int] = frozenset(),
) -> Message:
    info = PRIORITY << 16 | socket.htons(_ETH_P_ALL)
    return Message(
        kind,
        {
            "family": socket.AF_UNSPEC,
            "index": ifindex,
            "handle": 1 if kind != rtnl.GETTFILTER else 0,
            "parent": _PARENT[direction],
            "info": info,
        },
        attrs,
        flags,
        f"tc filter on {direction} of interface {ifindex}",
        tolerate,
    )


class HookTaken(Exception):
    """Another qdisc, `kind`, is where clsact would go."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


def attach(ifindex: int, programs: Mapping[Direction, int]) -> None:
    """Add the clsact qdisc if it is missing and put the programs in our filters, in one batch.

    HookTaken if an ingress qdisc is in the way, else typed errors as of any netlink request.
    """
    clsact = Message(
        rtnl.NEWQDISC,
        {"family": socket.AF_UNSPEC, "index": ifindex, "handle": _HANDLE, "parent": _CLSACT},
        [("TCA_KIND", "clsact")],
        rtnl.CREATE | rtnl.EXCL,
        f"add clsact qdisc to interface {ifindex}",
    )
    filters = []
    for direction, fd in programs.items():
        options = {
            "attrs": [("TCA_BPF_FD", fd), ("TCA_BPF_NAME", bpf.prog_info(fd).name), ("TCA_BPF_FLAGS", 1)]
        }
        filters.append(
            _filter(
                rtnl.NEWTFILTER,
                ifindex,
                direction,
                [("TCA_KIND", "bpf"), ("TCA_OPTIONS", options)],
                rtnl.CREATE | rtnl.REPLACE,
            )
        )
    with RtnlSocket() as netlink:
        try:
            netlink.apply([clsact, *filters])
            return
        except errors.AlreadyExists:
            taken = [kind for kind in _kinds(netlink, ifindex) if kind != "clsact"]
        if taken:
            # An ingress qdisc has taken our filter all the same.
            netlink.try_apply([_removal(ifindex, direction) for direction in programs])
            raise HookTaken(taken[0])
        netlink.apply(filters)


def _kinds(netlink: RtnlSocket, ifindex: int) -> list[str]:
    """Kinds of the qdiscs at the ingress/clsact place of an interface."""
    request = Message(rtnl.GETQDISC, {"index": ifindex}, [], what="list qdiscs")
    found = []
    for entry in netlink.dump(request):
        index, handle = struct.unpack_from("4xiI", entry.fixed)
        if index == ifindex and handle == _HANDLE:
            found.append(entry.attrs.get(1, b"").rstrip(b"\0").decode())
    return found


def _removal(ifindex: int, direction: Direction) -> Message:
    return _filter(rtnl.DELTFILTER, ifindex, direction, [("TCA_KIND", "bpf")], 0, _GONE)


def detach(ifindex: int, direction: Direction) -> bool:
    """Remove our filter; whether it was there. The qdisc stays: others may use it."""
    try:
        present = bool(attached(ifindex, direction))
    except errors.NotFound:
        return False
    with RtnlSocket() as netlink:
        netlink.apply([_removal(ifindex, direction)])
    return present


def attached(ifindex: int, direction: Direction) -> list[int]:
    """Ids of the programs in all filters of the hook."""
    with RtnlSocket() as netlink:
        try:
            found = netlink.dump(_filter(rtnl.GETTFILTER, ifindex, direction, [], 0))
        except errors.FailedPrecondition:  # no clsact qdisc there
            return []
    ids = (rtnl.attributes(entry.attrs.get(_TCA_OPTIONS, b"")).get(_TCA_BPF_ID) for entry in found)
    return list(dict.fromkeys(struct.unpack("I", ident)[0] for ident in ids if ident))
