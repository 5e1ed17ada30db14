"""`fibril ipcache`: which identity an address has, and behind which node it is."""

from __future__ import annotations

from typing import Any

import click

from services.ctl.commands import node as nodes
from services.ctl.context import Ctl, completed, pages, pass_ctl
from services.ctl.render import columns, short, to_record

SERVICE = "identity"
ENTRIES = columns(
    "prefix",
    "identity",
    ("SOURCE", lambda r: short(r["source"], "ENTRY_SOURCE_")),
    "node",
    ("HERE", lambda r: "yes" if r["local"] else ""),
    "pod",
    "tunnel_endpoint",
)
CHANGES = columns(
    ("CHANGE", lambda r: short(r["kind"], "WATCH_KIND_")),
    ("PREFIX", "entry.prefix"),
    ("IDENTITY", "entry.identity"),
    ("SOURCE", lambda r: short(r.get("entry", {}).get("source", ""), "ENTRY_SOURCE_")),
    ("NODE", "entry.node"),
    ("POD", "entry.pod"),
    "revision",
)


def stub(channel: Any) -> Any:
    """A stub of IpcacheService."""
    from fibril.ipcache.v1 import ipcache_pb2_grpc

    return ipcache_pb2_grpc.IpcacheServiceStub(channel)


def list_all(ctl: Ctl, node: str = "", identity: int = 0) -> list[dict[str, Any]]:
    """Every entry, or those of a node or with an identity."""
    from fibril.ipcache.v1 import ipcache_pb2

    async def use(channel: Any) -> list[Any]:
        return await pages(
            lambda page: stub(channel).ListEntries(
                ipcache_pb2.ListEntriesRequest(page=page, node=node, identity=identity), timeout=ctl.seconds
            ),
            "entries",
        )

    return [to_record(e) for e in ctl.call(use, SERVICE)]


def _complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Single addresses there are."""
    return completed(
        ctx,
        incomplete,
        lambda ctl: [
            e["prefix"].partition("/")[0]
            for e in list_all(ctl)
            if e["source"] in ("ENTRY_SOURCE_POD", "ENTRY_SOURCE_NODE")
        ],
    )


@click.group(short_help="Identity and node of addresses.")
def command() -> None:
    """The node's table of addresses: which identity each has, and behind which node it is."""


@command.command("ls")
@click.option("--node", default="", metavar="NAME", shell_complete=nodes.complete, help="Only of this node.")
@click.option(
    "--identity", type=click.IntRange(0), default=0, metavar="NUMBER", help="Only with this identity."
)
@pass_ctl
def ls(ctl: Ctl, node: str, identity: int) -> None:
    """List the entries."""
    ctl.show(list_all(ctl, node, identity), ENTRIES, "no entries")


@command.command("get")
@click.argument("address", shell_complete=_complete)
@pass_ctl
def get(ctl: Ctl, address: str) -> None:
    """Show the entry of the longest prefix that holds an address."""
    from fibril.ipcache.v1 import ipcache_pb2

    request = ipcache_pb2.GetEntryRequest(address=address)
    ctl.describe(
        to_record(ctl.call(lambda ch: stub(ch).GetEntry(request, timeout=ctl.seconds), SERVICE).entry)
    )


@command.command("watch")
@pass_ctl
def watch(ctl: Ctl) -> None:
    """Show entries as they come, change and go, until interrupted."""
    from fibril.ipcache.v1 import ipcache_pb2

    live = ctl.live(CHANGES, (8, 30, 10, 6, 16, 16, 0))
    ctl.stream(
        lambda ch: stub(ch).WatchEntries(ipcache_pb2.WatchEntriesRequest()),
        lambda message: live.put(to_record(message)),
        SERVICE,
    )
