"""What a node needs besides its pods: gateway addresses, routes for its blocks, forwarding, masquerade.

    fb<tag>host -- fb<tag>peer    a veth pair in the node's own namespace; fb<tag>host has every gateway
    unreachable <block>           pods have host routes; what is no pod must not leave by the default route
    table inet fibril-<instance>  masquerades what pods send to anything but pods, IPv4 and IPv6

All of it is idempotent, and found again by names and addresses, so that nothing depends on what a process
remembers. Routes for addresses outside blocks (cloud mode) have no unreachable cover. Functions block:
netlink thread.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import netlink as nl
from services.common.kernel import nft, sysctl
from services.common.kernel.netlink import IPAddress, IPNetwork, Netlink, Rtnl
from services.common.network import NetworkConfig
from services.ipam.endpoints import model
from services.ipam.endpoints.hoststate import Sysctls

log = logging.getLogger(__name__)

DEFAULT_MTU: Final = 1500
_PROTO_RA: Final = 9


@dataclass(frozen=True)
class NodeNet:
    """What the node shall have: blocks its pods' addresses come from, gateways, other pods' networks."""

    blocks: frozenset[IPNetwork] = frozenset()
    gateways: frozenset[IPAddress] = frozenset()
    cluster: frozenset[IPNetwork] = frozenset()
    """Networks of pods anywhere: traffic to them keeps its source."""


class NodeSetup:
    """Brings the node in line with a NodeNet. `mtu` is for pods that ask for none: what is configured, else what
    fits through the uplink to other nodes.
    """

    def __init__(
        self,
        instance: Instance,
        netlink: Netlink,
        network: NetworkConfig,
        masquerade: bool = True,
        mtu: int = 0,
    ) -> None:
        self._instance = instance
        self._netlink = netlink
        self._network = network
        self._masquerade = masquerade
        self._sysctls = Sysctls(instance)
        self._rules = ""
        self._listing = ""
        self._applied = NodeNet()
        self._fixed_mtu = mtu
        self.mtu = mtu or DEFAULT_MTU - network.overhead(has_ipv4=True)

    @property
    def applied(self) -> NodeNet:
        """What was last applied with success."""
        return self._applied

    async def apply(self, wanted: NodeNet) -> list[str]:
        """Make it so; what had to be changed, one phrase each. Raises the first error of the kernel."""
        changed = await self._netlink.call(self._apply, wanted)
        self._applied = wanted
        if changed:
            log.info("node set up", extra={"changed": "; ".join(changed)})
        return changed

    def _apply(self, node: Rtnl, wanted: NodeNet) -> list[str]:
        self._forwarding(node)
        changed: list[str] = []
        index = self._device(node, changed)
        self._addresses(node, index, wanted, changed)
        self._blocks(node, wanted, changed)
        self._nftables(wanted, changed)
        self.mtu = self._fixed_mtu or pod_mtu(node, self._network)
        return changed

    def _forwarding(self, node: Rtnl) -> None:
        self._sysctls.ensure("net/ipv4/ip_forward", 1)
        if sysctl.read("net/ipv6/conf/all/forwarding") is None:
            return
        # A forwarding node ignores router advertisements unless told otherwise, and drops the routes it
        # learnt.
        for route in node.routes(proto=_PROTO_RA):
            if (
                isinstance(route.destination, IPv6Network)
                and route.destination.prefixlen == 0
                and route.ifindex
            ):
                name = _name_of(node, route.ifindex)
                if name and sysctl.read(f"net/ipv6/conf/{name}/accept_ra") == "1":
                    self._sysctls.ensure(f"net/ipv6/conf/{name}/accept_ra", 2)
        self._sysctls.ensure("net/ipv6/conf/all/forwarding", 1)

    def _device(self, node: Rtnl, changed: list[str]) -> int:
        name, peer = self._instance.node_ifname, self._instance.node_peer_ifname
        index, other = node.ifindex(name), node.ifindex(peer)
        if not index or not other:
            node.delete_link(name)
            node.delete_link(peer)
            index = node.create_veth(name, model.random_mac(), peer, model.random_mac(), DEFAULT_MTU)
            other = node.ifindex(peer)
            changed.append(f"made {name}")
        for each in (name, peer):
            if sysctl.read(f"net/ipv6/conf/{each}/disable_ipv6") == "1":
                sysctl.ensure(f"net/ipv6/conf/{each}/disable_ipv6", 0)
        node.apply([nl.no_link_local(index), nl.no_link_local(other), nl.link_up(other), nl.link_up(index)])
        return index

    def _addresses(self, node: Rtnl, index: int, wanted: NodeNet, changed: list[str]) -> None:
        have = {entry.address: entry.prefix for entry in node.addresses(index)}
        missing = [address for address in wanted.gateways if have.get(address) != address.max_prefixlen]
        node.apply([nl.address_add(index, address) for address in missing])
        stale = [address for address in have if address not in wanted.gateways]
        # A gateway tells which block was ours: with the address goes the route (see _blocks).
        ours = [
            route.destination
            for route in _unreachable(node)
            if any(address in route.destination for address in stale)
            and route.destination not in wanted.blocks
        ]
        node.apply(
            [
                *(nl.route_del(block, route_type=nl.UNREACHABLE) for block in ours),
                *(nl.address_del(index, address, have[address]) for address in stale),
            ]
        )
        changed += [f"added {address}" for address in missing] + [f"removed {address}" for address in stale]

    def _blocks(self, node: Rtnl, wanted: NodeNet, changed: list[str]) -> None:
        missing = wanted.blocks - {route.destination for route in _unreachable(node)}
        node.apply([nl.route_put(block, route_type=nl.UNREACHABLE) for block in missing])
        changed += [f"routed {block}" for block in missing]

    def _nftables(self, wanted: NodeNet, changed: list[str]) -> None:
        rules = ruleset(self._instance, wanted, self._masquerade, self._network.overlay_port)
        if rules == self._rules and nft.table(self._instance.nft_table) == self._listing:
            return
        name = self._instance.nft_table
        nft.apply(f"table inet {name} {{}}\ndelete table inet {name}\n{rules}")
        self._rules, self._listing = rules, nft.table(name) or ""
        changed.append(f"set nftables table {name}")


def ruleset(instance: Instance, wanted: NodeNet, masquerade: bool, overlay_port: int) -> str:
    """The nftables table. Pods on one node never meet it: they are redirected before netfilter.

    Sets: pods4/pods6 this node's blocks and single addresses, peers4/peers6 all pods' networks,
    gates4/gates6 gateways. What still passes the stack between two pods (shaped pods, packets that draw an
    ICMP error) is kept out of connection tracking, which would see only some packets of a connection. So are the
    overlay's packets: each connection of a pod would take two entries, that no answer ever meets, for minutes.
    """

    def elements(items: Iterable[object]) -> str:
        listed = ", ".join(sorted(map(str, items)))
        return f" elements = {{ {listed} }};" if listed else ""

    def single(items: Iterable[IPNetwork]) -> list[IPNetwork]:
        return list(ipaddress.collapse_addresses(items))  # type: ignore[type-var]

    lines = [f"table inet {instance.nft_table} {{"]
    for version, kind in ((4, "ipv4_addr"), (6, "ipv6_addr")):
        pods = single(block for block in wanted.blocks if block.version == version)
        peers = single(net for net in (*wanted.blocks, *wanted.cluster) if net.version == version)
        gates = [address for address in wanted.gateways if address.version == version]
        lines += [
            f"  set pods{version} {{ type {kind}; flags interval;{elements(pods)} }}",
            f"  set peers{version} {{ type {kind}; flags interval;{elements(peers)} }}",
            f"  set gates{version} {{ type {kind};{elements(gates)} }}",
        ]
    lines += [
        "  chain untracked {",
        "    type filter hook prerouting priority raw; policy accept;",
        f'    iifname "fb{instance.tag}*" ip saddr @pods4 ip daddr @pods4 ip daddr != @gates4 notrack',
        f'    iifname "fb{instance.tag}*" ip6 saddr @pods6 ip6 daddr @pods6 ip6 daddr != @gates6 notrack',
        f"    udp dport {overlay_port} notrack",
        "  }",
        "  chain untracked_out {",
        "    type filter hook output priority raw; policy accept;",
        f"    udp dport {overlay_port} notrack",
        "  }",
    ]
    # A pod that reaches another pod of this node through a translated address (a host port): the answer must
    # pass the stack to be translated back, so it is drawn here instead of going to the pod directly.
    lines += [
        "  chain hairpin {",
        "    type nat hook postrouting priority srcnat - 1; policy accept;",
        f'    oifname "fb{instance.tag}*" ip saddr @pods4 ct status dnat masquerade',
        f'    oifname "fb{instance.tag}*" ip6 saddr @pods6 ct status dnat masquerade',
        "  }",
    ]
    if masquerade:
        lines += [
            "  chain to_world {",
            "    type nat hook postrouting priority srcnat; policy accept;",
            f'    oifname "fb{instance.tag}*" return',
            "    ip saddr @pods4 ip daddr != @peers4 masquerade",
            "    ip6 saddr @pods6 ip6 daddr != @peers6 masquerade",
            "  }",
        ]
    return "\n".join([*lines, "}", ""])


def pod_mtu(node: Rtnl, network: NetworkConfig) -> int:
    """What pods may send so that it fits through the uplinks in the way nodes are connected: the smallest uplink's
    MTU without what the overlay adds. Uplinks are the device configured, else those of default routes; without
    one, DEFAULT_MTU and IPv4 are assumed.
    """
    if network.device:
        uplinks = [link for link in node.links(network.device) if link.name == network.device]
    else:
        indexes = {r.ifindex for r in node.routes(proto=0) if r.destination.prefixlen == 0 and r.ifindex}
        uplinks = [link for link in node.links() if link.ifindex in indexes] if indexes else []
    has_ipv4 = not uplinks or bool(network.ipv4)
    for link in uplinks:
        has_ipv4 = has_ipv4 or any(entry.address.version == 4 for entry in node.addresses(link.ifindex))
    mtu = min((link.mtu for link in uplinks), default=DEFAULT_MTU) - network.overhead(has_ipv4=has_ipv4)
    return min(max(mtu, model.MTU_MIN), model.MTU_MAX)


def remove(node: Rtnl, instance: Instance) -> list[str]:
    """Take everything away; what there was, one phrase each. Works without any record but the names."""
    done: list[str] = []
    index = node.ifindex(instance.node_ifname)
    gateways = [entry.address for entry in node.addresses(index)] if index else []
    blocks = [
        route.destination
        for route in _unreachable(node)
        if any(gateway in route.destination for gateway in gateways)
    ]
    links = node.links(f"fb{instance.tag}")
    failures: list[errors.FibrilError] = node.try_apply(
        [
            *(nl.route_del(block, route_type=nl.UNREACHABLE) for block in blocks),
            *(nl.link_del(link.ifindex) for link in links),
        ]
    )
    done += [f"route {block}" for block in blocks] + [f"interface {link.name}" for link in links]
    if nft.delete_table(instance.nft_table):
        done.append(f"nftables table {instance.nft_table}")
    done += [f"parameter {name}" for name in Sysctls(instance).restore()]
    if failures:
        raise failures[0]
    return done


def _unreachable(node: Rtnl) -> list[nl.Route]:
    return [route for route in node.routes() if route.type == nl.UNREACHABLE]


def _name_of(node: Rtnl, index: int) -> str:
    return next((link.name for link in node.links() if link.ifindex == index), "")


def network_of(text: str) -> IPNetwork:
    """A block's CIDR text as a network."""
    version = ipaddress.ip_network(text).version
    return IPv4Network(text) if version == 4 else IPv6Network(text)
