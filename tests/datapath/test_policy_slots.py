"""Policy slots: what they ask, what they remember, what they tell."""

from __future__ import annotations

import asyncio
import ctypes as ct
import itertools
import socket
import struct
import threading
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
from scapy.layers.vxlan import VXLAN

from services.common.instance import Instance
from services.common.kernel import loader, progs
from services.common.pipeline import abi as pipeline
from services.common.pipeline.abi import FibAddr
from services.common.pipeline.reasons import Reason
from services.lb import install as lb
from services.policy import abi, install
from tests.datapath import policykit as kit
from tests.datapath.cluster import DIRECT, HERE, ROUTED, UNDERLAY, Cluster
from tests.datapath.harness import REDIRECT, SHOT, UNSPEC, Datapath
from tests.datapath.lbkit import HAIRPIN, VIP, Lab, exact
from tests.datapath.packets import delivered
from tests.datapath.policykit import ALL, ALLOW, KEEP, NONE, REJECT, RULE, WORLD, Rig, only, refuse
from tests.datapath.test_between_nodes import IDENTITY, PEER, host
from tests.datapath.test_lb_related import error

BOTH = pytest.mark.parametrize("family", [4, 6])
MARK = 0x66
EITHER = pytest.mark.parametrize("side", ["egress", "ingress"])


@pytest.fixture
def cluster(network: None, dp: Datapath) -> Iterator[Cluster]:
    made = Cluster(dp)
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
    ranges = [
        *only((6, 80, 89))[:-1],
        (6, 90, int(kit.DENY), RULE + 1),
        (6, 100, int(kit.DEFAULT), 0),
        (17, 0, int(ALLOW), 9),
    ]
    rig.one(side, rig.a if side == "egress" else rig.b, ranges)
    seen = {
        port: rig.packet(rig.a, rig.b, TCP(sport=1, dport=port), family).reason
        for port in (1, 79, 80, 89, 90, 99, 100, 65535)
    }
    default, denied, fine = Reason.POLICY_DEFAULT, Reason.POLICY_DENIED, Reason.NONE
    assert seen == {
        1: default,
        79: default,
        80: fine,
        89: fine,
        90: denied,
        99: denied,
        100: default,
        65535: default,
    }
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

    rig.one(side, mine, table, peers={peers.identity: 1}, unknown=2)
    assert (reach(80), reach(81)) == (True, False)
    rig.one(side, mine, table, peers={other.identity: 1}, unknown=2)
    assert (reach(80), reach(81)) == (True, True)
    rig.tables.peers.delete(abi.Peer(abi.KNOWN, other.identity))
    rig.forget()
    assert (reach(80), reach(81)) == (True, True), "named, if not known"
    rig.one(side, mine, table, unknown=2)
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
    rig.one(side, rig.a, rows, prefixes={near[0]: 1, near[1]: 2})
    got = {
        peer: [
            rig.packet(rig.a, peer, TCP(sport=3, dport=port), family, back=side == "ingress").passed
            for port in (80, 81)
        ]
        for peer in (far, middle, WORLD[family])
    }
    assert got == {far: [False, False], middle: [True, False], WORLD[family]: [False, True]}


def test_identity_and_prefix_together(rig: Rig) -> None:
    rig.open_all()
    rows = [[NONE, only((6, 1, 1))], [only((6, 2, 2)), only((6, 3, 3))]]
    for peers, prefixes, port in (
        ({}, {}, 0),
        ({}, {"10.1.0.21/32": 1}, 1),
        ({rig.b.identity: 1}, {}, 2),
        ({rig.b.identity: 1}, {"10.0.0.0/8": 1}, 3),
    ):
        rig.policy(rig.a, egress=rows, peers=peers, prefixes=prefixes)
        assert [p for p in (1, 2, 3) if rig.packet(rig.a, rig.b, TCP(sport=5, dport=p)).passed] == (
            [port] if port else []
        )


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
    assert established and not entry.flags & (
        abi.CtFlag.CLIENT_FIN | abi.CtFlag.SERVER_FIN | abi.CtFlag.RESET
    )
    assert rig.stat(abi.Stat.NEW) == new + 2
    rig.policy(rig.b, only((6, 80, 80)), NONE)
    assert rig.packet(rig.a, rig.b, back("R"), back=True).passed
    assert not rig.packet(rig.a, rig.b, back("S"), back=True).passed


@BOTH
def test_who_answered_may_not_open_the_other_way(rig: Rig, family: int) -> None:
    """By the ports of a connection that is there, for its client may have gone without a word."""
    rig.policy(rig.a, NONE, only((6, 80, 80)))
    rig.policy(rig.b, only((6, 80, 80)), NONE)
    connect(rig, family)
    assert not rig.packet(rig.a, rig.b, back("S"), family, back=True).passed
    rig.policy(rig.b, ALL, ALL)
    assert not rig.packet(rig.a, rig.b, back("S"), family, back=True).passed
    # What was there goes on.
    assert rig.packet(rig.a, rig.b, tcp("PA") / b"data", family).passed
    assert rig.packet(rig.a, rig.b, back("PA") / b"data", family, back=True).passed


