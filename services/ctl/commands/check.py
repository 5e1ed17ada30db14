"""`fibril check`: do the pods of this node and the host reach each other?"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address

import click

from services.ctl.context import Ctl, pass_ctl
from services.ctl.render import columns

PROBES = columns(
    "from",
    "to",
    "address",
    ("RTT MS", lambda r: f"{r['rtt_ms']:.2f}" if r["result"] == "ok" else ""),
    "result",
)


@click.command(short_help="Do pods and host reach each other?")
@click.option(
    "--to", "targets", multiple=True, metavar="ADDRESS", help="Also ask this address from every pod."
)
@pass_ctl
def command(ctl: Ctl, targets: Sequence[str]) -> int:
    """Send echo requests between all pods of the node, from them to the host and back, over IPv4 and IPv6.

    Exit code 1 when one stays without an answer, or there is no pod."""
    from services.common.errors import FailedPrecondition, InvalidArgument
    from services.ctl import reach
    from services.ctl.commands.endpoint import list_all
    from services.ctl.progress import Progress

    extra = []
    for text in targets:
        try:
            version = ip_address(text).version
        except ValueError:
            raise InvalidArgument(f"{text!r} is not an IP address", field="to") from None
        extra.append(reach.Place("world", None, text if version == 4 else "", text if version == 6 else ""))
    endpoints = [e for e in list_all(ctl) if e["netns"]]
    if not endpoints:
        raise FailedPrecondition(
            f"instance {ctl.name!r} has no pod to check", fix="make one with: fibril pod add NAME"
        )
    pods = [
        reach.Place(e["pod"] or e["container_id"][:13], e["netns"], e["ipv4"], e["ipv6"]) for e in endpoints
    ]
    host = reach.Place(
        "host",
        None,
        next((e["ipv4_gateway"] for e in endpoints if e["ipv4_gateway"]), ""),
        next((e["ipv6_gateway"] for e in endpoints if e["ipv6_gateway"]), ""),
    )
    probes = reach.plan([*pods, host], extra)
    with Progress(f"asking {len(probes)} times"):
        reach.run(probes)
    rows = [
        {
            "from": p.source.name,
            "to": p.target.name,
            "address": p.address,
            "rtt_ms": round(p.ms, 3),
            "result": p.result,
        }
        for p in probes
    ]
    ctl.show(rows, PROBES)
    failed = sum(p.result != "ok" for p in probes)
    if failed:
        click.echo(f"{failed} of {len(probes)} without an answer; see: fibril monitor --counters", err=True)
    return int(bool(failed) or not probes)
