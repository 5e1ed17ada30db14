"""Kubernetes' Service, EndpointSlice and Endpoints as fibril.lb.v1 services. Pure.

Each port of a Service is a service of ours, "namespace/name:port", since it has backends of its own. Backends come from
EndpointSlices; each carries its slice's name, so that one slice can be applied without the others. What would matter and is not
supported is refused by document and field; fields that say nothing about balancing (selectors, owners) are left aside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fibril.lb.v1 import lb_pb2 as pb
from services.common import documents
from services.common.errors import FailedPrecondition, InvalidArgument
from services.lb.kubefields import LIST, PROXY_NAME, SERVICE_NAME, SHAPES, TOPOLOGY, check, mapping

PORT_NAME: Final = "fibril.kubernetes/port-name"
"""Annotation: the port of the Service that a service of ours is."""
NOT_READY: Final = "fibril.kubernetes/publish-not-ready"
_PROTOCOLS: Final = {"TCP": pb.PROTOCOL_TCP, "UDP": pb.PROTOCOL_UDP, "SCTP": pb.PROTOCOL_SCTP}
_POLICIES: Final = {"Cluster": pb.TRAFFIC_POLICY_CLUSTER, "Local": pb.TRAFFIC_POLICY_LOCAL}
_TOPOLOGIES: Final = {
    "PreferClose": pb.TOPOLOGY_SAME_ZONE,
    "PreferSameZone": pb.TOPOLOGY_SAME_ZONE,
    "PreferSameNode": pb.TOPOLOGY_SAME_NODE,
}
VALUES_MAX: Final = 10_000_000
_AFFINITY_S: Final = 10800
_KINDS: Final = frozenset({"ClusterIP", "NodePort", "LoadBalancer", "ExternalName"})
_KNOWN: Final = (("Service", "v1"), ("EndpointSlice", "discovery.k8s.io/v1"), ("Endpoints", "v1"))
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
    objects: set[str] = field(default_factory=set)
    """Kubernetes' Services, as namespace/name."""
    notes: list[str] = field(default_factory=list)
    """What was left out because there is nothing to balance, and why."""
    left: set[str] = field(default_factory=set)
    """Of `objects`, those."""

    def leave(self, name: str, why: str) -> None:
        self.left.add(name)
        self.notes.append(f"{name}: {why}")


def parse(text: str) -> Parsed:
    """YAML or JSON, several documents and v1 Lists included. InvalidArgument names document and field."""
    parsed = Parsed()
    for number, doc in enumerate(documents.read(text, "file", VALUES_MAX)):
        for where, each in _flat(doc, f"documents[{number}]"):
            _document(parsed, each, where)
    return parsed


def gone(parsed: Parsed, stored: Mapping[str, pb.Service]) -> list[str]:
    """Stored services that are ports which the file's Services do not have any more."""
    return sorted(
        name
        for name, service in stored.items()
        if PORT_NAME in service.annotations
        and _object_of(name) in parsed.objects
        and name not in parsed.services
        and name not in parsed.own
    )


def merge(parsed: Parsed, stored: Mapping[str, pb.Service]) -> dict[str, pb.Service]:
    """What the services are to be, by name: those of the file, and stored ones that a slice of the file concerns.

    stored: services as the node has them, at least all that begin with "namespace/name:" of what the file names.
    FailedPrecondition: a slice without its Service.
    """
    away = set(gone(parsed, stored))
    stored = {name: service for name, service in stored.items() if name not in away}
    wanted = {name: _copy(service) for name, service in {**parsed.services, **parsed.own}.items()}
    for name, service in wanted.items():
        if name not in parsed.own and name in stored:
            service.backends.extend(_declared(stored[name].backends))
    ports: dict[str, list[str]] = {}
    for name in dict.fromkeys((*wanted, *stored)):
        ports.setdefault(_object_of(name), []).append(name)
    slices: dict[str, list[Slice]] = {}
    for each in parsed.slices:
        if each.service in parsed.left:
            continue
        if each.service not in ports:
            raise FailedPrecondition(
                f"{each.where}: there is no Service {each.service}", fix="apply it first, or in the same file"
            )
        slices.setdefault(each.service, []).append(each)
    for owner, mine in slices.items():
        origins = {each.origin for each in mine}
        for name in ports[owner]:
            if name not in wanted:
                wanted[name] = _copy(stored[name])
                _have(wanted[name], _declared(stored[name].backends))
            service = wanted[name]
            _have(service, [backend for backend in service.backends if backend.origin not in origins])
            for each in mine:
                service.backends.extend(_of_slice(each, service))
            _once(service)
    for service in wanted.values():
        service.ClearField("status")
        service.ClearField("revision")
    return wanted


