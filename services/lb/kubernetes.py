"""Kubernetes' Service, EndpointSlice and Endpoints as fibril.lb.v1 services. Pure.

Each port of a Service is a service of ours, "namespace/name:port", since it has backends of its own. Backends come from
EndpointSlices; each carries its slice's name, so that one slice can be applied without the others. What would matter and is not
supported is refused by document and field; fields that say nothing about balancing (selectors, owners) are left aside.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from fibril.lb.v1 import lb_pb2 as pb
from services.common.errors import FailedPrecondition, InvalidArgument

PORT_NAME: Final = "fibril.kubernetes/port-name"
"""Annotation: the port of the Service that a service of ours is."""
NOT_READY: Final = "fibril.kubernetes/publish-not-ready"
_SERVICE_NAME: Final = "kubernetes.io/service-name"
_PROTOCOLS: Final = {"TCP": pb.PROTOCOL_TCP, "UDP": pb.PROTOCOL_UDP, "SCTP": pb.PROTOCOL_SCTP}
_POLICIES: Final = {"Cluster": pb.TRAFFIC_POLICY_CLUSTER, "Local": pb.TRAFFIC_POLICY_LOCAL}
_TOPOLOGIES: Final = {
    "PreferClose": pb.TOPOLOGY_SAME_ZONE,
    "PreferSameZone": pb.TOPOLOGY_SAME_ZONE,
    "PreferSameNode": pb.TOPOLOGY_SAME_NODE,
}
_AFFINITY_S: Final = 10800
# What is understood, or says nothing about balancing.
_SPEC: Final = frozenset({
    "allocateLoadBalancerNodePorts", "clusterIP", "clusterIPs", "externalIPs", "externalName", "externalTrafficPolicy",
    "healthCheckNodePort", "internalTrafficPolicy", "ipFamilies", "ipFamilyPolicy", "loadBalancerClass", "loadBalancerIP",
    "loadBalancerSourceRanges", "ports", "publishNotReadyAddresses", "selector", "sessionAffinity", "sessionAffinityConfig",
    "trafficDistribution", "type",
})  # fmt: skip
_PORT: Final = frozenset({"appProtocol", "name", "nodePort", "port", "protocol", "targetPort"})
_SLICE: Final = frozenset({"addressType", "apiVersion", "endpoints", "kind", "metadata", "ports"})
_ENDPOINT: Final = frozenset({
    "addresses", "conditions", "deprecatedTopology", "hints", "hostname", "nodeName", "targetRef", "zone",
})  # fmt: skip
_META: Final = {"name": str, "namespace": str, "labels": {_SERVICE_NAME: str}}
_PORTS: Final = [{"name": str, "protocol": str}]
_ADDRESSES: Final = [{"ip": str, "nodeName": str}]
# Of what type things are that are read; numbers are checked where they are.
_SHAPES: Final[Mapping[str, Any]] = {
    "Service": {
        "metadata": _META,
        "spec": {
            "clusterIP": str, "clusterIPs": [str], "externalIPs": [str], "externalTrafficPolicy": str,
            "internalTrafficPolicy": str, "ipFamilies": [str], "loadBalancerIP": str, "loadBalancerSourceRanges": [str],
            "ports": _PORTS, "publishNotReadyAddresses": bool, "sessionAffinity": str,
            "sessionAffinityConfig": {"clientIP": {}}, "trafficDistribution": str, "type": str,
        },
        "status": {"loadBalancer": {"ingress": [{"ip": str, "ipMode": str}]}},
    },
    "EndpointSlice": {
        "metadata": _META,
        "addressType": str,
        "ports": _PORTS,
        "endpoints": [{
            "addresses": [str], "conditions": {"ready": bool, "serving": bool, "terminating": bool}, "nodeName": str,
            "zone": str,
        }],
    },
    "Endpoints": {
        "metadata": _META,
        "subsets": [{"addresses": _ADDRESSES, "notReadyAddresses": _ADDRESSES, "ports": _PORTS}],
    },
}  # fmt: skip
_TYPES: Final = {str: "text", bool: "true or false"}
_KINDS: Final = frozenset({"ClusterIP", "NodePort", "LoadBalancer", "ExternalName"})
_ANY: Final = {"IPv4": "0.0.0.0", "IPv6": "::"}

Doc = Mapping[str, Any]


@dataclass(frozen=True)
class Slice:
    """Backends that one object gives a Service: by the port's name, as (port, protocol) and backends."""

    service: str
    """namespace/name."""
    origin: str
    ports: Mapping[str, tuple[int, pb.Protocol.ValueType]]
    backends: tuple[pb.Backend, ...]
    """Without port."""
    where: str


