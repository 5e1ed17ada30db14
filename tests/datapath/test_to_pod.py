"""Packets from the host's stack to pod A."""

from __future__ import annotations

import pytest
from scapy.layers.inet import TCP, UDP
from scapy.layers.inet6 import ICMPv6MLReport2, IPv6ExtHdrHopByHop
from scapy.layers.l2 import ARP, Ether

from services.common.pipeline import abi, install
from services.common.pipeline.reasons import Reason
from services.identity.numbers import Reserved
from tests.datapath.harness import HOST_MAC, UNSPEC, A, B, Datapath
from tests.datapath.packets import ip, mac


def to_a(**fields: object) -> Ether:
    return Ether(**{"src": HOST_MAC, "dst": mac(A), **fields})


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("source", ["host", "pod B", "world"])
def test_reaches_the_pod_unchanged(dp: Datapath, family: int, source: str) -> None:
    address = {"host": "10.1.0.1" if family == 4 else "fd00:1::1", "world": "192.0.2.1" if family == 4 else "2001:db8::1",
               "pod B": str(B.ipv4 if family == 4 else B.ipv6)}[source]
    packet = bytes(to_a() / ip(A, family, source=address) / TCP(sport=1, dport=2, flags="R"))
    result = dp.run(packet, install.TO_POD)
    assert (result.action, result.verdict, result.data) == (UNSPEC, abi.Verdict.DELIVERED, packet)
    event = result.event
    assert (event.direction, event.dst_id, event.src_id) == (
        abi.Direction.TO_POD, A.id, B.id if source == "pod B" else 0)
    assert event.src_identity == (B.identity if source == "pod B" else Reserved.WORLD)
    assert (event.tcp_flags, abi.host16(event.dport)) == (4, 2)


@pytest.mark.parametrize("packet", [
    to_a(dst="ff:ff:ff:ff:ff:ff") / ARP(), to_a(dst="33:33:00:00:00:16")
    / ip("ff02::16", 6, source="fe80::1") / IPv6ExtHdrHopByHop() / ICMPv6MLReport2()], ids=["arp", "mld"])
def test_what_the_host_itself_says_passes(dp: Datapath, packet: Ether) -> None:
    assert dp.run(bytes(packet), install.TO_POD).verdict == abi.Verdict.DELIVERED


def test_malformed_and_homeless_packets_are_dropped(dp: Datapath) -> None:
    assert dp.run(bytes(to_a() / ip(A, source=B, ihl=4) / UDP()), install.TO_POD).reason == Reason.MALFORMED
    dp.remove(A)
    assert dp.run(bytes(to_a() / ip(A, source=B) / UDP()), install.TO_POD).reason == Reason.NO_ENDPOINT