@BOTH
def test_both_ends_may_open_one_connection_at_once(rig: Rig, family: int) -> None:
    rig.policy(rig.a, NONE, only((6, 80, 80)))
    rig.policy(rig.b, only((6, 80, 80)), NONE)
    for layer, other in ((tcp("S"), False), (back("S"), True), (back("S"), True), (tcp("SA"), False), (back("SA"), True)):
        assert rig.packet(rig.a, rig.b, layer, family, back=other).passed
    assert rig.entry()[1]


@BOTH
def test_who_answers_an_echo_may_not_ask_by_it(rig: Rig, family: int) -> None:
    """The number that stands for the asked end may be the asking one's own."""
    request, proto = (8 if family == 4 else 128), kit.ICMP[family]
    rig.policy(rig.a, NONE, only((proto, request, request)))
    rig.policy(rig.b, only((proto, request, request)), NONE)
    assert rig.packet(rig.a, rig.b, echo(family, number=0xFFFF), family).passed
    assert not rig.packet(rig.a, rig.b, echo(family, number=0xFFFF), family, back=True).passed
    assert rig.packet(rig.a, rig.b, echo(family, True, number=0xFFFF), family, back=True).passed


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


def pieces_of(packet: Any) -> list[Any]:
    made: list[Any] = fragment(packet, 1200) if IP in packet else fragment6(packet, 1280)  # type: ignore[no-untyped-call]
    return made


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
        pieces = pieces_of(IP(src=src, dst=dst, id=7) / layer)
    else:
        pieces = pieces_of(IPv6(src=src, dst=dst) / IPv6ExtHdrFragment(id=7) / layer)
    first, later = pieces[0], pieces[-1]
    assert rig.send(rig.a, later).reason is Reason.POLICY_FRAGMENT
    assert rig.send(rig.a, first).passed
    seen = rig.send(rig.a, later)
    assert seen.passed
    assert [established for _, established in [rig.entry()]] == [False]
    rig.policy(rig.b, NONE, NONE)
    assert not rig.send(rig.a, later).passed


# ---- changes ------------------------------------------------------------------------------------------------
@BOTH
@EITHER
def test_a_policy_that_changes_is_asked_again(rig: Rig, family: int, side: str) -> None:
    """Packets of both directions pass or do not, by what the new policy says of the connection."""
    rig.open_all()
    mine = rig.a if side == "egress" else rig.b
    connect(rig, family)
    rig.one(side, mine, only((6, 80, 80)))
    assert rig.packet(rig.a, rig.b, back("A"), family, back=True).passed
    assert rig.packet(rig.a, rig.b, tcp("A"), family).passed
    rig.one(side, mine, only((6, 81, 81)))
    before = rig.stat(abi.Stat.REVOKED)
    for answers in (True, False, True, False):
        layer = back("A") if answers else tcp("A")
        assert rig.packet(rig.a, rig.b, layer, family, back=answers).reason is Reason.POLICY_REVOKED
    assert rig.stat(abi.Stat.REVOKED) == before + 4
    rig.one(side, mine, ALL)
    assert rig.packet(rig.a, rig.b, back("A"), family, back=True).passed


def test_programs_of_before_go_on_to_those_of_now(rig: Rig, instance: Instance) -> None:
    """While a service is upgraded, packets are begun by programs that it replaces and decided by those it brings."""
    slots = instance.pin_dir / pipeline.MAPS[pipeline.SLOTS_MAP]
    name = install.SLOTS[pipeline.Slot.POLICY_EGRESS]
    with progs.opened(install.program_path(instance, name)) as before:
        asyncio.run(loader.load([install.programs()], instance.pin_dir))
        with progs.opened(install.program_path(instance, name)) as now:
            progs.set_slot(slots, pipeline.Slot.POLICY_EGRESS, before)
            try:
                rig.policy(rig.a, None, only((6, 80, 80)))
                rig.policy(rig.b, ALL, None)
                assert rig.packet(rig.a, rig.b, tcp("S")).passed
                assert rig.packet(rig.a, rig.b, tcp("S", dport=81)).reason is Reason.POLICY_DEFAULT
            finally:
                progs.set_slot(slots, pipeline.Slot.POLICY_EGRESS, now)


def test_what_is_noted_is_the_revision_that_was_asked(rig: Rig) -> None:
    """A policy that comes between question and note must not be taken for the one that answered."""
    words = []
    for ranges in (ALL, NONE):
        rig.policy(rig.a, ranges, None)
        words.append(rig.tables.ep(rig.a.id).policy)
    packet = kit.header(WORLD[4], str(rig.a.ipv4)) / tcp("S")
    inforce = ct.c_uint64.from_buffer(rig.tables.eps_memory, rig.a.id * ct.sizeof(abi.Ep))
    noted: set[int] = set()
    over = threading.Event()

    def storm() -> None:
        while len(noted) < 100 and not over.is_set():
            rig.storm(rig.a, packet, 20_000)

    storming = threading.Thread(target=storm)
    storming.start()
    try:
        for revision in itertools.count(1000, 2):
            # Even revisions allow, odd ones deny.
            inforce.value = revision << 32 | words[0]
            inforce.value = revision + 1 << 32 | words[1]
            noted |= {entry.revision[0] for _, entry in rig.entries(established=False)}
            if not storming.is_alive():
                break
    finally:
        over.set()
        storming.join()
        del inforce
    assert not {revision for revision in noted if revision % 2}


