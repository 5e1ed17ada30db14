"""CiliumNetworkPolicy and CiliumClusterwideNetworkPolicy (cilium.io/v2), as far as addresses, identities and ports go.

An entry of a list is a rule: peers of one entry are alternatives, as are its ports. An entry that names neither ({}) matches
nothing, it only switches default deny on; a list without entries does not even that. What concerns requests, names or
certificates is refused: to leave it aside would allow more than the policy says.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from fibril.policy.v1 import policy_pb2 as pb
from services.policy.documents.common import INGRESS, PROTOCOLS, SECTIONS, Draft, cidr, decimal, port
from services.policy.documents.fields import Fields
from services.policy.documents.selectors import (
    everywhere,
    nodes_selector,
    selector,
    selects_init,
    selects_namespace,
    within,
)
from services.policy.model import RESERVED

_ENTITIES: Final = {
    "all": pb.ENTITY_ALL,
    "cluster": pb.ENTITY_CLUSTER,
    "world": pb.ENTITY_WORLD,
    "host": pb.ENTITY_HOST,
    "remote-node": pb.ENTITY_REMOTE_NODE,
    "init": pb.ENTITY_INIT,
    "health": pb.ENTITY_HEALTH,
    "kube-apiserver": pb.ENTITY_KUBE_APISERVER,
    "unmanaged": pb.ENTITY_UNMANAGED,
    "none": pb.ENTITY_NONE,
}
_KUBE_APISERVER: Final = "default/kubernetes"
_WORLDS: Final = {"world-ipv4": "0.0.0.0/0", "world-ipv6": "::/0"}
_ICMP: Final = {
    "IPv4": {
        "EchoReply": 0, "DestinationUnreachable": 3, "Redirect": 5, "Echo": 8, "EchoRequest": 8,
        "RouterAdvertisement": 9, "RouterSelection": 10, "TimeExceeded": 11, "ParameterProblem": 12, "Timestamp": 13,
        "TimestampReply": 14, "Photuris": 40, "ExtendedEchoRequest": 42, "ExtendedEchoReply": 43,
    },
    "IPv6": {
        "DestinationUnreachable": 1, "PacketTooBig": 2, "TimeExceeded": 3, "ParameterProblem": 4, "EchoRequest": 128,
        "EchoReply": 129, "MulticastListenerQuery": 130, "MulticastListenerReport": 131, "MulticastListenerDone": 132,
        "RouterSolicitation": 133, "RouterAdvertisement": 134, "NeighborSolicitation": 135, "NeighborAdvertisement": 136,
        "RedirectMessage": 137, "RouterRenumbering": 138, "ICMPNodeInformationQuery": 139,
        "ICMPNodeInformationResponse": 140, "InverseNeighborDiscoverySolicitation": 141,
        "InverseNeighborDiscoveryAdvertisement": 142, "HomeAgentAddressDiscoveryRequest": 144,
        "HomeAgentAddressDiscoveryReply": 145, "MobilePrefixSolicitation": 146, "MobilePrefixAdvertisement": 147,
        "DuplicateAddressRequestCodeSuffix": 157, "DuplicateAddressConfirmationCodeSuffix": 158,
        "ExtendedEchoRequest": 160, "ExtendedEchoReply": 161,
    },
}  # fmt: skip
_LATER: Final = ("rules", "terminatingTLS", "originatingTLS", "serverNames", "listener")


def namespaced(fields: Fields, default_namespace: str) -> pb.Policy:
    """A CiliumNetworkPolicy."""
    return _policy(fields, Draft(fields, pb.POLICY_KIND_CILIUM, default_namespace))


def clusterwide(fields: Fields, _: str) -> pb.Policy:
    """A CiliumClusterwideNetworkPolicy."""
    return _policy(fields, Draft(fields, pb.POLICY_KIND_CILIUM_CLUSTERWIDE, ""))


def _policy(fields: Fields, draft: Draft) -> pb.Policy:
    specs = list(fields.children("specs"))
    spec = fields.child("spec")
    if spec is not None:
        specs.insert(0, spec)
    if not specs:
        raise fields.refuse("spec", "is missing")
    fields.done()
    for number, each in enumerate(specs):
        _spec(each, draft, f"{number + 1}." if len(specs) > 1 else "")
    return draft.policy


def _spec(spec: Fields, draft: Draft, prefix: str) -> None:
    draft.policy.description = spec.take("description", str, draft.policy.description)
    spec.ignore("labels")
    pods, nodes = spec.child("endpointSelector"), spec.child("nodeSelector")
    if (pods is None) == (nodes is None):
        raise spec.refuse("", "must have one of endpointSelector and nodeSelector")
    if nodes is not None and draft.namespace:
        raise spec.refuse("nodeSelector", "needs a CiliumClusterwideNetworkPolicy")
    if pods is not None:
        subject = selector(pods)
        if draft.namespace and not selects_namespace(subject, draft.namespace):
            raise spec.refuse(
                "endpointSelector",
                f"names another namespace than the policy's, {draft.namespace!r}",
                "leave the namespace out, or use a CiliumClusterwideNetworkPolicy",
            )
    else:
        assert nodes is not None
        subject = nodes_selector(nodes)
    deny_by_default = spec.child("enableDefaultDeny")
    before = len(draft.policy.rules)
    for section, direction in SECTIONS.items():
        entries = {name: list(spec.children(name)) for name in (section, f"{section}Deny")}
        wanted = any(entries.values())
        if deny_by_default is not None:
            wanted = deny_by_default.take(section, bool, wanted)
        rules = 0
        for name, action in ((section, pb.RULE_ACTION_ALLOW), (f"{section}Deny", pb.RULE_ACTION_DENY)):
            for at, each in enumerate(entries[name]):
                rule = draft.rule(
                    subject,
                    direction,
                    action,
                    subject_is_node=nodes is not None,
                    default_deny=wanted,
                    name=f"{prefix}{name} {at + 1}",
                )
                _rule(each, rule, direction, draft.namespace)
                rules += 1
        if wanted and not rules:
            draft.rule(
                subject,
                direction,
                pb.RULE_ACTION_ALLOW,
                subject_is_node=nodes is not None,
                match_no_peer=True,
                default_deny=True,
                name=f"{prefix}{section} default",
            )
    if deny_by_default is not None:
        deny_by_default.done()
    spec.done()
    if len(draft.policy.rules) == before:
        # Whoever expects a list without entries to deny everything must not find everything allowed.
        raise spec.refuse("", "has no rules", "give ingress or egress an entry; {} alone denies by default")


def _rule(fields: Fields, rule: pb.Rule, direction: int, namespace: str) -> None:
    way = "from" if direction == INGRESS else "to"
    fields.unsupported("fromRequires", "toRequires", "toFQDNs", "toGroups", "fromGroups", "authentication")
    lists = [f"{way}{each}" for each in ("Endpoints", "Entities", "CIDR", "CIDRSet", "Nodes", "Services")]
    # A list that is there and empty selects nobody, whatever the others say; one that is not there says nothing.
    nobody = any(name in fields and not fields.peek(name) for name in lists)
    for each in fields.children(f"{way}Endpoints"):
        found = selector(each)
        # Pods that are still being set up have no namespace: only a policy about such reaches them by what it does not say.
        if not selects_init(rule.subject):
            found = within(found, namespace) if namespace else everywhere(found)
        rule.peers.add(endpoints=found)
        if f"{RESERVED}kube-apiserver" in found.match_labels:
            rule.peers.append(_apiserver())
    rule.peers.extend(_entities(fields, f"{way}Entities"))
    for at, text in enumerate(fields.texts(f"{way}CIDR")):
        rule.peers.append(cidr(fields, f"{way}CIDR[{at}]", text))
    for each in fields.children(f"{way}CIDRSet"):
        each.unsupported("cidrGroupRef", "cidrGroupSelector")
        rule.peers.append(cidr(each, "cidr", each.take("cidr", str, ""), each.texts("except")))
        each.done()
    for each in fields.children(f"{way}Nodes"):
        rule.peers.add(node=pb.NodePeer(nodes=nodes_selector(each)))
    if direction != INGRESS:
        rule.peers.extend(_services(fields.children("toServices"), namespace))
    for each in fields.children("toPorts"):
        each.unsupported(*_LATER)
        rule.ports.extend(port(found, PROTOCOLS, "ANY") for found in _some(each, "ports"))
        each.done()
    for each in fields.children("icmps"):
        rule.ports.extend(_icmp(found) for found in _some(each, "fields"))
        each.done()
    fields.done()
    if nobody or not (rule.peers or rule.ports):
        del rule.peers[:]
        rule.match_no_peer = True


def _some(fields: Fields, name: str) -> list[Fields]:
    """A list that would stand for everything if it were left out: refused without entries."""
    found = list(fields.children(name))
    if not found:
        raise fields.refuse(name, "has no entries", "give some, or leave out the whole entry")
    return found


def _entities(fields: Fields, name: str) -> Iterable[pb.Peer]:
    for text in fields.texts(name):
        if text in _WORLDS:
            raise fields.refuse(name, f"names {text!r}, which is not supported yet", f"use CIDR {_WORLDS[text]} or world")
        if text not in _ENTITIES:
            raise fields.refuse(name, f"names {text!r}", f"one of: {', '.join(_ENTITIES)}")
        yield pb.Peer(entity=_ENTITIES[text])
        if text == "kube-apiserver":
            yield _apiserver()


def _apiserver() -> pb.Peer:
    """Nobody is given that identity here: the servers are whoever stands behind the cluster's service of that name."""
    return pb.Peer(service=pb.ServicePeer(name=_KUBE_APISERVER))


