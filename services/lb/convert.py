"""fibril.lb.v1 to the model and back. What is not as the contract says is refused by its path, with what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Final

from fibril.lb.v1 import lb_pb2 as pb
from services.common import errors
from services.common.pipeline.abi import IPAddress
from services.lb import checks, claims, fields
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
    IPNetwork,
    NoBackend,
    Spec,
    Topology,
    TrafficPolicy,
)

PROTOCOLS: Final = {pb.PROTOCOL_TCP: TCP, pb.PROTOCOL_UDP: UDP, pb.PROTOCOL_SCTP: SCTP}
NUMBERS: Final = {number: protocol for protocol, number in PROTOCOLS.items()}
_NAMES: Final = {TCP: "TCP", UDP: "UDP", SCTP: "SCTP"}
_ANYWHERE: Final = (FrontendType.NODE_PORT, FrontendType.HOST_PORT)
FRONTENDS_MAX: Final = 1000
PLACES_MAX: Final = 56
"""Blocks of ports (claims.BLOCK) of different addresses that a service may have: it gets all of them in one transaction."""
BACKENDS_MAX: Final = 65_536
CALL_MAX: Final = 10_000
"""Backends in one call that changes some of a service."""
SOURCES_MAX: Final = 1000
ANNOTATIONS_MAX: Final = 64
AFFINITY_MAX_S: Final = 86_400
MAGLEV: Final = (251, 131_071)


# -- from messages


def spec(message: pb.Service, at: str = "service") -> Spec:
    """A service without its backends."""
    fronts = _frontends(message.frontends, f"{at}.frontends")
    outside = any(front.outside for front in fronts)
    size = fields.number(message.maglev_size, *MAGLEV, 0, f"{at}.maglev_size")
    if size and not _prime(size):
        raise errors.InvalidArgument(
            f"{size} is no prime number",
            field=f"{at}.maglev_size",
            fix=f"give {_prime_above(size)}, or 0 to have it chosen",
        )
    found = Spec(
        name=fields.name(message.name, f"{at}.name"),
        frontends=fronts,
        algorithm=fields.choice(
            Algorithm, message.algorithm, Algorithm.MAGLEV if outside else Algorithm.RANDOM, f"{at}.algorithm"
        ),
        maglev_size=size,
        affinity_s=fields.number(
            message.affinity_timeout_s, 1, AFFINITY_MAX_S, 0, f"{at}.affinity_timeout_s"
        ),
        internal=fields.choice(
            TrafficPolicy,
            message.internal_traffic_policy,
            TrafficPolicy.CLUSTER,
            f"{at}.internal_traffic_policy",
        ),
        external=fields.choice(
            TrafficPolicy,
            message.external_traffic_policy,
            TrafficPolicy.CLUSTER,
            f"{at}.external_traffic_policy",
        ),
        topology=fields.choice(Topology, message.topology, Topology.ANY, f"{at}.topology"),
        sources=_sources(message.source_ranges, f"{at}.source_ranges"),
        forwarding=fields.choice(Forwarding, message.forwarding, Forwarding.DEFAULT, f"{at}.forwarding"),
        no_backend=fields.choice(NoBackend, message.no_backend, NoBackend.REJECT, f"{at}.no_backend"),
        health_check=checks.health_check(message.health_check, f"{at}.health_check")
        if message.HasField("health_check")
        else None,
        health_check_node_port=fields.number(
            message.health_check_node_port, 1, 65535, 0, f"{at}.health_check_node_port"
        ),
        annotations=_annotations(message.annotations, f"{at}.annotations"),
    )
    _check_collisions(found, at)
    return found


def service(message: pb.Service, at: str = "service") -> tuple[Spec, Backends]:
    """A service with its backends, each right for the other."""
    found = spec(message, at)
    members = backends(message.backends, f"{at}.backends", BACKENDS_MAX)
    check_backends(found, members.values(), f"{at}.backends")
    return found, members


def backends(messages: Iterable[pb.Backend], at: str, limit: int = CALL_MAX) -> Backends:
    """Different ones, in the order given."""
    found: Backends = {}
    for number, message in enumerate(messages):
        fields.at_most(number + 1, limit, "backends or more", at)
        one = backend(message, f"{at}[{number}]")
        if one.key in found:
            raise errors.InvalidArgument(
                f"{key_text(one.key)} is given twice", field=f"{at}[{number}]", fix="give each backend once"
            )
        found[one.key] = one
    return found


def backend(message: pb.Backend, at: str) -> Backend:
    """effective_state and health, which are output, are not looked at."""
    rest = _rest(message.weight, message.zone, message.node, message.cluster, message.state, message.origin)
    if rest is not None:
        return Backend(_key(message.address, message.port, at), *rest)
    return Backend(
        key=_key(message.address, message.port, at),
        weight=fields.number(message.weight, 1, 65535, 1, f"{at}.weight"),
        zone=fields.text(message.zone, f"{at}.zone"),
        node=fields.text(message.node, f"{at}.node"),
        cluster=fields.text(message.cluster, f"{at}.cluster"),
        state=state(message.state, f"{at}.state", BackendState.ACTIVE),
        origin=fields.text(message.origin, f"{at}.origin"),
    )


@lru_cache(1 << 14)
def _rest(
    weight: int, zone: str, node: str, cluster: str, wanted: int, origin: str
) -> tuple[int, str, str, str, BackendState, str] | None:
    """What a backend has besides its key, if there is nothing wrong with it: thousands have it in common."""
    try:
        return (
            fields.number(weight, 1, 65535, 1, ""),
            fields.text(zone, ""),
            fields.text(node, ""),
            fields.text(cluster, ""),
            state(wanted, "", BackendState.ACTIVE),
            fields.text(origin, ""),
        )
    except errors.InvalidArgument:
        return None


def keys(messages: Iterable[pb.BackendKey], at: str) -> tuple[BackendKey, ...]:
    """1 to CALL_MAX different ones."""
    found: dict[BackendKey, None] = {}
    for number, message in enumerate(messages):
        fields.at_most(number + 1, CALL_MAX, "backends or more", at)
        found[_key(message.address, message.port, f"{at}[{number}]")] = None
    if not found:
        raise errors.InvalidArgument("no backends are given", field=at, fix="give at least one")
    return tuple(found)


def state(value: int, at: str, default: BackendState | None = None) -> BackendState:
    """A declared state; without a default one must be given."""
    if value == 0 and default is not None:
        return default
    try:
        if value == 0:
            raise ValueError
        return BackendState(value)
    except ValueError:
        known = ", ".join(f"{each.name} ({each.value})" for each in BackendState if each)
        raise errors.InvalidArgument(
            f"there is no state {value}", field=at, fix=f"use one of {known}"
        ) from None


def protocol(value: int, at: str) -> int:
    """The IP protocol's number; TCP for want of any."""
    if value == pb.PROTOCOL_UNSPECIFIED:
        return TCP
    for known, number in PROTOCOLS.items():
        if known == value:
            return number
    raise errors.InvalidArgument(
        f"there is no protocol {value}", field=at, fix="use PROTOCOL_TCP, PROTOCOL_UDP or PROTOCOL_SCTP"
    )


