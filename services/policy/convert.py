"""fibril.policy.v1 to the model and back. What is not as the contract says is refused by its path, with the remedy."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Final, TypeVar

from fibril.policy.v1 import policy_pb2 as pb
from services.common.errors import InvalidArgument
from services.policy.model import (
    HOSTNAME,
    ICMP,
    ICMPV6,
    NAMESPACE,
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
    IPNetwork,
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

RULES_MAX: Final = 10_000
PEERS_MAX: Final = 20_000
PORTS_MAX: Final = 4096
TEXT_MAX: Final = 253
DOCUMENT_MAX: Final = 1 << 20
PRIORITY_MAX: Final = 1000
E = TypeVar("E", Action, Tier, Operator, Entity)
_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._:-]{0,251}[A-Za-z0-9])?")
PORT_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_PREFIX: Final = re.compile(r"[0-9A-Fa-f:.]+(/[0-9]{1,3})?")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_SOURCES: Final = ("k8s:", "any:", "container:")


# -- keys


def key(message: pb.PolicyKey, at: str) -> PolicyKey:
    """A policy's key."""
    number = int(message.kind) or int(Kind.FIBRIL)
    if number not in Kind.__members__.values():
        raise InvalidArgument(f"{number} is no kind of policy", field=f"{at}.kind")
    if not _NAME.fullmatch(message.name):
        raise InvalidArgument(
            f"{message.name[:60]!r} is no name of a policy",
            field=f"{at}.name",
            fix=f"1 to {TEXT_MAX} letters, digits and '-._:', a letter or digit first and last",
        )
    if message.namespace and not _NAME.fullmatch(message.namespace):
        raise InvalidArgument(f"{message.namespace[:60]!r} is no name of a namespace", field=f"{at}.namespace")
    return PolicyKey(Kind(number), message.namespace, message.name)


def key_message(found: PolicyKey) -> pb.PolicyKey:
    return pb.PolicyKey(kind=pb.PolicyKind.ValueType(found.kind), namespace=found.namespace, name=found.name)


# -- policies


def policy(message: pb.Policy, at: str = "policy") -> Policy:
    """A policy. Its rules' subjects are narrowed to its namespace."""
    found = key(message.key, f"{at}.key")
    _at_most(len(message.rules), RULES_MAX, "rules", f"{at}.rules")
    _text(message.description, 4096, f"{at}.description")
    _text(message.document, DOCUMENT_MAX, f"{at}.document")
    rules = tuple(
        _rule(each, found.namespace, f"{at}.rules[{number}]") for number, each in enumerate(message.rules)
    )
    return Policy(found, rules, message.description, message.document)


def check_nodes(message: pb.Policy, at: str) -> None:
    """Of a new policy: of nodes' labels the name alone is known, a condition on another would select nobody, silently."""
    for number, rule in enumerate(message.rules):
        where = f"{at}.rules[{number}]"
        if rule.subject_is_node:
            _check_nodes(rule.subject, f"{where}.subject")
        for count, peer in enumerate(rule.peers):
            if peer.HasField("node"):
                _check_nodes(peer.node.nodes, f"{where}.peers[{count}].node.nodes")


def _check_nodes(message: pb.LabelSelector, at: str) -> None:
    for each in selector(message, at).expressions:
        if each.key != HOSTNAME:
            raise InvalidArgument(f"label {each.key[:60]!r} of nodes is not known here", field=at, fix=f"use {HOSTNAME}")


def policy_message(found: Policy) -> pb.Policy:
    """As it was declared."""
    return pb.Policy(
        key=key_message(found.key),
        rules=[_rule_message(rule, found.key.namespace) for rule in found.rules],
        description=found.description,
        document=found.document,
    )


def _within(namespace: str) -> Expression:
    return Expression(NAMESPACE, Operator.IN, (namespace,))


# -- rules


