"""fibril.lb.v1 messages to values and back. Everything that a message may say wrong is found here, by its field."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Final

from fibril.lb.v1 import lb_pb2 as pb
from services.common.errors import InvalidArgument
from services.common.pipeline.abi import IPAddress
from services.lb import maglev
from services.lb.abi import BackendState
from services.lb.model import (
    ANY_V4,
    ANY_V6,
    SCTP,
    TCP,
    UDP,
    Algorithm,
    Backend,
    BackendKey,
    Backends,
    Forwarding,
    Frontend,
    FrontendType,
    GrpcProbe,
    HealthCheck,
    HttpProbe,
    IPNetwork,
    NoBackend,
    Spec,
    TcpProbe,
    Topology,
    TrafficPolicy,
)  # fmt: skip

BACKENDS_MAX: Final = 100_000
"""Of one service."""
FRONTENDS_MAX: Final = 256
SOURCES_MAX: Final = 4096
ANNOTATIONS_MAX: Final = 64
TEXT_MAX: Final = 253
AFFINITY_MAX_S: Final = 86_400
_NAME: Final = re.compile(r"[A-Za-z0-9][-._/:A-Za-z0-9]{0,252}")
_PROTOS: Final = {pb.PROTOCOL_TCP: TCP, pb.PROTOCOL_UDP: UDP, pb.PROTOCOL_SCTP: SCTP}
_PROTOCOLS: Final = {proto: number for number, proto in _PROTOS.items()}
_STATUS: Final = re.compile(r"([1-5]\d\d)(?:-([1-5]\d\d))?")


def service_name(name: str, field: str = "name") -> str:
    """The name, if it is one. InvalidArgument."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"{name[:80]!r} is not a service's name",
            field=field,
            fix='use 1 to 253 letters, digits and "-._/:", beginning with a letter or digit',
        )
    return name


def spec_from(message: pb.Service, field: str = "service") -> tuple[Spec, Backends]:
    """A service and its backends. InvalidArgument names the part that is wrong."""
    name = service_name(message.name, f"{field}.name")
    fronts = _frontends(message.frontends, f"{field}.frontends")
    backends = backends_from(message.backends, f"{field}.backends", BACKENDS_MAX)
    outside = any(front.outside for front in fronts)
    algorithm = _enum(pb.Algorithm, message.algorithm, f"{field}.algorithm")
    spec = Spec(
        name,
        fronts,
        Algorithm(algorithm) if algorithm else Algorithm.MAGLEV if outside else Algorithm.RANDOM,
        _maglev_size(message.maglev_size, f"{field}.maglev_size"),
        _within(message.affinity_timeout_s, 0, AFFINITY_MAX_S, f"{field}.affinity_timeout_s"),
        _policy(message.internal_traffic_policy, f"{field}.internal_traffic_policy"),
        _policy(message.external_traffic_policy, f"{field}.external_traffic_policy"),
        Topology(_enum(pb.Topology, message.topology, f"{field}.topology") or Topology.ANY),
        _sources(message.source_ranges, f"{field}.source_ranges"),
        Forwarding(_enum(pb.Forwarding, message.forwarding, f"{field}.forwarding")),
        NoBackend(_enum(pb.NoBackend, message.no_backend, f"{field}.no_backend") or NoBackend.REJECT),
        _health_check(message.health_check, f"{field}.health_check")
        if message.HasField("health_check")
        else None,
        _within(message.health_check_node_port, 0, 65535, f"{field}.health_check_node_port"),
        _annotations(message.annotations, f"{field}.annotations"),
    )
    check_sctp(spec, backends.values(), f"{field}.backends")
    return spec, backends


def backends_from(messages: Iterable[pb.Backend], field: str, most: int) -> Backends:
    """Backends by key. InvalidArgument."""
    given = list(messages)
    if len(given) > most:
        raise InvalidArgument(
            f"{len(given)} backends, at most {most} are possible", field=field, fix="use several calls"
        )
    found: Backends = {}
    for at, message in enumerate(given):
        backend = _backend(message, f"{field}[{at}]")
        if backend.key in found:
            raise InvalidArgument(f"{_shown(backend.key)} is there twice", field=f"{field}[{at}]")
        found[backend.key] = backend
    return found


