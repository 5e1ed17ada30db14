"""Targets: whose TLS is looked into, and what of it is shown; the contract, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fibril.tls.v1 import tls_pb2 as pb
from services.common.errors import InvalidArgument
from services.sockaccel.tls.http import is_secret

TARGETS_MAX: Final = 64
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,63}")
_HEADER: Final = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,64}")
_MANY: Final = 64
_LONG: Final = 253


@dataclass(frozen=True)
class Target:
    """Pods by name, or by labels, or both."""

    name: str
    pods: frozenset[str]
    labels: Mapping[str, str]
    headers: frozenset[str]
    query: bool
    kernel_ports: frozenset[int] = frozenset()

    def is_about(self, pod: str, labels: Mapping[str, str]) -> bool:
        return pod in self.pods or (
            bool(self.labels) and all(labels.get(key) == value for key, value in self.labels.items())
        )


def declared(message: pb.Target, field: str) -> Target:
    """InvalidArgument names the field."""
    if not _NAME.fullmatch(message.name):
        raise InvalidArgument(
            f"{message.name!r} is no name of a target",
            field=f"{field}.name",
            fix='write 1 to 63 letters, digits, "-", "_" and "."',
        )
    if not message.pods and not message.labels:
        raise InvalidArgument("a target names pods", field=f"{field}.pods", fix="give names of pods, or labels")
    headers = []
    for at, text in enumerate(message.headers):
        header = text.lower()
        if not _HEADER.fullmatch(header):
            raise InvalidArgument(f"{text!r} is no name of a header", field=f"{field}.headers[{at}]")
        if is_secret(header):
            raise InvalidArgument(
                f"{text} may hold credentials, and is never shown", field=f"{field}.headers[{at}]", fix="leave it out"
            )
        headers.append(header)
    for what, count in (
        ("pods", len(message.pods)),
        ("labels", len(message.labels)),
        ("headers", len(headers)),
        ("kernel_ports", len(message.kernel_ports)),
    ):
        if count > _MANY:
            raise InvalidArgument(f"{count} {what}, the limit is {_MANY}", field=f"{field}.{what}")
    for at, pod in enumerate(message.pods):
        if not pod or len(pod) > _LONG:
            raise InvalidArgument(f"{pod[:_LONG]!r} is no name of a pod", field=f"{field}.pods[{at}]")
    for key, value in message.labels.items():
        if not key or len(key) > _LONG or len(value) > _LONG:
            raise InvalidArgument(f"{key[:_LONG]!r} is no label", field=f"{field}.labels")
    for at, port in enumerate(message.kernel_ports):
        if not 1 <= port <= 65535:
            raise InvalidArgument(f"{port} is no port", field=f"{field}.kernel_ports[{at}]")
    return Target(
        message.name,
        frozenset(message.pods),
        dict(message.labels),
        frozenset(headers),
        message.query,
        frozenset(message.kernel_ports),
    )


def message(target: Target) -> pb.Target:
    return pb.Target(
        name=target.name,
        pods=sorted(target.pods),
        labels=target.labels,
        headers=sorted(target.headers),
        query=target.query,
        kernel_ports=sorted(target.kernel_ports),
    )