@dataclass
class Parsed:
    """What a file holds."""

    services: dict[str, pb.Service] = field(default_factory=dict)
    """Without backends, by name."""
    own: dict[str, pb.Service] = field(default_factory=dict)
    """In this project's own form, whole."""
    slices: list[Slice] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was left out because there is nothing to balance, and why."""


def parse(text: str) -> Parsed:
    """YAML or JSON, several documents and v1 Lists included. InvalidArgument names document and field."""
    try:
        documents = [doc for doc in yaml.safe_load_all(text) if doc is not None]
        # Nothing in it contains itself, and all of its text is Unicode.
        json.dumps(documents, ensure_ascii=False, default=str).encode()
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"not YAML: {' '.join(str(error).split())}", field="file") from None
    parsed = Parsed()
    for number, doc in enumerate(documents):
        for where, each in _flat(doc, f"documents[{number}]"):
            _document(parsed, each, where)
    return parsed


def merge(parsed: Parsed, stored: Mapping[str, pb.Service]) -> dict[str, pb.Service]:
    """What the services are to be, by name: those of the file, and stored ones that a slice of the file concerns.

    stored: services as the node has them, at least all that begin with "namespace/name:" of what the file names.
    FailedPrecondition: a slice without its Service.
    """
    wanted = {name: _copy(service) for name, service in {**parsed.services, **parsed.own}.items()}
    for name, service in wanted.items():
        if name not in parsed.own and name in stored:
            service.backends.extend(_declared(stored[name].backends))
    replaced: dict[str, set[str]] = {}
    for each in parsed.slices:
        prefix = f"{each.service}:"
        names = [name for name in (*wanted, *stored) if name.startswith(prefix)]
        if not names:
            raise FailedPrecondition(
                f"{each.where}: there is no Service {each.service}", fix="apply it first, or in the same file"
            )
        for name in dict.fromkeys(names):
            if name not in wanted:
                wanted[name] = _copy(stored[name])
                del wanted[name].backends[:]
                wanted[name].backends.extend(_declared(stored[name].backends))
            replaced.setdefault(name, set()).add(each.origin)
    for name, origins in replaced.items():
        service = wanted[name]
        kept = [backend for backend in service.backends if backend.origin not in origins]
        del service.backends[:]
        service.backends.extend(kept)
        for each in parsed.slices:
            if name.startswith(f"{each.service}:"):
                service.backends.extend(_of_slice(each, service))
        _once(service)
    for service in wanted.values():
        service.ClearField("status")
        service.ClearField("revision")
    return wanted


# ---- documents ----------------------------------------------------------------------------------------------
def _flat(doc: Any, where: str) -> Iterator[tuple[str, Doc]]:
    if isinstance(doc, list):
        for at, item in enumerate(doc):
            yield from _flat(item, f"{where}[{at}]")
        return
    if not isinstance(doc, Mapping):
        raise InvalidArgument("not an object", field=where)
    if str(doc.get("kind", "")).endswith("List") and isinstance(doc.get("items"), list):
        for at, item in enumerate(doc["items"]):
            yield from _flat(item, f"{where}.items[{at}]")
        return
    yield where, doc


def _document(parsed: Parsed, doc: Doc, where: str) -> None:
    kind, version = doc.get("kind"), doc.get("apiVersion")
    match (kind, version):
        case ("Service", "v1"):
            _typed(doc, _SHAPES["Service"], where)
            _service(parsed, doc, where)
        case ("EndpointSlice", "discovery.k8s.io/v1"):
            _typed(doc, _SHAPES["EndpointSlice"], where)
            parsed.slices.append(_slice(doc, where))
        case ("Endpoints", "v1"):
            _typed(doc, _SHAPES["Endpoints"], where)
            parsed.slices += _endpoints(doc, where)
        case (None, None):
            _own(parsed, doc, where)
        case _:
            raise InvalidArgument(
                f"{kind} {version} is not a kind this takes",
                field=f"{where}.kind",
                fix="give Service v1, EndpointSlice discovery.k8s.io/v1, Endpoints v1 or services of Fibril's own form",
            )


def _own(parsed: Parsed, doc: Doc, where: str) -> None:
    from google.protobuf import json_format

    try:
        service = json_format.ParseDict(dict(doc), pb.Service())
    except json_format.ParseError as error:
        raise InvalidArgument(f"not a service: {error}", field=where) from None
    _unique(parsed, service.name, where)
    parsed.own[service.name] = service


def _unique(parsed: Parsed, name: str, where: str) -> None:
    if name in parsed.services or name in parsed.own:
        raise InvalidArgument(f"service {name} is there twice", field=where)


def _typed(value: Any, shape: Any, where: str) -> None:
    """Whether what is read of a document has the types it must have; what is null is not there."""
    if value is None:
        return
    if isinstance(shape, Mapping):
        given = _mapping(value, where)
        for key, inner in shape.items():
            _typed(given.get(key), inner, f"{where}.{key}")
    elif isinstance(shape, list):
        if not isinstance(value, list) or None in value:
            raise InvalidArgument("not a list of something", field=where)
        for at, item in enumerate(value):
            _typed(item, shape[0], f"{where}[{at}]")
    elif not isinstance(value, shape):
        raise InvalidArgument(f"{str(value)[:60]!r} is not {_TYPES[shape]}", field=where)


def _known(doc: Doc, names: frozenset[str], where: str) -> None:
    for name in doc:
        if name not in names:
            raise InvalidArgument(
                f"{name} is not supported", field=f"{where}.{name}", fix="remove it, or ask for it"
            )


def _identity(doc: Doc, where: str) -> tuple[str, str]:
    metadata = doc.get("metadata")
    if not isinstance(metadata, Mapping) or not metadata.get("name"):
        raise InvalidArgument("it has no name", field=f"{where}.metadata.name")
    return str(metadata.get("namespace") or "default"), str(metadata["name"])


def _service(parsed: Parsed, doc: Doc, where: str) -> None:
    namespace, name = _identity(doc, where)
    spec = _mapping(doc.get("spec"), f"{where}.spec")
    _known(spec, _SPEC, f"{where}.spec")
    full = f"{namespace}/{name}"
    if spec.get("type") and spec["type"] not in _KINDS:
        raise InvalidArgument(f"{spec['type']!r} is not known", field=f"{where}.spec.type")
    if spec.get("type") == "ExternalName":
        parsed.notes.append(f"{full}: an ExternalName is a matter of DNS")
        return
    addresses = [str(a) for a in spec.get("clusterIPs") or [spec.get("clusterIP")] if a]
    if "None" in addresses:
        parsed.notes.append(f"{full}: headless, so it has no address to be balanced at")
        return
    ports = spec.get("ports")
    if not isinstance(ports, list) or not ports:
        raise InvalidArgument("a service has at least one port", field=f"{where}.spec.ports")
    common = _common(spec, f"{where}.spec")
    balancers = _balancers(doc, spec)
    outside = {pb.FRONTEND_TYPE_EXTERNAL_IP: [str(a) for a in spec.get("externalIPs") or ()],
               pb.FRONTEND_TYPE_LOAD_BALANCER: balancers}  # fmt: skip
    for at, port in enumerate(ports):
        here = f"{where}.spec.ports[{at}]"
        given = _mapping(port, here)
        _known(given, _PORT, here)
        number, protocol = _number(given.get("port"), f"{here}.port"), _protocol(given, here)
        service = _copy(common)
        service.name = f"{full}:{given.get('name') or number}"
        service.annotations[PORT_NAME] = str(given.get("name") or "")
        service.annotations[NOT_READY] = "true" if spec.get("publishNotReadyAddresses") else ""
        for address in addresses:
            service.frontends.add(
                type=pb.FRONTEND_TYPE_CLUSTER_IP, address=address, protocol=protocol, port=number
            )
        for kind, several in outside.items():
            for address in several:
                service.frontends.add(type=kind, address=address, protocol=protocol, port=number)
        if given.get("nodePort"):
            node_port = _number(given["nodePort"], f"{here}.nodePort")
            for anywhere in _anywhere(spec, addresses, f"{where}.spec.ipFamilies"):
                service.frontends.add(
                    type=pb.FRONTEND_TYPE_NODE_PORT, address=anywhere, protocol=protocol, port=node_port
                )
        if not service.frontends:
            raise InvalidArgument(
                "it has no address yet",
                field=f"{where}.spec.clusterIP",
                fix="give clusterIP, externalIPs or a nodePort",
            )
        if at:
            # A port of the nodes is one service's.
            service.health_check_node_port = 0
        _unique(parsed, service.name, here)
        parsed.services[service.name] = service


def _anywhere(spec: Doc, addresses: Sequence[str], where: str) -> list[str]:
    """Unspecified addresses of the families that a Service has."""
    families = (
        spec.get("ipFamilies") or ["IPv6" if ":" in address else "IPv4" for address in addresses] or ["IPv4"]
    )
    if not _ANY.keys() >= set(families):
        raise InvalidArgument(f"{families} are not known", field=where, fix="use IPv4 and IPv6")
    return [_ANY[family] for family in dict.fromkeys(families)]


def _common(spec: Doc, where: str) -> pb.Service:
    """What all ports of a Service share."""
    service = pb.Service(
        internal_traffic_policy=_choice(_POLICIES, spec, "internalTrafficPolicy", "Cluster", where),
        external_traffic_policy=_choice(_POLICIES, spec, "externalTrafficPolicy", "Cluster", where),
        source_ranges=[str(text).strip() for text in spec.get("loadBalancerSourceRanges") or ()],
        health_check_node_port=_number(
            spec.get("healthCheckNodePort") or 0, f"{where}.healthCheckNodePort", 0
        ),
    )
    if spec.get("trafficDistribution"):
        service.topology = _choice(_TOPOLOGIES, spec, "trafficDistribution", "", where)
    affinity = spec.get("sessionAffinity") or "None"
    if affinity == "ClientIP":
        config = _mapping(spec.get("sessionAffinityConfig") or {}, f"{where}.sessionAffinityConfig")
        client = _mapping(config.get("clientIP") or {}, f"{where}.sessionAffinityConfig.clientIP")
        seconds = client.get("timeoutSeconds")
        service.affinity_timeout_s = _AFFINITY_S if seconds is None else _number(
            seconds, f"{where}.sessionAffinityConfig.clientIP.timeoutSeconds")  # fmt: skip
    elif affinity != "None":
        raise InvalidArgument(
            f"{affinity!r} is not known", field=f"{where}.sessionAffinity", fix="use ClientIP or None"
        )
    return service


def _balancers(doc: Doc, spec: Doc) -> list[str]:
    """Addresses that a load balancer has given, or is to give."""
    status = doc.get("status")
    ingress = (status.get("loadBalancer") or {}).get("ingress") or () if isinstance(status, Mapping) else ()
    found = [str(each["ip"]) for each in ingress if each.get("ip") and each.get("ipMode", "VIP") == "VIP"]
    if not found and spec.get("loadBalancerIP"):
        found = [str(spec["loadBalancerIP"])]
    return found


# ---- backends -----------------------------------------------------------------------------------------------
def _slice(doc: Doc, where: str) -> Slice:
    namespace, name = _identity(doc, where)
    _known(doc, _SLICE, where)
    labels = doc["metadata"].get("labels") or {}
    if _SERVICE_NAME not in labels:
        raise InvalidArgument(
            "it does not say whose it is",
            field=f"{where}.metadata.labels",
            fix=f"set the label {_SERVICE_NAME}",
        )
    if doc.get("addressType") not in ("IPv4", "IPv6"):
        raise InvalidArgument(
            f"{doc.get('addressType')} is not supported", field=f"{where}.addressType", fix="use IPv4 or IPv6"
        )
    ports = {}
    for at, port in enumerate(doc.get("ports") or ()):
        here = f"{where}.ports[{at}]"
        ports[str(port.get("name") or "")] = (
            _number(port.get("port"), f"{here}.port"),
            _protocol(port, here),
        )
    backends = []
    for at, endpoint in enumerate(doc.get("endpoints") or ()):
        here = f"{where}.endpoints[{at}]"
        _known(endpoint, _ENDPOINT, here)
        # Kubernetes: all addresses are one and the same, consumers take the first.
        addresses = endpoint.get("addresses") or ()
        if not addresses:
            raise InvalidArgument("it has no address", field=f"{here}.addresses")
        backends.append(
            pb.Backend(
                address=str(addresses[0]),
                node=str(endpoint.get("nodeName") or ""),
                zone=str(endpoint.get("zone") or ""),
                state=_state(endpoint.get("conditions") or {}),
                origin=name,
            )
        )
    return Slice(f"{namespace}/{labels[_SERVICE_NAME]}", name, ports, tuple(backends), where)


def _state(conditions: Mapping[str, Any]) -> pb.BackendState.ValueType:
    """ready is true where nothing is said; who is leaving serves for want of others, if it can."""
    if conditions.get("ready") is not False:
        return pb.BACKEND_STATE_ACTIVE
    if conditions.get("terminating") and conditions.get("serving") is not False:
        return pb.BACKEND_STATE_TERMINATING
    return pb.BACKEND_STATE_QUARANTINED


def _endpoints(doc: Doc, where: str) -> Iterator[Slice]:
    """The older form, one object a Service: a slice for each of its subsets."""
    namespace, name = _identity(doc, where)
    for at, subset in enumerate(doc.get("subsets") or ()):
        here = f"{where}.subsets[{at}]"
        ports = {
            str(port.get("name") or ""): (
                _number(port.get("port"), f"{here}.ports"),
                _protocol(port, f"{here}.ports"),
            )
            for port in subset.get("ports") or ()
        }
        states = {"addresses": pb.BACKEND_STATE_ACTIVE, "notReadyAddresses": pb.BACKEND_STATE_QUARANTINED}
        backends = tuple(
            pb.Backend(
                address=each.get("ip") or "",
                node=str(each.get("nodeName") or ""),
                state=state,
                origin=f"endpoints/{name}",
            )
            for key, state in states.items()
            for each in subset.get(key) or ()
        )
        yield Slice(f"{namespace}/{name}", f"endpoints/{name}", ports, backends, here)


def _of_slice(each: Slice, service: pb.Service) -> Iterator[pb.Backend]:
    """A slice's backends at the port that a service of ours is."""
    found = each.ports.get(service.annotations.get(PORT_NAME, ""))
    if found is None:
        return
    port, protocol = found
    if protocol not in {front.protocol for front in service.frontends}:
        return
    for backend in each.backends:
        mine = pb.Backend()
        mine.CopyFrom(backend)
        mine.port = port
        if mine.state == pb.BACKEND_STATE_QUARANTINED and service.annotations.get(NOT_READY):
            mine.state = pb.BACKEND_STATE_ACTIVE
        yield mine