@pytest.mark.parametrize("layer", ["tcp", "udp"])
def test_answers_do_not_carry_on_what_is_revoked(rig: Rig, layer: str) -> None:
    """Though nothing restricts what the server may open."""
    rig.policy(rig.a, None, None)
    rig.policy(rig.b, ALL, None)
    there, here = (tcp("A"), back("A")) if layer == "tcp" else (UDP(sport=1, dport=2), UDP(sport=2, dport=1))
    connect(rig)
    for other in (False, True, False):
        assert rig.packet(rig.a, rig.b, here if other else there, back=other).passed
    rig.policy(rig.b, NONE, None)
    for other in (True, False, True, False):
        assert rig.packet(rig.a, rig.b, here if other else there, back=other).reason is Reason.POLICY_REVOKED


def test_what_a_verdict_keeps_is_what_was_established(rig: Rig) -> None:
    rig.open_all()
    connect(rig)
    assert rig.packet(rig.a, rig.b, tcp("S", 4001)).passed
    rig.policy(rig.b, refuse(kit.DENY | KEEP), None)
    assert rig.packet(rig.a, rig.b, back("A"), back=True).passed
    assert rig.packet(rig.a, rig.b, tcp("A")).passed
    assert rig.packet(rig.a, rig.b, tcp("S", 4001)).reason is Reason.POLICY_REVOKED
    assert rig.packet(rig.a, rig.b, tcp("S", 4002)).reason is Reason.POLICY_DENIED


@BOTH
@pytest.mark.parametrize("who", ["client", "server"])
@EITHER
def test_an_identity_that_changes_is_asked_about_again(rig: Rig, family: int, who: str, side: str) -> None:
    """Of two pods of this node by both policies."""
    rig.open_all()
    changed, mine = (rig.a if who == "client" else rig.b), (rig.a if side == "egress" else rig.b)
    if changed.id == mine.id:
        # One's own identity is no question to one's own policy.
        rows, peers = [[ALL]], {}
    else:
        rows, peers = [[NONE], [ALL]], {changed.identity: 1}
    rig.one(side, mine, rows, peers=peers)
    connect(rig, family)
    checked = rig.stat(abi.Stat.CHECKED)
    changed.identity = 2000
    rig.know(2000)
    rig.dp.put(changed)
    passes = changed.id == mine.id
    assert rig.packet(rig.a, rig.b, back("A"), family, back=True).passed is passes
    assert rig.packet(rig.a, rig.b, tcp("A"), family).passed is passes
    assert rig.stat(abi.Stat.CHECKED) >= checked + 3
    if passes:
        checked = rig.stat(abi.Stat.CHECKED)
        assert rig.packet(rig.a, rig.b, tcp("A"), family).passed
        assert rig.packet(rig.a, rig.b, back("A"), family, back=True).passed
        assert rig.stat(abi.Stat.CHECKED) == checked


def test_the_number_of_an_endpoint_is_used_again(rig: Rig) -> None:
    """The policy that is there was written for a pod with another interface."""
    rig.open_all()
    connect(rig)
    rig.set_ep(rig.b, 1, 99, owner=4711)
    for layer, other in ((tcp("A"), False), (back("A"), True), (tcp("S", 4001), False)):
        assert rig.packet(rig.a, rig.b, layer, back=other).reason is Reason.POLICY_UNKNOWN


# ---- switches -----------------------------------------------------------------------------------------------
@EITHER
@pytest.mark.parametrize("where", ["node", "endpoint"])
def test_audit_lets_pass_and_tells(rig: Rig, side: str, where: str) -> None:
    rig.open_all()
    rig.configure(flags=abi.ConfigFlag.AUDIT if where == "node" else 0)
    mine = rig.a if side == "egress" else rig.b
    rig.one(side, mine, refuse(), flags=abi.EpFlag.AUDIT if where == "endpoint" else 0)
    rig.events()
    before = rig.stat(abi.Stat.AUDITED)
    assert rig.packet(rig.a, rig.b, tcp("S")).passed
    (event,) = rig.events()
    assert (event.type, event.verdict, event.rule) == (4, 3, RULE + 1)
    assert Reason(event.reason) is Reason.POLICY_DENIED
    assert rig.packet(rig.a, rig.b, back("SA"), back=True).passed
    assert rig.packet(rig.a, rig.b, tcp("A")).passed
    assert rig.stat(abi.Stat.AUDITED) > before