def _rule(message: pb.Rule, namespace: str, at: str) -> Rule:
    subject = selector(message.subject, f"{at}.subject")
    if message.subject_is_node and namespace:
        raise InvalidArgument("nodes are in no namespace", field=f"{at}.subject_is_node", fix="leave the namespace out")
    if namespace:
        subject = subject.narrowed(_within(namespace))
    direction = _direction(message.direction, f"{at}.direction")
    action = _one_of(Action, message.action, f"{at}.action", "ALLOW, DENY or PASS")
    tier = Tier.NORMAL if not message.tier else _one_of(Tier, message.tier, f"{at}.tier", "ADMIN, NORMAL or BASELINE")
    if tier is Tier.NORMAL:
        if action is Action.PASS:
            raise InvalidArgument("there is no PASS in tier NORMAL", field=f"{at}.action", fix="ALLOW or DENY")
        if message.priority:
            raise InvalidArgument("priority does not count in tier NORMAL", field=f"{at}.priority", fix="give 0")
    elif message.default_deny:
        raise InvalidArgument("only tier NORMAL has a default deny", field=f"{at}.default_deny")
    _at_most(message.priority, PRIORITY_MAX, "as priority", f"{at}.priority")
    return Rule(
        subject=subject,
        direction=direction,
        action=action,
        peers=_peers(message, at),
        ports=_ports(message.ports, f"{at}.ports"),
        tier=tier,
        priority=message.priority,
        default_deny=message.default_deny,
        subject_is_node=message.subject_is_node,
        name=_text(message.name, TEXT_MAX, f"{at}.name"),
        reject=message.reject,
        keep_established=message.keep_established,
    )


def _rule_message(rule: Rule, namespace: str) -> pb.Rule:
    expressions = rule.subject.expressions
    if namespace:
        expressions = tuple(each for each in expressions if each != _within(namespace))
    return pb.Rule(
        subject=selector_message(Selector(expressions)),
        subject_is_node=rule.subject_is_node,
        direction=pb.TrafficDirection.ValueType(rule.direction + 1),
        action=pb.RuleAction.ValueType(rule.action),
        tier=pb.Tier.ValueType(rule.tier),
        priority=rule.priority,
        peers=[_peer_message(each) for each in rule.peers or ()],
        match_no_peer=rule.peers == (),
        ports=[_port_message(each) for each in rule.ports or ()],
        default_deny=rule.default_deny,
        name=rule.name,
        reject=rule.reject,
        keep_established=rule.keep_established,
    )


def _direction(number: int, at: str) -> Direction:
    if number not in (pb.TRAFFIC_DIRECTION_INGRESS, pb.TRAFFIC_DIRECTION_EGRESS):
        raise InvalidArgument("a rule has a direction", field=at, fix="INGRESS or EGRESS")
    return Direction(number - 1)


# -- selectors


def selector(message: pb.LabelSelector, at: str) -> Selector:
    """Of endpoints or nodes. Sources of labels ("k8s:") are left out of keys."""
    # Keys that differ in their source alone are conditions on one label: all of them count.
    found = [
        Expression(
            label_key(name, f"{at}.match_labels"),
            Operator.IN,
            (_text(value, TEXT_MAX, f"{at}.match_labels[{name[:60]!r}]"),),
        )
        for name, value in message.match_labels.items()
    ]
    found += [
        _expression(each, f"{at}.match_expressions[{number}]") for number, each in enumerate(message.match_expressions)
    ]
    _at_most(len(found), 256, "conditions", at)
    return Selector.of({}, *found)


def label_key(name: str, at: str) -> str:
    """A label's key without its source."""
    for source in _SOURCES:
        name = name.removeprefix(source)
    if not name or len(name) > TEXT_MAX or _CONTROL.search(name):
        raise InvalidArgument(f"{name[:60]!r} is no key of a label", field=at, fix=f"give 1 to {TEXT_MAX} characters")
    return name


