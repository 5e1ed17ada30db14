"""`fibril monitor`: what the data path drops, live, with names."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import click

from services.ctl.context import Ctl, pass_ctl
from services.ctl.render import columns, short, to_record
from services.identity.numbers import Reserved

PROTOCOLS = {
    1: "icmp",
    2: "igmp",
    6: "tcp",
    17: "udp",
    41: "ipv6",
    47: "gre",
    50: "esp",
    58: "icmpv6",
    132: "sctp",
}
ETHERTYPES = {0x0800: "ipv4", 0x0806: "arp", 0x86DD: "ipv6", 0x8100: "vlan", 0x88A8: "qinq", 0x88CC: "lldp"}
TCP_FLAGS = "FSRPAUEC"
RESERVED = {int(each): each.label.removeprefix("reserved:") for each in Reserved}


def clock(nanos: int) -> str:
    """Local time of day with milliseconds."""
    return f"{time.strftime('%H:%M:%S', time.localtime(nanos // 10**9))}.{nanos // 10**6 % 1000:03d}"


def protocol(event: Mapping[str, Any]) -> str:
    """What kind of packet: "tcp", with its flags, or the Ethernet type of what is not IP."""
    number = event["protocol"]
    if not number:
        ethertype = event["ethertype"]
        return ETHERTYPES.get(ethertype, f"ether {ethertype:#06x}")
    name = PROTOCOLS.get(number, f"proto {number}")
    flags = "".join(c for bit, c in enumerate(TCP_FLAGS) if event["tcp_flags"] >> bit & 1)
    return f"{name} {flags}" if flags else name


def party(event: Mapping[str, Any], side: str) -> str:
    """One end of a packet: name of the pod or of the reserved identity, or else the identity, if known; address, port."""
    address, port, pod = event[side], event[f"{side}_port"], event[f"{side}_pod"]
    where = f"[{address}]:{port}" if port and ":" in address else f"{address}:{port}" if port else address
    identity = event.get(f"{side}_identity", 0)
    who = pod or RESERVED.get(identity, f"#{identity}" if identity else "")
    return f"{who}({where})" if who else where


def reason(name: str) -> str:
    """A drop reason in words."""
    return "" if name == "DROP_REASON_UNSPECIFIED" else short(name, "DROP_REASON_")


EVENTS = columns(
    ("TIME", lambda e: clock(e["time_unix_nanos"])),
    ("VERDICT", lambda e: short(e["verdict"], "VERDICT_")),
    ("REASON", lambda e: reason(e["reason"])),
    ("SEEN", lambda e: short(e["direction"], "DIRECTION_")),
    ("PROTOCOL", protocol),
    ("SOURCE", lambda e: party(e, "source")),
    ("DESTINATION", lambda e: party(e, "destination")),
    ("BYTES", "length"),
)
COUNTERS = columns(
    ("REASON", lambda c: reason(c["reason"]) or "(forwarded)"),
    ("SEEN", lambda c: short(c["direction"], "DIRECTION_")),
    "packets",
    "bytes",
)


@click.command(short_help="Show packets as they are dropped.")
@click.option("--forwarded", is_flag=True, help="Also packets that were forwarded.")
@click.option(
    "--endpoint", metavar="WHAT", help="Only packets from or to this endpoint (number, address or pod)."
)
@click.option("--counters", is_flag=True, help="Print the counters by reason, and leave.")
@click.option("--count", type=click.IntRange(min=1), help="Leave after so many events.")
@pass_ctl
def command(ctl: Ctl, forwarded: bool, endpoint: str | None, counters: bool, count: int | None) -> None:
    """Show dropped packets as they are dropped, until interrupted."""
    from fibril.monitor.v1 import monitor_pb2, monitor_pb2_grpc

    if counters:
        answer = ctl.call(
            lambda ch: monitor_pb2_grpc.MonitorServiceStub(ch).GetCounters(
                monitor_pb2.GetCountersRequest(), timeout=ctl.seconds
            )
        )
        ctl.show([to_record(c) for c in answer.counters], COUNTERS, "no packet counted yet")
        return
    number = 0
    if endpoint is not None:
        from services.ctl.commands.endpoint import find

        number = find(ctl, endpoint)["id"]
    live = ctl.live(EVENTS, (12, 9, 18, 8, 8, 36, 36, 5))
    left = count

    class Enough(Exception):
        """As many events as were asked for."""

    def handle(message: Any) -> None:
        nonlocal left
        if message.lost:
            click.echo(f"{message.lost} events lost: this reader is too slow", err=True)
        if not message.HasField("event"):
            return
        live.put(to_record(message.event))
        if left is not None:
            left -= 1
            if left == 0:
                raise Enough

    try:
        ctl.stream(
            lambda ch: monitor_pb2_grpc.MonitorServiceStub(ch).WatchEvents(
                monitor_pb2.WatchEventsRequest(forwarded=forwarded, endpoint_id=number)
            ),
            handle,
        )
    except Enough:
        pass
