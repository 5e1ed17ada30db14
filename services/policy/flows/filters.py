"""fibril.flow.v1.FlowFilter to a predicate on records. What is cheap to look at is looked at first."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from typing import Final

from fibril.flow.v1 import flow_pb2 as pb
from services.common.errors import InvalidArgument
from services.common.pipeline.abi import addr_bytes
from services.policy.flows.store import V4, Predicate, Record

FILTERS_MAX: Final = 64
V4_BITS: Final = 8 * len(V4)
_PORT_MAX: Final = 65535
_PROTOCOL_MAX: Final = 255


def selected(allow: Sequence[pb.FlowFilter], deny: Sequence[pb.FlowFilter]) -> Predicate:
    """Whether any of the first (or there is none) and none of the second matches. InvalidArgument names the field."""
    wanted = [_filter(each, f"allow[{at}]") for at, each in enumerate(allow)]
    unwanted = [_filter(each, f"deny[{at}]") for at, each in enumerate(deny)]
    if len(wanted) + len(unwanted) > FILTERS_MAX:
        raise InvalidArgument(f"{len(wanted) + len(unwanted)} filters", field="allow", fix=f"give at most {FILTERS_MAX}")

    def matches(record: Record) -> bool:
        if wanted and not any(each(record) for each in wanted):
            return False
        return not any(each(record) for each in unwanted)

    return matches


def _filter(message: pb.FlowFilter, at: str) -> Predicate:
    found: list[Predicate] = []
    for field in ("verdict", "type", "protocol"):
        if getattr(message, field):
            found.append(_equals("proto" if field == "protocol" else field, getattr(message, field)))
    if message.direction:
        found.append(_equals("direction", message.direction - 1))
    if message.drop_reason:
        found.append(_equals("reason", message.drop_reason))
    if message.port:
        if message.port > _PORT_MAX:
            raise InvalidArgument(f"{message.port} is no port", field=f"{at}.port")
        found.append(_either("sport", "dport", message.port))
    if message.protocol > _PROTOCOL_MAX:
        raise InvalidArgument(f"{message.protocol} is no protocol", field=f"{at}.protocol")
    if message.endpoint:
        found.append(_either("src_id", "dst_id", message.endpoint))
    if message.identity:
        found.append(_either("src_identity", "dst_identity", message.identity))
    found += _addresses(message, at)
    found += _by_name(message)
    return lambda record: all(each(record) for each in found)


def _equals(field: str, value: int) -> Predicate:
    return lambda record: getattr(record, field) == value


def _either(one: str, other: str, value: int) -> Predicate:
    return lambda record: value in (getattr(record, one), getattr(record, other))


def _addresses(message: pb.FlowFilter, at: str) -> list[Predicate]:
    found: list[Predicate] = []
    if message.address:
        holds = _prefix(message.address, f"{at}.address")
        found.append(lambda record: holds(record.src) or holds(record.dst))
    if message.source_address:
        source = _prefix(message.source_address, f"{at}.source_address")
        found.append(lambda record: source(record.src))
    if message.destination_address:
        destination = _prefix(message.destination_address, f"{at}.destination_address")
        found.append(lambda record: destination(record.dst))
    return found


def _prefix(text: str, at: str) -> Callable[[bytes], bool]:
    try:
        if "%" in text:
            raise ValueError
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise InvalidArgument(f"{text[:60]!r} is no prefix", field=at, fix="as 10.0.0.1 or 10.0.0.0/8") from None
    shift = network.max_prefixlen - network.prefixlen
    wanted = int.from_bytes(addr_bytes(network.network_address), "big") >> shift
    if network.version == 6 and network.prefixlen < V4_BITS:
        # IPv4 is written as ::ffff:a.b.c.d, and is not in ::/0 all the same.
        return lambda raw: not raw.startswith(V4) and int.from_bytes(raw, "big") >> shift == wanted
    return lambda raw: int.from_bytes(raw, "big") >> shift == wanted


def _by_name(message: pb.FlowFilter) -> list[Predicate]:
    found: list[Predicate] = []
    if message.pod:
        pod = message.pod
        found.append(lambda record: _is_source(pod, record) or _is_destination(pod, record))
    if message.source_pod:
        source = message.source_pod
        found.append(lambda record: _is_source(source, record))
    if message.destination_pod:
        destination = message.destination_pod
        found.append(lambda record: _is_destination(destination, record))
    if message.labels:
        labels = dict(message.labels).items()
        found.append(
            lambda record: any(
                labels <= own.items() for own in (record.names.source_labels, record.names.destination_labels)
            )
        )
    if message.policy:
        policy = message.policy
        found.append(lambda record: policy in record.names.policy or policy in record.names.rule)
    return found


def _is_source(wanted: str, record: Record) -> bool:
    return _is_pod(wanted, record.src_id, record.names.source_pod)


def _is_destination(wanted: str, record: Record) -> bool:
    return _is_pod(wanted, record.dst_id, record.names.destination_pod)


def _is_pod(wanted: str, endpoint: int, name: str) -> bool:
    if not endpoint:
        return False
    return name.startswith(wanted[:-1]) if wanted.endswith("*") else name == wanted
