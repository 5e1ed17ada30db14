"""`fibril lb`: the balancer itself."""

from __future__ import annotations

import click

from services.ctl import balancing
from services.ctl.context import Ctl, pass_ctl
from services.ctl.render import columns, to_record

TABLES = columns("name", "used", "size", "limit")


@click.group(short_help="How full the balancer is.")
def command() -> None:
    """The load balancer of this node."""


@command.command("usage")
@pass_ctl
def usage(ctl: Ctl) -> None:
    """Show the kernel's tables, what became of connections, and backends towards which ports ran out."""
    from fibril.lb.v1 import lb_pb2

    answer = balancing.ask(ctl, "GetUsage", lb_pb2.GetUsageRequest())
    if ctl.output != "table":
        ctl.describe(to_record(answer))
        return
    ctl.show([to_record(each) for each in answer.tables], TABLES)
    click.echo()
    ctl.show(
        [{"event": k, "count": v} for k, v in sorted(answer.counters.items())], columns("event", "count")
    )
    for each in answer.exhausted:
        where = balancing.shown_endpoint(each.address, each.port)
        click.echo(f"no port was left towards {where}, {each.times} times; add backends or use DSR", err=True)