def check_backends(found: Spec, members: Iterable[Backend], at: str) -> None:
    """Whether a service can have these. Raises InvalidArgument that names the first it cannot."""
    widest = max(front.port_last - front.port for front in found.frontends)
    fixed = next((front.port for front in found.frontends if front.proto == SCTP), 0)
    for number, member in enumerate(members):
        port = member.key.port
        if port + widest > 65535:
            raise errors.InvalidArgument(
                f"a frontend has {widest + 1} ports, and {widest} above {port} is none",
                field=f"{at}[{number}].port",
                fix=f"give a port up to {65535 - widest}",
            )
        if fixed and port != fixed:
            raise errors.InvalidArgument(
                f"the service has an SCTP frontend at port {fixed}, and SCTP ports are not translated",
                field=f"{at}[{number}].port",
                fix=f"give port {fixed}",
            )


# -- to messages


def to_proto(
    found: Spec, members: Mapping[BackendKey, Backend] | None = None, *, revision: int = 0
) -> pb.Service:
    """As it would be given: reading it again gives the same."""
    message = pb.Service(
        name=found.name,
        frontends=[frontend_to_proto(front) for front in found.frontends],
        backends=[backend_to_proto(member) for _, member in sorted((members or {}).items(), key=_order)],
        algorithm=pb.Algorithm.ValueType(found.algorithm),
        maglev_size=found.maglev_size,
        affinity_timeout_s=found.affinity_s,
        internal_traffic_policy=pb.TrafficPolicy.ValueType(found.internal),
        external_traffic_policy=pb.TrafficPolicy.ValueType(found.external),
        topology=pb.Topology.ValueType(found.topology),
        source_ranges=[str(prefix) for prefix in found.sources],
        forwarding=pb.Forwarding.ValueType(found.forwarding),
        no_backend=pb.NoBackend.ValueType(found.no_backend),
        health_check_node_port=found.health_check_node_port,
        annotations=found.annotations,
        revision=revision,
    )
    if found.health_check is not None:
        message.health_check.CopyFrom(checks.to_proto(found.health_check))
    return message


def frontend_to_proto(front: Frontend) -> pb.Frontend:
    return pb.Frontend(
        type=pb.FrontendType.ValueType(front.type),
        address=str(front.address),
        protocol=NUMBERS[front.proto],
        port=front.port,
        port_last=front.port_last if front.port_last != front.port else 0,
        node=front.node,
    )


def backend_to_proto(member: Backend) -> pb.Backend:
    """As declared: effective_state is not known here."""
    return pb.Backend(
        address=str(member.key.address),
        port=member.key.port,
        weight=member.weight,
        zone=member.zone,
        node=member.node,
        cluster=member.cluster,
        state=pb.BackendState.ValueType(member.state),
        origin=member.origin,
    )


def key_text(key: BackendKey) -> str:
    """address:port, IPv6 in brackets."""
    return f"{key.address}:{key.port}" if key.address.version == 4 else f"[{key.address}]:{key.port}"


