"""What rules mean depends on: identities, services' backends, nodes, named ports. Filled by those who follow them."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_network

from services.policy.model import CidrPeer, NodePeer, Selector, ServicePeer
from services.policy.resolve.selectors import Selectors

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
NamedPort = tuple[int, int]
"""Protocol and port."""


@dataclass(frozen=True)
class NodeFacts:
    """labels: those that NodePeer selects by."""

    labels: Mapping[str, str]
    addresses: frozenset[IPAddress]


@dataclass
class World:
    """Used from one event loop."""

    selectors: Selectors = field(default_factory=Selectors)
    backends: dict[str, frozenset[IPAddress]] = field(default_factory=dict)
    """Of services, by name."""
    nodes: dict[str, NodeFacts] = field(default_factory=dict)
    named: dict[str, dict[NamedPort, set[int]]] = field(default_factory=dict)
    """Which identities have a port of that name, by what it stands for."""

    def service(self, peer: ServicePeer) -> list[CidrPeer]:
        """Addresses that a peer stands for now."""
        return _singles(self.backends.get(peer.name, ()))

    def node(self, peer: NodePeer) -> list[CidrPeer]:
        """See service."""
        return _singles(
            address
            for node in self.nodes.values()
            if node_selected(peer.selector, node.labels)
            for address in node.addresses
        )


def node_selected(selector: Selector, labels: Mapping[str, str]) -> bool:
    """Whether a selector of nodes selects one with these labels."""
    return selector.matches(labels)


def _singles(addresses: Iterable[IPAddress]) -> list[CidrPeer]:
    return [CidrPeer(ip_network(address)) for address in addresses]