@BOTH
@pytest.mark.parametrize("audit", [False, True])
def test_lockdown_lets_nothing_pass(rig: Rig, family: int, audit: bool) -> None:
    """Not even what is established, or the pod itself; audit changes nothing of that."""
    rig.open_all()
    connect(rig, family)
    rig.configure(flags=abi.ConfigFlag.AUDIT if audit else 0)
    rig.policy(rig.b, ALL, ALL, flags=abi.EpFlag.LOCKDOWN)
    for layer, other in ((tcp("A"), False), (back("A"), True)):
        assert rig.packet(rig.a, rig.b, layer, family, back=other).reason is Reason.POLICY_LOCKDOWN
    assert rig.packet(rig.b, rig.b, tcp("S"), family).reason is Reason.POLICY_LOCKDOWN
    assert rig.packet(rig.a, rig.c, tcp("S"), family).passed


@BOTH
def test_the_host_may_reach_its_pods_if_it_is_said_so(rig: Rig, cluster: Cluster, family: int) -> None:
    host = {4: "10.1.0.1", 6: "fd00:1::1"}[family]
    cluster.know(f"{host}/{32 if family == 4 else 128}", 1, HERE)
    rig.policy(rig.a, NONE, NONE)
    assert not rig.packet(rig.a, host, tcp("S"), family, back=True).passed
    rig.configure(flags=abi.ConfigFlag.HOST)
    assert rig.packet(rig.a, host, tcp("S"), family, back=True).passed
    entry, _ = rig.entry()
    assert list(entry.rule) == [abi.RULE_HOST, 0]
    assert rig.packet(rig.a, host, back("SA"), family).passed
    assert not rig.packet(rig.a, host, tcp("S", 4001), family).passed
    assert not rig.packet(rig.a, WORLD[family], tcp("S"), family, back=True).passed


# ---- events -------------------------------------------------------------------------------------------------
@BOTH
@EITHER
def test_a_refusal_is_told(rig: Rig, family: int, side: str) -> None:
    rig.open_all()
    mine = rig.a if side == "egress" else rig.b
    revision = rig.one(side, mine, refuse())
    rig.events()
    assert not rig.packet(rig.a, rig.b, tcp("S"), family).passed
    (event,) = rig.events()
    assert (str(event.src.ip()), str(event.dst.ip())) == (kit.own(rig.a, family), kit.own(rig.b, family))
    assert (event.src_id, event.dst_id, event.src_identity, event.dst_identity) == (20, 21, 1020, 1021)
    assert (event.rule, event.revision, event.suppressed) == (RULE + 1, revision, 0)
    assert (event.type, event.verdict, Reason(event.reason)) == (4, 2, Reason.POLICY_DENIED)
    assert (event.direction, event.family, event.proto, event.tcp_flags) == (side == "egress", family, 6, 2)
    assert (socket.ntohs(event.sport), socket.ntohs(event.dport)) == (4000, 80)


def test_like_refusals_are_told_once_a_beat(rig: Rig) -> None:
    rig.open_all()
    rig.policy(rig.b, NONE, None)
    suppressed = rig.stat(abi.Stat.SUPPRESSED)
    for port in range(4000, 4010):
        assert not rig.packet(rig.a, rig.b, tcp("S", port)).passed
    assert not rig.packet(rig.a, rig.b, tcp("S", dport=81)).passed
    assert not rig.packet(rig.c, rig.b, tcp("S")).passed
    assert len(rig.events()) == 3
    assert rig.stat(abi.Stat.SUPPRESSED) == suppressed + 9
    rig.beat()
    assert not rig.packet(rig.a, rig.b, tcp("S")).passed
    assert [event.suppressed for event in rig.events()] == [9]


def test_connections_are_told_of_from_beginning_to_end(rig: Rig) -> None:
    rig.configure(flags=abi.ConfigFlag.FLOWS)
    revision = rig.policy(rig.a, ALL, ALL)
    rig.policy(rig.b, ALL, ALL)
    connect(rig)
    assert rig.packet(rig.a, rig.b, tcp("PA") / b"data").passed
    for layer, other in ((tcp("FA"), False), (back("FA"), True), (tcp("A"), False)):
        assert rig.packet(rig.a, rig.b, layer, back=other).passed
    told = [(event.type, event.verdict, event.direction, event.rule) for event in rig.events()]
    assert told == [(1, 1, 1, RULE), (1, 1, 0, RULE), (2, 1, 1, RULE)]
    connect(rig)
    rig.events()
    rig.policy(rig.b, refuse(), None)
    assert not rig.packet(rig.a, rig.b, tcp("A")).passed
    (event,) = rig.events()
    assert (event.type, event.verdict, event.direction, event.rule) == (3, 2, 0, RULE + 1)
    assert event.revision > revision and Reason(event.reason) is Reason.POLICY_REVOKED


# ---- refusals -----------------------------------------------------------------------------------------------
def whole(frame: bytes) -> Any:
    return Ether(frame)


def ends(packet: Any) -> tuple[str, str]:
    return packet[1].src, packet[1].dst


