"""Policy slots: which packets are of one connection, and for how long."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrFragment,
)

from services.common.pipeline.abi import FibAddr
from services.common.pipeline.reasons import Reason
from services.policy import abi
from tests.datapath import policykit as kit
from tests.datapath.policyconns import back, connect, echo, pieces_of, tcp
from tests.datapath.policykit import ALL, NONE, WORLD, Rig, only

BOTH = pytest.mark.parametrize("family", [4, 6])


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
