"""What a lab consists of: names and addresses, computed from its size and shape. Pure.

            world (203.0.113.1, 2001:db8:ffff::1: "the Internet")
              |
    ----------+---------- underlay: one bridge, 172.30.0.0/16, fd30::/64
      |       |       |
    c1n1    c1n2    c2n1  …  a namespace each, running a Fibril instance <lab>-<node>

Node n of cluster c is 172.30.c.n and fd30::c:n. Its default route leads to the world, which knows no
route to pods: what comes back from there was masqueraded. Clusters have pools of their own, so that they
can be joined.

A lab with several subnets, or in cloud mode, has a router between them and the world:

            world ---- router ----+---- subnet 1: 172.30.0.0/16, fd30::/64         c1n1, c1n3, …
                                  +---- subnet 2: 172.29.0.0/16, fd30:0:0:1::/64   c1n2, c1n4, …

It knows pods' addresses only in cloud mode, where it plays the provider: each node is given a prefix of the
pool, which the router sends there, and the world sends the pool to the router.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from ipaddress import IPv4Address, IPv6Address
from typing import Self

from services.common.errors import InvalidArgument
from services.common.instance import Instance

MOST = 99  # clusters, and nodes of one: three characters a part keep every name short
MOST_SUBNETS = 8
WORLD, UNDERLAY, ROUTER = "world", "net", "router"
WORLD_ADDRESSES = ("203.0.113.1", "2001:db8:ffff::1")
UNDERLAY_PREFIXES = (16, 64)
ALL_UNDERLAYS = ("172.16.0.0/12", "fd30::/32")
# Between router and world: (router's, world's).
TRANSIT = (("172.31.255.1", "172.31.255.2"), ("fd31::1", "fd31::2"))
TRANSIT_PREFIXES = (30, 64)
MODES = ("overlay", "routed", "cloud", "auto")
UNDERLAYS = ("dual", "ipv4", "ipv6")
CLOUD_ADDRESSES = 32  # of each family that the provider gives a node
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,14}[a-z0-9])?")


@dataclass(frozen=True)
class Node:
    """One node of a lab; `number` counts within its cluster, from 1 as clusters and subnets do."""

    lab: str
    cluster: int
    number: int
    subnet: int = 1

    @property
    def name(self) -> str:
        """For people: "c1n2"."""
        return f"c{self.cluster}n{self.number}"

    @property
    def instance(self) -> str:
        """Name of its Fibril instance."""
        return f"{self.lab}-{self.name}"

    @property
    def cluster_name(self) -> str:
        """Name of its cluster in etcd."""
        return f"{self.lab}-c{self.cluster}"

    @property
    def netns(self) -> str:
        """Name of its network namespace."""
        return netns(self.lab, self.name)

    @property
    def addresses(self) -> tuple[str, str]:
        """On the underlay, IPv4 and IPv6."""
        return in_subnet(self.subnet, self.cluster, self.number)

    @property
    def pool(self) -> tuple[str, str]:
        """Prefixes of its cluster's default pool."""
        return f"10.{100 + self.cluster}.0.0/16", f"fd00:10:{100 + self.cluster}::/48"

    @property
    def delegated(self) -> tuple[str, str]:
        """Cloud mode: prefixes of the pool that the provider sends to this node."""
        return (
            f"10.{100 + self.cluster}.{self.number}.0/24",
            f"fd00:10:{100 + self.cluster}:{self.number}::/64",
        )

    def cloud_addresses(self) -> tuple[list[str], list[str]]:
        """Cloud mode: the single addresses the provider gives this node, IPv4 and IPv6."""
        four = IPv4Address(self.delegated[0].partition("/")[0])
        six = IPv6Address(self.delegated[1].partition("/")[0])
        numbers = range(10, 10 + CLOUD_ADDRESSES)
        return [str(four + i) for i in numbers], [str(six + i) for i in numbers]