@BOTH
@EITHER
@pytest.mark.parametrize("flags", ["S", "A", "FPA"])
def test_a_client_in_a_pod_is_reset(rig: Rig, family: int, side: str, flags: str) -> None:
    rig.open_all()
    rig.one(side, rig.a if side == "egress" else rig.b, refuse(kit.DENY | REJECT))
    seen = rig.packet(rig.a, rig.b, tcp(flags) / (b"data" if "P" in flags else b""), family)
    assert (seen.action, seen.reason) == (REDIRECT, Reason.POLICY_DENIED)
    assert exact(seen.data) == seen.data
    got: Any = Ether(seen.data)
    assert (got.src, got.dst) == ("02:00:00:00:00:01", "02:00:00:00:01:14")
    assert ends(got) == (kit.own(rig.b, family), kit.own(rig.a, family))
    answer = got[TCP]
    assert (answer.sport, answer.dport, len(answer.payload)) == (80, 4000, 0)
    if "A" in flags:
        assert (str(answer.flags), answer.seq, answer.ack) == ("R", 2000, 0)
    else:
        assert (str(answer.flags), answer.seq, answer.ack) == ("RA", 0, 1001)
    assert (got[1].ttl if family == 4 else got[1].hlim) == 64


@BOTH
@EITHER
@pytest.mark.parametrize(
    "layer",
    [UDP(sport=4000, dport=53) / b"?", UDP(sport=4000, dport=53) / bytes(1200)],
    ids=["short", "long"],
)
def test_a_client_in_a_pod_is_told_by_a_message(rig: Rig, family: int, side: str, layer: Any) -> None:
    rig.open_all()
    rig.one(side, rig.a if side == "egress" else rig.b, refuse(kit.DENY | REJECT))
    seen = rig.packet(rig.a, rig.b, layer, family)
    assert (seen.action, seen.reason) == (REDIRECT, Reason.POLICY_DENIED)
    assert exact(seen.data) == seen.data
    got: Any = Ether(seen.data)
    assert (got.src, got.dst) == ("02:00:00:00:00:01", "02:00:00:00:01:14")
    assert ends(got) == (kit.own(rig.b, family), kit.own(rig.a, family))
    if family == 4:
        assert (got[ICMP].type, got[ICMP].code) == (3, 13)
        quote = bytes(got[ICMP])[8:]
    else:
        assert (got[2].type, got[2].code) == (1, 1)
        quote = bytes(got[2])[8:]
    sent = bytes(kit.header(kit.own(rig.a, family), kit.own(rig.b, family)) / layer)
    start = 20 if family == 4 else 40
    assert quote[start:] == sent[start : len(quote)] and len(quote) == min(len(sent), 120)


@BOTH
def test_what_is_never_answered(rig: Rig, family: int) -> None:
    rig.open_all()
    rig.policy(rig.a, None, refuse(kit.DENY | REJECT))
    unreachable = ICMP(type=3) if family == 4 else ICMPv6DestUnreach()
    assert rig.packet(rig.a, rig.b, tcp("RA"), family).action == SHOT
    assert rig.packet(rig.a, rig.b, unreachable / bytes(48), family).action == SHOT
    src, dst = kit.own(rig.a, family), kit.own(rig.b, family)
    layer = UDP(sport=4000, dport=53) / bytes(2000)
    if family == 4:
        first, later = pieces_of(IP(src=src, dst=dst, id=7) / layer)[:2]
    else:
        first, later = pieces_of(IPv6(src=src, dst=dst) / IPv6ExtHdrFragment(id=7) / layer)[:2]
    assert rig.send(rig.a, first).action == REDIRECT
    assert rig.send(rig.a, later).action == SHOT


@BOTH
@pytest.mark.parametrize("layer", [tcp("S"), UDP(sport=4000, dport=80)], ids=["tcp", "udp"])
def test_a_client_behind_the_stack_is_told_by_way_of_the_pods_link(rig: Rig, family: int, layer: Any) -> None:
    """The refusal passes all there is on a pod's way out, and policies, though no connection was ever allowed."""
    rig.policy(rig.a, refuse(kit.DENY | REJECT), NONE)
    seen = rig.packet(rig.a, WORLD[family], layer, family, back=True)
    assert (seen.action, seen.mark) == (REDIRECT, MARK)
    assert exact(seen.data) == seen.data
    got: Any = Ether(seen.data)
    assert (got.src, got.dst) == ("02:00:00:00:01:14", "02:00:00:00:00:01")
    assert ends(got) == (kit.own(rig.a, family), WORLD[family])
    after = rig.run(got, "fib_from_pod", rig.a.ifindex, mark=MARK)
    assert (after.passed, after.action, after.mark) == (True, UNSPEC, 0)
    assert not rig.run(got, "fib_from_pod", rig.a.ifindex).passed
    ask = Ether(src=got.src, dst=got.dst) / kit.header(*ends(got)) / tcp("S")
    assert not rig.run(ask, "fib_from_pod", rig.a.ifindex, mark=MARK).passed, (
        "the mark is good for refusals alone"
    )


def test_a_pod_that_needs_the_stack_is_told_as_well(rig: Rig) -> None:
    rig.policy(rig.a, refuse(kit.DENY | REJECT), NONE)
    rig.policy(rig.b, NONE, ALL)
    seen = rig.arrive(rig.a, kit.header("10.1.0.21", "10.1.0.20") / tcp("S"))
    assert (seen.action, seen.mark) == (REDIRECT, MARK)
    after = rig.run(Ether(seen.data), "fib_from_pod", rig.a.ifindex, mark=MARK)
    assert (after.passed, after.action, after.mark) == (True, REDIRECT, 0)
    assert Ether(after.data).dst == "02:00:00:00:01:15"


