"""How packets travel between two nodes. Pure, and the same from either side.

    both           what it is
    overlay        overlay
    routed         routed if on one network, else the host's routes know
    cloud          the host's routes know
    auto           routed if on one network and all pods can be, else overlay
    overlay+auto   overlay
    routed+auto    as auto

Other combinations are mistakes and named as such; what works best is done all the same: overlay if either node
does overlay at all, since a node of any mode takes overlay packets, else the host's routes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Self

from services.common.kernel.netlink import IPAddress, IPNetwork
from services.common.network import VXLAN_OVERHEAD, Mode, NetworkConfig, Underlay
from services.common.pipeline import abi
from services.common.underlay import Facts
from services.identity.nodes.model import Node

MTU_MIN: Final = 1280
"""What IPv6 needs (RFC 8200)."""


@dataclass(frozen=True)
class Side:
    """What the decision needs of a node."""

    mode: Mode
    ipv4: IPv4Address | None
    ipv6: IPv6Address | None
    networks: tuple[IPNetwork, ...]
    mtu: int
    overlay_port: int
    pods: frozenset[int] = frozenset()
    """Families its pods have."""

    @classmethod
    def of(cls, node: Node) -> Self:
        """As it has published itself."""
        return cls(
            node.configured_mode,
            node.ipv4,
            node.ipv6,
            node.underlay_networks,
            node.uplink_mtu,
            node.overlay_port,
            families(node.blocks),
        )

    @classmethod
    def own(cls, cfg: NetworkConfig, facts: Facts, blocks: Iterable[IPNetwork]) -> Self:
        """This node."""
        return cls(
            cfg.mode, facts.ipv4, facts.ipv6, facts.networks, facts.mtu, cfg.overlay_port, families(blocks)
        )

    def address(self, family: int) -> IPAddress | None:
        """The address of family 4 or 6."""
        return self.ipv4 if family == 4 else self.ipv6


@dataclass(frozen=True)
class Pair:
    """How to reach a node.

    tunnel: family overlay packets travel in, else 0. mtu: largest packet of a pod that fits, 0 if not known.
    direct: overlay packets, over IPv4, need no router.
    hops: which of the other node's addresses can be the next hop: (family of the pods, family of the address).
    needs_routes: `problem` is none if somebody else has given the host routes to the node's pods.
    """

    mode: abi.NodeMode
    mtu: int = 0
    tunnel: int = 0
    direct: bool = False
    hops: frozenset[tuple[int, int]] = frozenset()
    problem: str = ""
    needs_routes: bool = False


def families(blocks: Iterable[IPNetwork]) -> frozenset[int]:
    return frozenset(block.version for block in blocks)


def decide(own: Side, peer: Side, underlay: Underlay = Underlay.AUTO) -> Pair:
    """How packets travel between this node and another. The mode is the same for (peer, own), provided that
    both are set to the same `underlay`.
    """
    common = [family for family in (4, 6) if own.address(family) and peer.address(family)]
    if not common:
        return Pair(abi.NodeMode.NONE, problem=_strangers(own, peer))
    mode, problem = _mode(own, peer, common)
    if mode is abi.NodeMode.OVERLAY:
        return _overlay(own, peer, common, underlay, problem)
    mtu = _mtu(own, peer)
    if mode is not abi.NodeMode.ROUTED:
        return Pair(mode, mtu, problem=problem, needs_routes=own.mode is peer.mode)
    hops = _hops(own, peer, common)
    if _stuck(own, peer, hops) and not problem:
        problem = "IPv6 pods cannot be routed: the nodes share no IPv6 network"
    return Pair(mode, mtu, hops=hops, problem=problem)


def _mode(own: Side, peer: Side, common: list[int]) -> tuple[abi.NodeMode, str]:
    hops = _hops(own, peer, common)
    modes = {own.mode, peer.mode}
    if modes == {Mode.OVERLAY} or modes == {Mode.OVERLAY, Mode.AUTO}:
        return abi.NodeMode.OVERLAY, ""
    if modes == {Mode.CLOUD}:
        return abi.NodeMode.STACK, ""
    if modes == {Mode.ROUTED}:
        if hops:
            return abi.NodeMode.ROUTED, ""
        return abi.NodeMode.STACK, (
            "mode is routed, the nodes are on different networks and the host has no routes to its pods; "
            "use auto or overlay, or have a routing daemon provide them"
        )
    if modes <= {Mode.AUTO, Mode.ROUTED}:
        if hops and not _stuck(own, peer, hops):
            return abi.NodeMode.ROUTED, ""
        if modes == {Mode.AUTO}:
            return abi.NodeMode.OVERLAY, ""
        return abi.NodeMode.OVERLAY, "one node's mode is routed but not all can be routed; use auto on both"
    names = " and ".join(sorted(mode.value for mode in modes))
    problem = f"modes do not fit: {names}; set network.mode alike on all nodes"
    if modes & {Mode.OVERLAY, Mode.AUTO}:
        return abi.NodeMode.OVERLAY, problem
    return abi.NodeMode.STACK, problem


def _hops(own: Side, peer: Side, common: Iterable[int]) -> frozenset[tuple[int, int]]:
    """Next hops are addresses that are on a network of the other node, each way. IPv6 ones serve IPv4 packets, too
    (RFC 8950).
    """
    near = {family for family in common if _on_network(own, peer, family) and _on_network(peer, own, family)}
    hops = {(family, family) for family in near}
    if near == {6}:
        hops.add((4, 6))
    return frozenset(hops)


def _stuck(own: Side, peer: Side, hops: Iterable[tuple[int, int]]) -> bool:
    """Whether some pods cannot be routed to."""
    return not own.pods | peer.pods <= {pods for pods, _ in hops}


def _on_network(one: Side, other: Side, family: int) -> bool:
    address = one.address(family)
    return any(network.version == family and address in network for network in other.networks)


def _overlay(own: Side, peer: Side, common: list[int], underlay: Underlay, problem: str) -> Pair:
    if own.overlay_port != peer.overlay_port:
        ports = f"{own.overlay_port} and {peer.overlay_port}"
        return Pair(
            abi.NodeMode.NONE,
            problem=f"overlay ports differ: {ports}; set network.overlay_port alike on all nodes",
        )
    usable = {Underlay.AUTO: common, Underlay.IPV4: [4], Underlay.IPV6: [6]}[underlay]
    family = next((family for family in usable if family in common), 0)
    if not family:
        return Pair(
            abi.NodeMode.NONE,
            problem=f"network.underlay is {underlay.value} but not both nodes have such an address",
        )
    mtu = _mtu(own, peer)
    mtu = max(0, mtu - VXLAN_OVERHEAD[family]) if mtu else 0
    if 0 < mtu < MTU_MIN and not problem:
        problem = f"packets of {mtu} bytes at most fit, and IPv6 needs {MTU_MIN}; raise the uplinks' MTU"
    direct = family == 4 and (4, 4) in _hops(own, peer, common)
    return Pair(abi.NodeMode.OVERLAY, mtu, family, direct=direct, problem=problem)


def _mtu(own: Side, peer: Side) -> int:
    return min(filter(None, (own.mtu, peer.mtu)), default=0)


def _strangers(own: Side, peer: Side) -> str:
    if not (own.ipv4 or own.ipv6):
        return "this node has no address that others could use"
    if not (peer.ipv4 or peer.ipv6):
        return "it has published no address"
    return "no address family is common to both nodes"
