"""fibril.sockaccel.v1 to values and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from fibril.sockaccel.v1 import sockaccel_pb2 as pb
from services.common.errors import InvalidArgument
from services.sockaccel.model import PORTS_MAX, Class, Scope

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,63}")
_LABELS_MAX: Final = 64
_LABEL_MAX: Final = 253
_CGROUPS_MAX: Final = 64


def class_name(text: str, field: str) -> str:
    """A name as classes have."""
    if not _NAME.fullmatch(text):
        raise InvalidArgument(
            f"{text!r} is no name of a class", field=field, fix='write 1 to 63 letters, digits, "-", "_" and "."'
        )
    return text


def declared(message: pb.Class, field: str) -> Class:
    """InvalidArgument names the field."""
    scopes = []
    for at, number in enumerate(message.scopes):
        if int(number) not in Scope.__members__.values():
            raise InvalidArgument(f"{number} is no scope", field=f"{field}.scopes[{at}]", fix="see enum Scope")
        scopes.append(Scope(number))
    if not scopes:
        raise InvalidArgument("a class needs a scope", field=f"{field}.scopes", fix="say where the two ends are")
    return Class(
        class_name(message.name, f"{field}.name"),
        message.enabled,
        frozenset(scopes),
        _ports(message, f"{field}.ports"),
        _labels(message.client_labels, f"{field}.client_labels"),
        _labels(message.server_labels, f"{field}.server_labels"),
        _cgroups(message, f"{field}.cgroups"),
        message.proxies_only,
        message.nonblocking_only,
    )


def _ports(message: pb.Class, field: str) -> tuple[tuple[int, int], ...]:
    found = []
    for at, each in enumerate(message.ports):
        first, last = each.first, each.last or each.first
        if not 1 <= first <= 65535:
            raise InvalidArgument(f"{first} is no port", field=f"{field}[{at}].first", fix="give 1 to 65535")
        if not first <= last <= 65535:
            raise InvalidArgument(
                f"{last} does not end a range that begins with {first}", field=f"{field}[{at}].last", fix="give a later port"
            )
        found.append((first, last))
    total = sum(last - first + 1 for first, last in found)
    if total > PORTS_MAX:
        raise InvalidArgument(
            f"{total} ports, the limit is {PORTS_MAX}", field=field, fix="name fewer, or none for all there are"
        )
    return tuple(sorted(set(found)))


def _labels(labels: Mapping[str, str], field: str) -> dict[str, str]:
    if len(labels) > _LABELS_MAX:
        raise InvalidArgument(f"{len(labels)} labels, the limit is {_LABELS_MAX}", field=field)
    for key, value in labels.items():
        if not 1 <= len(key) <= _LABEL_MAX or len(value) > _LABEL_MAX:
            raise InvalidArgument(f"{key!r}: {value!r} is no label", field=field, fix=f"give 1 to {_LABEL_MAX} characters")
    return dict(sorted(labels.items()))


def _cgroups(message: pb.Class, field: str) -> tuple[str, ...]:
    found = []
    if len(message.cgroups) > _CGROUPS_MAX:
        raise InvalidArgument(f"{len(message.cgroups)} control groups, the limit is {_CGROUPS_MAX}", field=field)
    for at, text in enumerate(message.cgroups):
        path = text.strip("/")
        if not path or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")) or len(path) > 4096:
            raise InvalidArgument(
                f"{text!r} is no path of a control group", field=f"{field}[{at}]", fix='write it as "shop.slice/cart.service"'
            )
        found.append(path)
    return tuple(sorted(set(found)))


def class_message(each: Class) -> pb.Class:
    """As declared; `message` and `pairs` are the caller's."""
    return pb.Class(
        name=each.name,
        enabled=each.enabled,
        scopes=[pb.Scope.ValueType(scope) for scope in sorted(each.scopes)],
        ports=[pb.PortRange(first=first, last=last) for first, last in each.ports],
        client_labels=each.client_labels,
        server_labels=each.server_labels,
        cgroups=each.cgroups,
        proxies_only=each.proxies_only,
        nonblocking_only=each.nonblocking_only,
    )
