"""How pods of different nodes reach each other: the configuration section `network`, which several services
read, and what follows from it for packet sizes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from services.common.errors import InvalidArgument

VXLAN_OVERHEAD: Final = {4: 50, 6: 70}
"""Bytes that VXLAN adds to a packet, by the family of the underlay: Ethernet 14, VXLAN 8, UDP 8, IP 20 or 40
(RFC 7348)."""


class Mode(enum.Enum):
    """How packets travel between nodes; see fibril.node.v1.NetworkMode."""

    OVERLAY = "overlay"
    ROUTED = "routed"
    CLOUD = "cloud"
    AUTO = "auto"


class Underlay(enum.Enum):
    """Family of the node addresses that overlay packets travel between."""

    AUTO = "auto"
    IPV4 = "ipv4"
    IPV6 = "ipv6"


@dataclass(frozen=True)
class NetworkConfig:
    """The same on all nodes of a cluster, but for addresses and device."""

    mode: Mode = field(
        default=Mode.OVERLAY,
        metadata={"help": "overlay, routed (one network), cloud, auto (routed where possible, else overlay)"},
    )
    device: str = field(
        default="", metadata={"help": "interface to the other nodes; empty: that of the default route"}
    )
    ipv4: str = field(
        default="", metadata={"help": "this node's IPv4 address for others; empty: the device's first"}
    )
    ipv6: str = field(default="", metadata={"help": "as ipv4, for IPv6"})
    underlay: Underlay = field(
        default=Underlay.AUTO,
        metadata={"help": "family that overlay packets travel in: ipv4, ipv6, auto (ipv4 if both nodes have it)"},
    )
    overlay_port: int = field(default=8472, metadata={"help": "UDP port of the overlay (VXLAN)"})
    probe_port: int = field(default=4240, metadata={"help": "UDP port of the nodes' probes of each other"})

    def __post_init__(self) -> None:
        for name, kind in (("ipv4", IPv4Address), ("ipv6", IPv6Address)):
            text = getattr(self, name)
            try:
                if text:
                    kind(text)
            except ValueError:
                raise InvalidArgument(f"{text!r} is no {name} address", field=name) from None
        for name in ("overlay_port", "probe_port"):
            if not 1 <= getattr(self, name) <= 65535:
                raise InvalidArgument(f"{getattr(self, name)} is outside 1..65535", field=name)
        if len(self.device) > 15:
            raise InvalidArgument(f"{self.device!r} is no interface name", field="device")

    def overhead(self, *, has_ipv4: bool) -> int:
        """Bytes by which pods' packets must be smaller than the uplink's on a node that has, or has not, an
        IPv4 address. Towards a node without IPv4 it may be more: that is in the pair's own MTU.
        """
        if self.mode in (Mode.ROUTED, Mode.CLOUD):
            return 0
        over_ipv4 = self.underlay is Underlay.IPV4 or (self.underlay is Underlay.AUTO and has_ipv4)
        return VXLAN_OVERHEAD[4 if over_ipv4 else 6]