def _once(service: pb.Service) -> None:
    """A backend that moves from one slice to another is in both for a while: whoever says it is active is right."""
    found: dict[tuple[str, int], pb.Backend] = {}
    for backend in service.backends:
        known = found.get((backend.address, backend.port))
        if known is None or known.state != pb.BACKEND_STATE_ACTIVE:
            found[backend.address, backend.port] = backend
    backends = [_copy(backend) for backend in found.values()]
    del service.backends[:]
    service.backends.extend(backends)


def _declared(backends: Iterable[pb.Backend]) -> list[pb.Backend]:
    """Stored backends without what is output only."""
    found = []
    for backend in backends:
        mine = _copy(backend)
        mine.ClearField("effective_state")
        mine.ClearField("health")
        found.append(mine)
    return found


# ---- fields -------------------------------------------------------------------------------------------------
def _copy(message: Any) -> Any:
    made = type(message)()
    made.CopyFrom(message)
    return made


def _mapping(value: Any, where: str) -> Doc:
    if not isinstance(value, Mapping):
        raise InvalidArgument("not an object", field=where)
    return value


def _number(value: Any, where: str, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= 86_400:
        raise InvalidArgument(f"{value!r} is no number that is possible here", field=where)
    return value


def _protocol(port: Doc, where: str) -> pb.Protocol.ValueType:
    name = str(port.get("protocol") or "TCP")
    if name not in _PROTOCOLS:
        raise InvalidArgument(
            f"{name} is not known", field=f"{where}.protocol", fix=f"use {', '.join(_PROTOCOLS)}"
        )
    return _PROTOCOLS[name]


def _choice(known: Mapping[str, Any], spec: Doc, key: str, default: str, where: str) -> Any:
    value = str(spec.get(key) or default)
    if value not in known:
        raise InvalidArgument(
            f"{value!r} is not known", field=f"{where}.{key}", fix=f"use {', '.join(known)}"
        )
    return known[value]
