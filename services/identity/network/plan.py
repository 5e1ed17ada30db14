"""What the kernel shall have so that this node reaches the others: out of facts about this one and about them.
Pure, and incremental: a node costs work for that node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from services.common.kernel.netlink import IPNetwork
from services.common.network import NetworkConfig
from services.common.pipeline import abi
from services.common.underlay import Facts
from services.identity.network import pair as pairing
from services.identity.network.devices import Found
from services.identity.network.pair import Pair, Side
from services.identity.network.routes import NO_ROUTE, RemoteRoute
from services.identity.nodes.model import Node


@dataclass(frozen=True)
class Own:
    """This node."""

    facts: Facts
    devices: Found
    blocks: frozenset[IPNetwork] = frozenset()


@dataclass(frozen=True)
class Changed:
    """Keys whose wanted objects are others than before."""

    indexes: frozenset[int] = frozenset()
    blocks: frozenset[IPNetwork] = frozenset()
    pairs: bool = False

    def __bool__(self) -> bool:
        return bool(self.indexes or self.blocks or self.pairs)


class Plan:
    """entries: struct node_entry's bytes by index. routes: by block, NO_ROUTE where others must have one. pairs: of
    other nodes, by name.
    """

    def __init__(self, cfg: NetworkConfig, foreign: Callable[[IPNetwork], bool]) -> None:
        """foreign: whether somebody else has a route to a block."""
        self._cfg = cfg
        self._foreign = foreign
        self._own = Own(Facts(), Found())
        self._nodes: dict[str, Node] = {}
        self._owners: dict[IPNetwork, str] = {}
        self._blocks: dict[str, frozenset[IPNetwork]] = {}
        self.entries: dict[int, bytes] = {}
        self.routes: dict[IPNetwork, RemoteRoute] = {}
        self.pairs: dict[str, Pair] = {}

    @property
    def own(self) -> Own:
        return self._own

    def owner(self, block: IPNetwork) -> str:
        """The node whose pods a block is for, "" if none that can be reached."""
        return self._owners.get(block, "")

    def set_own(self, own: Own) -> Changed:
        """This node is another than before: everything may be."""
        if own == self._own:
            return Changed()
        self._own = own
        return _all(self.put(node) for node in tuple(self._nodes.values()))

    def put(self, node: Node) -> Changed:
        """A node, or this one's own record, is there or has changed."""
        before = self._nodes.get(node.name)
        self._nodes[node.name] = node
        indexes = set()
        if before is not None and before.index != node.index:
            indexes |= self._set_entry(before.index, None)
        if node.local:
            indexes |= self._set_entry(node.index, self._local_entry(node))
            return Changed(frozenset(indexes))
        pair = pairing.decide(
            Side.own(self._cfg, self._own.facts, self._own.blocks), Side.of(node), self._cfg.underlay
        )
        changed_pair = self.pairs.get(node.name) != pair
        self.pairs[node.name] = pair
        blocks = self._set_routes(node.name, self._routes_of(node, pair))
        indexes |= self._set_entry(node.index, self._entry(node, pair))
        return Changed(frozenset(indexes), frozenset(blocks), changed_pair)

    def drop(self, name: str) -> Changed:
        """A node is no more."""
        node = self._nodes.pop(name, None)
        if node is None:
            return Changed()
        blocks = self._set_routes(name, {})
        indexes = self._set_entry(node.index, None)
        return Changed(frozenset(indexes), frozenset(blocks), self.pairs.pop(name, None) is not None)

    def again(self, name: str) -> Changed:
        """Something else that a node's part depends on has changed."""
        node = self._nodes.get(name)
        return self.put(node) if node is not None else Changed()

    def problem(self, name: str) -> str:
        """What is wrong between this node and another; empty if nothing is."""
        pair, node = self.pairs.get(name), self._nodes.get(name)
        if pair is None or node is None:
            return ""
        if pair.needs_routes and node.blocks and all(map(self._foreign, node.blocks)):
            return ""
        return pair.problem

    def _entry(self, node: Node, pair: Pair) -> bytes:
        mode, ifindex = pair.mode, 0
        if mode is abi.NodeMode.ROUTED:
            ifindex = self._own.devices.uplink
            if not ifindex or any(map(self._foreign, node.blocks)):
                # Somebody knows a way of their own: pods' packets take it as the host's do.
                mode, ifindex = abi.NodeMode.STACK, 0
        flags = abi.NodeFlag.TUNNEL_V6 if pair.tunnel == 6 else abi.NodeFlag(0)
        if (4, 6) in pair.hops:
            flags |= abi.NodeFlag.HOP_V6
        if pair.direct and self._own.devices.uplink:
            flags |= abi.NodeFlag.DIRECT
            ifindex = self._own.devices.uplink
        return _raw(node, mode, ifindex, pair.mtu, int(flags))

    def _local_entry(self, node: Node) -> bytes:
        """With the addresses the node has now, which its record may not have yet."""
        facts = self._own.facts
        entry = abi.NodeEntry(
            v6=abi.FibAddr.of(facts.ipv6) if facts.ipv6 else abi.FibAddr(),
            v4=abi.be32(facts.ipv4) if facts.ipv4 else 0,
            mtu=min(facts.mtu, 0xFFFF),
            mode=abi.NodeMode.LOCAL,
        )
        return bytes(entry)

    def _routes_of(self, node: Node, pair: Pair) -> dict[IPNetwork, RemoteRoute]:
        """One for each block of a node that can be reached, if only to know whether others have one."""
        if pair.mode is abi.NodeMode.NONE:
            return {}
        return {block: self._route(node, pair, block) for block in node.blocks - self._own.blocks}

    def _route(self, node: Node, pair: Pair, block: IPNetwork) -> RemoteRoute:
        devices, facts = self._own.devices, self._own.facts
        source = next((a for a in devices.sources if a.version == block.version), None)
        if pair.mode is abi.NodeMode.OVERLAY and devices.host:
            return RemoteRoute(devices.host, None, source, pair.mtu)
        if pair.mode is abi.NodeMode.ROUTED and devices.uplink:
            hop = next((node.address(family) for pods, family in pair.hops if pods == block.version), None)
            mtu = pair.mtu if pair.mtu < facts.mtu else 0
            if hop is not None and hop.version == block.version:
                # From the uplink's own address.
                return RemoteRoute(devices.uplink, hop, None, mtu)
            if hop is not None:
                return RemoteRoute(devices.uplink, hop, source, mtu)
        return NO_ROUTE

    def _set_entry(self, index: int, raw: bytes | None) -> set[int]:
        if self.entries.get(index) == raw:
            return set()
        if raw is None:
            del self.entries[index]
        else:
            self.entries[index] = raw
        return {index}

    def _set_routes(self, name: str, wanted: dict[IPNetwork, RemoteRoute]) -> set[IPNetwork]:
        """A block changes hands by whoever says so last; who had it before no longer matters."""
        before = self._blocks.get(name, frozenset())
        gone = {block for block in before - wanted.keys() if self._owners.get(block) == name}
        changed = {block for block, route in wanted.items() if self.routes.get(block) != route} | gone
        for block in gone:
            del self._owners[block], self.routes[block]
        self.routes.update(wanted)
        self._owners.update(dict.fromkeys(wanted, name))
        self._blocks[name] = frozenset(wanted)
        if not wanted:
            del self._blocks[name]
        return changed


def _all(changes: Iterable[Changed]) -> Changed:
    indexes: set[int] = set()
    blocks: set[IPNetwork] = set()
    pairs = False
    for each in changes:
        indexes |= each.indexes
        blocks |= each.blocks
        pairs |= each.pairs
    return Changed(frozenset(indexes), frozenset(blocks), pairs)


def _raw(node: Node, mode: abi.NodeMode, ifindex: int, mtu: int, flags: int) -> bytes:
    return bytes(
        abi.NodeEntry(
            v6=abi.FibAddr.of(node.ipv6) if node.ipv6 else abi.FibAddr(),
            v4=abi.be32(node.ipv4) if node.ipv4 else 0,
            ifindex=ifindex,
            mtu=min(mtu, 0xFFFF),
            mode=mode,
            flags=flags,
        )
    )
