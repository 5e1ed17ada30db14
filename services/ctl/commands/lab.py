"""`fibril lab`: nodes made of network namespaces, one cluster or several, on this machine."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from services.ctl.context import EXEC_SETTINGS, Ctl, pass_ctl, words
from services.ctl.render import columns, short

if TYPE_CHECKING:
    import subprocess

    from lab.topology import Node

NODES = columns("lab", "node", "instance", "cluster", ("ADDRESSES", "addresses"), "netns",
                ("HEALTH", lambda r: short(r["health"], "HEALTH_")))  # fmt: skip
NAME = click.option("--name", default="lab", show_default=True, help="Name of the lab; several can exist.")


@click.group(short_help="Nodes made of network namespaces.")
def command() -> None:
    """Nodes made of network namespaces, with an underlay between them and a "world" beyond."""


@command.command("up")
@NAME
@click.option("--clusters", type=click.IntRange(1, 99), default=1, show_default=True)
@click.option(
    "--nodes", type=click.IntRange(1, 99), default=1, show_default=True, help="Nodes of each cluster."
)
@pass_ctl
def up(ctl: Ctl, name: str, clusters: int, nodes: int) -> None:
    """Build the namespaces and start a node in each; again completes what is missing."""
    from lab import build
    from lab.topology import Lab
    from services.common.errors import FailedPrecondition
    from services.ctl.progress import Progress

    if os.geteuid() != 0:
        raise FailedPrecondition("a lab can only be built by root", fix="run it with sudo")
    made = Lab(name, clusters, nodes)
    with Progress(f"building lab {name!r}") as progress:
        build.build(made)
        # The first node of a cluster has its etcd, the others need it.
        firsts = [n for n in made.nodes() if n.number == 1]
        others = [n for n in made.nodes() if n.number > 1]
        for batch in (firsts, others):
            progress.step(f"starting {', '.join(n.name for n in batch)}")
            failed = _fibril_on(ctl, batch, _up_words)
            if failed:
                raise FailedPrecondition(
                    f"lab {name!r}: {', '.join(n.name for n in failed)} did not come up (said above why)",
                    fix=f"try again, or remove it: fibril lab down --name {name}",
                )
    _show(ctl, [name])


@command.command("down")
@NAME
@pass_ctl
def down(ctl: Ctl, name: str) -> int:
    """Take down every node of a lab and remove its namespaces; none there is fine."""
    from lab import build, topology
    from services.ctl.progress import Progress

    with Progress(f"removing lab {topology.check_name(name)!r}"):
        failed = _fibril_on(ctl, build.nodes(name), lambda _: ["down"])
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
@click.argument("node")
@click.argument("argv", nargs=-1, type=click.UNPROCESSED)
def exec_(name: str, node: str, argv: tuple[str, ...]) -> None:
    """Run a command (by default a shell) on NODE: c1n1, …, or "world". There, `fibril` means that node."""
    from lab import build, topology
    from services.common.errors import NotFound

    command = words(argv)
    found = topology.parse_node(topology.check_name(name), node)
    env = _environment(found) if found is not None else dict(os.environ)
    with build.inside(name, node):
        sys.stdout.flush()
        try:
            os.execvpe(command[0], command, env)
        except FileNotFoundError:
            raise NotFound(f"there is no command {command[0]!r}") from None


def _environment(node: Node) -> dict[str, str]:
    """What makes `fibril` on that node mean that node, and this very `fibril` be found there; and the part of the
    services' configuration in which nodes differ."""
    ipv4, ipv6 = node.pool
    return {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', os.defpath)}",
        "FIBRIL_INSTANCE": node.instance,
        "FIBRIL_ETCD_NODE": node.instance,
        "FIBRIL_POOLS_IPV4": ipv4,
        "FIBRIL_POOLS_IPV6": ipv6,
    }


def _up_words(node: Node) -> list[str]:
    line = ["up", "--cluster", node.cluster_name]
    if node.number > 1:
        from lab.topology import Node as AnyNode
        from services.common.instance import Instance
        from services.ctl.node import embedded_etcd

        first = AnyNode(node.lab, node.cluster, 1)
        line += ["--etcd", embedded_etcd(Instance.from_env(first.instance)).endpoint]
    return line


def _fibril_on(ctl: Ctl, nodes: list[Node], line: Any) -> list[Node]:
    """Run `fibril …` on several nodes at once, its messages on our standard error; gives the nodes where
    it failed."""
    import subprocess

    from lab import build

    running: list[tuple[Node, subprocess.Popen[bytes]]] = []
    options = [] if ctl.timeout is None else ["--timeout", str(ctl.timeout)]
    for node in nodes:
        argv = [sys.executable, "-m", "services.ctl.main", *options, *line(node)]
        with build.inside(node.lab, node.name):
            running.append(
                (
                    node,
                    subprocess.Popen(
                        argv, env=_environment(node), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
                    ),
                )
            )
    return [node for node, popen in running if popen.wait() != 0]


def _show(ctl: Ctl, labs: list[str]) -> None:
    from lab import build
    from services.common.instance import Instance
    from services.ctl import health
    from services.ctl.node import SERVICES

    rows = []
    for lab in labs:
        for node in build.nodes(lab):
            found = health.ask(Instance.from_env(node.instance), list(SERVICES))
            rows.append(
                {
                    "lab": lab,
                    "node": node.name,
                    "instance": node.instance,
                    "cluster": node.cluster_name,
                    "addresses": list(node.addresses),
                    "netns": node.netns,
                    "health": found.health,
                }
            )
    ctl.show(rows, NODES, "no lab; make one with: fibril lab up")
