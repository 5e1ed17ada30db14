"""What PolicyService's comment says, in plain Python and without haste: the tests' oracle. Shares nothing with the resolver."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from services.policy import model
from services.policy.model import Action, Direction, Entity, Operator, PolicyKey, Rule, Tier

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Services = Mapping[str, Collection[Address]]
"""Addresses of the backends, by name of the service."""

TRANSPORTS = (6, 17, 132)
WITH_PORTS_OR_TYPES = (*TRANSPORTS, 1, 58)
WORLD, NODE_LOCAL_CLUSTER = 2, 4095
ONE_IDENTITY = {Entity.HOST: 1, Entity.UNMANAGED: 3, Entity.HEALTH: 4, Entity.INIT: 5, Entity.REMOTE_NODE: 6,
                Entity.KUBE_APISERVER: 7}  # fmt: skip
ENDPOINTS_ALTHOUGH_RESERVED = (3, 4, 5)
"""Pods that are unmanaged, health or not known yet: "all endpoints" are these, too."""


@dataclass(frozen=True)
class Who:
    """One end of a connection. labels: its own; {"reserved:host": ""} or so for reserved identities; of a subject that is_node
    the node's.
    """

    labels: Mapping[str, str]
    identity: int
    address: Address | None = None
    named_ports: Mapping[str, Collection[tuple[int, int]]] = field(default_factory=dict)
    """Protocols and ports that names stand for. Endpoints of one identity may differ; then all of them."""
    is_node: bool = False
    """It is this node's host."""


@dataclass(frozen=True)
class Node:
    """As NodePeer sees it."""

    labels: Mapping[str, str]
    addresses: Collection[Address]


@dataclass(frozen=True)
class Decision:
    """deciding: policy and index of the rule. enforced: whether any rule selects the subject. reject and keep: of a refusal."""

    allowed: bool
    deciding: tuple[PolicyKey, int] | None
    enforced: bool
    reject: bool = False
    keep: bool = False


def decide(
    policies: Iterable[model.Policy],
    subject: Who,
    direction: Direction,
    peer: Who,
    proto: int,
    port: int,
    services: Services | None = None,
    nodes: Mapping[str, Node] | None = None,
) -> Decision:
    """May a connection of the subject be? port: the server's, or the ICMP type; of other protocols it does not count."""
    ours = [
        (policy.key, index, rule)
        for policy in sorted(policies, key=lambda each: each.key)
        for index, rule in enumerate(policy.rules)
        if rule.direction is direction and concerns(rule, subject)
    ]
    server = subject if direction is Direction.INGRESS else peer
    matching = [
        (key, index, rule)
        for key, index, rule in ours
        if has_peer(rule, peer, services or {}, nodes or {}) and has_port(rule, server, proto, port)
    ]
    enforced = bool(ours)

    def by(key: PolicyKey, index: int, rule: Rule) -> Decision:
        if rule.action is Action.ALLOW:
            return Decision(True, (key, index), enforced)
        return Decision(False, (key, index), enforced, rule.reject, rule.keep_established)

    admin = in_order(matching, Tier.ADMIN)
    if admin and admin[0][2].action is not Action.PASS:
        return by(*admin[0])
    normal = [each for each in matching if each[2].tier is Tier.NORMAL]
    for action in (Action.DENY, Action.ALLOW):
        for each in normal:
            if each[2].action is action:
                return by(*each)
    closing = [rule for _, _, rule in ours if rule.tier is Tier.NORMAL and rule.default_deny]
    if closing:
        return Decision(False, None, True, any(rule.reject for rule in closing),
                        any(rule.keep_established for rule in closing))  # fmt: skip
    baseline = in_order(matching, Tier.BASELINE)
    if baseline and baseline[0][2].action is not Action.PASS:
        return by(*baseline[0])
    return Decision(True, None, enforced)


