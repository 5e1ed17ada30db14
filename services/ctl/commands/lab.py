"""`fibril lab`: nodes made of network namespaces, one cluster or several, on this machine."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from services.ctl.context import EXEC_SETTINGS, Ctl, pass_ctl, words
from services.ctl.render import columns, short

if TYPE_CHECKING:
    from lab.topology import Lab

NODES = columns("lab", "node", "instance", "cluster", "mode", "subnet", ("ADDRESSES", "addresses"), "netns",
                ("HEALTH", lambda r: short(r["health"], "HEALTH_")))  # fmt: skip
MODES, UNDERLAYS = ("overlay", "routed", "cloud", "auto"), ("dual", "ipv4", "ipv6")
# What another `up` may change of a lab that exists; the rest is what its nodes were started with.
GROWS = ("clusters", "nodes_each")


def _labs(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of the labs there are."""
    from lab import build

    return [name for name in build.labs() if name.startswith(incomplete)]


def _places(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Nodes of the lab, and the world."""
    from lab import build

    return [place for place in build.places(ctx.params.get("name") or "lab") if place.startswith(incomplete)]


NAME = click.option(
    "--name",
    default="lab",
    show_default=True,
    shell_complete=_labs,
    help="Name of the lab; several can exist.",
)


@click.group(short_help="Nodes made of network namespaces.")
def command() -> None:
    """Nodes made of network namespaces, with an underlay between them and a "world" beyond."""


@command.command("up")
@NAME
@click.option("--clusters", type=click.IntRange(1, 99), help="[default: 1]")
@click.option("--nodes", "nodes_each", type=click.IntRange(1, 99), help="Nodes of each cluster. [default: 1]")
@click.option(
    "--mode", type=click.Choice(MODES), help="How pods' packets travel between nodes. [default: overlay]"
)
@click.option("--ipv4/--no-ipv4", default=None, help="Whether pods have IPv4 addresses. [default: yes]")
@click.option("--ipv6/--no-ipv6", default=None, help="Whether pods have IPv6 addresses. [default: yes]")
@click.option(
    "--underlay",
    type=click.Choice(UNDERLAYS),
    help="Families of the network between nodes. [default: dual]",
)
@click.option(
    "--subnets",
    type=click.IntRange(1, 8),
    help="Networks the nodes are dealt out to, joined by a router. [default: 1]",
)
@click.option("--mtu", type=click.IntRange(1280, 9000), help="Of the underlay, bytes. [default: 1500]")
@click.option(
    "--etcd-members",
    type=click.Choice((1, 3)),
    help="An etcd on the first node of a cluster, or one member on each of three. [default: 1]",
)
@click.option(
    "--pods",
    type=click.IntRange(0, 99),
    default=0,
    show_default=True,
    help="Sample pods on each node: p1, p2, … with the labels app=p1, …",
)
@click.option("--services", default="", metavar="NAME,…", help="Services that each node runs. [default: all]")
@pass_ctl
def up(ctl: Ctl, /, name: str, pods: int, services: str, **given: Any) -> None:
    """Build the namespaces and start a node in each; again completes what is missing, with the same options
    unless more nodes are asked for."""
    from lab import build
    from services.common.errors import FailedPrecondition
    from services.ctl import labs
    from services.ctl.progress import Progress

    if os.geteuid() != 0:
        raise FailedPrecondition("a lab can only be built by root", fix="run it with sudo")
    lab = _wanted(name, {key: value for key, value in given.items() if value is not None})
    options = [] if ctl.timeout is None else ["--timeout", str(ctl.timeout)]
    with Progress(f"building lab {name!r}") as progress:
        build.remember(lab)
        build.build(lab)
        for batch in labs.batches(lab):
            progress.step(f"starting {', '.join(n.name for n in batch)}")
            labs.fibril(lab, batch, partial(labs.up_words, lab, services), "did not come up", options)
        if lab.mode == "cloud":
            progress.step("giving addresses to the nodes")
            firsts = [n for n in lab.nodes() if n.number == 1]
            labs.fibril(lab, firsts, partial(labs.pool_words, lab), "did not make the pool")
            labs.fibril(lab, lab.nodes(), partial(labs.address_words, lab), "did not take the addresses")
        for number in range(1, pods + 1):
            progress.step(f"making pod p{number} of every node")
            labs.fibril(lab, lab.nodes(), partial(labs.pod_words, number), f"did not make pod p{number}")
    _show(ctl, [name])


def _wanted(name: str, given: dict[str, Any]) -> Lab:
    """The lab as it shall be: what is given, else as it was, else the default.

    Raises FailedPrecondition when a lab that exists would have to change other than by growing."""
    from lab import build
    from lab.topology import Lab
    from services.common.errors import FailedPrecondition

    before = build.known(name)
    if before is None:
        return Lab(name, **given)
    for field, value in given.items():
        was = getattr(before, field)
        if field in GROWS:
            given[field] = max(was, value)
        elif value != was:
            raise FailedPrecondition(
                f"lab {name!r} exists with another {field}: {was}",
                field=field,
                fix=f"leave the option out, or take the lab down first: fibril lab down --name {name}",
            )
    return replace(before, **given)


@command.command("down")
@NAME
@pass_ctl
def down(ctl: Ctl, name: str) -> int:
    """Take down every node of a lab and remove its namespaces; none there is fine."""
    from lab import build, topology
    from services.ctl import labs
    from services.ctl.progress import Progress

    with Progress(f"removing lab {topology.check_name(name)!r}"):
        failed = labs.run(build.recall(name), build.nodes(name), lambda _: ["down"])
        build.remove(name)
    return int(bool(failed))


@command.command("ls")
@pass_ctl
def ls(ctl: Ctl) -> None:
    """List labs and their nodes."""
    from lab import build

    _show(ctl, build.labs())


@command.command("exec", context_settings=EXEC_SETTINGS)
@NAME
@click.argument("node", shell_complete=_places)
@click.argument("argv", nargs=-1, type=click.UNPROCESSED)
def exec_(name: str, node: str, argv: tuple[str, ...]) -> None:
    """Run a command (by default a shell) on NODE: c1n1, …, "world", "router" or "net" (the bridges). On a node,
    `fibril` means that node."""
    from lab import build
    from services.common.errors import NotFound
    from services.ctl import labs

    command = words(argv)
    lab = build.recall(name)
    found = lab.node_at(node)
    env = dict(os.environ)
    if found is not None:
        env = labs.environment(lab, found)
    with build.inside(name, node):
        if found is not None:
            labs.enter_cgroup(found)
        sys.stdout.flush()
        try:
            os.execvpe(command[0], command, env)
        except FileNotFoundError:
            raise NotFound(f"there is no command {command[0]!r}") from None


def _show(ctl: Ctl, labs: list[str]) -> None:
    from lab import build
    from services.common.instance import Instance
    from services.ctl import health
    from services.ctl.children import SERVICES

    rows = []
    for name in labs:
        lab = build.recall(name)
        for node in build.nodes(name):
            found = health.ask(Instance.from_env(node.instance), list(SERVICES))
            rows.append(
                {
                    "lab": name,
                    "node": node.name,
                    "instance": node.instance,
                    "cluster": node.cluster_name,
                    "mode": lab.mode,
                    "subnet": node.subnet,
                    "addresses": [address for address, _ in lab.underlay_of(node)],
                    "netns": node.netns,
                    "health": found.health,
                }
            )
    ctl.show(rows, NODES, "no lab; make one with: fibril lab up")