@BOTH
@pytest.mark.parametrize("layer", [tcp("S"), UDP(sport=4000, dport=80) / b"?"], ids=["tcp", "udp"])
def test_a_client_of_another_node_is_told_through_the_overlay(
    rig: Rig, cluster: Cluster, family: int, layer: Any
) -> None:
    """As the pod that refuses, under its own identity: nothing else would be believed there."""
    cluster.know(host(PEER[family]), IDENTITY, DIRECT)
    rig.know(IDENTITY)
    rig.policy(rig.b, refuse(kit.DENY | REJECT), NONE)
    seen = rig.overlay(cluster, kit.header(PEER[family], kit.own(rig.b, family)) / layer, IDENTITY, DIRECT)
    assert (seen.action, seen.reason) == (REDIRECT, Reason.POLICY_DENIED)
    outer = Ether(seen.data)
    assert (outer[IP].src, outer[IP].dst) == (UNDERLAY[HERE][0], UNDERLAY[DIRECT][0])
    vxlan = VXLAN(bytes(outer[UDP].payload))
    assert vxlan.vni == rig.b.identity
    inside = bytes(vxlan.payload)
    assert exact(inside) == inside
    assert ends(Ether(inside)) == (kit.own(rig.b, family), PEER[family])
    if TCP in layer:
        assert str(Ether(inside)[TCP].flags) == "RA"
    rig.policy(rig.b, ALL, NONE)
    assert rig.overlay(
        cluster, kit.header(PEER[family], kit.own(rig.b, family)) / layer, IDENTITY, DIRECT
    ).passed


@BOTH
@pytest.mark.parametrize("layer", [tcp("S"), UDP(sport=4000, dport=80) / b"?"], ids=["tcp", "udp"])
def test_a_client_of_another_node_is_told_by_the_uplink(
    rig: Rig, cluster: Cluster, family: int, layer: Any
) -> None:
    cluster.know(host(PEER[family]), IDENTITY, ROUTED)
    rig.know(IDENTITY)
    rig.policy(rig.b, refuse(kit.DENY | REJECT), NONE)
    frame = (
        Ether(src="02:00:00:00:00:fe", dst="02:00:00:00:00:11")
        / kit.header(PEER[family], kit.own(rig.b, family))
        / layer
    )
    seen = rig.run(frame, "fib_from_uplink", rig.space.uplink)
    assert (seen.action, seen.reason) == (REDIRECT, Reason.POLICY_DENIED)
    assert exact(seen.data) == seen.data
    assert ends(Ether(seen.data)) == (kit.own(rig.b, family), PEER[family])


# ---- errors about connections -------------------------------------------------------------------------------
def cases(rig: Rig, family: int, protocol: str) -> tuple[Any, Any]:
    """A connection from A to B, allowed in no other direction; what A and B send."""
    request, proto = (8 if family == 4 else 128), kit.ICMP[family]
    allowed = {"tcp": (6, 80, 80), "udp": (17, 80, 80), "echo": (proto, request, request)}[protocol]
    rig.policy(rig.a, NONE, only(allowed))
    rig.policy(rig.b, only(allowed), NONE)
    if protocol == "echo":
        return echo(family), echo(family, True)
    layer = {"tcp": TCP, "udp": UDP}[protocol]
    return layer(sport=4000, dport=80) / b"abcdefgh", layer(sport=80, dport=4000) / b"abcdefgh"


@BOTH
@pytest.mark.parametrize("protocol", ["tcp", "udp", "echo"])
@pytest.mark.parametrize("established", [False, True])
@pytest.mark.parametrize("kind", ["mtu", "port", "hops"])
def test_errors_about_connections_pass(
    rig: Rig, family: int, protocol: str, established: bool, kind: str
) -> None:
    """From whom they are opened to, from whom opens them, and from routers on the way; else policy is asked."""
    there, here = cases(rig, family, protocol)
    a, b = kit.own(rig.a, family), kit.own(rig.b, family)
    sent, said = kit.header(a, b) / there, kit.header(b, a) / here
    assert not rig.send(rig.b, error(sent, b, kind)).passed
    assert not rig.arrive(rig.a, error(sent, WORLD[family], kind)).passed
    assert rig.send(rig.a, sent).passed
    if established:
        assert rig.send(rig.b, said).passed
        assert rig.send(rig.a, sent).passed
    related = rig.stat(abi.Stat.RELATED)
    assert rig.send(rig.b, error(sent, b, kind)).passed
    assert rig.arrive(rig.a, error(sent, WORLD[family], kind)).passed
    assert rig.send(rig.a, error(said, a, kind)).passed
    assert rig.arrive(rig.b, error(said, WORLD[family], kind)).passed
    assert rig.stat(abi.Stat.RELATED) == related + 6
    # About what was never sent, by others, to others.
    c = kit.own(rig.c, family)
    rig.policy(rig.c, NONE, NONE)
    other = kit.header(a, b) / (UDP(sport=4001, dport=80) / b"abcdefgh")
    assert not rig.send(rig.b, error(other, b, kind)).passed
    assert not rig.send(rig.c, error(sent, c, kind)).passed
    stray = error(sent, WORLD[family], kind)
    stray[0].dst = kit.own(rig.b, family)
    assert not rig.arrive(rig.b, stray).passed
    rig.age(100000)
    assert not rig.send(rig.b, error(sent, b, kind)).passed


