"""`fibril status`: every process, service, map and connection of a node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from services.ctl.context import Ctl, pass_ctl
from services.ctl.render import age, columns, short

if TYPE_CHECKING:
    from services.ctl.health import NodeHealth

PARTS = columns(
    "source",
    "name",
    ("HEALTH", lambda r: short(r["health"], "HEALTH_")),
    ("USED", lambda r: f"{r['used']}/{r['capacity']}" if r["capacity"] else ""),
    ("SINCE", lambda r: age(r["since_unix_seconds"])),
    "message",
)


def show(ctl: Ctl, node: NodeHealth) -> None:
    """Print a node's health."""
    if ctl.output == "table":
        ctl.show(node.record()["parts"], PARTS)
        click.echo(f"instance {node.instance}: {short(node.health, 'HEALTH_')}")
    else:
        ctl.show(node.record(), PARTS)


@click.command(short_help="Show how every part of the node is.")
@pass_ctl
def command(ctl: Ctl) -> int:
    """Show how the node is; exit code 0 only when all of it is well."""
    from services.ctl import health
    from services.ctl.children import SERVICES

    node = health.ask(ctl.instance, list(SERVICES), min(ctl.seconds, 5.0))
    show(ctl, node)
    return 0 if node.ok else 1
