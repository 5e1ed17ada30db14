"""Small worlds with much in them that conflicts: a few labels, ports at the edges of ranges, prefixes within prefixes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from ipaddress import ip_address, ip_network

from hypothesis import strategies as st

from services.identity.numbers import Reserved, make
from services.policy.model import (
    ICMP,
    ICMPV6,
    NAMESPACE,
    NAMESPACE_NAME,
    PORT_MAX,
    SCTP,
    TCP,
    UDP,
    Action,
    CidrPeer,
    Direction,
    EndpointPeer,
    Entity,
    EntityPeer,
    Expression,
    Kind,
    NodePeer,
    Operator,
    Peer,
    Policy,
    PolicyKey,
    Port,
    Rule,
    Selector,
    ServicePeer,
    Tier,
)
from tests.policy.reference import Address, Node, Who

HOSTNAME = "kubernetes.io/hostname"
NAMESPACES = ("default", "shop")
PREFIXES = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/24", "10.1.0.16/29", "10.1.0.20/31", "10.1.0.21/32", "192.168.7.0/24",
        "192.0.2.0/24", "192.0.2.0/31", "192.0.2.1/32", "::/0", "fd00:1::/64", "fd00:1::10/125", "fd00:1::15/128",
        "2001:db8::/32", "2001:db8::/127",
    )
)  # fmt: skip
WORLD_ADDRESSES = tuple(
    map(ip_address, ("192.0.2.1", "192.0.2.2", "10.9.0.1", "2001:db8::1", "2001:db8:9::1"))
)
NAMES = ("http", "dns")
NAMED = ((TCP, 80), (TCP, 443), (UDP, 80))
EDGES = (1, 79, 80, 81, 443, 65534, 65535)
QUESTIONS = (
    (TCP, 1), (TCP, 79), (TCP, 80), (TCP, 81), (TCP, 443), (TCP, 65534), (TCP, 65535), (UDP, 80), (UDP, 443),
    (SCTP, 80), (ICMP, 0), (ICMP, 8), (ICMPV6, 128), (ICMPV6, 255), (47, 0), (255, 0),
)  # fmt: skip
"""Protocols, and ports or types, on both sides of every edge."""
NODES_OF_RESERVED = {Reserved.HOST: "n1", Reserved.REMOTE_NODE: "n2"}
NODE_ADDRESSES = {
    "n1": (ip_address("192.168.7.1"), ip_address("fd77::1")),
    "n2": (ip_address("192.168.7.2"), ip_address("fd77::2")),
}


# ---- labels -----------------------------------------------------------------------------------------------------
labels = st.fixed_dictionaries(
    {},
    optional={
        "app": st.sampled_from(("x", "y")),
        "role": st.sampled_from(("p", "")),
        NAMESPACE: st.sampled_from(NAMESPACES),
    },
)
_VALUES = {
    "app": ("x", "y", "z"), "role": ("p", ""), NAMESPACE: NAMESPACES, NAMESPACE_NAME: NAMESPACES,
    Reserved.HOST.label: ("", "x"), Reserved.REMOTE_NODE.label: ("",), Reserved.WORLD.label: ("",), Reserved.INIT.label: ("",),
}  # fmt: skip


def expressions(keys: tuple[str, ...] = tuple(_VALUES)) -> st.SearchStrategy[Expression]:
    def of(key: str) -> st.SearchStrategy[Expression]:
        values = st.sets(st.sampled_from(_VALUES.get(key, ("n1", "n2", "a"))), min_size=1, max_size=2)
        return st.one_of(
            st.builds(
                lambda operator, some: Expression(key, operator, tuple(sorted(some))),
                st.sampled_from((Operator.IN, Operator.IN, Operator.NOT_IN)),
                values,
            ),
            st.builds(Expression, st.just(key), st.sampled_from((Operator.EXISTS, Operator.DOES_NOT_EXIST))),
        )

    # Reserved ones now and then.
    return st.sampled_from((*keys, "app", "app", "role")).flatmap(of)


selectors = st.lists(expressions(), max_size=2).map(lambda some: Selector.of({}, *some))
node_selectors = st.lists(expressions((HOSTNAME, "app")), max_size=1).map(lambda some: Selector.of({}, *some))


# ---- rules ------------------------------------------------------------------------------------------------------
def _cidr(prefix_and_holes: tuple[int, set[int]]) -> CidrPeer:
    prefix = PREFIXES[prefix_and_holes[0]]
    inside = [
        hole
        for hole in (PREFIXES[at] for at in sorted(prefix_and_holes[1]))
        if hole.version == prefix.version and hole != prefix and hole.subnet_of(prefix)  # type: ignore[arg-type]
    ]
    return CidrPeer(prefix, tuple(inside))


_places = st.integers(0, len(PREFIXES) - 1)
cidrs = st.tuples(_places, st.sets(_places, max_size=3)).map(_cidr)
peers: st.SearchStrategy[Peer] = st.one_of(
    selectors.map(EndpointPeer),
    selectors.map(EndpointPeer),
    cidrs,
    cidrs,
    st.sampled_from(Entity).map(EntityPeer),
    st.sampled_from(("shop/db", "shop/none", "shop/unheard")).map(ServicePeer),
    node_selectors.map(NodePeer),
)


def _port(protocol: int, ends: tuple[int, int]) -> Port:
    return Port(protocol, min(ends), max(ends))


_edges = st.sampled_from(EDGES)
_protocols = st.sampled_from((0, TCP, TCP, UDP, SCTP))
ports = st.one_of(
    st.builds(_port, _protocols, st.tuples(_edges, _edges)),
    st.builds(lambda protocol, at: Port(protocol, at, at), _protocols, _edges),
    st.builds(lambda protocol, name: Port(protocol, name=name), st.sampled_from((0, TCP, UDP)), st.sampled_from(NAMES)),
    st.sampled_from((
        Port(0), Port(TCP), Port(ICMP), Port(ICMP, 8, 8), Port(ICMP, 0, 0), Port(ICMPV6, 128, 128), Port(ICMPV6, 0, 255),
    )),
)  # fmt: skip
# Most rules are about many, so that they meet.
subjects = st.just(Selector()) | st.just(Selector()) | selectors
_some_ports = st.none() | st.lists(ports, min_size=1, max_size=3).map(tuple)
_peers = st.lists(peers, min_size=1, max_size=3).map(tuple)
_some_peers = st.sampled_from((None, (), 1, 1, 1, 1)).flatmap(lambda kind: _peers if kind else st.just(kind))


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    tier = draw(st.sampled_from((Tier.ADMIN, Tier.NORMAL, Tier.NORMAL, Tier.BASELINE)))
    normal = tier is Tier.NORMAL
    return Rule(
        subject=draw(subjects),
        direction=draw(st.sampled_from(Direction)),
        action=draw(st.sampled_from((Action.ALLOW, Action.ALLOW, Action.DENY) if normal else tuple(Action))),
        peers=draw(_some_peers),
        ports=draw(_some_ports),
        tier=tier,
        priority=draw(st.integers(0, 3)),
        default_deny=normal and draw(st.booleans()),
        subject_is_node=draw(st.integers(0, 9)) == 0,
        reject=draw(st.booleans()),
        keep_established=draw(st.booleans()),
    )


@st.composite
def policies(draw: st.DrawFn, key: PolicyKey | None = None, *, max_rules: int = 5) -> Policy:
    """As convert.py makes them: subjects narrowed to the namespace."""
    if key is None:
        key = draw(policy_keys)
    made = draw(st.lists(rules(), min_size=2, max_size=max_rules))
    if key.namespace:
        made = [
            replace(
                each,
                subject=each.subject.narrowed(Expression(NAMESPACE, Operator.IN, (key.namespace,))),
                subject_is_node=False,
            )
            for each in made
        ]
    return Policy(key, tuple(made))


policy_keys = st.builds(
    PolicyKey,
    st.sampled_from((Kind.FIBRIL, Kind.CILIUM, Kind.ADMIN)),
    st.sampled_from(("", "", "", "default", "shop")),
    st.sampled_from(("a", "b", "c")),
)
policy_sets = st.lists(policies(), min_size=1, max_size=4, unique_by=lambda policy: policy.key)


# ---- who there is -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pod:
    """An endpoint. named: what it calls its ports."""

    labels: Mapping[str, str]
    identity: int
    addresses: tuple[Address, Address]
    named: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Universe:
    """Identities are as many as there are sets of labels."""

    pods: tuple[Pod, ...]
    services: Mapping[str, frozenset[Address]]
    nodes: Mapping[str, Node]

    @cached_property
    def identities(self) -> Mapping[int, Mapping[str, str]]:
        """Their labels."""
        found: dict[int, Mapping[str, str]] = {int(each): {each.label: ""} for each in Reserved}
        found.update(LOCAL_IDENTITIES)
        found.update((pod.identity, pod.labels) for pod in self.pods)
        return found

    @cached_property
    def named(self) -> Mapping[str, Mapping[tuple[int, int], frozenset[int]]]:
        """Identities with a port of that name, by what it stands for."""
        found: dict[str, dict[tuple[int, int], frozenset[int]]] = {}
        for pod in self.pods:
            for name, port in pod.named.items():
                having = found.setdefault(name, {})
                having[port] = having.get(port, frozenset()) | {pod.identity}
        return found

    @cached_property
    def subjects(self) -> tuple[Who, ...]:
        """All pods, and the host."""
        host = self.nodes["n1"]
        return (
            *(
                Who(
                    pod.labels,
                    pod.identity,
                    pod.addresses[0],
                    {name: (at,) for name, at in pod.named.items()},
                )
                for pod in self.pods
            ),
            Who(host.labels, int(Reserved.HOST), host_address(4), is_node=True),
        )

    @cached_property
    def peers(self) -> tuple[Who, ...]:
        """Everybody with every address he has."""
        found = [
            Who(pod.labels, pod.identity, address, self._named_by(pod.identity))
            for pod in self.pods
            for address in pod.addresses
        ]
        for which in Reserved:
            addresses: tuple[Address | None, ...] = (None,)
            if which in NODES_OF_RESERVED:
                addresses = NODE_ADDRESSES[NODES_OF_RESERVED[which]]
            elif which is Reserved.WORLD:
                addresses = WORLD_ADDRESSES
            found.extend(Who({which.label: ""}, int(which), address) for address in addresses)
        found.extend(
            Who(own, number, address)
            for number, own in LOCAL_IDENTITIES.items()
            for address in WORLD_ADDRESSES[:1]
        )
        return tuple(found)

    def _named_by(self, identity: int) -> Mapping[str, tuple[tuple[int, int], ...]]:
        return {
            name: tuple(port for port, having in standing.items() if identity in having)
            for name, standing in self.named.items()
        }


LOCAL_IDENTITIES: Mapping[int, Mapping[str, str]] = {make(4095, 3): {"cidr:192.0.2.0/24": ""}}


def host_address(version: int) -> Address:
    return NODE_ADDRESSES["n1"][version == 6]


_named = st.fixed_dictionaries({"http": st.sampled_from(NAMED)}, optional={"dns": st.sampled_from(NAMED)})
_node_labels = st.fixed_dictionaries({}, optional={"app": st.sampled_from(("x", "y"))})
_all_addresses = (
    *(ip_address(f"10.1.0.{20 + at}") for at in range(4)),
    *(ip_address(f"fd00:1::{20 + at:x}") for at in range(4)),
    *WORLD_ADDRESSES,
)


@st.composite
def universes(draw: st.DrawFn, pods: int = 4, first: int = 1000) -> Universe:
    """first: number of the first identity."""
    numbers: dict[tuple[tuple[str, str], ...], int] = {}
    made = []
    for at in range(20, 20 + pods):
        own = draw(labels)
        number = numbers.setdefault(tuple(sorted(own.items())), first + len(numbers))
        # Number n has 10.1.0.n and fd00:1::n.
        both = ip_address(f"10.1.0.{at}"), ip_address(f"fd00:1::{at:x}")
        made.append(Pod(own, number, both, draw(_named)))
    backends = draw(st.frozensets(st.sampled_from(_all_addresses), max_size=3))
    nodes = {
        name: Node({HOSTNAME: name, **draw(_node_labels)}, addresses)
        for name, addresses in NODE_ADDRESSES.items()
    }
    return Universe(tuple(made), {"shop/db": backends, "shop/none": frozenset()}, nodes)


def question(
    universe: Universe, subjects: Sequence[Who], some: random.Random
) -> tuple[Who, Direction, Who, int, int]:
    """Whom to ask about whom: pods and ports that have names more often than others."""
    peers = universe.peers[: 2 * len(universe.pods)] if some.random() < 0.5 else universe.peers
    ports = NAMED if some.random() < 0.3 else QUESTIONS
    return (
        some.choice(subjects),
        some.choice(tuple(Direction)),
        some.choice(peers),
        *some.choice(ports),
    )


assert EDGES[-1] == PORT_MAX
