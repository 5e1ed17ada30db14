"""What documents of all kinds have: names, options, ports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from fibril.policy.v1 import policy_pb2 as pb
from services.common.errors import InvalidArgument
from services.policy import convert
from services.policy.documents.fields import Fields
from services.policy.model import IPNetwork

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
        # An empty one is none, not the whole cluster.
        namespace = metadata.take("namespace", str, "") or default_namespace
        if namespace and not default_namespace:
            raise metadata.refuse("namespace", "is given, and this kind has none", "leave it out")
        annotations = metadata.child("annotations")
        options = dict(annotations.pairs()) if annotations is not None else {}
        self.reject, self.keep = (self._option(metadata, options, each) for each in (_REJECT, _KEEP))
        fields.ignore("apiVersion", "kind", "status")
        self.policy = pb.Policy(key=pb.PolicyKey(kind=kind, namespace=namespace, name=name))
        try:
            convert.key(self.policy.key, "")
        except InvalidArgument as error:
            raise metadata.refuse(error.field.lstrip("."), f"is not usable: {error.message}", error.fix) from None
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


def decimal(value: object) -> int | None:
    """A number, or text that is one in plain digits; None: neither."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        # Nothing is as large as that; long texts take long.
        return int(value) if len(value) < 10 else 10**9
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def number(fields: Fields, name: str, default: int = 0) -> int:
    """A port or type given as a number, or as text that is one."""
    value = fields.take(name, object, default)
    found = decimal(value)
    if found is None:
        raise fields.refuse(name, f"is {str(value)[:30]!r}, not a number")
    if found > 65535:
        raise fields.refuse(name, f"is {found}", "give at most 65535")
    return found


def port(fields: Fields, protocols: dict[str, pb.PortProtocol.ValueType], default: str) -> pb.Port:
    """protocol, port (a number or a name) and endPort, as Kubernetes and Cilium write them. Port 0 is Cilium's word for all."""
    protocol = fields.take("protocol", str, default).upper() or default
    if protocol not in protocols:
        raise fields.refuse("protocol", f"is {protocol!r}", f"one of: {', '.join(protocols)}")
    found = pb.Port(protocol=protocols[protocol])
    value = fields.take("port", object, "")
    last = number(fields, "endPort")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise fields.refuse("port", "is neither a number nor a name")
    first = decimal(value)
    if first is not None:
        found.first = _port(fields, "port", first)
        if not first and protocols is not PROTOCOLS:
            raise fields.refuse("port", "is 0", "give 1 to 65535; leave it out for all ports")
        if last:
            found.last = _port(fields, "endPort", last)
            if found.first and found.last < found.first:
                raise fields.refuse("endPort", f"is {last}, before {found.first}")
            if not found.first:
                raise fields.refuse("endPort", "is given without a port")
    elif value:
        found.name = port_name(fields, "port", str(value))
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


def port_name(fields: Fields, name: str, text: str) -> str:
    """A named port's name."""
    if not convert.PORT_NAME.fullmatch(text):
        raise fields.refuse(name, f"is {text[:60]!r}, no name of a port", "up to 63 letters, digits and '-'")
    return text


def cidr(fields: Fields, name: str, text: str, excepted: Sequence[str] = ()) -> pb.Peer:
    """A prefix, with holes."""
    whole = _network(fields, name, text)
    for at, each in enumerate(excepted):
        hole = _network(fields, f"except[{at}]", each)
        if not convert.is_within(hole, whole):
            raise fields.refuse(f"except[{at}]", f"is {hole}, not within {whole}")
    found = pb.Peer(cidr=pb.CidrPeer(cidr=text))
    getattr(found.cidr, "except").extend(excepted)
    return found


def _network(fields: Fields, name: str, text: str) -> IPNetwork:
    try:
        return convert.network(text, name)
    except InvalidArgument as error:
        raise fields.refuse(name, f"is not usable: {error.message}", error.fix) from None