def _order(item: tuple[BackendKey, Backend]) -> tuple[int, bytes, int]:
    address, port = item[0]
    return address.version, address.packed, port


# -- parts


def _key(address: str, port: int, at: str) -> BackendKey:
    return BackendKey(fields.address(address, f"{at}.address"), fields.port(port, f"{at}.port"))


def _frontends(messages: Iterable[pb.Frontend], at: str) -> tuple[Frontend, ...]:
    found: list[Frontend] = []
    for number, message in enumerate(messages):
        fields.at_most(number + 1, FRONTENDS_MAX, "frontends or more", at)
        found += _frontend(message, number, f"{at}[{number}]")
    if not found:
        raise errors.InvalidArgument("the service has no frontend", field=at, fix="give at least one")
    return tuple(found)


def _frontend(message: pb.Frontend, number: int, at: str) -> list[Frontend]:
    kind = fields.choice(FrontendType, message.type, FrontendType.CLUSTER_IP, f"{at}.type")
    proto = protocol(message.protocol, f"{at}.protocol")
    first = fields.port(message.port, f"{at}.port")
    last = fields.port(message.port_last or first, f"{at}.port_last")
    if last < first:
        raise errors.InvalidArgument(
            f"the range ends at {last}, below its first port {first}",
            field=f"{at}.port_last",
            fix="give the larger one here, or 0 for a single port",
        )
    if proto == SCTP and last != first:
        raise errors.InvalidArgument(
            "SCTP ports are not translated, so a frontend has one",
            field=f"{at}.port_last",
            fix="give a frontend for each port in a service of its own",
        )
    node = fields.text(message.node, f"{at}.node")
    if (kind is FrontendType.HOST_PORT) != bool(node):
        raise errors.InvalidArgument(
            "a host port belongs to one node" if not node else f"a {kind.name} frontend is on all nodes",
            field=f"{at}.node",
            fix="name the node" if not node else "leave node empty, or make the frontend a HOST_PORT",
        )
    where = _anywhere(message.address, f"{at}.address") if kind in _ANYWHERE else (
        fields.address(message.address, f"{at}.address"),
    )  # fmt: skip
    return [Frontend(kind, address, proto, first, last, node, number) for address in where]


def _anywhere(value: str, at: str) -> tuple[IPAddress, ...]:
    if not value:
        return ANY_V4, ANY_V6
    found = fields.any_address(value, at)
    if not found.is_unspecified:
        raise errors.InvalidArgument(
            f"a port of a node is one of all its addresses, not of {found} only",
            field=at,
            fix='write "0.0.0.0", "::", or nothing for both; or make it an EXTERNAL_IP',
        )
    return (found,)


def _check_collisions(found: Spec, at: str) -> None:
    if len(found.frontends) == 1 and not found.health_check_node_port:
        return
    # More than one port of SCTP would need backends with more than one port.
    ports = {front.port for front in found.frontends if front.proto == SCTP}
    if len(ports) > 1:
        number = next(f.at for f in found.frontends if f.proto == SCTP and f.port != min(ports))
        raise errors.InvalidArgument(
            f"SCTP frontends at {len(ports)} different ports would need backends at different ports",
            field=f"{at}.frontends[{number}].port",
            fix="give each port a service of its own",
        )
    pair = claims.collision(found)
    if pair is None:
        places = len(claims.wanted(found))
        what = f"blocks of {claims.BLOCK} ports, counted for each address, have frontends in them"
        fields.at_most(places, PLACES_MAX, what, f"{at}.frontends")
        return
    first = found.frontends[pair[0]]
    what = f"{_NAMES[first.proto]} port {first.port} of {first.address}"
    second = found.frontends[pair[1]].at
    field = f"{at}.frontends[{second}]" if pair[1] >= 0 else f"{at}.health_check_node_port"
    raise errors.InvalidArgument(
        f"{what} or one of its range is given twice", field=field, fix="give each port once"
    )


def _sources(messages: Iterable[str], at: str) -> tuple[IPNetwork, ...]:
    found: dict[IPNetwork, None] = {}
    for number, message in enumerate(messages):
        fields.at_most(number + 1, SOURCES_MAX, "prefixes or more", at)
        prefix = fields.network(message, f"{at}[{number}]")
        if prefix in found:
            raise errors.InvalidArgument(
                f"{prefix} is given twice", field=f"{at}[{number}]", fix="give each prefix once"
            )
        found[prefix] = None
    return tuple(found)


def _annotations(given: Mapping[str, str], at: str) -> dict[str, str]:
    fields.at_most(len(given), ANNOTATIONS_MAX, "annotations", at)
    for key, value in given.items():
        for what in (key, value):
            if len(what) > fields.TEXT_MAX or not key:
                raise errors.InvalidArgument(
                    f"annotation {fields.shown(key)} is empty or too long",
                    field=f"{at}[{key[:60]}]",
                    fix=f"use 1 to {fields.TEXT_MAX} characters for the key, and at most as many for the value",
                )
    return dict(given)


def _prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _prime_above(number: int) -> int:
    """131,071 is a prime itself."""
    return next(candidate for candidate in range(number, MAGLEV[1] + 1) if _prime(candidate))
