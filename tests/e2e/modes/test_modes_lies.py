"""Overlay packets that lie about their sender are dropped, each with its own reason, where people look for it.

world ---- underlay ---- c1n2 -- pod p1      the world claims to be c1n1, or its pod
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from modelab import ModeLab, wait_for
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet

from lab import build, topology

PORT = 8472


def inject(made: ModeLab, outer: str, inner: str, identity: int, target: str) -> None:
    """Send a VXLAN packet to c1n2 from the world, whose frames reach every node."""
    node = made.node("c1n2")
    packet: Packet = (
        Ether(src="02:00:00:00:00:66", dst=made.mac("c1n2"))
        / IP(src=outer, dst=node.addresses[0])
        / UDP(sport=40000, dport=PORT, chksum=0)
        / VXLAN(flags=0x88, gpid=identity >> 24, vni=identity & 0xFFFFFF)
        / Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
        / IP(src=inner, dst=target)
        / ICMP(id=7)
    )
    send(made, packet)


def send(made: ModeLab, packet: Packet) -> None:
    """A frame from the world."""
    with build.inside(made.name, topology.WORLD):
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with raw:
        raw.bind(("eth0", 0))
        raw.send(bytes(packet))


@contextmanager
def counted(made: ModeLab, reason: str, exactly: bool = True) -> Iterator[None]:
    """c1n2 counts one packet for this reason meanwhile (or more)."""
    before = made.counters("c1n2").get(reason, 0)
    yield

    def more() -> int:
        return made.counters("c1n2").get(reason, 0) - before

    wait_for(more, reason)
    assert more() == 1 or not exactly


@pytest.fixture
def ends(overlay: ModeLab) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pods of c1n1 and c1n2, both known at c1n2."""
    sender, receiver = overlay.pod("c1n1", "p1"), overlay.pod("c1n2", "p1")

    def known() -> bool:
        return any(
            e["prefix"] == f"{sender['ipv4']}/32" and e["identity"] == sender["identity"]
            for e in overlay.json("c1n2", "ipcache", "ls")
        )

    wait_for(known, "the sender's entry")
    return sender, receiver


def test_lies_are_dropped_by_reason(overlay: ModeLab, ends: tuple[dict[str, Any], dict[str, Any]]) -> None:
    sender, receiver = ends
    honest = overlay.node("c1n1").addresses[0]
    stranger = topology.gateway(1)[0]
    cases = {
        # Right node, right address, wrong identity.
        "OVERLAY_IDENTITY": (honest, sender["ipv4"], sender["identity"] ^ 1),
        # The upper byte counts as well.
        "OVERLAY_IDENTITY upper": (honest, sender["ipv4"], sender["identity"] ^ 1 << 24),
        # All of it right, but from another node than the pod's.
        "OVERLAY_SOURCE": (stranger, sender["ipv4"], sender["identity"]),
        # An address that is no pod's.
        "OVERLAY_SOURCE world": (honest, "198.51.100.7", sender["identity"]),
        # A pod of the receiver's own.
        "OVERLAY_SOURCE own": (honest, receiver["ipv4"], receiver["identity"]),
    }
    for case, (outer, inner, identity) in cases.items():
        with counted(overlay, f"DROP_REASON_{case.split()[0]}"):
            inject(overlay, outer, inner, identity, receiver["ipv4"])
    # The truth passes: what was dropped before was dropped for the lie alone.
    with counted(overlay, "DROP_REASON_UNSPECIFIED", exactly=False):
        inject(overlay, honest, sender["ipv4"], sender["identity"], receiver["ipv4"])


def test_a_lie_is_shown_by_the_monitor(
    overlay: ModeLab, ends: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    sender, receiver = ends
    lie = sender["identity"] ^ 1

    def seen() -> dict[str, Any] | None:
        # Until the watch is on, nothing is reported; so packets are sent until something is.
        inject(overlay, overlay.node("c1n1").addresses[0], sender["ipv4"], lie, receiver["ipv4"])
        events = map(json.loads, shown.read_text().splitlines())
        return next((e for e in events if e["reason"] == "DROP_REASON_OVERLAY_IDENTITY"), None)

    shown = tmp_path / "events"
    with (
        shown.open("w") as output,
        overlay.started("c1n2", "fibril", "-o", "json", "monitor", stdout=output, stderr=subprocess.DEVNULL),
    ):
        event = wait_for(seen, "the event")
    assert (event["source"], event["destination"]) == (sender["ipv4"], receiver["ipv4"])
    assert event["direction"] == "DIRECTION_FROM_OVERLAY"


def test_a_pod_s_address_on_the_uplink_is_refused(
    overlay: ModeLab, ends: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """Pods of a node reached by the overlay send nothing outside of it."""
    sender, receiver = ends
    packet = (
        Ether(src="02:00:00:00:00:66", dst=overlay.mac("c1n2"))
        / IP(src=sender["ipv4"], dst=receiver["ipv4"])
        / ICMP(id=7)
    )
    with counted(overlay, "DROP_REASON_UPLINK_SPOOFED"):
        send(overlay, packet)