@BOTH
@pytest.mark.parametrize("protocol", ["tcp", "udp", "echo"])
def test_errors_do_not_carry_on_what_is_revoked(rig: Rig, family: int, protocol: str) -> None:
    """They have room for as much as anybody has to say; a policy that still allows the connection lets them pass again."""
    there, here = cases(rig, family, protocol)
    a, b = kit.own(rig.a, family), kit.own(rig.b, family)
    sent, said = kit.header(a, b) / there, kit.header(b, a) / here
    for packet, sender in ((sent, rig.a), (said, rig.b), (sent, rig.a)):
        assert rig.send(sender, packet).passed
    rig.policy(rig.b, NONE, NONE)
    assert not rig.send(rig.b, error(sent, b, "port")).passed
    assert not rig.send(rig.a, sent).passed and not rig.send(rig.b, said).passed
    assert not rig.send(rig.b, error(sent, b, "port")).passed
    assert not rig.arrive(rig.b, error(said, WORLD[family], "hops")).passed
    cases(rig, family, protocol)
    assert rig.send(rig.a, sent).passed
    assert rig.send(rig.b, error(sent, b, "port")).passed


@BOTH
def test_errors_are_asked_about_by_their_type(rig: Rig, family: int) -> None:
    proto, kind = kit.ICMP[family], 3 if family == 4 else 1
    rig.policy(rig.a, only((proto, kind, kind)), NONE)
    rig.policy(rig.b, NONE, only((proto, kind, kind)))
    a, b = kit.own(rig.a, family), kit.own(rig.b, family)
    about = kit.header(a, b) / UDP(sport=1, dport=2) / b"abcdefgh"
    assert rig.send(rig.b, error(about, b, "port")).passed
    assert not rig.send(rig.b, error(about, b, "hops")).passed


@BOTH
@pytest.mark.parametrize("protocol", ["tcp", "udp", "echo"])
def test_errors_that_quote_little_or_nonsense(rig: Rig, family: int, protocol: str) -> None:
    there, _ = cases(rig, family, protocol)
    a, b = kit.own(rig.a, family), kit.own(rig.b, family)
    sent = kit.header(a, b) / there
    assert rig.send(rig.a, sent).passed
    ip = 20 if family == 4 else 40
    least = {"tcp": 4, "udp": 4, "echo": 6}[protocol]
    for length in (1, 19, ip - 1, ip, ip + least - 1):
        assert not rig.send(rig.b, error(sent, b, "port", length)).passed, length
    assert rig.send(rig.b, error(sent, b, "port", ip + least)).passed
    raw = bytearray(bytes(sent))
    head = len(bytes(error(sent, b, "port"))) - len(raw)
    for at, value in ((0, 0x35), (0, 0x41), (0, 0x00), (6, 0x20 if family == 4 else 0)):
        broken = bytearray(bytes(error(sent, b, "port")))
        broken[head + at] = value
        if family == 4 and at == 6:
            broken[head + 7] = 1
        if family == 6 and value == 0x41:
            continue
        assert not rig.send(rig.b, type(sent)(bytes(broken))).passed, (at, value)


def test_errors_about_fragments(rig: Rig) -> None:
    """The first one has ports, behind a header of its own in IPv6."""
    for family in (4, 6):
        cases(rig, family, "udp")
        a, b = kit.own(rig.a, family), kit.own(rig.b, family)
        layer = UDP(sport=4000, dport=80) / bytes(2000)
        if family == 4:
            first, later = pieces_of(IP(src=a, dst=b, id=7) / layer)[:2]
        else:
            first, later = pieces_of(IPv6(src=a, dst=b) / IPv6ExtHdrFragment(id=7) / layer)[:2]
        assert rig.send(rig.a, first).passed
        assert rig.send(rig.b, error(first, b, "hops", 80)).passed
        assert not rig.send(rig.b, error(later, b, "hops", 80)).passed


# ---- behind the balancer ------------------------------------------------------------------------------------
@pytest.fixture
def lab(rig: Rig, cluster: Cluster, instance: Instance) -> Iterator[Lab]:
    slots = instance.pin_dir / pipeline.MAPS[pipeline.SLOTS_MAP]
    with progs.opened(lb.program_path(instance, lb.LB)) as fd:
        progs.set_slot(slots, pipeline.Slot.LB, fd)
    made = Lab(cluster)
    yield made
    made.close()
    progs.clear_slot(slots, pipeline.Slot.LB)


def to_service(rig: Rig, family: int, layer: Any) -> Any:
    return rig.send(rig.a, kit.header(kit.own(rig.a, family), VIP[family]) / layer)


