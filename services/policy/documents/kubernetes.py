"""NetworkPolicy (networking.k8s.io/v1), AdminNetworkPolicy and BaselineAdminNetworkPolicy (v1alpha1 of
policy.networking.k8s.io), and ClusterNetworkPolicy (v1alpha2), which follows these two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fibril.policy.v1 import policy_pb2 as pb
from services.policy.documents.common import (
    EGRESS,
    INGRESS,
    PROTOCOLS,
    SECTIONS,
    Draft,
    cidr,
    number,
    port,
    port_name,
)
from services.policy.documents.fields import Fields
from services.policy.documents.selectors import namespace_key, nodes_selector, selector
from services.policy.model import NAMESPACE

_TRANSPORT: Final = {name: value for name, value in PROTOCOLS.items() if value}
_TYPES: Final = {"Ingress": INGRESS, "Egress": EGRESS}
BASELINE: Final = "default"
_TIERS: Final = {"Admin": pb.TIER_ADMIN, "Baseline": pb.TIER_BASELINE}
_ACTIONS: Final = {
    "Allow": pb.RULE_ACTION_ALLOW,
    "Accept": pb.RULE_ACTION_ALLOW,
    "Deny": pb.RULE_ACTION_DENY,
    "Pass": pb.RULE_ACTION_PASS,
}


# -- NetworkPolicy


def network_policy(fields: Fields, default_namespace: str) -> pb.Policy:
    """A NetworkPolicy. Its pods are denied what it does not allow."""
    draft = Draft(fields, pb.POLICY_KIND_KUBERNETES, default_namespace)
    spec = _spec(fields)
    subject = spec.child("podSelector")
    pods = selector(subject) if subject is not None else pb.LabelSelector()
    types = spec.texts("policyTypes")
    for name in types:
        if name not in _TYPES:
            raise spec.refuse("policyTypes", f"names {name!r}", "Ingress and Egress")
    sections = {section: list(spec.children(section)) for section in SECTIONS}
    if not types:
        # A list without rules is as good as none.
        types = ["Ingress", "Egress"] if sections["egress"] else ["Ingress"]
    for section, direction in SECTIONS.items():
        rules = sections[section]
        if section.capitalize() not in types:
            if rules:
                raise spec.refuse(section, "is given, and policyTypes does not name it")
            continue
        draft.rule(pods, direction, pb.RULE_ACTION_ALLOW, match_no_peer=True, default_deny=True, name=f"{section} default")
        for at, each in enumerate(rules):
            rule = draft.rule(pods, direction, pb.RULE_ACTION_ALLOW, default_deny=True, name=f"{section} {at + 1}")
            for peer in each.children("from" if direction == INGRESS else "to"):
                rule.peers.append(_peer(peer, draft.namespace))
            rule.ports.extend(port(found, _TRANSPORT, "TCP") for found in each.children("ports"))
            each.done()
    spec.done()
    fields.done()
    return draft.policy


def _spec(fields: Fields) -> Fields:
    spec = fields.child("spec")
    if spec is None:
        raise fields.refuse("spec", "is missing")
    return spec


def _peer(fields: Fields, namespace: str) -> pb.Peer:
    block = fields.child("ipBlock")
    pods, namespaces = fields.child("podSelector"), fields.child("namespaceSelector")
    fields.done()
    if block is not None:
        if pods is not None or namespaces is not None:
            raise fields.refuse("ipBlock", "excludes podSelector and namespaceSelector", "make two peers of it")
        found = cidr(block, "cidr", block.take("cidr", str, ""), block.texts("except"))
        block.done()
        return found
    if pods is None and namespaces is None:
        raise fields.refuse("", "names nobody", "give podSelector, namespaceSelector or ipBlock")
    chosen = pb.LabelSelector()
    if pods is not None:
        selector(pods, into=chosen)
    if namespaces is not None:
        selector(namespaces, namespace_key, chosen)
        _of_namespaces(chosen)
    else:
        # Whatever the selector says: labels of pods are nothing but labels here.
        chosen.match_expressions.add(key=NAMESPACE, operator=pb.LABEL_OPERATOR_IN, values=[namespace])
    return pb.Peer(endpoints=chosen)


def _of_namespaces(chosen: pb.LabelSelector) -> None:
    """Only endpoints that are pods, whatever the selector leaves open: each is in a namespace, and nobody else is."""
    chosen.match_expressions.add(key=NAMESPACE, operator=pb.LABEL_OPERATOR_EXISTS)


# -- policies of administrators


def admin(fields: Fields, _: str) -> pb.Policy:
    """An AdminNetworkPolicy."""
    return _ranked(fields, pb.POLICY_KIND_ADMIN, lambda _: pb.TIER_ADMIN, True)


def baseline(fields: Fields, _: str) -> pb.Policy:
    """A BaselineAdminNetworkPolicy."""
    found = _ranked(fields, pb.POLICY_KIND_BASELINE_ADMIN, lambda _: pb.TIER_BASELINE, False)
    if found.key.name != BASELINE:
        # Priorities are for those of whom there may be several.
        raise fields.refuse("metadata.name", f"is {found.key.name!r}", f"there is one of these, and it is called {BASELINE!r}")
    return found


def cluster(fields: Fields, _: str) -> pb.Policy:
    """A ClusterNetworkPolicy."""
    return _ranked(fields, pb.POLICY_KIND_CLUSTER, _tier, True)


def _tier(spec: Fields) -> pb.Tier.ValueType:
    name = spec.take("tier", str, "")
    if name not in _TIERS:
        raise spec.refuse("tier", f"is {name!r}", "Admin or Baseline")
    return _TIERS[name]


def _ranked(
    fields: Fields,
    kind: pb.PolicyKind.ValueType,
    tier_of: Callable[[Fields], pb.Tier.ValueType],
    has_priority: bool,
) -> pb.Policy:
    draft = Draft(fields, kind, "")
    spec = _spec(fields)
    tier = tier_of(spec)
    priority = 0
    if has_priority:
        if "priority" not in spec:
            raise spec.refuse("priority", "is missing")
        priority = number(spec, "priority")
        if priority > 1000:
            raise spec.refuse("priority", f"is {priority}", "give 0 to 1000")
    subject = spec.child("subject")
    if subject is None:
        raise spec.refuse("subject", "is missing")
    pods = _pods(subject)
    subject.done()
    for section, direction in SECTIONS.items():
        for at, each in enumerate(spec.children(section)):
            action = each.take("action", str, "")
            if action not in _ACTIONS:
                raise each.refuse("action", f"is {action!r}", "Accept (Allow), Deny or Pass")
            if kind == pb.POLICY_KIND_BASELINE_ADMIN and _ACTIONS[action] == pb.RULE_ACTION_PASS:
                raise each.refuse("action", "is Pass, and there is nothing to pass to", "Allow or Deny")
            name = each.take("name", str, "") or f"{section} {at + 1}"
            rule = draft.rule(pods, direction, _ACTIONS[action], tier=tier, priority=priority, name=name)
            peers = list(each.children("from" if direction == INGRESS else "to"))
            if not peers:
                raise each.refuse("from" if direction == INGRESS else "to", "names nobody")
            for peer in peers:
                rule.peers.extend(_ranked_peers(peer))
            rule.ports.extend(found for item in each.children("ports") for found in _ranked_port(item))
            rule.ports.extend(found for item in each.children("protocols") for found in _protocol(item))
            each.done()
    spec.done()
    fields.done()
    return draft.policy


def _pods(fields: Fields) -> pb.LabelSelector:
    """subject, and peers: namespaces, or pods of namespaces."""
    namespaces, pods = fields.child("namespaces"), fields.child("pods")
    if (namespaces is None) == (pods is None):
        raise fields.refuse("", "must have one of namespaces and pods")
    found = pb.LabelSelector()
    if namespaces is not None:
        selector(namespaces, namespace_key, found)
    elif pods is not None:
        for name, key_of in (("namespaceSelector", namespace_key), ("podSelector", None)):
            chosen = pods.child(name)
            if chosen is None:
                raise pods.refuse(name, "is missing")
            if key_of is None:
                selector(chosen, into=found)
            else:
                selector(chosen, key_of, found)
        pods.done()
    return found


def _ranked_peers(fields: Fields) -> list[pb.Peer]:
    fields.unsupported("domainNames")
    if "networks" in fields:
        found = [cidr(fields, f"networks[{at}]", text) for at, text in enumerate(fields.texts("networks"))]
        if not found:
            raise fields.refuse("networks", "has no entries")
    elif "nodes" in fields:
        nodes = fields.child("nodes")
        assert nodes is not None
        found = [pb.Peer(node=pb.NodePeer(nodes=nodes_selector(nodes)))]
    else:
        chosen = _pods(fields)
        _of_namespaces(chosen)
        found = [pb.Peer(endpoints=chosen)]
    fields.done()
    return found


def _ranked_port(fields: Fields) -> list[pb.Port]:
    """portNumber, portRange or namedPort."""
    name = fields.take("namedPort", str, "")
    one, many = fields.child("portNumber"), fields.child("portRange")
    fields.done()
    if bool(name) + (one is not None) + (many is not None) != 1:
        raise fields.refuse("", "must have one of portNumber, portRange and namedPort")
    if name:
        return [pb.Port(name=port_name(fields, "namedPort", name))]
    if one is not None:
        single = pb.Port(protocol=_transport(one), first=number(one, "port"))
        if not single.first:
            raise one.refuse("port", "is missing")
        one.done()
        return [single]
    assert many is not None
    found = pb.Port(protocol=_transport(many), first=number(many, "start"), last=number(many, "end"))
    if not 1 <= found.first <= found.last:
        raise many.refuse("end", f"is {found.last}, and start {found.first}")
    many.done()
    return [found]


def _transport(fields: Fields) -> pb.PortProtocol.ValueType:
    name = fields.take("protocol", str, "TCP")
    if name not in _TRANSPORT:
        raise fields.refuse("protocol", f"is {name!r}", f"one of: {', '.join(_TRANSPORT)}")
    return _TRANSPORT[name]


def _protocol(fields: Fields) -> list[pb.Port]:
    """A ClusterNetworkPolicy's protocol: tcp, udp or sctp with a destination port, or a name."""
    name = fields.take("destinationNamedPort", str, "")
    if name:
        fields.done()
        return [pb.Port(name=port_name(fields, "destinationNamedPort", name))]
    for protocol in _TRANSPORT:
        found = fields.child(protocol.lower())
        if found is None:
            continue
        fields.done()
        result = pb.Port(protocol=_TRANSPORT[protocol])
        destination = found.child("destinationPort")
        found.done()
        if destination is not None:
            span = destination.child("range")
            if span is not None:
                result.first, result.last = number(span, "start"), number(span, "end")
                if not 1 <= result.first <= result.last:
                    raise span.refuse("end", f"is {result.last}, and start {result.first}")
                span.done()
            else:
                result.first = number(destination, "number")
                if not result.first:
                    raise destination.refuse("number", "is missing")
            destination.done()
        return [result]
    raise fields.refuse("", "must have one of tcp, udp, sctp and destinationNamedPort")