def _object_of(name: str) -> str:
    """The Service that one of ours is a port of."""
    return name.rpartition(":")[0]


def _have(service: pb.Service, backends: Iterable[pb.Backend]) -> None:
    """These instead of what it has."""
    kept = [_copy(backend) for backend in backends]
    del service.backends[:]
    service.backends.extend(kept)


# ---- documents ----------------------------------------------------------------------------------------------
def _flat(doc: Any, where: str) -> Iterator[tuple[str, Doc]]:
    if isinstance(doc, list):
        for at, item in enumerate(doc):
            yield from _flat(item, f"{where}[{at}]")
        return
    if not isinstance(doc, Mapping):
        raise InvalidArgument("not an object", field=where)
    if str(doc.get("kind", "")).endswith("List") and isinstance(doc.get("items"), list):
        check(doc, LIST, where)
        for at, item in enumerate(doc["items"]):
            yield from _flat(item, f"{where}.items[{at}]")
        return
    yield where, doc


def _document(parsed: Parsed, doc: Doc, where: str) -> None:
    kind, version = doc.get("kind"), doc.get("apiVersion")
    if (kind, version) in _KNOWN:
        check(doc, SHAPES[str(kind)], where)
    match (kind, version):
        case ("Service", "v1"):
            _service(parsed, doc, where)
        case ("EndpointSlice", "discovery.k8s.io/v1"):
            parsed.slices.append(_slice(doc, where))
        case ("Endpoints", "v1"):
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


def _identity(doc: Doc, where: str) -> tuple[str, str]:
    metadata = doc.get("metadata")
    if not isinstance(metadata, Mapping) or not metadata.get("name"):
        raise InvalidArgument("it has no name", field=f"{where}.metadata.name")
    return str(metadata.get("namespace") or "default"), str(metadata["name"])


def _service(parsed: Parsed, doc: Doc, where: str) -> None:
    namespace, name = _identity(doc, where)
    spec = mapping(doc.get("spec"), f"{where}.spec")
    full = f"{namespace}/{name}"
    if full in parsed.objects:
        raise InvalidArgument(f"service {full} is there twice", field=where)
    parsed.objects.add(full)
    if spec.get("type") and spec["type"] not in _KINDS:
        raise InvalidArgument(f"{spec['type']!r} is not known", field=f"{where}.spec.type")
    if spec.get("type") == "ExternalName":
        parsed.leave(full, "an ExternalName is a matter of DNS")
        return
    if proxy := (doc["metadata"].get("labels") or {}).get(PROXY_NAME):
        parsed.leave(full, f"it is to be served by {proxy[:60]} ({PROXY_NAME})")
        return
    addresses = [str(a) for a in spec.get("clusterIPs") or [spec.get("clusterIP")] if a]
    if "None" in addresses:
        parsed.leave(full, "headless, so it has no address to be balanced at")
        return
    for asked in TOPOLOGY:
        if (doc["metadata"].get("annotations") or {}).get(asked, "") not in ("", "Disabled", "disabled"):
            raise InvalidArgument(
                f"{asked} is not supported",
                field=f"{where}.metadata.annotations.{asked}",
                fix="remove it; spec.trafficDistribution says which backends are preferred",
            )
    ports = spec.get("ports")
    if not isinstance(ports, list) or not ports:
        raise InvalidArgument("a service has at least one port", field=f"{where}.spec.ports")
    common = _common(spec, f"{where}.spec")
    balancers = _balancers(doc, spec)
    outside = {pb.FRONTEND_TYPE_EXTERNAL_IP: [str(a) for a in spec.get("externalIPs") or ()],
               pb.FRONTEND_TYPE_LOAD_BALANCER: balancers}  # fmt: skip
    for at, port in enumerate(ports):
        here = f"{where}.spec.ports[{at}]"
        given = mapping(port, here)
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
        config = mapping(spec.get("sessionAffinityConfig") or {}, f"{where}.sessionAffinityConfig")
        client = mapping(config.get("clientIP") or {}, f"{where}.sessionAffinityConfig.clientIP")
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
    labels = doc["metadata"].get("labels") or {}
    if SERVICE_NAME not in labels:
        raise InvalidArgument(
            "it does not say whose it is",
            field=f"{where}.metadata.labels",
            fix=f"set the label {SERVICE_NAME}",
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
    return Slice(f"{namespace}/{labels[SERVICE_NAME]}", name, ports, tuple(backends), where)


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
    _have(service, found.values())


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
