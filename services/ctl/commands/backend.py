"""`fibril backend`: who serves a service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from services.ctl import balancing
from services.ctl.context import Ctl, pass_ctl
from services.ctl.render import columns, short, to_record

STATES = ("active", "terminating", "quarantined", "maintenance")


def _state(record: Mapping[str, Any], field: str) -> str:
    return short(record[field], "BACKEND_STATE_")


BACKENDS = columns(
    "service",
    ("BACKEND", lambda r: balancing.shown_endpoint(r["address"], r["port"])),
    "weight",
    ("STATE", lambda r: _state(r, "state")),
    ("HERE", lambda r: _state(r, "effective_state")),
    "zone",
    "node",
    "health",
)


@click.group(short_help="Who serves a service.")
def command() -> None:
    """Backends of services: added, drained, taken out."""


@command.command("ls")
@click.argument("service", default="", shell_complete=balancing.complete_service)
@pass_ctl
def ls(ctl: Ctl, service: str) -> None:
    """List backends, of one service or of all. HERE is the state on this node, health checks included."""
    from fibril.lb.v1 import lb_pb2

    if service:
        found = [balancing.ask(ctl, "GetService", lb_pb2.GetServiceRequest(name=service)).service]
    else:
        found = balancing.services(ctl)
    records = [{"service": each.name, **to_record(backend)} for each in found for backend in each.backends]
    ctl.show(records, BACKENDS, "no backends")


@command.command("add")
@click.argument("service", shell_complete=balancing.complete_service)
@click.argument("backends", nargs=-1, required=True, metavar="ADDRESS:PORT[=WEIGHT]…")
@click.option("--zone", default="", help="Zone they are in.")
@click.option("--node", default="", help="Node they run on.")
@pass_ctl
def add(ctl: Ctl, service: str, backends: Sequence[str], zone: str, node: str) -> None:
    """Add backends to a service, or change those that are there."""
    from fibril.lb.v1 import lb_pb2

    given = [balancing.backend(text) for text in backends]
    for backend in given:
        backend.zone, backend.node = zone, node
    answer = balancing.ask(ctl, "AddBackends", lb_pb2.AddBackendsRequest(service=service, backends=given))
    ctl.describe(to_record(answer))


@command.command("rm")
@click.argument("service", shell_complete=balancing.complete_service)
@click.argument("backends", nargs=-1, required=True, metavar="ADDRESS:PORT…")
@pass_ctl
def rm(ctl: Ctl, service: str, backends: Sequence[str]) -> None:
    """Take backends away at once; TCP connections to them are reset. See also: drain."""
    from fibril.lb.v1 import lb_pb2

    request = lb_pb2.RemoveBackendsRequest(service=service, backends=balancing.backend_keys(backends))
    ctl.describe(to_record(balancing.ask(ctl, "RemoveBackends", request)))


@command.command("set-state")
@click.argument("state", type=click.Choice(STATES))
@click.argument("backends", nargs=-1, required=True, metavar="ADDRESS:PORT…")
@click.option(
    "--service", default="", shell_complete=balancing.complete_service, help="Only of this one; else of all."
)
@pass_ctl
def set_state(ctl: Ctl, state: str, backends: Sequence[str], service: str) -> None:
    """Change the state of backends: whether they get new connections. Those there are go on."""
    _set(ctl, state, backends, service)


@command.command("drain")
@click.argument("backends", nargs=-1, required=True, metavar="ADDRESS:PORT…")
@click.option(
    "--service", default="", shell_complete=balancing.complete_service, help="Only of this one; else of all."
)
@pass_ctl
def drain(ctl: Ctl, backends: Sequence[str], service: str) -> None:
    """Give backends no new connections any more (set-state terminating)."""
    _set(ctl, "terminating", backends, service)


def _set(ctl: Ctl, state: str, backends: Sequence[str], service: str) -> None:
    from fibril.lb.v1 import lb_pb2

    request = lb_pb2.SetBackendStateRequest(
        service=service,
        backends=balancing.backend_keys(backends),
        state=lb_pb2.BackendState.Value(f"BACKEND_STATE_{state.upper()}"),
    )
    ctl.describe(to_record(balancing.ask(ctl, "SetBackendState", request)))
