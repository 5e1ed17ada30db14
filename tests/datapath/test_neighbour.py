"""A pod that asks for MACs: its node answers for every address but the pod's own, and nobody else hears."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
)
from scapy.layers.l2 import ARP, Ether

from services.common.pipeline import abi
from services.common.pipeline.reasons import Reason
from tests.datapath.harness import HOST_MAC, REDIRECT, A, Datapath
from tests.datapath.packets import ether, ip, mac

GATEWAY4, GATEWAY6 = "10.1.0.1", "fd00:1::1"


def arp(**fields: Any) -> Ether:
    return ether(dst="ff:ff:ff:ff:ff:ff") / ARP(**{
        "op": 1, "hwsrc": mac(A), "psrc": str(A.ipv4), "hwdst": "00:00:00:00:00:00", "pdst": GATEWAY4, **fields})


def solicitation(target: str = GATEWAY6, source: str = str(A.ipv6), hlim: int = 255, option: bool = True) -> Ether:
    packet = ether(dst="33:33:ff:00:00:01") / IPv6(src=source, dst="ff02::1:ff00:1", hlim=hlim) / ICMPv6ND_NS(tgt=target)
    return packet / ICMPv6NDOptSrcLLAddr(lladdr=mac(A)) if option else packet


@pytest.mark.parametrize("target", [GATEWAY4, "10.1.0.77"])
def test_arp_request_is_answered_with_the_gateways_mac(dp: Datapath, target: str) -> None:
    result = dp.run(bytes(arp(pdst=target)))
    assert result.action == REDIRECT
    assert result.data == bytes(Ether(src=HOST_MAC, dst=mac(A)) / ARP(
        op=2, hwsrc=HOST_MAC, psrc=target, hwdst=mac(A), pdst=str(A.ipv4)))


@pytest.mark.parametrize("target", [GATEWAY6, "fd00:1::77"])
def test_solicitation_is_answered_with_the_gateways_mac(dp: Datapath, target: str) -> None:
    result = dp.run(bytes(solicitation(target)))
    assert result.action == REDIRECT
    assert result.data == bytes(
        Ether(src=HOST_MAC, dst=mac(A)) / IPv6(src=target, dst=str(A.ipv6), hlim=255)
        / ICMPv6ND_NA(tgt=target, R=1, S=1, O=1) / ICMPv6NDOptDstLLAddr(lladdr=HOST_MAC))


@pytest.mark.parametrize("packet", [
    arp(pdst=str(A.ipv4)), arp(psrc="0.0.0.0", pdst=str(A.ipv4)), arp(op=2), arp(hwtype=6), arp(hwlen=8)],
    ids=["own-address", "probe", "reply", "not-ethernet", "other-length"])
def test_other_arp_is_dropped(dp: Datapath, packet: Ether) -> None:
    result = dp.run(bytes(packet))
    assert (result.verdict, result.reason) == (abi.Verdict.DROPPED, Reason.ARP)


@pytest.mark.parametrize("packet", [
    solicitation(str(A.ipv6)), solicitation(source="::"), solicitation("fe80::1"), solicitation(hlim=254),
    solicitation(option=False), ether() / ip(GATEWAY6, 6, hlim=255) / ICMPv6ND_NA(tgt=str(A.ipv6))],
    ids=["own-address", "duplicate-detection", "link-local", "from-afar", "no-option", "advertisement"])
def test_other_neighbour_discovery_is_dropped(dp: Datapath, packet: Ether) -> None:
    result = dp.run(bytes(packet))
    assert (result.verdict, result.reason) == (abi.Verdict.DROPPED, Reason.NEIGHBOUR)


def test_short_arp_is_truncated(dp: Datapath) -> None:
    assert dp.run(bytes(arp())[:41]).reason == Reason.TRUNCATED


def test_asking_with_another_mac_is_spoofing(dp: Datapath) -> None:
    for packet in (arp(), solicitation()):
        packet.src = "02:00:00:00:01:99"
        assert dp.run(bytes(packet)).reason == Reason.SPOOFED_MAC