def _expression(message: pb.LabelExpression, at: str) -> Expression:
    operator = _one_of(Operator, message.operator, f"{at}.operator", "IN, NOT_IN, EXISTS or DOES_NOT_EXIST")
    values = tuple(sorted({_text(value, TEXT_MAX, f"{at}.values") for value in message.values}))
    needs = operator in (Operator.IN, Operator.NOT_IN)
    if needs != bool(values):
        raise InvalidArgument(
            f"{operator.name} {'needs' if needs else 'takes no'} values",
            field=f"{at}.values",
            fix="give at least one" if needs else "leave them out",
        )
    return Expression(label_key(message.key, f"{at}.key"), operator, values)


def selector_message(found: Selector) -> pb.LabelSelector:
    message = pb.LabelSelector()
    for each in found.expressions:
        if each.operator is Operator.IN and len(each.values) == 1 and each.key not in message.match_labels:
            message.match_labels[each.key] = each.values[0]
        else:
            message.match_expressions.add(
                key=each.key, operator=pb.LabelOperator.ValueType(each.operator), values=each.values
            )
    return message


# -- peers


def _peers(message: pb.Rule, at: str) -> tuple[Peer, ...] | None:
    _at_most(len(message.peers), PEERS_MAX, "peers", f"{at}.peers")
    if message.match_no_peer:
        if message.peers:
            raise InvalidArgument("it matches no peer, and names some", field=f"{at}.match_no_peer", fix="leave one out")
        return ()
    if not message.peers:
        return None
    return tuple(dict.fromkeys(_peer(each, f"{at}.peers[{number}]") for number, each in enumerate(message.peers)))


def _peer(message: pb.Peer, at: str) -> Peer:
    match message.WhichOneof("is"):
        case "endpoints":
            return EndpointPeer(selector(message.endpoints, f"{at}.endpoints"))
        case "entity":
            return EntityPeer(_one_of(Entity, message.entity, f"{at}.entity", "WORLD, CLUSTER, HOST, …"))
        case "cidr":
            return _cidr(message.cidr, f"{at}.cidr")
        case "service":
            name = _text(message.service.name, TEXT_MAX, f"{at}.service.name")
            if not name:
                raise InvalidArgument("the service has no name", field=f"{at}.service.name")
            return ServicePeer(name)
        case "node":
            return NodePeer(selector(message.node.nodes, f"{at}.node.nodes"))
    raise InvalidArgument("a peer is somebody", field=at, fix="set endpoints, entity, cidr, service or node")


def _cidr(message: pb.CidrPeer, at: str) -> CidrPeer:
    whole = network(message.cidr, f"{at}.cidr")
    holes = []
    # "except" is a word of Python's.
    given = getattr(message, "except")
    _at_most(len(given), 1024, "holes", f"{at}.except")
    for number, text in enumerate(given):
        hole = network(text, f"{at}.except[{number}]")
        if not is_within(hole, whole):
            raise InvalidArgument(f"{hole} is not within {whole}", field=f"{at}.except[{number}]")
        holes.append(hole)
    return CidrPeer(whole, tuple(dict.fromkeys(holes)))


def is_within(hole: IPNetwork, whole: IPNetwork) -> bool:
    """Whether all addresses of the first are of the second."""
    shift = whole.max_prefixlen - whole.prefixlen
    if hole.version != whole.version or hole.prefixlen < whole.prefixlen:
        return False
    return int(hole.network_address) >> shift == int(whole.network_address) >> shift


def network(text: str, at: str) -> IPNetwork:
    """A prefix; an address is one of its own."""
    try:
        if not _PREFIX.fullmatch(text):
            # Python also knows zones and masks.
            raise ValueError("an address, or an address and a length")
        found = ipaddress.ip_network(text)
    except ValueError as error:
        raise InvalidArgument(f"{text[:60]!r} is no prefix: {error}", field=at, fix="as 10.0.0.0/8") from None
    if isinstance(found, ipaddress.IPv6Network) and found.network_address.ipv4_mapped is not None:
        raise InvalidArgument(f"{text[:60]!r} is IPv4 in disguise", field=at, fix="write it as IPv4")
    return found


