"""VXLAN devices that take everything about a tunnel packet from the program that sends it, and tell everything to
the one that receives it ("external", collect metadata), with the group policy extension.

One such device serves all peers and both families of the underlay. Port and extensions belong to the socket
it shares its port with, so the kernel changes neither of an existing device.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

from services.common import errors
from services.common.kernel import netlink as nl
from services.common.kernel import rtnl
from services.common.kernel.netlink import Link, Rtnl
from services.common.kernel.rtnl import Message

MTU_MAX: Final = 65535 - 70
"""What the kernel makes of a wish for more: it leaves room for the outer headers (IPv6)."""
_LEARNING, _PORT, _GBP, _EXTERNAL = 7, 15, 23, 25


@dataclass(frozen=True)
class Vxlan:
    """What cannot be changed of a device."""

    port: int
    external: bool = True
    gbp: bool = True
    learning: bool = False


def vxlan_add(name: str, wanted: Vxlan, mtu: int = MTU_MAX) -> Message:
    """A device, down.

    AlreadyExists if its name, or its port by another such device, is taken; a port that another kind of device or
    a process has is noticed when it is set up (AlreadyExists too). Packets without UDP checksum over IPv6 are
    not taken.
    """
    data: list[tuple[str, Any]] = [
        ("IFLA_VXLAN_PORT", wanted.port), ("IFLA_VXLAN_LEARNING", int(wanted.learning)),
        ("IFLA_VXLAN_COLLECT_METADATA", int(wanted.external)), ("IFLA_VXLAN_UDP_ZERO_CSUM6_RX", 0),
    ]  # fmt: skip
    if wanted.gbp:
        data.append(("IFLA_VXLAN_GBP", True))
    return Message(
        rtnl.NEWLINK,
        {},
        [
            ("IFLA_IFNAME", name),
            ("IFLA_MTU", mtu),
            ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "vxlan"), ("IFLA_INFO_DATA", {"attrs": data})]}),
        ],
        rtnl.CREATE | rtnl.EXCL,
        f"create VXLAN device {name}",
    )


def read(node: Rtnl, name: str) -> tuple[Link, Vxlan | None] | None:
    """The interface of that name, and what it is as a VXLAN device; None if there is no such interface."""
    index = node.ifindex(name)
    if not index:
        return None
    try:
        found = node.get(Message(rtnl.GETLINK, {"index": index}, [], what=f"read interface {name}"))
    except errors.NotFound:
        return None
    info = rtnl.attributes(found.attrs.get(18, b""))
    link = nl.parse_link(found)
    if link.kind != "vxlan":
        return link, None
    data = rtnl.attributes(info.get(2, b""))
    flag = {number: bool(data.get(number, b"\0")[0]) for number in (_LEARNING, _EXTERNAL)}
    port = struct.unpack(">H", data.get(_PORT, b"\0\0"))[0]
    return link, Vxlan(port, flag[_EXTERNAL], _GBP in data, flag[_LEARNING])


def others(node: Rtnl, port: int, name: str) -> list[str]:
    """Names of other VXLAN devices on a port."""
    found = []
    for link in node.links():
        if link.kind == "vxlan" and link.name != name:
            read_back = read(node, link.name)
            if read_back is not None and read_back[1] is not None and read_back[1].port == port:
                found.append(link.name)
    return found