def _services(items: Iterable[Fields], namespace: str) -> Iterable[pb.Peer]:
    for each in items:
        each.unsupported("k8sServiceSelector")
        service = each.child("k8sService")
        each.done()
        if service is None:
            raise each.refuse("k8sService", "is missing")
        name = service.take("serviceName", str, "")
        if not name:
            raise service.refuse("serviceName", "is missing")
        yield pb.Peer(service=pb.ServicePeer(name=f"{service.take('namespace', str, namespace or 'default')}/{name}"))
        service.done()


def _icmp(fields: Fields) -> pb.Port:
    family = fields.take("family", str, "IPv4")
    if family not in _ICMP:
        raise fields.refuse("family", f"is {family!r}", "IPv4 or IPv6")
    value = fields.take("type", object, "")
    protocol = pb.PORT_PROTOCOL_ICMP if family == "IPv4" else pb.PORT_PROTOCOL_ICMPV6
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise fields.refuse("type", "is neither a number nor a name")
    number = decimal(value)
    kind = number if number is not None else _ICMP[family].get(str(value), -1)
    if not 0 <= kind <= 255:
        raise fields.refuse("type", f"is {str(value)[:40]!r}", "a number up to 255, or a name such as EchoRequest")
    fields.done()
    return pb.Port(protocol=protocol, icmp_type=kind)
