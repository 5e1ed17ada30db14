"""Health checks: fibril.lb.v1.HealthCheck to the model and back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from fibril.lb.v1 import lb_pb2 as pb
from services.common import errors
from services.lb import fields
from services.lb.model import GrpcProbe, HealthCheck, HttpProbe, TcpProbe

INTERVAL_MS: Final = (100, 3_600_000)
PATH_MAX: Final = 2048
RANGES_MAX: Final = 100
_STATUS: Final = re.compile(r"([1-5][0-9][0-9])(?:-([1-5][0-9][0-9]))?")
_PATH: Final = re.compile(r"/[\x21-\x7e]*")
_HOST: Final = re.compile(r"[\x21-\x7e]*")


def health_check(message: pb.HealthCheck, at: str) -> HealthCheck:
    """Checked; raises InvalidArgument that names the field."""
    interval = fields.number(message.interval_ms, *INTERVAL_MS, 10_000, f"{at}.interval_ms")
    timeout = message.timeout_ms or min(1000, interval)
    if timeout > interval:
        raise errors.InvalidArgument(
            f"a check that lasts {timeout} ms does not end before the next, after {interval} ms",
            field=f"{at}.timeout_ms",
            fix=f"give at most {interval}",
        )
    return HealthCheck(
        probe=_probe(message, at),
        port=fields.number(message.port, 1, 65535, 0, f"{at}.port"),
        interval_s=interval / 1000,
        timeout_s=timeout / 1000,
        unhealthy_after=fields.number(message.unhealthy_after, 1, 100, 3, f"{at}.unhealthy_after"),
        healthy_after=fields.number(message.healthy_after, 1, 100, 2, f"{at}.healthy_after"),
    )


def _probe(message: pb.HealthCheck, at: str) -> TcpProbe | HttpProbe | GrpcProbe:
    match message.WhichOneof("probe"):
        case "tcp":
            return TcpProbe()
        case "grpc":
            return GrpcProbe(fields.text(message.grpc.service, f"{at}.grpc.service"))
        case "http":
            http, where = message.http, f"{at}.http"
            path = http.path or "/"
            if not _PATH.fullmatch(path) or len(path) > PATH_MAX:
                raise errors.InvalidArgument(
                    f"{fields.shown(path)} is no path",
                    field=f"{where}.path",
                    fix='begin with "/" and write what is not printable as %XX',
                )
            if not _HOST.fullmatch(http.host) or len(http.host) > fields.TEXT_MAX:
                raise errors.InvalidArgument(
                    f"{fields.shown(http.host)} is no host", field=f"{where}.host", fix='write "example.org"'
                )
            return HttpProbe(path, http.host, _statuses(http.statuses, f"{where}.statuses"))
        case _:
            raise errors.InvalidArgument(
                "the health check does not say what to ask", field=at, fix="give tcp, http or grpc"
            )


def _statuses(given: Iterable[str], at: str) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for number, each in enumerate(given):
        fields.at_most(number + 1, RANGES_MAX, "ranges of statuses or more", at)
        match = _STATUS.fullmatch(each)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise errors.InvalidArgument(
                f"{fields.shown(each)} is no range of statuses",
                field=f"{at}[{number}]",
                fix='write "204" or "200-299"',
            )
        found.append((low, high))
    return tuple(found) or HttpProbe().statuses


def to_proto(check: HealthCheck) -> pb.HealthCheck:
    """As it would be given."""
    message = pb.HealthCheck(
        port=check.port,
        interval_ms=round(check.interval_s * 1000),
        timeout_ms=round(check.timeout_s * 1000),
        unhealthy_after=check.unhealthy_after,
        healthy_after=check.healthy_after,
    )
    match check.probe:
        case TcpProbe():
            message.tcp.SetInParent()
        case GrpcProbe(service=name):
            message.grpc.SetInParent()
            message.grpc.service = name
        case HttpProbe(path, host, statuses):
            message.http.path, message.http.host = path, host
            message.http.statuses.extend(
                str(low) if low == high else f"{low}-{high}" for low, high in statuses
            )
    return message