def keys_from(messages: Iterable[pb.BackendKey], field: str, most: int) -> list[BackendKey]:
    """Keys without repetition, 1 to `most`. InvalidArgument."""
    given = list(messages)
    if not 1 <= len(given) <= most:
        raise InvalidArgument(f"{len(given)} backends are named", field=field, fix=f"name 1 to {most}")
    keys = {
        BackendKey(_address(m.address, f"{field}[{at}].address"), _port(m.port, f"{field}[{at}].port")): None
        for at, m in enumerate(given)
    }
    return list(keys)


def state_from(number: int, field: str = "state") -> BackendState:
    """A state; unspecified is ACTIVE. InvalidArgument."""
    return BackendState(_enum(pb.BackendState, number, field) or BackendState.ACTIVE)


def proto_from(number: int, field: str = "protocol") -> int:
    """An IP protocol's number; unspecified is TCP. InvalidArgument."""
    return _PROTOS[pb.Protocol.ValueType(_enum(pb.Protocol, number, field) or pb.PROTOCOL_TCP)]


def protocol_of(proto: int) -> pb.Protocol.ValueType:
    """The message's word for an IP protocol."""
    return _PROTOCOLS.get(proto, pb.PROTOCOL_UNSPECIFIED)


def address_from(text: str, field: str = "address") -> IPAddress:
    """An address that can be sent to. InvalidArgument."""
    return _address(text, field)


def check_sctp(spec: Spec, backends: Iterable[Backend], field: str) -> None:
    """SCTP's checksum covers the ports, and no program can compute it: they stay as they are."""
    fronts = [front for front in spec.frontends if front.proto == SCTP]
    for front in fronts:
        for at, backend in enumerate(backends):
            if backend.key.port != front.port:
                raise InvalidArgument(
                    f"port {backend.key.port} is not the SCTP frontend's {front.port}",
                    field=f"{field}[{at}].port",
                    fix="SCTP ports cannot be translated: use the same on both",
                )


def spec_to(spec: Spec, backends: Iterable[Backend] = ()) -> pb.Service:
    """The message of a service as declared."""
    message = pb.Service(
        name=spec.name,
        frontends=[front_to(front) for front in spec.frontends],
        backends=[backend_to(backend) for backend in backends],
        algorithm=pb.Algorithm.ValueType(spec.algorithm),
        maglev_size=spec.maglev_size,
        affinity_timeout_s=spec.affinity_s,
        internal_traffic_policy=pb.TrafficPolicy.ValueType(spec.internal),
        external_traffic_policy=pb.TrafficPolicy.ValueType(spec.external),
        topology=pb.Topology.ValueType(spec.topology),
        source_ranges=[str(prefix) for prefix in spec.sources],
        forwarding=pb.Forwarding.ValueType(spec.forwarding),
        no_backend=pb.NoBackend.ValueType(spec.no_backend),
        health_check_node_port=spec.health_check_node_port,
        annotations=spec.annotations,
    )
    if spec.health_check is not None:
        message.health_check.CopyFrom(_health_check_to(spec.health_check))
    return message


def front_to(front: Frontend) -> pb.Frontend:
    """The message of a frontend."""
    return pb.Frontend(
        type=pb.FrontendType.ValueType(front.type),
        address=str(front.address),
        protocol=protocol_of(front.proto),
        port=front.port,
        port_last=front.port_last if front.port_last != front.port else 0,
        node=front.node,
    )


def backend_to(backend: Backend) -> pb.Backend:
    """The message of a backend as declared."""
    return pb.Backend(
        address=str(backend.key.address),
        port=backend.key.port,
        weight=backend.weight,
        zone=backend.zone,
        node=backend.node,
        cluster=backend.cluster,
        state=pb.BackendState.ValueType(backend.state),
    )


# ---- parts --------------------------------------------------------------------------------------------------
def _frontends(messages: Iterable[pb.Frontend], field: str) -> tuple[Frontend, ...]:
    given = list(messages)
    if not 1 <= len(given) <= FRONTENDS_MAX:
        raise InvalidArgument(f"{len(given)} frontends", field=field, fix=f"give 1 to {FRONTENDS_MAX}")
    found: list[Frontend] = []
    for at, message in enumerate(given):
        for front in _frontend(message, f"{field}[{at}]"):
            if any(overlap(front, other) for other in found):
                raise InvalidArgument(
                    f"{front.address} port {front.port} is there twice",
                    field=f"{field}[{at}]",
                    fix="leave one out",
                )
            found.append(front)
    return tuple(found)


