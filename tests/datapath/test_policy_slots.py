"""Policy slots: what they ask, what they tell, and what changes of policies and switches do."""

from __future__ import annotations

import asyncio
import ctypes as ct
import itertools
import socket
import struct
import threading

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether

from services.common.instance import Instance
from services.common.kernel import loader, progs
from services.common.pipeline import abi as pipeline
from services.common.pipeline.reasons import Reason
from services.policy import abi, install
from tests.datapath import policykit as kit
from tests.datapath.cluster import HERE, Cluster
from tests.datapath.packets import delivered
from tests.datapath.policyconns import back, connect, tcp
from tests.datapath.policykit import ALL, ALLOW, KEEP, NONE, RULE, WORLD, Rig, only, refuse

BOTH = pytest.mark.parametrize("family", [4, 6])
EITHER = pytest.mark.parametrize("side", ["egress", "ingress"])


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
