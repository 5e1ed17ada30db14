"""`fibril trace`: what processes execute and connect to, live, with pods instead of numbers."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import click

from services.ctl.commands.monitor import clock
from services.ctl.context import Ctl, pass_ctl
from services.ctl.render import Column, cell, columns, to_record

PROTOCOLS = {6: "tcp", 17: "udp"}


def pod(event: Mapping[str, Any]) -> str:
    """Name of the pod a process belongs to; "(host)" for none."""
    known = event["process"].get("workload")
    if known is None:
        return "(host)"
    return str(known["pod"] or known["container_id"][:13] or f"endpoint {known['endpoint_id']}")


def labels(event: Mapping[str, Any]) -> str:
    """Labels of the pod."""
    return cell(event["process"].get("workload", {}).get("labels"))


def program(event: Mapping[str, Any]) -> str:
    """What was executed, as one would type it."""
    return shlex.join([event["path"], *event["arguments"][1:]])


def address(event: Mapping[str, Any], side: str) -> str:
    """One end of a connection."""
    host, port = event[side], event[f"{side}_port"]
    if not host:
        return ""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


WHO = (
    ("TIME", lambda e: clock(e["time_unix_nanos"])),
    ("POD", pod),
    ("LABELS", labels),
    ("PID", "process.pid"),
)
EXECS = columns(*WHO, ("PARENT", "process.parent_pid"), ("USER", "process.uid"), ("PROGRAM", program))
CONNECTS = columns(
    *WHO,
    ("COMMAND", "process.command"),
    ("PROTOCOL", lambda e: PROTOCOLS.get(e["protocol"], e["protocol"])),
    ("SOURCE", lambda e: address(e, "source")),
    ("DESTINATION", lambda e: address(e, "destination")),
)
_PLACE = (12, 14, 24, 7)


def _options(function: Callable[..., None]) -> Callable[..., None]:
    """Which events, and how many."""
    for option in (
        click.option("--count", type=click.IntRange(min=1), help="Leave after so many events."),
        click.option("--endpoint", metavar="WHAT", help="Only of this endpoint (number, address or pod)."),
        click.option("--host", is_flag=True, help="Also of processes that are of no pod."),
    ):
        function = option(function)
    return function


@click.group(short_help="What processes do, by pod.")
def command() -> None:
    """Show what processes execute and connect to, live and named by pod. Nothing is traced while nobody looks."""


@command.command("exec")
@_options
@pass_ctl
def exec_(ctl: Ctl, host: bool, endpoint: str | None, count: int | None) -> None:
    """Show programs as pods execute them, until interrupted."""
    _show(ctl, "WatchExecs", EXECS, (*_PLACE, 7, 5, 0), host, endpoint, count)


@command.command("connect")
@_options
@pass_ctl
def connect(ctl: Ctl, host: bool, endpoint: str | None, count: int | None) -> None:
    """Show TCP connections as pods open them and UDP sockets as they are connected, until interrupted."""
    _show(ctl, "WatchConnects", CONNECTS, (*_PLACE, 15, 8, 22, 0), host, endpoint, count)


def _show(
    ctl: Ctl,
    method: str,
    cols: Sequence[Column],
    widths: Sequence[int],
    host: bool,
    endpoint: str | None,
    count: int | None,
) -> None:
    from fibril.workload.v1 import workload_pb2, workload_pb2_grpc

    if host and endpoint is not None:
        raise click.UsageError("give either --host or --endpoint")
    number = 0
    if endpoint is not None:
        from services.ctl.commands.endpoint import find

        number = find(ctl, endpoint)["id"]
    request = getattr(workload_pb2, f"{method}Request")(host=host, endpoint_id=number)
    live = ctl.live(cols, widths)
    left, lost = count, 0

    class Enough(Exception):
        """As many events as were asked for."""

    async def events(channel: Any) -> AsyncIterator[Any]:
        call = getattr(workload_pb2_grpc.WorkloadServiceStub(channel), method)(request)
        if (await call.initial_metadata()).get("fibril-trace"):
            click.echo("tracing", err=True)
        async for message in call:
            yield message

    def handle(message: Any) -> None:
        nonlocal left, lost
        if message.lost > lost:
            click.echo(f"{message.lost - lost} events lost: they came faster than they are read", err=True)
            lost = message.lost
        live.put(to_record(message))
        if left is not None:
            left -= 1
            if left == 0:
                raise Enough

    try:
        ctl.stream(events, handle, "identity")
    except Enough:
        pass
