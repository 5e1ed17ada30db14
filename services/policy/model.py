"""Policies as the service thinks of them: checked, immutable, comparable. convert.py makes them of messages."""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

TCP: Final = 6
UDP: Final = 17
SCTP: Final = 132
ICMP: Final = 1
ICMPV6: Final = 58
PORT_MAX: Final = 65535

NAMESPACE: Final = "io.kubernetes.pod.namespace"
"""Label with an endpoint's namespace."""
NAMESPACE_NAME: Final = "io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name"
"""The same, as selectors of namespaces ask for it."""
DEFAULT_NAMESPACE: Final = "default"
HOSTNAME: Final = "kubernetes.io/hostname"
"""A node's label with its name."""
RESERVED: Final = "reserved:"
"""Begins the one label of a reserved identity."""


class Kind(enum.IntEnum):
    """fibril.policy.v1.PolicyKind."""

    FIBRIL = 1
    CILIUM = 2
    CILIUM_CLUSTERWIDE = 3
    KUBERNETES = 4
    CLUSTER = 5
    ADMIN = 6
    BASELINE_ADMIN = 7

    @property
    def title(self) -> str:
        """As its documents call it."""
        return _TITLES[self]


_TITLES: Final = {
    Kind.FIBRIL: "Policy",
    Kind.CILIUM: "CiliumNetworkPolicy",
    Kind.CILIUM_CLUSTERWIDE: "CiliumClusterwideNetworkPolicy",
    Kind.KUBERNETES: "NetworkPolicy",
    Kind.CLUSTER: "ClusterNetworkPolicy",
    Kind.ADMIN: "AdminNetworkPolicy",
    Kind.BASELINE_ADMIN: "BaselineAdminNetworkPolicy",
}


class Direction(enum.IntEnum):
    """TrafficDirection less one: the index of a direction in the kernel's tables."""

    INGRESS = 0
    EGRESS = 1


class Action(enum.IntEnum):
    """fibril.policy.v1.RuleAction."""

    ALLOW = 1
    DENY = 2
    PASS = 3


class Tier(enum.IntEnum):
    """fibril.policy.v1.Tier; asked in this order."""

    ADMIN = 1
    NORMAL = 2
    BASELINE = 3


class Operator(enum.IntEnum):
    """fibril.policy.v1.LabelOperator."""

    IN = 1
    NOT_IN = 2
    EXISTS = 3
    DOES_NOT_EXIST = 4


class Entity(enum.IntEnum):
    """fibril.policy.v1.Entity."""

    ALL = 1
    CLUSTER = 2
    WORLD = 3
    HOST = 4
    REMOTE_NODE = 5
    INIT = 6
    HEALTH = 7
    KUBE_APISERVER = 8
    UNMANAGED = 9
    NONE = 10


@dataclass(frozen=True, order=True)
class PolicyKey:
    """namespace "": of the whole cluster."""

    kind: Kind
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind.title} {self.namespace + '/' if self.namespace else ''}{self.name}"


@dataclass(frozen=True, order=True)
class Expression:
    """One condition on labels; values sorted."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        match self.operator:
            case Operator.IN:
                return value is not None and value in self.values
            case Operator.NOT_IN:
                return value is None or value not in self.values
            case Operator.EXISTS:
                return value is not None
            case Operator.DOES_NOT_EXIST:
                return value is None


@dataclass(frozen=True, order=True)
class Selector:
    """All expressions must hold; none: everything. Equal ones are one selector: expressions are sorted (see `of`)."""

    expressions: tuple[Expression, ...] = ()

    @classmethod
    def of(cls, labels: Mapping[str, str], *more: Expression) -> Selector:
        """From labels that must be there, and further conditions."""
        equal = (Expression(key, Operator.IN, (value,)) for key, value in labels.items())
        return cls(tuple(sorted({*equal, *more})))

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether it selects who has these labels (effective ones, see labels.py)."""
        return all(each.matches(labels) for each in self.expressions)

    def narrowed(self, *more: Expression) -> Selector:
        return Selector(tuple(sorted({*self.expressions, *more})))


@dataclass(frozen=True, order=True)
class EndpointPeer:
    """Endpoints of the cluster with these labels; of reserved identities only those that the selector names by label."""

    selector: Selector


@dataclass(frozen=True, order=True)
class EntityPeer:
    entity: Entity


@dataclass(frozen=True)
class CidrPeer:
    """Addresses, whoever has them."""

    prefix: IPNetwork
    excepted: tuple[IPNetwork, ...] = ()


@dataclass(frozen=True, order=True)
class ServicePeer:
    """Addresses of the backends of a service of fibril.lb.v1."""

    name: str


@dataclass(frozen=True, order=True)
class NodePeer:
    """Nodes' own processes, by the labels of nodes."""

    selector: Selector


Peer = EndpointPeer | EntityPeer | CidrPeer | ServicePeer | NodePeer


@dataclass(frozen=True, order=True)
class Port:
    """first 0 and last 65,535: all ports, and what has none. protocol 0: TCP, UDP and SCTP. ICMP: types, 0 to 255.

    name: instead of numbers, a port of that name in the server's endpoint.
    """

    protocol: int
    first: int = 0
    last: int = PORT_MAX
    name: str = ""


@dataclass(frozen=True)
class Rule:
    """One direction of an endpoint's connections with any of the peers on any of the ports.

    peers None: everybody; (): nobody. ports None: every protocol there is.
    """

    subject: Selector
    direction: Direction
    action: Action
    peers: tuple[Peer, ...] | None = None
    ports: tuple[Port, ...] | None = None
    tier: Tier = Tier.NORMAL
    priority: int = 0
    default_deny: bool = False
    subject_is_node: bool = False
    name: str = ""
    reject: bool = False
    keep_established: bool = False

    def title(self, index: int) -> str:
        """What people call it. index: its place in its policy."""
        return self.name or f"{self.direction.name.lower()} {index + 1}"


@dataclass(frozen=True)
class Policy:
    """A named list of rules. Subjects are narrowed to the namespace already."""

    key: PolicyKey
    rules: tuple[Rule, ...]
    description: str = ""
    document: str = ""

    @cached_property
    def selectors(self) -> frozenset[Selector]:
        """Of peers."""
        return frozenset(
            peer.selector for rule in self.rules for peer in rule.peers or () if isinstance(peer, EndpointPeer)
        )
