"""What documents of all kinds have: names, options, ports."""

from __future__ import annotations

from typing import Any, Final

from fibril.policy.v1 import policy_pb2 as pb
from services.policy.documents.fields import Fields

PROTOCOLS: Final = {
    "ANY": pb.PORT_PROTOCOL_UNSPECIFIED,
    "TCP": pb.PORT_PROTOCOL_TCP,
    "UDP": pb.PORT_PROTOCOL_UDP,
    "SCTP": pb.PORT_PROTOCOL_SCTP,
}
INGRESS: Final = pb.TRAFFIC_DIRECTION_INGRESS
EGRESS: Final = pb.TRAFFIC_DIRECTION_EGRESS
SECTIONS: Final = {"ingress": INGRESS, "egress": EGRESS}
_REJECT: Final = "fibril.io/reject"
_KEEP: Final = "fibril.io/keep-established"


class Draft:
    """A policy being read."""

    def __init__(self, fields: Fields, kind: pb.PolicyKind.ValueType, default_namespace: str) -> None:
        """default_namespace: "" for kinds that have none."""
        metadata = fields.child("metadata")
        if metadata is None:
            raise fields.refuse("metadata", "is missing")
        name = metadata.take("name", str, "")
        if not name:
            raise metadata.refuse("name", "is missing")
        namespace = metadata.take("namespace", str, default_namespace)
        if namespace and not default_namespace:
            raise metadata.refuse("namespace", "is given, and this kind has none", "leave it out")
        annotations = metadata.child("annotations")
        options = dict(annotations.pairs()) if annotations is not None else {}
        self.reject, self.keep = (self._option(metadata, options, each) for each in (_REJECT, _KEEP))
        fields.ignore("apiVersion", "kind", "status")
        self.policy = pb.Policy(key=pb.PolicyKey(kind=kind, namespace=namespace, name=name))
        self.namespace = namespace

    @staticmethod
    def _option(metadata: Fields, options: dict[str, str], name: str) -> bool:
        value = options.get(name, "false")
        if value not in ("true", "false"):
            raise metadata.refuse(f"annotations[{name}]", f"is {value!r}", '"true" or "false"')
        return value == "true"

    def rule(self, subject: pb.LabelSelector, direction: int, action: int, **more: Any) -> pb.Rule:
        """One more rule."""
        return self.policy.rules.add(
            subject=subject,
            direction=pb.TrafficDirection.ValueType(direction),
            action=pb.RuleAction.ValueType(action),
            reject=self.reject,
            keep_established=self.keep,
            **more,
        )


def number(fields: Fields, name: str, default: int = 0) -> int:
    """A port or type given as a number, or as text that is one."""
    value = fields.take(name, object, default)
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).isdigit():
        raise fields.refuse(name, f"is {str(value)[:30]!r}, not a number")
    found = int(value)
    if found > 65535:
        raise fields.refuse(name, f"is {found}", "give at most 65535")
    return found


def port(fields: Fields, protocols: dict[str, pb.PortProtocol.ValueType], default: str) -> pb.Port:
    """protocol, port (a number or a name) and endPort, as Kubernetes and Cilium write them."""
    protocol = fields.take("protocol", str, default).upper() or default
    if protocol not in protocols:
        raise fields.refuse("protocol", f"is {protocol!r}", f"one of: {', '.join(protocols)}")
    found = pb.Port(protocol=protocols[protocol])
    value = fields.take("port", object, "")
    last = number(fields, "endPort")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise fields.refuse("port", "is neither a number nor a name")
    if str(value).isdigit():
        found.first = _port(fields, "port", int(value))
        if last:
            found.last = _port(fields, "endPort", last)
            if found.first and found.last < found.first:
                raise fields.refuse("endPort", f"is {last}, before {found.first}")
            if not found.first:
                raise fields.refuse("endPort", "is given without a port")
    elif value:
        found.name = str(value)
        if last:
            raise fields.refuse("endPort", "is given with a port's name")
    elif last:
        raise fields.refuse("endPort", "is given without a port")
    fields.done()
    return found


def _port(fields: Fields, name: str, value: int) -> int:
    if value > 65535:
        raise fields.refuse(name, f"is {value}", "give at most 65535")
    return value


def cidr(text: object, excepted: list[str]) -> pb.Peer:
    """A prefix with holes; convert.py checks what they say."""
    found = pb.Peer(cidr=pb.CidrPeer(cidr=str(text)))
    getattr(found.cidr, "except").extend(excepted)
    return found
