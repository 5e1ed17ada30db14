"""Policy slots: who is told of a refusal, errors about connections, and services."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    IPv6,
    IPv6ExtHdrFragment,
)
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN

from services.common.instance import Instance
from services.common.kernel import progs
from services.common.pipeline import abi as pipeline
from services.common.pipeline.reasons import Reason
from services.lb import install as lb
from services.policy import abi
from tests.datapath import policykit as kit
from tests.datapath.cluster import DIRECT, HERE, ROUTED, UNDERLAY, Cluster
from tests.datapath.harness import REDIRECT, SHOT, UNSPEC
from tests.datapath.lbkit import HAIRPIN, VIP, Lab, exact
from tests.datapath.policyconns import echo, pieces_of, tcp
from tests.datapath.policykit import ALL, NONE, REJECT, WORLD, Rig, only, refuse
from tests.datapath.test_between_nodes import IDENTITY, PEER, host
from tests.datapath.test_lb_related import error

BOTH = pytest.mark.parametrize("family", [4, 6])
MARK = 0x66
EITHER = pytest.mark.parametrize("side", ["egress", "ingress"])


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