def overlap(a: Frontend, b: Frontend) -> bool:
    """Whether two frontends have a port in common."""
    return (
        a.address == b.address
        and a.proto == b.proto
        and a.port <= b.port_last
        and b.port <= a.port_last
        and (not a.node or not b.node or a.node == b.node)
    )


def _frontend(message: pb.Frontend, field: str) -> list[Frontend]:
    """One, or for a port of nodes without an address one of each family."""
    kind = FrontendType(_enum(pb.FrontendType, message.type, f"{field}.type") or FrontendType.CLUSTER_IP)
    proto = proto_from(message.protocol, f"{field}.protocol")
    port = _port(message.port, f"{field}.port")
    last = _port(message.port_last, f"{field}.port_last") if message.port_last else port
    if last < port:
        raise InvalidArgument(f"{last} is below the first port {port}", field=f"{field}.port_last")
    if last > port and proto == SCTP:
        raise InvalidArgument("SCTP frontends have one port", field=f"{field}.port_last")
    if (kind is FrontendType.HOST_PORT) != bool(message.node):
        raise InvalidArgument(
            "a host port is one node's" if not message.node else "only a host port names a node",
            field=f"{field}.node",
            fix="set node with type HOST_PORT, and only with it",
        )
    if len(message.node) > TEXT_MAX:
        raise InvalidArgument(f"longer than {TEXT_MAX} characters", field=f"{field}.node")
    of_nodes = kind in (FrontendType.NODE_PORT, FrontendType.HOST_PORT)
    addresses: list[IPAddress]
    if not of_nodes:
        addresses = [_address(message.address, f"{field}.address")]
    elif message.address == "":
        addresses = [ANY_V4, ANY_V6]
    elif message.address in (str(ANY_V4), str(ANY_V6)):
        addresses = [ipaddress.ip_address(message.address)]
    else:
        raise InvalidArgument(
            f"{message.address!r}: such a port is one of all addresses of a node",
            field=f"{field}.address",
            fix='use "0.0.0.0", "::" or nothing; for a single address type EXTERNAL_IP',
        )
    return [Frontend(kind, address, proto, port, last, message.node) for address in addresses]


def _backend(message: pb.Backend, field: str) -> Backend:
    for text, name in ((message.zone, "zone"), (message.node, "node"), (message.cluster, "cluster")):
        if len(text) > TEXT_MAX:
            raise InvalidArgument(f"longer than {TEXT_MAX} characters", field=f"{field}.{name}")
    return Backend(
        BackendKey(_address(message.address, f"{field}.address"), _port(message.port, f"{field}.port")),
        _within(message.weight or 1, 1, 65535, f"{field}.weight"),
        message.zone,
        message.node,
        message.cluster,
        state_from(message.state, f"{field}.state"),
    )


def _address(text: str, field: str) -> IPAddress:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise InvalidArgument(f"{text[:60]!r} is not an IP address", field=field) from None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        raise InvalidArgument(
            f"{text} is an IPv4 address in disguise", field=field, fix=f"use {address.ipv4_mapped}"
        )
    if "%" in text or address.is_unspecified or address.is_multicast or address.is_link_local:
        raise InvalidArgument(f"{text} cannot be connected to from other machines", field=field)
    if address == ipaddress.IPv4Address("255.255.255.255"):
        raise InvalidArgument(f"{text} is everybody's", field=field)
    return address


def _port(port: int, field: str) -> int:
    return _within(port, 1, 65535, field)


def _within(value: int, least: int, most: int, field: str) -> int:
    if not least <= value <= most:
        raise InvalidArgument(f"{value} is outside {least}..{most}", field=field)
    return value


def _enum(kind: object, number: int, field: str) -> int:
    values: list[int] = kind.values()  # type: ignore[attr-defined]
    if number not in values:
        raise InvalidArgument(
            f"{number} is not known", field=field, fix="client and server must be of one version"
        )
    return number


def _policy(number: int, field: str) -> TrafficPolicy:
    return TrafficPolicy(_enum(pb.TrafficPolicy, number, field) or TrafficPolicy.CLUSTER)


def _maglev_size(size: int, field: str) -> int:
    if not size:
        return 0
    _within(size, maglev.SIZES[0], maglev.SIZES[-1], field)
    if any(size % divisor == 0 for divisor in range(2, int(size**0.5) + 1)):
        known = min(maglev.SIZES, key=lambda prime: abs(prime - size))
        raise InvalidArgument(f"{size} is not a prime", field=field, fix=f"use {known}")
    return size


