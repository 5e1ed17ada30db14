"""A node as this node sees it. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from services.common.kernel.netlink import IPAddress, IPNetwork
from services.common.network import Mode


class NodeState(enum.Enum):
    """As in fibril.node.v1.NodeState."""

    ALIVE = 1
    LOST = 2


@dataclass(frozen=True)
class Node:
    """What etcd says of a node, out of nodes/, alive/ and blocks/.

    index: its number in BPF maps of this machine, 1 and up (nodes/index.py).
    configured_mode: what it is set to; how the pair travels is decided by network/pair.py.
    """

    name: str
    index: int
    local: bool
    ipv4: IPv4Address | None
    ipv6: IPv6Address | None
    configured_mode: Mode
    overlay_port: int
    probe_port: int
    uplink_mtu: int
    underlay_networks: tuple[IPNetwork, ...]
    version: str
    state: NodeState
    blocks: frozenset[IPNetwork] = frozenset()
    gateways: frozenset[IPAddress] = frozenset()
    revision: int = 0

    def address(self, family: int) -> IPAddress | None:
        """Its underlay address of family 4 or 6."""
        return self.ipv4 if family == 4 else self.ipv6
