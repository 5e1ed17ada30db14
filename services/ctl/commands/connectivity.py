"""`fibril connectivity`: does everything that shall reach each other do so?"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import TYPE_CHECKING

import click

from services.ctl.context import Ctl, pass_ctl

if TYPE_CHECKING:
    from services.ctl.connectivity.collect import Origin

KINDS = ("icmp", "tcp", "udp", "large")


@click.group(short_help="Does everything reach each other?")
def command() -> None:
    """Does everything that shall reach each other do so?"""


@command.command("test")
@click.option(
    "--lab", metavar="NAME", help="From all nodes of this lab instead of this node, and to its world."
)
@click.option(
    "--world",
    multiple=True,
    metavar="ADDRESS",
    envvar="FIBRIL_CONNECTIVITY_WORLD",
    help="Also ask this address outside the cluster, from everywhere. By default none but a lab's own.",
)
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice(KINDS),
    help="Only this kind of question; give it again for more. [default: all]",
)
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    metavar="N",
    help="At most N pods of each node, picked at random: for big clusters.",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 64),
    default=8,
    show_default=True,
    help="Pods that ask at the same time.",
)
@click.option(
    "--wait",
    type=click.FloatRange(0.05, 60),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="How long an answer may take; three tries.",
)
@pass_ctl
def test(
    ctl: Ctl,
    lab: str | None,
    world: Sequence[str],
    kinds: Sequence[str],
    sample: int | None,
    parallel: int,
    wait: float,
) -> int:
    """Ask every pod and node of the cluster, from every pod of this node and from the node itself.

    Over IPv4 and IPv6: echo requests, TCP connections, datagrams, and packets as large as pods may send, which must
    get through in one piece. Nothing needs to run at a target: a refused connection or datagram came from there, and
    so counts as an answer (TCP and UDP port 4241). In the pods of this node the command answers itself meanwhile,
    so towards them data is transferred as well.

    Exit code 1 when anything stays without an answer."""
    import time

    from services.common.errors import FailedPrecondition
    from services.ctl.connectivity import collect, report, runner
    from services.ctl.connectivity.model import PORT
    from services.ctl.connectivity.plan import WORLD_KINDS, plan
    from services.ctl.connectivity.responder import Responder
    from services.ctl.progress import Progress

    began = time.monotonic()
    wanted = tuple(k for k in KINDS if k in kinds) or KINDS
    with Progress("asking the services what there is") as progress:
        probes, namespaces = [], set()
        for run in _runs(ctl, lab, _addresses(world)):
            cluster = collect.cluster([collect.view(origin) for origin in run.origins])
            namespaces |= {s.netns for s in cluster.sources if s.is_pod} | run.answering
            # A world that answers, or whatever was asked for by name.
            beyond = wanted if run.answering or kinds else WORLD_KINDS
            probes += plan(cluster, wanted, run.world, set(beyond) - {"large"}, sample or 0)
        if not probes:
            raise FailedPrecondition(
                f"instance {ctl.name!r} knows of nothing to ask", fix="make a pod with: fibril pod add NAME"
            )
        with Responder(sorted(namespaces), PORT):
            pace = runner.Pace(wait_s=wait, parallel=parallel)
            progress.step(f"asking {len(probes)} questions")
            runner.run(probes, pace, lambda n: progress.step(f"asked {n} of {len(probes)} questions"))
    if ctl.output == "table":
        click.echo(report.text(probes, max(80, shutil.get_terminal_size((120, 24)).columns)))
        click.echo(f"{time.monotonic() - began:.1f} s", err=True)
    else:
        ctl.describe(report.record(probes))
    if any(not p.ok for p in probes):
        click.echo("what is dropped, and why: fibril monitor", err=True)
        return 1
    return 0


def _addresses(texts: Sequence[str]) -> list[str]:
    from services.common.errors import InvalidArgument

    found = []
    for text in texts:
        try:
            found.append(str(ip_address(text)))
        except ValueError:
            raise InvalidArgument(f"{text!r} is not an IP address", field="world") from None
    return found


@dataclass
class Run:
    """One cluster: the nodes to ask from, the addresses beyond, and namespaces that shall answer besides the pods."""

    origins: list[Origin]
    world: list[str]
    answering: set[str]


def _runs(ctl: Ctl, lab: str | None, world: list[str]) -> list[Run]:
    """What to run, cluster by cluster. Raises NotFound for a lab that is not there."""
    from services.common.errors import NotFound
    from services.ctl.connectivity.collect import Origin

    if lab is None:
        return [Run([Origin(ctl)], world, set())]
    from lab import build, topology

    nodes = build.nodes(lab)
    if not nodes:
        raise NotFound(f"there is no lab {lab!r}", field="lab", fix="see: fibril lab ls")
    # Nodes answer as well: they refuse only so many datagrams a second, and many pods may ask.
    answering = {str(build.path(lab, place)) for place in (topology.WORLD, *(n.name for n in nodes))}
    by_cluster: dict[int, list[Origin]] = {}
    for node in nodes:
        origin = Origin(replace(ctl, name=node.instance), str(build.path(lab, node.name)))
        by_cluster.setdefault(node.cluster, []).append(origin)
    beyond = world or list(build.recall(lab).world)
    return [Run(origins, beyond, answering) for origins in by_cluster.values()]