@BOTH
@pytest.mark.parametrize("layer", [TCP, UDP])
def test_a_service_is_asked_about_by_its_backend(rig: Rig, lab: Lab, family: int, layer: Any) -> None:
    """Answers are known, though they have the service's address when they get to the client; so are errors."""
    proto = 6 if layer is TCP else 17
    rig.policy(rig.a, NONE, only((proto, 8080, 8080)))
    rig.policy(rig.b, only((proto, 8080, 8080)), NONE)
    lab.serve(family, [(kit.own(rig.b, family), 8080)], layer)
    flags = [{"flags": "S"}, {"flags": "SA"}, {"flags": "A"}] if layer is TCP else [{}] * 3
    a, b = kit.own(rig.a, family), kit.own(rig.b, family)
    there = to_service(rig, family, layer(sport=4000, dport=80, **flags[0]) / b"abcdefgh")
    assert there.passed and ends(Ether(there.data)) == (a, b)
    sent = whole(there.data)[1]
    for _ in range(2):
        here = rig.send(rig.b, kit.header(b, a) / layer(sport=8080, dport=4000, **flags[1]))
        assert here.passed and ends(Ether(here.data)) == (VIP[family], a)
        assert exact(here.data) == here.data
        assert to_service(rig, family, layer(sport=4000, dport=80, **flags[2])).passed
    assert rig.entry()[1]
    related = rig.stat(abi.Stat.RELATED)
    got = rig.send(rig.b, error(sent, b, "port"))
    assert got.passed and ends(Ether(got.data)) == (VIP[family], a)
    assert rig.stat(abi.Stat.RELATED) == related + 2
    got = rig.arrive(rig.a, error(sent, WORLD[family], "hops"))
    assert got.passed and ends(Ether(got.data)) == (WORLD[family], a)
    # What the client says of an answer that it got quotes the service.
    said = kit.header(VIP[family], a) / layer(sport=80, dport=4000) / b"abcdefgh"
    got = rig.send(rig.a, error(said, a, "port"))
    assert got.passed and ends(Ether(got.data)) == (a, b)
    assert not rig.send(rig.c, error(sent, kit.own(rig.c, family), "port")).passed


@BOTH
@pytest.mark.parametrize("layer", [TCP, UDP])
@EITHER
def test_a_client_of_a_service_is_told_by_the_service(
    rig: Rig, lab: Lab, family: int, layer: Any, side: str
) -> None:
    rig.open_all()
    rig.one(side, rig.a if side == "egress" else rig.b, refuse(kit.DENY | REJECT))
    lab.serve(family, [(kit.own(rig.b, family), 8080)], layer)
    sent = kit.header(kit.own(rig.a, family), VIP[family]) / layer(sport=4000, dport=80) / b"abcdefgh"
    seen = rig.send(rig.a, sent)
    assert (seen.action, seen.reason) == (REDIRECT, Reason.POLICY_DENIED)
    assert exact(seen.data) == seen.data
    got: Any = Ether(seen.data)
    assert ends(got) == (VIP[family], kit.own(rig.a, family))
    assert got.dst == "02:00:00:00:01:14"
    if layer is TCP:
        assert (got[TCP].sport, got[TCP].dport, str(got[TCP].flags)) == (80, 4000, "RA")
    else:
        start, quote = (20, bytes(got[ICMP])[8:]) if family == 4 else (40, bytes(got[2])[8:])
        assert quote[start:] == bytes(sent)[start:]
        assert (
            quote[start - (8 if family == 4 else 32) : start]
            == bytes(sent)[start - (8 if family == 4 else 32) : start]
        )


@BOTH
def test_a_pod_reaches_itself_through_a_service(rig: Rig, lab: Lab, family: int) -> None:
    rig.policy(rig.a, NONE, NONE)
    lab.serve(family, [(kit.own(rig.a, family), 8080)], TCP)
    there = to_service(rig, family, tcp("S"))
    assert there.passed and whole(there.data)[1].src == HAIRPIN[family]
    here = rig.send(rig.a, kit.header(kit.own(rig.a, family), HAIRPIN[family]) / tcp("SA", 8080, 4000))
    assert here.passed and ends(Ether(here.data)) == (VIP[family], kit.own(rig.a, family))


@BOTH
def test_revoked_behind_a_service(rig: Rig, lab: Lab, family: int) -> None:
    rig.open_all()
    lab.serve(family, [(kit.own(rig.b, family), 8080)], TCP)
    a, b = kit.own(rig.a, family), kit.own(rig.b, family)
    answer = kit.header(b, a) / tcp("SA", 8080, 4000)
    assert to_service(rig, family, tcp("S")).passed
    assert rig.send(rig.b, answer).passed
    assert to_service(rig, family, tcp("A")).passed
    rig.policy(rig.a, None, NONE)
    assert rig.send(rig.b, answer).reason is Reason.POLICY_REVOKED
    assert to_service(rig, family, tcp("A")).reason is Reason.POLICY_REVOKED
    rig.policy(rig.a, None, ALL)
    rig.policy(rig.b, NONE, None)
    assert rig.send(rig.b, answer).reason is Reason.POLICY_REVOKED