def in_order(rules: list[tuple[PolicyKey, int, Rule]], tier: Tier) -> list[tuple[PolicyKey, int, Rule]]:
    return sorted((each for each in rules if each[2].tier is tier), key=lambda e: (e[2].priority, e[0], e[1]))


# ---- subjects and peers -----------------------------------------------------------------------------------------
def concerns(rule: Rule, subject: Who) -> bool:
    if rule.subject_is_node or subject.is_node:
        return rule.subject_is_node and subject.is_node and conditions(rule.subject, subject.labels)
    return selects(rule.subject, subject)


def has_peer(rule: Rule, peer: Who, services: Services, nodes: Mapping[str, Node]) -> bool:
    if rule.peers is None:
        return True
    return any(is_peer(each, peer, services, nodes) for each in rule.peers)


def is_peer(wanted: model.Peer, peer: Who, services: Services, nodes: Mapping[str, Node]) -> bool:
    match wanted:
        case model.EndpointPeer(selector):
            return selects(selector, peer)
        case model.EntityPeer(entity):
            return is_of(entity, peer.identity)
        case model.CidrPeer(prefix, excepted):
            return within(peer.address, prefix) and not any(within(peer.address, hole) for hole in excepted)
        case model.ServicePeer(name):
            return peer.address is not None and peer.address in services.get(name, ())
        case model.NodePeer(selector):
            return any(
                peer.address in node.addresses for node in nodes.values() if conditions(selector, node.labels)
            )


def is_world(identity: int) -> bool:
    return identity == WORLD or identity // 2**20 == NODE_LOCAL_CLUSTER


def is_of(entity: Entity, identity: int) -> bool:
    if entity is Entity.ALL:
        return True
    if entity is Entity.NONE:
        return False
    if entity in (Entity.WORLD, Entity.CLUSTER):
        return is_world(identity) == (entity is Entity.WORLD)
    return identity == ONE_IDENTITY[entity]


def within(address: Address | None, network: model.IPNetwork) -> bool:
    return address is not None and address.version == network.version and address in network


# ---- labels -----------------------------------------------------------------------------------------------------
def selects(selector: model.Selector, who: Who) -> bool:
    """Whether a selector of endpoints selects somebody."""
    if is_reserved(who.labels):
        (own,) = who.labels
        asked_for = any(
            each.key == own and each.operator in (Operator.IN, Operator.EXISTS)
            for each in selector.expressions
        )
        if not asked_for and who.identity not in ENDPOINTS_ALTHOUGH_RESERVED:
            return False
        return conditions(selector, who.labels)
    if is_world(who.identity):
        return False
    labels = dict(who.labels)
    labels.setdefault("io.kubernetes.pod.namespace", "default")
    labels["io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name"] = labels[
        "io.kubernetes.pod.namespace"
    ]
    return conditions(selector, labels)


def is_reserved(labels: Mapping[str, str]) -> bool:
    return len(labels) == 1 and all(key.startswith("reserved:") for key in labels)


def conditions(selector: model.Selector, labels: Mapping[str, str]) -> bool:
    for each in selector.expressions:
        there = each.key in labels
        holds = {
            Operator.EXISTS: there,
            Operator.DOES_NOT_EXIST: not there,
            Operator.IN: there and labels[each.key] in each.values,
            Operator.NOT_IN: not (there and labels[each.key] in each.values),
        }[each.operator]
        if not holds:
            return False
    return True


# ---- ports ------------------------------------------------------------------------------------------------------
def has_port(rule: Rule, server: Who, proto: int, port: int) -> bool:
    if rule.ports is None:
        return True
    return proto in WITH_PORTS_OR_TYPES and any(is_port(each, server, proto, port) for each in rule.ports)


def is_port(wanted: model.Port, server: Who, proto: int, port: int) -> bool:
    if wanted.protocol != proto and not (wanted.protocol == 0 and proto in TRANSPORTS):
        return False
    if wanted.name:
        return (proto, port) in server.named_ports.get(wanted.name, ())
    return wanted.first <= port <= wanted.last
