"""Policy slots: what they ask, what they remember, what they tell."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrFragment,
    fragment6,
)
from scapy.layers.l2 import Ether

from services.common.instance import Instance
from services.common.pipeline.abi import FibAddr
from services.common.pipeline.reasons import Reason
from services.policy import abi
from tests.datapath import policykit as kit
from tests.datapath.harness import Datapath
from tests.datapath.packets import delivered
from tests.datapath.policykit import ALL, ALLOW, NONE, RULE, WORLD, Rig, Space, only, refuse

BOTH = pytest.mark.parametrize("family", [4, 6])
EITHER = pytest.mark.parametrize("side", ["egress", "ingress"])


@pytest.fixture(scope="module")
def space(instance: Instance) -> Iterator[Space]:
    with kit.installed(instance):
        made = Space()
        yield made
        made.close()


@pytest.fixture
def rig(space: Space, dp: Datapath) -> Iterator[Rig]:
    made = Rig(dp, space)
    yield made
    made.close()


# ---- what policies say --------------------------------------------------------------------------------------
@BOTH
def test_an_endpoint_without_policy_is_denied_everything(rig: Rig, family: int) -> None:
    syn = TCP(sport=4000, dport=80)
    assert rig.packet(rig.a, rig.b, syn, family).reason is Reason.POLICY_UNKNOWN
    rig.open_all(rig.a)
    assert rig.packet(rig.a, rig.b, syn, family).reason is Reason.POLICY_UNKNOWN
    rig.open_all(rig.b)
    assert rig.packet(rig.a, rig.b, syn, family).passed
    assert rig.packet(rig.c, WORLD[family], syn, family, back=True).reason is Reason.POLICY_UNKNOWN


@BOTH
def test_what_is_allowed_is_delivered_as_it_came(rig: Rig, family: int) -> None:
    rig.open_all()
    packet = kit.header(kit.own(rig.a, family), kit.own(rig.b, family)) / TCP(sport=4000, dport=80) / b"data"
    frame = Ether(src="02:00:00:00:01:14", dst="02:00:00:00:00:01") / packet
    assert rig.send(rig.a, packet).data == delivered(frame, rig.b)


@BOTH
@EITHER
def test_rules_and_what_no_rule_says(rig: Rig, family: int, side: str) -> None:
    """The verdict is that of the range that the port is in, at its borders, too."""
    rig.open_all()
    ranges = [*only((6, 80, 89))[:-1], (6, 90, int(kit.DENY), RULE + 1), (6, 100, int(kit.DEFAULT), 0), (17, 0, int(ALLOW), 9)]
    rig.policy(rig.a if side == "egress" else rig.b, **{side: ranges})
    seen = {port: rig.packet(rig.a, rig.b, TCP(sport=1, dport=port), family).reason for port in (1, 79, 80, 89, 90, 99, 100, 65535)}
    default, denied, fine = Reason.POLICY_DEFAULT, Reason.POLICY_DENIED, Reason.NONE
    assert seen == {1: default, 79: default, 80: fine, 89: fine, 90: denied, 99: denied, 100: default, 65535: default}
    assert rig.packet(rig.a, rig.b, UDP(sport=1, dport=0), family).passed
    assert rig.packet(rig.a, rig.b, UDP(sport=1, dport=65535), family).passed


@EITHER
def test_classes_of_identities(rig: Rig, side: str) -> None:
    """Class by identity; class 0 for whom the policy does not name; `unknown` for whom nothing is known of."""
    rig.open_all()
    mine, peers = (rig.a, rig.c) if side == "egress" else (rig.b, rig.c)
    other = rig.b if side == "egress" else rig.a
    table = [[only((6, 80, 80))], [ALL], [NONE]]

    def reach(port: int) -> bool:
        sender, receiver = (mine, other) if side == "egress" else (other, mine)
        return rig.packet(sender, receiver, TCP(sport=2, dport=port)).passed

    rig.policy(mine, **{side: table}, peers={peers.identity: 1}, unknown=2)
    assert (reach(80), reach(81)) == (True, False)
    rig.policy(mine, **{side: table}, peers={other.identity: 1}, unknown=2)
    assert (reach(80), reach(81)) == (True, True)
    rig.tables.peers.delete(abi.Peer(abi.KNOWN, other.identity))
    rig.forget()
    assert (reach(80), reach(81)) == (True, True), "named, if not known"
    rig.policy(mine, **{side: table}, unknown=2)
    rig.forget()
    assert (reach(80), reach(81)) == (False, False)


@BOTH
@EITHER
def test_classes_of_prefixes(rig: Rig, family: int, side: str) -> None:
    rig.open_all()
    near = {4: ("192.0.2.0/24", "192.0.2.0/28"), 6: ("2001:db8:1::/48", "2001:db8:1::/64")}[family]
    far = {4: "198.51.100.1", 6: "2001:db8:2::1"}[family]
    middle = {4: "192.0.2.77", 6: "2001:db8:1:7::1"}[family]
    rows = [[NONE, only((6, 80, 80)), only((6, 81, 81))]]
    rig.policy(rig.a, **{side: rows}, prefixes={near[0]: 1, near[1]: 2})
    got = {peer: [rig.packet(rig.a, peer, TCP(sport=3, dport=port), family, back=side == "ingress").passed for port in (80, 81)]
           for peer in (far, middle, WORLD[family])}
    assert got == {far: [False, False], middle: [True, False], WORLD[family]: [False, True]}


def test_identity_and_prefix_together(rig: Rig) -> None:
    rig.open_all()
    rows = [[NONE, only((6, 1, 1))], [only((6, 2, 2)), only((6, 3, 3))]]
    for peers, prefixes, port in (({}, {}, 0), ({}, {"10.1.0.21/32": 1}, 1), ({rig.b.identity: 1}, {}, 2),
                                  ({rig.b.identity: 1}, {"10.0.0.0/8": 1}, 3)):
        rig.policy(rig.a, egress=rows, peers=peers, prefixes=prefixes)
        assert [p for p in (1, 2, 3) if rig.packet(rig.a, rig.b, TCP(sport=5, dport=p)).passed] == ([port] if port else [])


@BOTH
def test_types_of_messages(rig: Rig, family: int) -> None:
    rig.open_all()
    proto = kit.ICMP[family]
    rig.policy(rig.b, ingress=only((proto, 13, 13), (proto, 130, 130)))
    for kind, passes in ((12, False), (13, True), (14, False), (129, False), (130, True), (131, False)):
        message = struct.pack("!BBHI", kind, 0, 0, 0)
        packet = kit.header(kit.own(rig.a, family), kit.own(rig.b, family))
        setattr(packet, "proto" if family == 4 else "nh", proto)
        assert rig.send(rig.a, packet / message).passed is passes, kind


def test_a_protocol_without_ports(rig: Rig) -> None:
    rig.open_all()
    rig.policy(rig.b, ingress=only((47, 0, 65535)))
    assert rig.send(rig.a, IP(src="10.1.0.20", dst="10.1.0.21", proto=47) / bytes(20)).passed
    assert not rig.send(rig.a, IP(src="10.1.0.20", dst="10.1.0.21", proto=48) / bytes(20)).passed


def test_a_pod_may_speak_to_itself(rig: Rig) -> None:
    rig.policy(rig.a, NONE, NONE)
    assert rig.packet(rig.a, rig.a, TCP(sport=4000, dport=80)).passed


def test_broken_tables_deny(rig: Rig) -> None:
    rig.open_all()
    rig.policy(rig.a, egress=ALL)
    rig._write(rig._first - 2, abi.cell_class(0, 0))
    assert rig.packet(rig.a, rig.b, TCP(sport=4000, dport=80)).reason is Reason.POLICY_BROKEN
    rig.set_ep(rig.b, 60000, 1)
    assert rig.packet(rig.c, rig.b, TCP(sport=4000, dport=80)).reason is Reason.POLICY_BROKEN


# ---- connections --------------------------------------------------------------------------------------------
def tcp(flags: str, sport: int = 4000, dport: int = 80, **fields: Any) -> TCP:
    return TCP(sport=sport, dport=dport, flags=flags, seq=1000, ack=2000 if "A" in flags else 0, **fields)


def back(flags: str, **fields: Any) -> TCP:
    return tcp(flags, 80, 4000, **fields)


def connect(rig: Rig, family: int = 4, peer: Any = None) -> None:
    peer = peer or rig.b
    assert rig.packet(rig.a, peer, tcp("S"), family).passed
    assert rig.packet(rig.a, peer, back("SA"), family, back=True).passed
    assert rig.packet(rig.a, peer, tcp("A"), family).passed


@BOTH
@pytest.mark.parametrize("where", ["pod", "world"])
def test_answers_pass_whatever_policy_says_of_them(rig: Rig, family: int, where: str) -> None:
    """A may open, nobody may open anything to A; B takes connections, and opens none."""
    rig.policy(rig.a, NONE, only((6, 80, 80)))
    rig.policy(rig.b, only((6, 80, 80)), NONE)
    peer = rig.b if where == "pod" else WORLD[family]
    assert not rig.packet(rig.a, peer, back("A"), family, back=True).passed
    connect(rig, family, peer)
    assert rig.packet(rig.a, peer, back("A"), family, back=True).passed
    assert not rig.packet(rig.a, peer, tcp("S", 4001, 81), family).passed
    assert not rig.packet(rig.a, peer, tcp("S", 80, 4001), family, back=True).passed


@BOTH
def test_a_connection_is_established_when_its_client_has_heard_of_it(rig: Rig, family: int) -> None:
    rig.open_all()
    states = []
    for layer, other in ((tcp("S"), False), (back("SA"), True), (tcp("A"), False)):
        assert rig.packet(rig.a, rig.b, layer, family, back=other).passed
        entry, established = rig.entry()
        states.append((established, bool(entry.flags & abi.CtFlag.ANSWERED)))
    assert states == [(False, False), (False, True), (True, True)]
    checked = rig.stat(abi.Stat.CHECKED)
    assert rig.packet(rig.a, rig.b, tcp("PA") / b"data", family).passed
    assert rig.packet(rig.a, rig.b, back("PA") / b"data", family, back=True).passed
    assert rig.stat(abi.Stat.CHECKED) == checked


@BOTH
def test_the_lower_address_may_be_the_server(rig: Rig, family: int) -> None:
    rig.policy(rig.b, NONE, only((6, 80, 80)))
    rig.policy(rig.a, only((6, 80, 80)), NONE)
    assert rig.packet(rig.b, rig.a, tcp("S"), family).passed
    assert rig.packet(rig.b, rig.a, back("SA"), family, back=True).passed
    assert rig.packet(rig.b, rig.a, tcp("A"), family).passed
    entry, established = rig.entry()
    assert established and not entry.flags & abi.CtFlag.CLIENT_LOW


def test_a_flood_of_beginnings_displaces_nothing_established(rig: Rig) -> None:
    rig.policy(rig.a, NONE, only((6, 80, 80)))
    rig.policy(rig.b, only((6, 80, 80)), NONE)
    connect(rig)
    key = abi.CtKey(low=FibAddr.of("10.9.0.1"), high=FibAddr.of("10.9.0.2"), proto=6)
    for at in range(abi.CT_NEW_MAX // 2048):
        keys = bytearray()
        for port in range(2048):
            key.low_port, key.high_port = port, at
            keys += bytes(key)
        assert rig.tables.new.update_packed(bytes(keys), bytes(abi.CtEntry()) * 2048)[1] is None
    for port in range(5000, 5200):
        assert rig.packet(rig.a, rig.b, tcp("S", port)).passed
    assert rig.packet(rig.a, rig.b, back("PA") / b"data", back=True).passed
    rig.forget()


def test_a_full_table_forgets_and_goes_on(rig: Rig) -> None:
    """What is displaced from the table of connections is asked about again."""
    rig.policy(rig.a, NONE, only((6, 80, 80)))
    rig.policy(rig.b, only((6, 80, 80)), NONE)
    connect(rig)
    for port in range(5000, 5000 + 4 * kit.CONNECTIONS):
        for layer, other in ((tcp("S", port), False), (tcp("SA", 80, port), True), (tcp("A", port), False)):
            assert rig.packet(rig.a, rig.b, layer, back=other).passed
    assert len(rig.entries()) <= kit.CONNECTIONS
    assert rig.packet(rig.a, rig.b, tcp("PA") / b"data").passed
    assert rig.packet(rig.a, rig.b, back("PA") / b"data", back=True).passed


@pytest.mark.parametrize(("ends", "limit"), [("", 21600), ("FF", 10), ("F", 21600), ("R", 10)])
def test_how_long_tcp_may_be_silent(rig: Rig, ends: str, limit: int) -> None:
    rig.policy(rig.a, NONE, only((6, 80, 80)))
    rig.policy(rig.b, only((6, 80, 80)), NONE)
    connect(rig)
    if "F" in ends:
        assert rig.packet(rig.a, rig.b, tcp("FA")).passed
    if ends == "FF":
        assert rig.packet(rig.a, rig.b, back("FA"), back=True).passed
    if ends == "R":
        assert rig.packet(rig.a, rig.b, back("R"), back=True).passed
    rig.age(limit)
    assert rig.packet(rig.a, rig.b, back("A"), back=True).passed
    rig.age(limit + 1)
    assert not rig.packet(rig.a, rig.b, back("A"), back=True).passed
    # Who may open it goes on.
    assert rig.packet(rig.a, rig.b, tcp("A")).passed
    assert rig.packet(rig.a, rig.b, back("A"), back=True).passed


def test_what_nobody_answers_is_over_sooner(rig: Rig) -> None:
    rig.policy(rig.a, NONE, only((6, 80, 80)))
    rig.policy(rig.b, only((6, 80, 80)), NONE)
    assert rig.packet(rig.a, rig.b, tcp("S")).passed
    rig.age(61)
    assert not rig.packet(rig.a, rig.b, back("SA"), back=True).passed


def test_a_connection_noted_by_another_cpu_a_beat_ahead_is_alive(rig: Rig) -> None:
    rig.policy(rig.a, NONE, only((6, 80, 80)))
    rig.policy(rig.b, only((6, 80, 80)), NONE)
    connect(rig)
    rig.age(-1)
    assert rig.packet(rig.a, rig.b, back("A"), back=True).passed


@pytest.mark.parametrize("end", ["fins", "reset"])
def test_the_same_ports_once_more_are_another_connection(rig: Rig, end: str) -> None:
    """Which is asked about, in whichever direction it is opened."""
    rig.open_all()
    connect(rig)
    if end == "fins":
        assert rig.packet(rig.a, rig.b, tcp("FA")).passed
        assert rig.packet(rig.a, rig.b, back("FA"), back=True).passed
    else:
        assert rig.packet(rig.a, rig.b, back("R"), back=True).passed
    new = rig.stat(abi.Stat.NEW)
    connect(rig)
    entry, established = rig.entry()
    assert established and not entry.flags & (abi.CtFlag.CLIENT_FIN | abi.CtFlag.SERVER_FIN | abi.CtFlag.RESET)
    assert rig.stat(abi.Stat.NEW) == new + 2
    rig.policy(rig.b, only((6, 80, 80)), NONE)
    assert rig.packet(rig.a, rig.b, back("R"), back=True).passed
    assert not rig.packet(rig.a, rig.b, back("S"), back=True).passed


def test_who_answers_begins_nothing(rig: Rig) -> None:
    rig.open_all()
    assert rig.packet(rig.a, rig.b, back("SA"), back=True).passed
    assert rig.packet(rig.a, rig.b, back("R"), back=True).passed
    assert not rig.entries() and not rig.entries(False)


@BOTH
def test_udp(rig: Rig, family: int) -> None:
    rig.policy(rig.a, NONE, only((17, 53, 53)))
    rig.policy(rig.b, only((17, 53, 53)), NONE)
    ask, say = UDP(sport=4000, dport=53) / b"?", UDP(sport=53, dport=4000) / b"!"
    assert not rig.packet(rig.a, rig.b, say, family, back=True).passed
    assert rig.packet(rig.a, rig.b, ask, family).passed
    assert rig.packet(rig.a, rig.b, say, family, back=True).passed
    assert not rig.entry()[1]
    assert rig.packet(rig.a, rig.b, ask, family).passed
    assert rig.entry()[1]
    assert rig.packet(rig.a, rig.b, say, family, back=True).passed
    rig.age(61)
    assert not rig.packet(rig.a, rig.b, say, family, back=True).passed


@BOTH
def test_both_speak_first_and_only_one_may(rig: Rig, family: int) -> None:
    rig.policy(rig.a, only((17, 4000, 4000)), None)
    rig.policy(rig.b, NONE, None)
    ask, say = UDP(sport=4000, dport=4001) / b"?", UDP(sport=4001, dport=4000) / b"!"
    assert not rig.packet(rig.a, rig.b, ask, family).passed
    assert rig.packet(rig.a, rig.b, say, family, back=True).passed
    assert rig.packet(rig.a, rig.b, ask, family).passed
    assert rig.packet(rig.a, rig.b, say, family, back=True).passed


def echo(family: int, answer: bool = False, number: int = 77, data: bytes = b"ping") -> Any:
    if family == 4:
        return ICMP(type=0 if answer else 8, id=number, seq=1) / data
    return (ICMPv6EchoReply if answer else ICMPv6EchoRequest)(id=number, seq=1, data=data)


@BOTH
def test_echo(rig: Rig, family: int) -> None:
    request = 8 if family == 4 else 128
    proto = kit.ICMP[family]
    rig.policy(rig.a, NONE, only((proto, request, request)))
    rig.policy(rig.b, only((proto, request, request)), NONE)
    assert not rig.packet(rig.a, rig.b, echo(family, True), family, back=True).passed
    assert rig.packet(rig.a, rig.b, echo(family), family).passed
    assert rig.packet(rig.a, rig.b, echo(family, True), family, back=True).passed
    assert rig.packet(rig.a, rig.b, echo(family), family).passed
    assert not rig.packet(rig.a, rig.b, echo(family, True, 78), family, back=True).passed
    assert not rig.packet(rig.a, rig.b, echo(family), family, back=True).passed


@BOTH
@pytest.mark.parametrize("what", ["udp", "echo"])
def test_fragments(rig: Rig, family: int, what: str) -> None:
    """They are asked about as their packet; later ones first are not known."""
    request, proto = (8 if family == 4 else 128), kit.ICMP[family]
    allowed = (17, 53, 53) if what == "udp" else (proto, request, request)
    rig.policy(rig.a, NONE, only(allowed))
    rig.policy(rig.b, only(allowed), NONE)
    data = bytes(2000)
    layer = UDP(sport=4000, dport=53) / data if what == "udp" else echo(family, data=data)
    src, dst = kit.own(rig.a, family), kit.own(rig.b, family)
    if family == 4:
        pieces = fragment(IP(src=src, dst=dst, id=7) / layer, 1200)
    else:
        pieces = fragment6(IPv6(src=src, dst=dst) / IPv6ExtHdrFragment(id=7) / layer, 1280)
    first, later = pieces[0], pieces[-1]
    assert rig.send(rig.a, later).reason is Reason.POLICY_FRAGMENT
    assert rig.send(rig.a, first).passed
    seen = rig.send(rig.a, later)
    assert seen.passed
    assert [established for _, established in [rig.entry()]] == [False]
    rig.policy(rig.b, NONE, NONE)
    assert not rig.send(rig.a, later).passed
