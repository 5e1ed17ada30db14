"""What etcd says of the nodes, put together: records, signs of life and blocks. Pure.

A record makes a node; its sign of life and its blocks may come before it and stay when it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from fibril.ipam.v1 import ipam_pb2
from fibril.node.v1 import node_pb2 as pb
from services.common.kernel.netlink import IPAddress, IPNetwork
from services.common.network import Mode
from services.identity.nodes.model import Node, NodeState

MODES: Mapping[int, Mode] = {
    pb.NETWORK_MODE_OVERLAY: Mode.OVERLAY,
    pb.NETWORK_MODE_ROUTED: Mode.ROUTED,
    pb.NETWORK_MODE_CLOUD: Mode.CLOUD,
    pb.NETWORK_MODE_AUTO: Mode.AUTO,
}
NUMBERS: Mapping[Mode, int] = {mode: number for number, mode in MODES.items()}


@dataclass(frozen=True)
class Block:
    """A block of addresses and its gateway, None when it has none."""

    node: str
    network: IPNetwork
    gateway: IPAddress | None


@dataclass(frozen=True)
class Alive:
    """A sign of life. revision: of its last change."""

    token: str
    revision: int


def decode_block(value: bytes) -> Block:
    """ValueError or DecodeError for what no Fibril wrote."""
    message = ipam_pb2.Block.FromString(value)
    if not message.node:
        raise ValueError("it names no node")
    network = ip_network(message.cidr)
    gateway = ip_address(message.gateway) if message.gateway else None
    if gateway is not None and gateway not in network:
        raise ValueError(f"gateway {gateway} is not in {network}")
    return Block(message.node, network, gateway)


def decode_node(name: str, value: bytes, revision: int) -> Node:
    """A record as a node without index, life and blocks. ValueError or DecodeError as above."""
    message = pb.StoredNode.FromString(value)
    if message.name != name:
        raise ValueError(f"it is of a node called {message.name!r}")
    ipv4 = IPv4Address(message.ipv4) if message.ipv4 else None
    ipv6 = IPv6Address(message.ipv6) if message.ipv6 else None
    for address in (ipv4, ipv6):
        if address is not None and (address.is_unspecified or address.is_multicast):
            raise ValueError(f"{address} is nobody's address")
    # Nobody sends packets to another port, and a socket that is told to breaks.
    if max(message.overlay_port, message.probe_port) > 65535:
        raise ValueError("a port is above 65535")
    return Node(
        name=name,
        index=0,
        local=False,
        ipv4=ipv4,
        ipv6=ipv6,
        configured_mode=MODES.get(message.mode, Mode.OVERLAY),
        overlay_port=message.overlay_port,
        probe_port=message.probe_port,
        uplink_mtu=message.uplink_mtu,
        underlay_networks=tuple(ip_network(text) for text in message.underlay_networks),
        version=message.version,
        state=NodeState.LOST,
        revision=revision,
    )


class Roster:
    """Every change names the node it may have changed, so that nobody looks at all of them."""

    def __init__(self, own: str, index_of: Callable[[str], int]) -> None:
        self._own = own
        self._index_of = index_of
        self._records: dict[str, Node] = {}
        self._alive: dict[str, Alive] = {}
        self._blocks: dict[str, Block] = {}
        self._of_node: dict[str, dict[str, Block]] = {}
        self.nodes: dict[str, Node] = {}

    def names(self) -> set[str]:
        """Of all that have a record."""
        return set(self._records)

    def alive(self, name: str) -> Alive | None:
        """The node's sign of life."""
        return self._alive.get(name)

    def put_record(self, record: Node) -> str:
        self._records[record.name] = record
        return record.name

    def delete_record(self, name: str) -> str:
        self._records.pop(name, None)
        return name

    def put_alive(self, name: str, alive: Alive) -> str:
        self._alive[name] = alive
        return name

    def delete_alive(self, name: str) -> str:
        self._alive.pop(name, None)
        return name

    def put_block(self, key: str, block: Block) -> set[str]:
        """A block may go from one node to another."""
        changed = self.delete_block(key)
        self._blocks[key] = block
        self._of_node.setdefault(block.node, {})[key] = block
        return changed | {block.node}

    def delete_block(self, key: str) -> set[str]:
        block = self._blocks.pop(key, None)
        if block is None:
            return set()
        own = self._of_node[block.node]
        del own[key]
        if not own:
            del self._of_node[block.node]
        return {block.node}

    def refresh(self, name: str) -> bool:
        """Put a node together anew; whether it differs from before. ResourceExhausted when it gets no index: then it stays
        unknown.
        """
        before = self.nodes.get(name)
        record = self._records.get(name)
        if record is None:
            return self.nodes.pop(name, None) is not None
        blocks = self._of_node.get(name, {}).values()
        now = replace(
            record,
            index=before.index if before is not None else self._index_of(name),
            local=name == self._own,
            state=NodeState.ALIVE if name in self._alive else NodeState.LOST,
            blocks=frozenset(block.network for block in blocks),
            gateways=frozenset(block.gateway for block in blocks if block.gateway is not None),
        )
        self.nodes[name] = now
        return now != before
