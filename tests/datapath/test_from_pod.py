"""A packet's way out of a pod: before and after, case by case."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_RR
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6MLReport2,
    ICMPv6ND_RS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import Dot1Q, Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Raw

from services.common.pipeline import abi
from services.common.pipeline.reasons import Reason
from tests.datapath.harness import PODS, REDIRECT, SHAPED, SMALL, UNSPEC, A, B, Datapath, make_pod
from tests.datapath.packets import delivered, ether, ip, mac

FAMILIES = pytest.mark.parametrize("family", [4, 6])
TRANSPORTS: dict[str, Any] = {
    "tcp": TCP(sport=4000, dport=80, flags="SA"), "udp": UDP(sport=4000, dport=53) / b"question",
    "udp-empty": UDP(sport=4000, dport=53), "sctp": SCTP(sport=4000, dport=9), "unknown": Raw(b"12345"),
}


@FAMILIES
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("near", [True, False], ids=["near", "by-hash"])
def test_reaches_local_pod_with_its_macs_and_one_hop_less(
        dp: Datapath, family: int, transport: str, near: bool) -> None:
    if not near:
        dp.forget_near()
    packet = ether() / ip(B, family) / TRANSPORTS[transport]
    result = dp.run(bytes(packet))
    assert (result.action, result.verdict) == (REDIRECT, abi.Verdict.DELIVERED)
    assert result.data == delivered(packet, B)
    assert (result.event.src_id, result.event.dst_id) == (A.id, B.id)


@FAMILIES
@pytest.mark.parametrize(("transport", "ports"), [("tcp", (4000, 80)), ("udp", (4000, 53)), ("unknown", (0, 0))])
def test_event_describes_the_packet(dp: Datapath, family: int, transport: str, ports: tuple[int, int]) -> None:
    packet = ether() / ip(B, family) / TRANSPORTS[transport]
    event = dp.run(bytes(packet)).event
    assert (abi.host16(event.sport), abi.host16(event.dport)) == ports
    assert (event.src.ip(), event.dst.ip()) == ((A.ipv4, B.ipv4) if family == 4 else (A.ipv6, B.ipv6))
    assert (event.family, event.len, event.ifindex) == (family, len(packet), 1)
    assert event.tcp_flags == (0x12 if transport == "tcp" else 0)
    assert abi.host16(event.ethertype) == (0x800 if family == 4 else 0x86DD)
    assert event.direction == abi.Direction.FROM_POD


def test_icmp_type_and_code_are_known(dp: Datapath) -> None:
    event = dp.run(bytes(ether() / ip(B) / ICMP(type=3, code=4))).event
    assert (event.proto, event.icmp_type, event.icmp_code) == (1, 3, 4)
    event = dp.run(bytes(ether() / ip(B, 6) / ICMPv6EchoRequest())).event
    assert (event.proto, event.icmp_type, event.icmp_code) == (58, 128, 0)


DROPS: dict[str, tuple[Any, Reason]] = {
    "another-mac": (ether(src="02:00:00:00:01:99") / ip(B) / TCP(), Reason.SPOOFED_MAC),
    "the-hosts-mac": (ether(src="02:00:00:00:00:01") / ip(B) / TCP(), Reason.SPOOFED_MAC),
    "another-v4": (ether() / ip(B, source="10.1.0.99") / TCP(), Reason.SPOOFED_IPV4),
    "other-pods-v4": (ether() / ip(SMALL, source=B) / TCP(), Reason.SPOOFED_IPV4),
    "zero-v4": (ether() / ip(B, source="0.0.0.0") / TCP(), Reason.SPOOFED_IPV4),
    "another-v6": (ether() / ip(B, 6, source="fd00:1::99") / TCP(), Reason.SPOOFED_IPV6),
    "v6-differs-in-first-half": (ether() / ip(B, 6, source="fd00:2::a") / TCP(), Reason.SPOOFED_IPV6),
    "link-local-v6": (ether() / ip(B, 6, source="fe80::1") / TCP(), Reason.SPOOFED_IPV6),
    "unspecified-v6": (ether() / ip(B, 6, source="::") / TCP(), Reason.SPOOFED_IPV6),
    "broadcast": (ether(dst="ff:ff:ff:ff:ff:ff") / ip("255.255.255.255") / UDP(), Reason.BROADCAST),
    "dhcp": (ether(dst="ff:ff:ff:ff:ff:ff") / ip("255.255.255.255", source="0.0.0.0")
             / UDP(sport=68, dport=67) / BOOTP() / DHCP(options=[("message-type", "discover"), "end"]),
             Reason.BROADCAST),
    "multicast-v4": (ether(dst="01:00:5e:00:00:fb") / ip("224.0.0.251") / UDP(), Reason.MULTICAST),
    "multicast-v6": (ether(dst="33:33:00:00:00:fb") / ip("ff02::fb", 6) / UDP(), Reason.MULTICAST),
    "router-solicitation": (ether(dst="33:33:00:00:00:02") / ip("ff02::2", 6, source="fe80::1") / ICMPv6ND_RS(),
                            Reason.MULTICAST),
    "listener-report": (ether(dst="33:33:00:00:00:16") / ip("ff02::16", 6, source="fe80::1")
                        / IPv6ExtHdrHopByHop() / ICMPv6MLReport2(), Reason.MULTICAST),
    "multicast-address-to-gateways-mac": (ether() / ip("224.0.0.251") / UDP(), Reason.MULTICAST),
    "broadcast-address-to-gateways-mac": (ether() / ip("255.255.255.255") / UDP(), Reason.BROADCAST),
    "multicast-v6-to-gateways-mac": (ether() / ip("ff02::fb", 6) / UDP(), Reason.MULTICAST),
    "another-pods-mac": (ether(dst=mac(B)) / ip(B) / TCP(), Reason.WRONG_MAC),
    "link-local-destination": (ether() / ip("fe80::1", 6) / TCP(), Reason.LINK_LOCAL),
    "loopback": (ether() / ip("127.0.0.1") / TCP(), Reason.MARTIAN),
    "zero": (ether() / ip("0.0.0.0") / TCP(), Reason.MARTIAN),
    "reserved": (ether() / ip("240.0.0.1") / TCP(), Reason.MARTIAN),
    "loopback-v6": (ether() / ip("::1", 6) / TCP(), Reason.MARTIAN),
    "unspecified-v6-destination": (ether() / ip("::", 6) / TCP(), Reason.MARTIAN),
    "v4-mapped-destination": (ether() / ip("::ffff:10.1.0.11", 6) / TCP(), Reason.MARTIAN),
    "v4-mapped-source": (ether() / ip(B, 6, source="::ffff:10.1.0.10") / TCP(), Reason.MARTIAN),
    "vlan": (ether() / Dot1Q(vlan=7) / ip(B) / TCP(), Reason.VLAN),
    "vlan-in-vlan": (ether(type=0x88A8) / Dot1Q(vlan=7) / Dot1Q(vlan=8) / ip(B, 6) / TCP(), Reason.VLAN),
    "not-ip": (ether(type=0x88CC) / (b"\x02\x07" + bytes(60)), Reason.ETHERTYPE),
    "ip-version": (ether(type=0x800) / bytes(IPv6() / TCP()), Reason.MALFORMED),
    "ip6-version": (ether(type=0x86DD) / bytes(IP() / Raw(bytes(40))), Reason.MALFORMED),
    "ip-header-length": (ether() / ip(B, ihl=4) / TCP(), Reason.MALFORMED),
    "tcp-header-length": (ether() / ip(B) / TCP(dataofs=4), Reason.MALFORMED),
    "options-beyond-the-end": (ether() / ip(B, ihl=15, proto=17) / bytes(8), Reason.TRUNCATED),
    "half-a-tcp-header": (ether() / ip(B, proto=6) / bytes(13), Reason.TRUNCATED),
    "half-a-udp-header": (ether() / ip(B, proto=17) / bytes(7), Reason.TRUNCATED),
    "half-an-icmp-header": (ether() / ip(B, proto=1) / bytes(3), Reason.TRUNCATED),
    "half-an-extension-header": (ether() / ip(B, 6, nh=0) / b"\x06\x00", Reason.TRUNCATED),
    "extension-beyond-the-end": (ether() / ip(B, 6, nh=60) / b"\x06\xff" / bytes(30), Reason.TRUNCATED),
    "seven-extension-headers": (ether() / ip(B, 6, nh=60) / (b"\x3c\0" + bytes(6)) / (b"\x3c\0" + bytes(6))
                                / (b"\x3c\0" + bytes(6)) / (b"\x3c\0" + bytes(6)) / (b"\x3c\0" + bytes(6))
                                / (b"\x3c\0" + bytes(6)) / (b"\x06\0" + bytes(6)) / TCP(), Reason.EXT_HEADERS),
}


@pytest.mark.parametrize("case", DROPS)
def test_drops_with_its_reason(dp: Datapath, case: str) -> None:
    packet, reason = DROPS[case]
    result = dp.run(bytes(packet))
    assert (result.verdict, result.reason) == (abi.Verdict.DROPPED, reason)
    assert result.event.src_id == A.id


def test_event_of_a_frame_that_is_not_ip_has_its_macs(dp: Datapath) -> None:
    event = dp.run(bytes(ether(type=0x88CC) / bytes(60))).event
    assert bytes(event.src)[:6].hex(":") == mac(A)
    assert bytes(event.dst)[:6].hex(":") == "02:00:00:00:00:01"
    assert (event.family, abi.host16(event.ethertype)) == (0, 0x88CC)


def test_interface_without_endpoint_is_dropped(dp: Datapath) -> None:
    dp.remove(A)
    assert dp.run(bytes(ether() / ip(B) / TCP())).reason == Reason.NO_ENDPOINT


def test_pod_with_one_family_cannot_use_the_other(dp: Datapath) -> None:
    dp.remove(A)
    dp.put(make_pod(10, 1, v6=False))
    assert dp.run(bytes(ether() / ip(B, 6, source="fd00:1::a") / TCP())).reason == Reason.SPOOFED_IPV6
    assert dp.run(bytes(ether() / ip(B, 6, source="::") / TCP())).reason == Reason.SPOOFED_IPV6
    dp.remove(make_pod(10, 1))
    dp.put(make_pod(10, 1, v4=False))
    assert dp.run(bytes(ether() / ip(B, source="0.0.0.0") / TCP())).reason == Reason.SPOOFED_IPV4


STACK: dict[str, Any] = {
    "world": ether() / ip("192.0.2.1") / TCP(), "world-v6": ether() / ip("2001:db8::1", 6) / TCP(),
    "gateway": ether() / ip("10.1.0.1") / ICMP(), "v4-link-local (node services)": ether() / ip("169.254.20.10") / UDP(),
    "unknown-pod": ether() / ip("10.1.0.99") / TCP(), "unknown-pod-v6": ether() / ip("fd00:1::99", 6) / TCP(),
    "ttl-1": ether() / ip(B, ttl=1) / UDP(), "ttl-0": ether() / ip(B, ttl=0) / UDP(),
    "hop-limit-1": ether() / ip(B, 6, ttl=1) / UDP(), "hop-limit-0": ether() / ip(B, 6, ttl=0) / UDP(),
    "one-byte-too-big": ether() / ip(SMALL) / UDP() / bytes(1300 - 28 + 1),
    "one-byte-too-big-v6": ether() / ip(SMALL, 6) / UDP() / bytes(1300 - 48 + 1),
}


@pytest.mark.parametrize("case", STACK)
def test_goes_to_the_stack_unchanged(dp: Datapath, case: str) -> None:
    result = dp.run(bytes(STACK[case]))
    assert (result.action, result.verdict) == (UNSPEC, abi.Verdict.TO_STACK)
    assert result.data == bytes(STACK[case])


@FAMILIES
def test_packet_of_exactly_the_mtu_is_delivered(dp: Datapath, family: int) -> None:
    packet = ether() / ip(SMALL, family) / UDP() / bytes(1300 - (28 if family == 4 else 48))
    assert dp.run(bytes(packet)).data == delivered(packet, SMALL)


@FAMILIES
@pytest.mark.parametrize("transport", [TCP(), TCP(options=[("Timestamp", (1, 2))]), UDP()], ids=["tcp", "ts", "udp"])
@pytest.mark.parametrize("excess", [0, 1])
def test_super_packet_is_judged_by_its_segments(dp: Datapath, family: int, transport: Any, excess: int) -> None:
    headers = ip(SMALL, family) / transport
    packet = ether() / headers / bytes(2500)
    result = dp.run(bytes(packet), gso_size=1300 - len(headers) + excess)
    assert result.verdict == (abi.Verdict.TO_STACK if excess else abi.Verdict.DELIVERED)


def test_every_hop_count_is_decremented_with_a_valid_checksum(dp: Datapath) -> None:
    for ttl in range(2, 256):
        packet = ether() / ip(B, ttl=ttl, id=ttl * 257 & 0xFFFF) / UDP()
        assert dp.run(bytes(packet)).data == delivered(packet, B)


def test_ip_options_do_not_hide_the_ports(dp: Datapath) -> None:
    packet = ether() / ip(B, options=[IPOption_RR(routers=["0.0.0.0"] * 9)]) / TCP(sport=1, dport=2)
    result = dp.run(bytes(packet))
    assert result.verdict == abi.Verdict.DELIVERED
    assert (abi.host16(result.event.sport), abi.host16(result.event.dport)) == (1, 2)


@pytest.mark.parametrize("headers", [
    [IPv6ExtHdrHopByHop()], [IPv6ExtHdrDestOpt()], [IPv6ExtHdrRouting()],
    [IPv6ExtHdrHopByHop(), IPv6ExtHdrRouting(), IPv6ExtHdrDestOpt()], [IPv6ExtHdrDestOpt()] * 6,
], ids=["hop-by-hop", "destination", "routing", "three", "six"])
def test_extension_headers_do_not_hide_the_ports(dp: Datapath, headers: list[Any]) -> None:
    packet = ether() / ip(B, 6)
    for header in headers:
        packet /= header.copy()
    packet /= TCP(sport=1, dport=2)
    result = dp.run(bytes(packet))
    assert result.data == delivered(packet, B)
    assert (result.event.proto, abi.host16(result.event.sport), abi.host16(result.event.dport)) == (6, 1, 2)


@pytest.mark.parametrize(("offset", "more", "ports"), [(0, 1, (1, 2)), (1, 1, (0, 0)), (185, 0, (0, 0))])
def test_only_the_first_fragment_has_ports(dp: Datapath, offset: int, more: int, ports: tuple[int, int]) -> None:
    body = struct.pack(">HHHH", 1, 2, 8, 0) + bytes(64)
    for packet in (ether() / ip(B, frag=offset, flags="MF" if more else 0, proto=17) / body,
                   ether() / ip(B, 6) / IPv6ExtHdrFragment(offset=offset, m=more, nh=17) / body):
        result = dp.run(bytes(packet))
        assert result.data == delivered(packet, B)
        assert (result.event.proto, abi.host16(result.event.sport), abi.host16(result.event.dport)) == (17, *ports)


def test_later_fragment_shorter_than_a_header_is_delivered(dp: Datapath) -> None:
    packet = ether() / ip(B, frag=185, proto=6) / b"end"
    assert dp.run(bytes(packet)).data == delivered(packet, B)


def test_shaped_pod_is_reached_through_its_egress(dp: Datapath) -> None:
    result = dp.run(bytes(ether() / ip(SHAPED) / TCP()))
    assert (result.action, result.verdict) == (REDIRECT, abi.Verdict.DELIVERED)


def test_packets_of_a_pod_shaped_on_its_way_out_go_through_the_stack(dp: Datapath) -> None:
    shaped = make_pod(10, 1, flags=abi.EndpointFlag.SHAPED_OUT)
    dp.put(shaped)
    packet = ether() / ip(B) / TCP()
    result = dp.run(bytes(packet))
    assert (result.action, result.verdict, result.data) == (UNSPEC, abi.Verdict.TO_STACK, bytes(packet))
    assert dp.run(bytes(ether() / ip(B, source="10.1.0.99") / TCP())).reason == Reason.SPOOFED_IPV4


@FAMILIES
def test_pods_whose_keys_share_a_slot_do_not_meet(dp: Datapath, family: int) -> None:
    """Two addresses and interfaces 4,096 apart have one slot of ep_near; the later comer is found by hash."""
    twin = abi.Endpoint.of(id=77, ifindex=B.ifindex + abi.EP_NEAR_SLOTS, mac="02:00:00:00:01:77",
                           host_mac="02:00:00:00:00:01", mtu=1500, ipv4="10.1.16.11", ipv6="fd00:1::100b")
    dp.put(twin)
    try:
        for pod in (B, twin):
            packet = ether() / ip(pod, family) / TCP()
            assert dp.run(bytes(packet)).data == delivered(packet, pod)
        dp.remove(B)
        packet = ether() / ip(twin, family) / TCP()
        assert dp.run(bytes(packet)).data == delivered(packet, twin)
        assert dp.run(bytes(ether() / ip(B, family) / TCP())).verdict == abi.Verdict.TO_STACK
    finally:
        dp.remove(twin)


def test_removed_pod_is_not_delivered_to(dp: Datapath) -> None:
    for pod in PODS[1:]:
        dp.remove(pod)
        for family in (4, 6):
            assert dp.run(bytes(ether() / ip(pod, family) / TCP())).verdict == abi.Verdict.TO_STACK


def test_frames_shorter_than_their_ip_header_claim_no_more_than_they_have(dp: Datapath) -> None:
    whole = bytes(ether() / ip(B) / UDP() / bytes(20))
    for length in range(14 + 20, len(whole) + 1):
        result = dp.run(whole[:length])
        assert (result.reason == Reason.TRUNCATED) == (length < 14 + 28), length
    assert Ether(whole)[IP].len == len(whole) - 14