def _peer_message(found: Peer) -> pb.Peer:
    match found:
        case EndpointPeer():
            return pb.Peer(endpoints=selector_message(found.selector))
        case EntityPeer():
            return pb.Peer(entity=pb.Entity.ValueType(found.entity))
        case CidrPeer():
            message = pb.Peer(cidr=pb.CidrPeer(cidr=str(found.prefix)))
            getattr(message.cidr, "except").extend(map(str, found.excepted))
            return message
        case ServicePeer():
            return pb.Peer(service=pb.ServicePeer(name=found.name))
        case NodePeer():
            return pb.Peer(node=pb.NodePeer(nodes=selector_message(found.selector)))


# -- ports


def _ports(messages: Iterable[pb.Port], at: str) -> tuple[Port, ...] | None:
    found = tuple(dict.fromkeys(_port(each, f"{at}[{number}]") for number, each in enumerate(messages)))
    _at_most(len(found), PORTS_MAX, "ports", at)
    return found or None


def _port(message: pb.Port, at: str) -> Port:
    protocol = int(message.protocol)
    if protocol not in (0, TCP, UDP, SCTP, ICMP, ICMPV6):
        raise InvalidArgument(f"protocol {protocol} is not known", field=f"{at}.protocol", fix="TCP, UDP, SCTP or ICMP")
    if protocol in (ICMP, ICMPV6):
        return _icmp(message, protocol, at)
    if message.HasField("icmp_type"):
        raise InvalidArgument("only ICMP has types", field=f"{at}.icmp_type", fix="set protocol to ICMP or ICMPV6")
    if message.name:
        if message.first or message.last:
            raise InvalidArgument("a named port has no number", field=f"{at}.name", fix="leave one out")
        if not PORT_NAME.fullmatch(message.name):
            raise InvalidArgument(f"{message.name[:60]!r} is no name of a port", field=f"{at}.name")
        return Port(protocol, name=message.name)
    if max(message.first, message.last) > PORT_MAX:
        raise InvalidArgument(f"{max(message.first, message.last)} is no port", field=f"{at}.first", fix="1 to 65535")
    if not message.first:
        if message.last:
            raise InvalidArgument("a range has a first port", field=f"{at}.first")
        return Port(protocol)
    last = message.last or message.first
    if last < message.first:
        raise InvalidArgument(f"{last} is before {message.first}", field=f"{at}.last")
    return Port(protocol, message.first, last)


def _icmp(message: pb.Port, protocol: int, at: str) -> Port:
    if message.first or message.last or message.name:
        raise InvalidArgument("ICMP has no ports", field=f"{at}.first", fix="set icmp_type")
    if not message.HasField("icmp_type"):
        return Port(protocol, 0, 255)
    if message.icmp_type > 255:
        raise InvalidArgument(f"{message.icmp_type} is outside 0..255", field=f"{at}.icmp_type")
    return Port(protocol, message.icmp_type, message.icmp_type)


def _port_message(found: Port) -> pb.Port:
    protocol = pb.PortProtocol.ValueType(found.protocol)
    if found.protocol in (ICMP, ICMPV6):
        if (found.first, found.last) == (0, 255):
            return pb.Port(protocol=protocol)
        return pb.Port(protocol=protocol, icmp_type=found.first)
    if found.name:
        return pb.Port(protocol=protocol, name=found.name)
    if (found.first, found.last) == (0, PORT_MAX):
        return pb.Port(protocol=protocol)
    return pb.Port(protocol=protocol, first=found.first, last=found.last if found.last != found.first else 0)


# -- small things


def _one_of(kind: type[E], number: int, at: str, fix: str) -> E:
    if number not in kind.__members__.values():
        raise InvalidArgument(f"{number} is not known" if number else "nothing is set", field=at, fix=f"give {fix}")
    return kind(number)


def _at_most(count: int, limit: int, what: str, at: str) -> None:
    if count > limit:
        raise InvalidArgument(f"{count} {what}", field=at, fix=f"give at most {limit}")


def _text(value: str, limit: int, at: str) -> str:
    if len(value) > limit or _CONTROL.search(value):
        raise InvalidArgument(
            f"{value[:60]!r} is too long or has control characters", field=at, fix=f"at most {limit} characters"
        )
    return value
