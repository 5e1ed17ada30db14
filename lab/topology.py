"""What a lab consists of: names and addresses, computed from its size. Pure.

            world (203.0.113.1, 2001:db8:ffff::1: "the Internet")
              |
    ----------+---------- underlay: one bridge, 172.30.0.0/16, fd30::/64
      |       |       |
    c1n1    c1n2    c2n1  …  a namespace each, running a Fibril instance <lab>-<node>

Node n of cluster c is 172.30.c.n and fd30::c:n. Its default route leads to the world, which knows no
route to pods: what comes back from there was masqueraded. Clusters have pools of their own, so that they
can be joined.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from services.common.errors import InvalidArgument

MOST = 99  # clusters, and nodes of one: three characters a part keep every name short
WORLD, UNDERLAY = "world", "net"
WORLD_UNDERLAY = ("172.30.255.254", "fd30::ffff:ffff")
WORLD_ADDRESSES = ("203.0.113.1", "2001:db8:ffff::1")
UNDERLAY_PREFIXES = (16, 64)
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,14}[a-z0-9])?")


@dataclass(frozen=True)
class Node:
    """One node of a lab; `number` counts within its cluster, from 1 as clusters do."""

    lab: str
    cluster: int
    number: int

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
        return f"172.30.{self.cluster}.{self.number}", f"fd30::{self.cluster}:{self.number}"

    @property
    def pool(self) -> tuple[str, str]:
        """Prefixes of its cluster's default pool."""
        return f"10.{100 + self.cluster}.0.0/16", f"fd00:10:{100 + self.cluster}::/48"


@dataclass(frozen=True)
class Lab:
    """A landscape. Raises InvalidArgument for a name or size that is not possible."""

    name: str = "lab"
    clusters: int = 1
    nodes_each: int = 1

    def __post_init__(self) -> None:
        check_name(self.name)
        for field, size in (("clusters", self.clusters), ("nodes", self.nodes_each)):
            if not 1 <= size <= MOST:
                raise InvalidArgument(
                    f"{size} {field} are not possible", field=field, fix=f"choose 1 to {MOST}"
                )

    def nodes(self) -> Iterator[Node]:
        """All nodes, cluster by cluster."""
        for cluster in range(1, self.clusters + 1):
            for number in range(1, self.nodes_each + 1):
                yield Node(self.name, cluster, number)


def check_name(name: str) -> str:
    """The name itself, if a lab can be called so. Raises InvalidArgument."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"a lab cannot be called {name!r}", field="name", fix="use 1 to 16 of a-z, 0-9 and -"
        )
    return name


def netns(lab: str, place: str) -> str:
    """Name of the namespace of a node, the world or the underlay. "_" is in neither part, so none is
    ambiguous."""
    return f"fiblab-{lab}_{place}"


def parse_netns(name: str) -> tuple[str, str] | None:
    """(lab, place) of a namespace's name; None when it is no lab's."""
    if not name.startswith("fiblab-"):
        return None
    lab, separator, place = name.removeprefix("fiblab-").partition("_")
    return (lab, place) if separator and lab and place else None


def parse_node(lab: str, place: str) -> Node | None:
    """The node called `place`; None for the world, the underlay, and what is no node's name."""
    match = re.fullmatch(r"c([1-9][0-9]?)n([1-9][0-9]?)", place)
    return Node(lab, int(match[1]), int(match[2])) if match else None
