"""tc programs as direct-action filters of a clsact qdisc. Use it through `attach`.

Our filter is the one of priority PRIORITY, or of another that the caller chooses for an interface that several
nodes share; replacing it is atomic. Netlink thread, as for all netlink.
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
_DIRECTIONS: Final[tuple[Direction, ...]] = ("ingress", "egress")
_GONE: Final = frozenset({errno.ENOENT, errno.ENODEV, errno.EINVAL})


def _filter(
    kind: int,
    ifindex: int,
    direction: Direction,
    attrs: list[tuple[str, object]],
    flags: int,
    tolerate: frozenset[int] = frozenset(),
    priority: int = PRIORITY,
) -> Message:
    # Priority 0 lists the filters of all priorities and protocols.
    info = priority << 16 | socket.htons(_ETH_P_ALL) if priority else 0
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


def attach(ifindex: int, programs: Mapping[Direction, int], priority: int = PRIORITY) -> None:
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
                priority=priority,
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
            netlink.try_apply([_removal(ifindex, direction, priority) for direction in programs])
            raise HookTaken(taken[0])
        netlink.apply(filters)


def taken_by(ifindex: int) -> str:
    """Kind of the qdisc that is where clsact would go; "" if none is, or clsact."""
    with RtnlSocket() as netlink:
        return next((kind for kind in _kinds(netlink, ifindex) if kind != "clsact"), "")


def _kinds(netlink: RtnlSocket, ifindex: int) -> list[str]:
    """Kinds of the qdiscs at the ingress/clsact place of an interface."""
    request = Message(rtnl.GETQDISC, {"index": ifindex}, [], what="list qdiscs")
    found = []
    for entry in netlink.dump(request):
        index, handle = struct.unpack_from("4xiI", entry.fixed)
        if index == ifindex and handle == _HANDLE:
            found.append(entry.attrs.get(1, b"").rstrip(b"\0").decode())
    return found


def _removal(ifindex: int, direction: Direction, priority: int) -> Message:
    return _filter(rtnl.DELTFILTER, ifindex, direction, [("TCA_KIND", "bpf")], 0, _GONE, priority)


def detach(ifindex: int, direction: Direction, priority: int = PRIORITY) -> bool:
    """Remove our filter; whether it was there. The qdisc stays: others may use it."""
    try:
        present = bool(attached(ifindex, direction, priority))
    except errors.NotFound:
        return False
    with RtnlSocket() as netlink:
        netlink.apply([_removal(ifindex, direction, priority)])
    return present


def remove_unused(ifindex: int) -> bool:
    """Remove the clsact qdisc of an interface unless anybody has a filter there; whether it went."""
    with RtnlSocket() as netlink:
        try:
            for direction in _DIRECTIONS:
                if netlink.dump(_filter(rtnl.GETTFILTER, ifindex, direction, [], 0, priority=0)):
                    return False
        except (errors.FailedPrecondition, errors.NotFound):
            return False
        if _kinds(netlink, ifindex) != ["clsact"]:
            return False
        netlink.apply(
            [
                Message(
                    rtnl.DELQDISC,
                    {"family": socket.AF_UNSPEC, "index": ifindex, "handle": _HANDLE, "parent": _CLSACT},
                    [("TCA_KIND", "clsact")],
                    what=f"remove the clsact qdisc of interface {ifindex}",
                    tolerate=_GONE,
                )
            ]
        )
    return True


def attached(ifindex: int, direction: Direction, priority: int = PRIORITY) -> list[int]:
    """Ids of the programs in the filters of a priority (0: of all) on the hook."""
    with RtnlSocket() as netlink:
        try:
            found = netlink.dump(_filter(rtnl.GETTFILTER, ifindex, direction, [], 0, priority=priority))
        except errors.FailedPrecondition:  # no clsact qdisc there
            return []
    ids = (rtnl.attributes(entry.attrs.get(_TCA_OPTIONS, b"")).get(_TCA_BPF_ID) for entry in found)
    return list(dict.fromkeys(struct.unpack("I", ident)[0] for ident in ids if ident))