@dataclass(frozen=True)
class Lab:
    """A landscape. Raises InvalidArgument for a name, size or shape that is not possible.

    mode, underlay: words of services.common.network; underlay "dual" leaves the choice to the nodes.
    ipv4, ipv6: families that pods have. mtu: of the underlay, bytes.
    """

    name: str = "lab"
    clusters: int = 1
    nodes_each: int = 1
    mode: str = "overlay"
    underlay: str = "dual"
    ipv4: bool = True
    ipv6: bool = True
    subnets: int = 1
    mtu: int = 1500
    etcd_members: int = 1

    def __post_init__(self) -> None:
        check_name(self.name)
        for field, value, least, most in (
            ("clusters", self.clusters, 1, MOST),
            ("nodes", self.nodes_each, 1, MOST),
            ("subnets", self.subnets, 1, MOST_SUBNETS),
            ("mtu", self.mtu, 1280, 9000),
        ):
            if not least <= value <= most:
                raise InvalidArgument(
                    f"{field} cannot be {value}", field=field, fix=f"choose {least} to {most}"
                )
        for field, word, words in (("mode", self.mode, MODES), ("underlay", self.underlay, UNDERLAYS)):
            if word not in words:
                raise InvalidArgument(
                    f"{field} cannot be {word!r}", field=field, fix=f"choose from {', '.join(words)}"
                )
        if not (self.ipv4 or self.ipv6):
            raise InvalidArgument("pods without any address are not possible", field="ipv4")
        if self.etcd_members not in (1, 3):
            raise InvalidArgument(
                f"an etcd of {self.etcd_members} is not possible", field="etcd_members", fix="choose 1 or 3"
            )
        if self.etcd_members > self.nodes_each:
            raise InvalidArgument(
                f"an etcd of {self.etcd_members} members needs as many nodes in a cluster",
                field="etcd_members",
                fix=f"add nodes: --nodes {self.etcd_members}",
            )

    @property
    def families(self) -> tuple[bool, bool]:
        """Which families the underlay has: IPv4, IPv6."""
        return self.underlay != "ipv6", self.underlay != "ipv4"

    @property
    def has_router(self) -> bool:
        """Whether there is a router between the nodes and the world."""
        return self.subnets > 1 or self.mode == "cloud"

    @property
    def world(self) -> tuple[str, ...]:
        """Addresses of the world that nodes and their pods can reach."""
        return tuple(a for a, have in zip(WORLD_ADDRESSES, self.families, strict=True) if have)

    def node(self, cluster: int, number: int) -> Node:
        """A node by its numbers; subnets are dealt out in turn."""
        return Node(self.name, cluster, number, (number - 1) % self.subnets + 1)

    def node_at(self, place: str) -> Node | None:
        """The node called `place`; None for the world, the router, the underlay, and what is no node's name."""
        parsed = parse_node(self.name, place)
        return None if parsed is None else self.node(parsed.cluster, parsed.number)

    def nodes(self) -> Iterator[Node]:
        """All nodes, cluster by cluster."""
        for cluster in range(1, self.clusters + 1):
            for number in range(1, self.nodes_each + 1):
                yield self.node(cluster, number)

    def underlay_of(self, node: Node) -> list[tuple[str, int]]:
        """A node's addresses with their prefix lengths, of the families the underlay has."""
        return self._of_families(node.addresses, UNDERLAY_PREFIXES)

    def gateways(self, subnet: int) -> list[tuple[str, int]]:
        """Where default routes of a subnet lead, with the prefix lengths."""
        return self._of_families(gateway(subnet), UNDERLAY_PREFIXES)

    def transit(self, side: int) -> list[tuple[str, int]]:
        """Addresses of the router (side 0) or the world (side 1) towards each other."""
        return self._of_families((TRANSIT[0][side], TRANSIT[1][side]), TRANSIT_PREFIXES)

    def _of_families(self, pair: tuple[str, str], lengths: tuple[int, int]) -> list[tuple[str, int]]:
        found = zip(pair, lengths, self.families, strict=True)
        return [(address, length) for address, length, have in found if have]

    def etcd_addresses(self, cluster: int) -> list[str]:
        """Addresses of the members of a cluster's etcd on the underlay; none when it has a single one, on a
        unix socket of the first node."""
        if self.etcd_members == 1:
            return []
        return [self.underlay_of(self.node(cluster, n + 1))[0][0] for n in range(self.etcd_members)]

    def environment(self, node: Node) -> Mapping[str, str]:
        """The part of the services' configuration in which a node of this lab differs from the defaults."""
        ipv4, ipv6 = node.pool
        # In cloud mode the pool is made by the lab, not by the node that comes first.
        cluster_pool = self.mode != "cloud"
        return {
            "FIBRIL_INSTANCE": node.instance,
            "FIBRIL_ETCD_NODE": node.instance,
            "FIBRIL_ETCD_CLUSTER_ID": str(node.cluster),
            "FIBRIL_POOLS_IPV4": ipv4 if self.ipv4 and cluster_pool else "",
            "FIBRIL_POOLS_IPV6": ipv6 if self.ipv6 and cluster_pool else "",
            "FIBRIL_NETWORK_MODE": self.mode,
            "FIBRIL_NETWORK_UNDERLAY": "auto" if self.underlay == "dual" else self.underlay,
            # Sockets of other nodes on this kernel are not this node's to balance.
            "FIBRIL_LB_CGROUP": Instance(node.instance).cgroup,
            "FIBRIL_SOCKACCEL_CGROUP": Instance(node.instance).cgroup,
            "FIBRIL_CONNECTIVITY_WORLD": " ".join(self.world),
        }

    def dump(self) -> str:
        """As text, for `load`."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Self:
        """What `dump` wrote. Raises InvalidArgument when it is not that."""
        try:
            given = json.loads(text)
            return cls(**{field.name: given[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgument(f"this is no description of a lab: {error}") from None


def in_subnet(subnet: int, cluster: int, number: int) -> tuple[str, str]:
    """Addresses of a node in a subnet, IPv4 and IPv6; the same digits in both, for people."""
    six = IPv6Address(f"fd30::{subnet - 1}:0:0:{cluster}:{number}")
    return f"172.{31 - subnet}.{cluster}.{number}", str(six)


def gateway(subnet: int) -> tuple[str, str]:
    """Where default routes of a subnet lead, IPv4 and IPv6; the world's addresses when there is no router."""
    return f"172.{31 - subnet}.255.254", str(IPv6Address(f"fd30::{subnet - 1}:0:0:ffff:ffff"))


def check_name(name: str) -> str:
    """The name itself, if a lab can be called so. Raises InvalidArgument."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"a lab cannot be called {name!r}", field="name", fix="use 1 to 16 of a-z, 0-9 and -"
        )
    return name


def netns(lab: str, place: str) -> str:
    """Name of the namespace of a node, the world, the router or the underlay. "_" is in neither part, so none
    is ambiguous."""
    return f"fiblab-{lab}_{place}"


def parse_netns(name: str) -> tuple[str, str] | None:
    """(lab, place) of a namespace's name; None when it is no lab's."""
    if not name.startswith("fiblab-"):
        return None
    lab, separator, place = name.removeprefix("fiblab-").partition("_")
    return (lab, place) if separator and lab and place else None


def parse_node(lab: str, place: str) -> Node | None:
    """The node called `place`, in the first subnet; None for the world, the underlay, and what is no node's
    name."""
    match = re.fullmatch(r"c([1-9][0-9]?)n([1-9][0-9]?)", place)
    return Node(lab, int(match[1]), int(match[2])) if match else None
