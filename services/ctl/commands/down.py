"""`fibril down`."""

from __future__ import annotations

import click

from services.ctl.context import Ctl, pass_ctl


@click.command(short_help="Stop the node, remove every trace.")
@click.option(
    "--keep-state", is_flag=True, help="Keep the state directory: allocations, and the data of our own etcd."
)
@pass_ctl
def command(ctl: Ctl, keep_state: bool) -> int:
    """Stop the node and remove every trace: processes, pods, interfaces, routes, programs, maps, files."""
    from services.ctl import node

    failures = node.down(ctl.instance, keep_state)
    for text in failures:
        click.echo(f"fibril: could not remove {text}", err=True)
    if not failures:
        click.echo(f"instance {ctl.name}: gone", err=True)
    return int(bool(failures))
