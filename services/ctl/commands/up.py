"""`fibril up`."""

from __future__ import annotations

from pathlib import Path

import click

from services.ctl.context import Ctl, pass_ctl

# The first start of a version compiles its programs: seconds, on a machine with other things to do many more.
UP_TIMEOUT = 120.0


def _words(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in value.split(",") if word.strip())


@click.command(short_help="Start the node; again repairs it.")
@click.option(
    "--services", default="all", callback=_words, metavar="NAME,…", help="Services to run. [default: all]"
)
@click.option("--in-process", is_flag=True, help="All services in one process, for small nodes.")
@click.option(
    "--etcd",
    default="",
    callback=_words,
    metavar="URL,…",
    help="Use this etcd instead of a child of our own.",
)
@click.option(
    "--etcd-members",
    default="",
    callback=_words,
    metavar="ADDRESS,…",
    help="Have an etcd of our own on the nodes with these addresses; the same list on every node. Its members talk "
    "in the clear: for networks you trust.",
)
@click.option("--cluster", default="", metavar="NAME", help="Cluster the node belongs to.")
@click.option("--foreground", is_flag=True, help="Become the supervisor, for service managers.")
@pass_ctl
def command(
    ctl: Ctl,
    services: tuple[str, ...],
    in_process: bool,
    etcd: tuple[str, ...],
    etcd_members: tuple[str, ...],
    cluster: str,
    foreground: bool,
) -> None:
    """Start the node and wait until all of it is well; again is harmless and repairs what has died."""
    from services.ctl import children, node
    from services.ctl.commands.status import show

    chosen = tuple(children.SERVICES) if services in ((), ("all",)) else services
    config = "" if ctl.config is None else str(Path(ctl.config).absolute())
    options = children.Options(
        services=chosen,
        in_process=in_process,
        etcd=etcd,
        config=config,
        cluster=cluster,
        etcd_members=etcd_members,
    )
    if foreground:
        node.foreground(ctl.instance, options)
    show(ctl, node.up(ctl.instance, options, UP_TIMEOUT if ctl.timeout is None else ctl.timeout))