def _sources(texts: Iterable[str], field: str) -> tuple[IPNetwork, ...]:
    given = list(texts)
    if len(given) > SOURCES_MAX:
        raise InvalidArgument(f"{len(given)} prefixes, at most {SOURCES_MAX} are possible", field=field)
    found = []
    for at, text in enumerate(given):
        try:
            found.append(ipaddress.ip_network(text))
        except ValueError as error:
            raise InvalidArgument(f"{text[:60]!r} is not a prefix: {error}", field=f"{field}[{at}]") from None
    return tuple(dict.fromkeys(found))


def _annotations(given: object, field: str) -> dict[str, str]:
    pairs: dict[str, str] = dict(given)  # type: ignore[call-overload]
    if len(pairs) > ANNOTATIONS_MAX:
        raise InvalidArgument(f"{len(pairs)} pairs, at most {ANNOTATIONS_MAX} are possible", field=field)
    for key, value in pairs.items():
        if not key or len(key) > TEXT_MAX or len(value) > TEXT_MAX:
            raise InvalidArgument(
                f"{key[:40]!r}: 1 to {TEXT_MAX} characters, value at most {TEXT_MAX}", field=field
            )
    return pairs


def _health_check(message: pb.HealthCheck, field: str) -> HealthCheck:
    probe: TcpProbe | HttpProbe | GrpcProbe
    match message.WhichOneof("probe"):
        case "tcp":
            probe = TcpProbe()
        case "http":
            probe = _http(message.http, f"{field}.http")
        case "grpc":
            probe = GrpcProbe(_text(message.grpc.service, f"{field}.grpc.service"))
        case _:
            raise InvalidArgument(
                "nothing to ask is given", field=f"{field}.probe", fix="set tcp, http or grpc"
            )
    interval = _within(message.interval_ms or 10_000, 100, 3_600_000, f"{field}.interval_ms")
    timeout = _within(message.timeout_ms or min(1000, interval), 1, interval, f"{field}.timeout_ms")
    return HealthCheck(
        probe,
        _within(message.port, 0, 65535, f"{field}.port"),
        interval / 1000,
        timeout / 1000,
        _within(message.unhealthy_after or 3, 1, 100, f"{field}.unhealthy_after"),
        _within(message.healthy_after or 2, 1, 100, f"{field}.healthy_after"),
    )


def _text(text: str, field: str) -> str:
    """What goes into a request: one line."""
    if len(text) > TEXT_MAX or not text.isprintable():
        raise InvalidArgument(f"not one line of at most {TEXT_MAX} characters", field=field)
    return text


def _http(message: pb.HealthCheck.Http, field: str) -> HttpProbe:
    path = _text(message.path or "/", f"{field}.path")
    if not path.startswith("/") or " " in path:
        raise InvalidArgument(f"{path!r} is not a path", field=f"{field}.path", fix='begin it with "/"')
    statuses = []
    for at, text in enumerate(message.statuses):
        match = _STATUS.fullmatch(text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if last < first:
            raise InvalidArgument(
                f"{text[:20]!r} is no status", field=f"{field}.statuses[{at}]", fix='as "204" or "200-299"'
            )
        statuses.append((first, last))
    return HttpProbe(path, _text(message.host, f"{field}.host"), tuple(statuses) or HttpProbe().statuses)


def _health_check_to(check: HealthCheck) -> pb.HealthCheck:
    message = pb.HealthCheck(
        port=check.port,
        interval_ms=round(check.interval_s * 1000),
        timeout_ms=round(check.timeout_s * 1000),
        unhealthy_after=check.unhealthy_after,
        healthy_after=check.healthy_after,
    )
    match check.probe:
        case HttpProbe(path, host, statuses):
            texts = [str(first) if first == last else f"{first}-{last}" for first, last in statuses]
            message.http.CopyFrom(pb.HealthCheck.Http(path=path, host=host, statuses=texts))
        case GrpcProbe(service):
            message.grpc.CopyFrom(pb.HealthCheck.Grpc(service=service))
        case _:
            message.tcp.SetInParent()
    return message


def _shown(key: BackendKey) -> str:
    return f"[{key.address}]:{key.port}" if key.address.version == 6 else f"{key.address}:{key.port}"
