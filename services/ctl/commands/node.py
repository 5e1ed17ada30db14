"""`fibril node`: the nodes of the cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from services.ctl.context import Ctl, completed, pages, pass_ctl
from services.ctl.render import columns, short, to_record

SERVICE = "identity"


def _mode(record: Mapping[str, Any]) -> str:
    if record["local"]:
        return "(this node)"
    mode = short(record["mode"], "NETWORK_MODE_")
    return "" if mode == "unspecified" else mode


def reached(record: Mapping[str, Any]) -> str:
    """What the probing nodes say: "2/2" when both that probe it reach it in both ways, and who does not."""
    views = record["reachability"]
    if not views:
        return ""
    bad = [v["prober"] for v in views if not (v["underlay"] and v["pod_network"])]
    return f"{len(views) - len(bad)}/{len(views)}" + (f" not from {','.join(bad)}" if bad else "")


NODES = columns(
    "name",
    ("STATE", lambda r: short(r["state"], "NODE_STATE_")),
    "ipv4",
    "ipv6",
    "pod_cidrs",
    ("MODE", _mode),
    ("MTU", lambda r: r["mtu"] or ""),
    ("REACHED", reached),
    "problem",
)
CHANGES = columns(
    ("CHANGE", lambda r: short(r["kind"], "WATCH_KIND_")),
    ("NAME", "node.name"),
    ("STATE", lambda r: short(r.get("node", {}).get("state", ""), "NODE_STATE_")),
    ("IPV4", "node.ipv4"),
    ("IPV6", "node.ipv6"),
    ("POD CIDRS", "node.pod_cidrs"),
    "revision",
)


def stub(channel: Any) -> Any:
    """A stub of NodeService."""
    from fibril.node.v1 import node_pb2_grpc

    return node_pb2_grpc.NodeServiceStub(channel)


def list_all(ctl: Ctl) -> list[dict[str, Any]]:
    """Every node of the cluster, sorted by name."""
    from fibril.node.v1 import node_pb2

    async def use(channel: Any) -> list[Any]:
        return await pages(
            lambda page: stub(channel).ListNodes(node_pb2.ListNodesRequest(page=page), timeout=ctl.seconds),
            "nodes",
        )

    return [to_record(n) for n in ctl.call(use, SERVICE)]


def complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of the nodes there are."""
    return completed(ctx, incomplete, lambda ctl: [n["name"] for n in list_all(ctl)])


@click.group(short_help="Nodes of the cluster.")
def command() -> None:
    """Nodes of the cluster, as this one sees them."""


@command.command("ls")
@pass_ctl
def ls(ctl: Ctl) -> None:
    """List the nodes."""
    ctl.show(list_all(ctl), NODES, "no nodes")


@command.command("get")
@click.argument("name", required=False, default="", shell_complete=complete)
@pass_ctl
def get(ctl: Ctl, name: str) -> None:
    """Show one node in full, by default this one."""
    from fibril.node.v1 import node_pb2

    request = node_pb2.GetNodeRequest(name=name)
    node = to_record(ctl.call(lambda ch: stub(ch).GetNode(request, timeout=ctl.seconds), SERVICE).node)
    if ctl.output == "table":
        node["reachability"] = [_view(v) for v in node["reachability"]]
    ctl.describe(node)


def _view(view: Mapping[str, Any]) -> str:
    ways = {"underlay": view["underlay"], "pods": view["pod_network"]}
    text = " ".join(f"{way} {'ok' if ok else 'NOT REACHED'}" for way, ok in ways.items())
    rtt = f" {view['rtt_us']} us" if view["rtt_us"] else ""
    return f"{view['prober']}: {text}{rtt}"


@command.command("rm")
@click.argument("names", nargs=-1, required=True, shell_complete=complete)
@pass_ctl
def rm(ctl: Ctl, names: Sequence[str]) -> None:
    """Forget nodes that are gone for good: their records, their blocks of addresses and their pods' addresses."""
    from fibril.node.v1 import node_pb2

    async def delete(channel: Any) -> list[dict[str, str]]:
        rows = []
        for name in names:
            answer = await stub(channel).DeleteNode(
                node_pb2.DeleteNodeRequest(name=name), timeout=ctl.seconds
            )
            rows += [{"node": name, "freed": block} for block in answer.blocks]
        return rows

    ctl.show(ctl.call(delete, SERVICE), columns("node", "freed"), "no block was freed")


@command.command("watch")
@pass_ctl
def watch(ctl: Ctl) -> None:
    """Show nodes as they come, change and go, until interrupted."""
    from fibril.node.v1 import node_pb2

    live = ctl.live(CHANGES, (8, 20, 6, 15, 20, 36, 0))
    ctl.stream(
        lambda ch: stub(ch).WatchNodes(node_pb2.WatchNodesRequest()),
        lambda message: live.put(to_record(message)),
        SERVICE,
    )
