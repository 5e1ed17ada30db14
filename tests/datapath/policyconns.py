"""Connections as the policy programs' tests make them: from pod A's port 4000 to port 80 of another."""

from __future__ import annotations

from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, fragment
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, fragment6

from tests.datapath.policykit import Rig


def tcp(flags: str, sport: int = 4000, dport: int = 80, **fields: Any) -> TCP:
    return TCP(sport=sport, dport=dport, flags=flags, seq=1000, ack=2000 if "A" in flags else 0, **fields)


def back(flags: str, **fields: Any) -> TCP:
    return tcp(flags, 80, 4000, **fields)


def connect(rig: Rig, family: int = 4, peer: Any = None) -> None:
    peer = peer or rig.b
    assert rig.packet(rig.a, peer, tcp("S"), family).passed
    assert rig.packet(rig.a, peer, back("SA"), family, back=True).passed
    assert rig.packet(rig.a, peer, tcp("A"), family).passed


def echo(family: int, answer: bool = False, number: int = 77, data: bytes = b"ping") -> Any:
    if family == 4:
        return ICMP(type=0 if answer else 8, id=number, seq=1) / data
    return (ICMPv6EchoReply if answer else ICMPv6EchoRequest)(id=number, seq=1, data=data)


def pieces_of(packet: Any) -> list[Any]:
    made: list[Any] = fragment(packet, 1200) if IP in packet else fragment6(packet, 1280)  # type: ignore[no-untyped-call]
    return made
