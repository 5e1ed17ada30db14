"""Clients outside: there and back again by every way that a backend can be reached."""

from __future__ import annotations

import ctypes as ct
import socket
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, IPv6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP, SCTPChunkData

from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi as pipeline
from services.common.pipeline.abi import FibAddr
from services.common.pipeline.reasons import Reason
from services.identity.network.install import FROM_OVERLAY
from services.identity.numbers import Reserved
from services.lb import abi, install
from tests.datapath.cluster import HERE, OVERLAY, ROUTED, UNDERLAY, Tunnel
from tests.datapath.harness import REDIRECT, SMALL, UNSPEC, A, B
from tests.datapath.lbkit import (
    CLIENT,
    NARROW,
    NODE,
    NODE_MAC,
    ROUTER_MAC,
    SERVER,
    SERVER_MAC,
    VIP,
    Uplink,
    answer,
    arriving,
    exact,
    outside,
    own,
    rewritten,
)  # fmt: skip
from tests.datapath.packets import ether, ip
from tests.datapath.test_between_nodes import IDENTITY, PEER, host, inner

BOTH = pytest.mark.parametrize("family", [4, 6])
EACH = pytest.mark.parametrize("layer", [TCP, UDP])
EXAMPLES = {
    "max_examples": 25,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
}
SPORT, DATA, HOPS = st.integers(1, 65535), st.binary(max_size=64), st.integers(2, 255)


def in_ranges(port: int) -> bool:
    return 1024 <= port <= 29999 or port >= 61000


# -- there and back


@BOTH
@EACH
def test_a_pod_of_this_node(uplink: Uplink, family: int, layer: Any) -> None:
    uplink.lab.serve(family, [(own(A, family), 8080)], layer)

    @settings(**EXAMPLES)
    @given(sport=SPORT, said=DATA, heard=DATA, ttl=HOPS)
    def check(sport: int, said: bytes, heard: bytes, ttl: int) -> None:
        packet = outside(family, ttl=ttl) / layer(sport=sport, dport=80) / said
        there = uplink.sends(packet)
        assert bytes(there[1]) == rewritten(Ether(arriving(packet)), dst=own(A, family), dport=8080)
        event = uplink.event()
        assert (event.dst_id, event.src_identity, event.verdict) == (
            A.id,
            Reserved.WORLD,
            pipeline.Verdict.DELIVERED,
        )

        reply = ether() / answer(bytes(there), layer) / heard
        back = uplink.from_pod(reply)
        assert back.action == REDIRECT and exact(back.data) == back.data
        assert back.data[14:] == rewritten(reply, src=VIP[family], sport=80)
        assert (Ether(back.data).src, Ether(back.data).dst) == (NODE_MAC, ROUTER_MAC)

    check()


@BOTH
@EACH
def test_a_server_on_the_network(uplink: Uplink, family: int, layer: Any) -> None:
    uplink.lab.serve(family, [(SERVER[family], 8080)], layer)

    @settings(**EXAMPLES)
    @given(sport=SPORT, said=DATA, heard=DATA, ttl=HOPS)
    def check(sport: int, said: bytes, heard: bytes, ttl: int) -> None:
        packet = outside(family, ttl=ttl) / layer(sport=sport, dport=80) / said
        there = uplink.sends(packet)
        assert (there.src, there.dst) == (NODE_MAC, SERVER_MAC) and in_ranges(there[layer].sport)
        assert bytes(there[1]) == rewritten(
            Ether(arriving(packet)), NODE[family], SERVER[family], there[layer].sport, 8080
        )

        reply = answer(bytes(there), layer) / heard
        back = uplink.sends(reply)
        assert (back.src, back.dst) == (NODE_MAC, ROUTER_MAC)
        assert bytes(back[1]) == rewritten(Ether(arriving(reply)), VIP[family], CLIENT[family], 80, sport)

    check()


@BOTH
def test_sctp_is_answered_at_the_port_it_came_from(uplink: Uplink, family: int) -> None:
    """Its ports cannot be changed: so a second client with the same one, towards the same backend, is refused."""
    uplink.lab.tables.service([(VIP[family], 80)], [(SERVER[family], 80)], 132)

    def sctp(packet: Any, **ends: int) -> Any:
        made = packet / SCTP(**ends) / SCTPChunkData(data=b"abc")
        if family == 6:
            made[IPv6].nh = 132
        return made

    for _ in range(2):
        there = uplink.sends(sctp(outside(family), sport=70, dport=80))
        assert (there[1].src, there[1].dst) == (NODE[family], SERVER[family])
        assert (there[SCTP].sport, there[SCTP].dport) == (70, 80)
        back = uplink.sends(sctp(ip(NODE[family], family, SERVER[family]), sport=80, dport=70))
        assert (back[1].src, back[1].dst, back[SCTP].dport) == (VIP[family], CLIENT[family], 70)
    other = "192.0.2.77" if family == 4 else "2001:db8:1::77"
    assert uplink.drops(sctp(outside(family, src=other), sport=70, dport=80)) == Reason.LB_NO_PORT


@BOTH
@EACH
@pytest.mark.parametrize("node", [OVERLAY, ROUTED])
def test_a_pod_of_another_node(uplink: Uplink, family: int, layer: Any, node: int) -> None:
    uplink.lab.cluster.know(host(PEER[family]), IDENTITY, node)
    uplink.lab.serve(family, [(PEER[family], 8080)], layer)

    @settings(**EXAMPLES)
    @given(sport=SPORT, said=DATA, heard=DATA, ttl=HOPS)
    def check(sport: int, said: bytes, heard: bytes, ttl: int) -> None:
        packet = outside(family, ttl=ttl) / layer(sport=sport, dport=80) / said
        there = uplink.sends(packet)
        assert bytes(there[1]) == rewritten(
            Ether(arriving(packet)), NODE[family], PEER[family], there[layer].sport, 8080
        )
        event = uplink.event()
        wanted = pipeline.Verdict.TO_OVERLAY if node == OVERLAY else pipeline.Verdict.TO_NODE
        assert (event.verdict, event.src_identity, event.dst_identity) == (
            wanted,
            Reserved.REMOTE_NODE,
            IDENTITY,
        )

        reply = answer(bytes(there), layer) / heard
        if node == ROUTED:
            back = bytes(uplink.sends(reply))
        else:
            with uplink.netns.entered():
                back = uplink.lab.cluster.run(
                    bytes(inner() / reply), FROM_OVERLAY, Tunnel.of(UNDERLAY[OVERLAY][0], IDENTITY)
                ).data
        assert exact(back) == back and (Ether(back).src, Ether(back).dst) == (NODE_MAC, ROUTER_MAC)
        assert back[14:] == rewritten(inner() / reply, VIP[family], CLIENT[family], 80, sport)

    check()


@BOTH
def test_a_process_of_this_host(uplink: Uplink, family: int) -> None:
    uplink.lab.tables.service([(VIP[family], 80)], {(NODE[family], 8080): abi.BackendFlag.LOCAL})
    packet = outside(family, ttl=9) / TCP(sport=7, dport=80) / b"abc"
    there = uplink.sends(packet, UNSPEC)
    assert bytes(there[1]) == rewritten(Ether(arriving(packet)), dst=NODE[family], dport=8080, ttl=9)
    reply = answer(bytes(there), TCP, flags="SA")
    action, data = uplink.run(bytes(Ether(src=NODE_MAC, dst=ROUTER_MAC) / reply), install.UPLINK_OUT)
    assert action == UNSPEC and exact(data) == data
    assert data[14:] == rewritten(Ether(arriving(reply)), src=VIP[family], sport=80, ttl=64)


@BOTH
def test_a_node_port(uplink: Uplink, family: int) -> None:
    tables = uplink.lab.tables
    tables.service([("0.0.0.0" if family == 4 else "::", 30080)], [(own(A, family), 8080)])
    tables.node_address(NODE[family])
    assert uplink.sends(outside(family, dst=NODE[family]) / TCP(sport=7, dport=30080))[1].dst == own(
        A, family
    )
    uplink.passes(outside(family, dst=NODE[family]) / TCP(sport=7, dport=22))
    uplink.passes(outside(family) / TCP(sport=7, dport=30080))


@BOTH
def test_what_is_no_services_is_the_hosts(uplink: Uplink, family: int) -> None:
    uplink.lab.serve(family, [(SERVER[family], 8080)])
    for packet in (
        outside(family) / TCP(dport=81), outside(family) / UDP(dport=80), outside(family, dst=NODE[family]) / TCP(dport=80),
        outside(family, src=SERVER[family], dst=NODE[family]) / TCP(sport=8080, dport=2000),
        outside(family, src=SERVER[family], dst=own(B, family)) / TCP(sport=8080),
    ):  # fmt: skip
        uplink.passes(packet)
    data = bytes(Ether(src=ROUTER_MAC, dst="02:00:00:00:00:77") / outside(family) / TCP(dport=80))
    assert uplink.run(data) == (UNSPEC, data)


@BOTH
def test_nobody_speaks_for_a_pod(uplink: Uplink, family: int) -> None:
    uplink.lab.cluster.know(host(PEER[family]), IDENTITY, OVERLAY)
    uplink.lab.cluster.know(host(own(B, family)), B.identity, HERE)
    uplink.lab.serve(family, [(SERVER[family], 8080)])
    for source in (PEER[family], own(B, family)):
        assert uplink.drops(outside(family, src=source) / TCP(dport=80)) == Reason.UPLINK_SPOOFED


@BOTH
def test_source_ranges_concern_clients_outside(uplink: Uplink, family: int) -> None:
    index, _ = uplink.lab.serve(family, [(SERVER[family], 8080)], flags=abi.ServiceFlag.SOURCES)
    packet = outside(family) / TCP(sport=7, dport=80)
    assert uplink.drops(packet) == Reason.LB_SOURCE
    prefix = {4: "192.0.2.0/24", 6: "2001:db8:1::/64"}[family]
    path = uplink.lab.dp.instance.pin_dir / abi.MAPS["lb_sources"]
    key = abi.SourceKey.of(index, ip_network(prefix))
    with BpfMap.open(path, abi.SourceKey, abi.Admitted) as sources:
        sources.update(key, abi.Admitted(1))
        try:
            assert uplink.sends(packet)[1].dst == SERVER[family]
        finally:
            sources.delete(key)
    # An established connection is asked again.
    assert uplink.drops(outside(family) / TCP(sport=7, dport=80, flags="A")) == Reason.LB_SOURCE
    assert (
        Ether(uplink.from_pod(ether() / ip(VIP[family], family) / TCP(sport=7, dport=80)).data)[1].dst
        == SERVER[family]
    )


@BOTH
def test_inside_and_outside_have_backends_of_their_own(uplink: Uplink, family: int) -> None:
    index, (first, second) = uplink.lab.serve(family, [(SERVER[family], 8080), (own(B, family), 8080)])
    line = uplink.lab.tables.line(abi.Table.SERVICES, index, abi.Service)
    line.outside.count = 1
    line.inside.first, line.inside.count = line.outside.first + 1, 1
    assert first != second
    for sport in range(1, 20):
        assert uplink.sends(outside(family) / TCP(sport=sport, dport=80))[1].dst == SERVER[family]
    routed = {4: "192.168.7.4", 6: "fd77::4"}[family]
    uplink.lab.cluster.know(host(routed), Reserved.REMOTE_NODE, ROUTED)
    assert uplink.sends(outside(family, src=routed) / TCP(sport=7, dport=80))[1].dst == own(B, family)


# -- ports


def ports(uplink: Uplink, first: int, last: int, then: tuple[int, int] = (0, 0)) -> None:
    uplink.lab.tables.write_config(snat_ports=(ct.c_uint32 * 2)(first << 16 | last, then[0] << 16 | then[1]))


@BOTH
@EACH
def test_every_port_is_used_and_exhaustion_is_told(uplink: Uplink, family: int, layer: Any) -> None:
    ports(uplink, 2000, 2059, (3000, 3036))
    uplink.lab.serve(family, [(SERVER[family], 8080)], layer)
    sent = {
        sport: uplink.sends(outside(family) / layer(sport=sport, dport=80))[layer].sport
        for sport in range(1, 98)
    }
    assert sorted(sent.values()) == [*range(2000, 2060), *range(3000, 3037)]
    for _ in range(2):
        assert uplink.drops(outside(family) / layer(sport=99, dport=80)) == Reason.LB_NO_PORT
    for sport, port in sent.items():
        assert uplink.sends(outside(family) / layer(sport=sport, dport=80))[layer].sport == port
    path = uplink.lab.dp.instance.pin_dir / abi.MAPS["lb_exhausted"]
    with BpfMap.open(path, abi.FullKey, abi.Full) as full:
        key = abi.FullKey(
            addr=FibAddr.of(SERVER[family]), port=socket.htons(8080), proto=6 if layer is TCP else 17
        )
        found = full.lookup(key)
        assert found is not None and found.times >= 2
        full.delete(key)
    # Another backend has ports of its own.
    uplink.lab.serve(family, [(SERVER[family], 8081)], layer, port=81)
    uplink.sends(outside(family) / layer(sport=99, dport=81))


@BOTH
def test_ports_of_connections_that_are_over_are_used_again(uplink: Uplink, family: int) -> None:
    ports(uplink, 2000, 2009)
    uplink.lab.serve(family, [(SERVER[family], 8080)], UDP)
    for sport in range(1, 11):
        uplink.sends(outside(family) / UDP(sport=sport, dport=80))
    with uplink.lab.tables.nats() as nats:
        for key, nat in list(nats.items()):
            nat.stamp = (nat.stamp & ~abi.STAMP) | ((nat.stamp - 20) & abi.STAMP)
            nats.update(key, nat)
    for sport in range(11, 21):
        uplink.sends(outside(family) / UDP(sport=sport, dport=80))


@BOTH
@pytest.mark.parametrize("grown", [False, True])
def test_whoever_gets_a_port_again_gets_the_answers(uplink: Uplink, family: int, grown: bool) -> None:
    """What is left of the port's last connection, which had settled, does not stand before the one that begins."""
    tables = uplink.lab.tables
    ports(uplink, 2000, 2000)
    uplink.lab.serve(family, [(SERVER[family], 8080)])
    for sport in (1, 2, 3):
        if grown and sport == 2:
            tables.grow_nats()
        for flags in ("S", "A", "FA"):
            there = uplink.sends(outside(family) / TCP(sport=sport, dport=80, flags=flags))
            assert there[TCP].sport == 2000
            back = uplink.sends(ip(NODE[family], family, SERVER[family]) / TCP(sport=8080, dport=2000, flags="A"))
            assert back[TCP].dport == sport, flags
        tables.age_flows(20)
        tables.age_nats(20)


@BOTH
def test_a_long_search_ends_where_it_should(uplink: Uplink, family: int) -> None:
    """Nearly all of 20,000 ports are taken: the search goes on from program to program."""
    tables = uplink.lab.tables
    uplink.lab.tables.close()
    uplink.lab.tables = tables = type(tables)(uplink.lab.dp.instance.pin_dir, nats=40000)
    tables.snat(*NODE.values())
    ports(uplink, 10001, 30000)
    uplink.lab.serve(family, [(SERVER[family], 8080)])
    now = uplink.sends(outside(family) / TCP(sport=1, dport=80))[TCP].sport
    with tables.nats() as nats, tables.begun() as begun:
        ((key, nat),) = begun.items()
        nat.cport = 0
        for port in range(10001, 30001):
            if port not in (now, 12345):
                key.lport = socket.htons(port)
                nats.update(key, nat)
    assert uplink.sends(outside(family) / TCP(sport=2, dport=80))[TCP].sport == 12345
    assert uplink.drops(outside(family) / TCP(sport=3, dport=80)) == Reason.LB_NO_PORT


@BOTH
def test_a_flood_of_beginnings_displaces_no_connection(uplink: Uplink, family: int) -> None:
    """However many say SYN: what answers to connections that are established finds its way."""
    ports(uplink, 1024, 65535)
    uplink.lab.serve(family, [(SERVER[family], 8080)])
    held = {}
    for sport in range(1, 21):
        held[sport] = uplink.sends(outside(family) / TCP(sport=sport, dport=80))[TCP].sport
        assert uplink.sends(outside(family) / TCP(sport=sport, dport=80, flags="A"))[TCP].sport == held[sport]
    with uplink.lab.tables.begun() as begun, uplink.lab.tables.nats() as nats:
        assert not list(begun.keys())
        assert len(list(nats.keys())) == len(held)
        # A flood of them, as far as the table is concerned.
        key, nat = next(nats.items())
        nat.stamp &= ~abi.FlowFlag.CONFIRMED
        for number in range(2 * abi.NATS_NEW):
            key.lport, key.rport = number & 0xFFFF, number >> 16
            begun.update(key, nat)
        assert len(list(nats.keys())) == len(held)
    uplink.sends(outside(family) / TCP(sport=5000, dport=80))
    for sport, port in held.items():
        packet = ip(NODE[family], family, SERVER[family]) / TCP(sport=8080, dport=port, flags="A")
        assert uplink.sends(packet)[TCP].dport == sport


@BOTH
def test_a_lost_half_is_found_again(uplink: Uplink, family: int) -> None:
    ports(uplink, 2000, 2059)
    uplink.lab.serve(family, [(SERVER[family], 8080)])
    packets = [outside(family) / TCP(sport=sport, dport=80, flags="A") for sport in range(1, 50)]
    before = [uplink.sends(packet)[TCP].sport for packet in packets]
    uplink.lab.tables.forget_flows()
    assert [uplink.sends(packet)[TCP].sport for packet in packets] == before
    with uplink.lab.tables.nats() as nats:
        for key in list(nats.keys()):
            nats.delete(key)
    uplink.lab.tables.age_flows()
    assert [uplink.sends(packet)[TCP].sport for packet in packets] == before
    assert uplink.sends(answer(bytes(uplink.sends(packets[7])), TCP))[TCP].dport == 8


# -- errors


@BOTH
@pytest.mark.parametrize("where", ["pod", "outside"])
def test_nobody_there_is_told_by_tcp(uplink: Uplink, family: int, where: str) -> None:
    uplink.lab.serve(family, [])

    def told(layer: TCP) -> Ether:
        if where == "outside":
            action, data = uplink.run(arriving(outside(family) / layer / b"abc"))
            assert action == REDIRECT and Reason(uplink.event().reason) == Reason.LB_NO_BACKEND
            assert (Ether(data).src, Ether(data).dst) == (NODE_MAC, ROUTER_MAC)
        else:
            result = uplink.lab.dp.run(bytes(ether() / ip(VIP[family], family) / layer / b"abc"))
            assert (result.action, result.reason) == (REDIRECT, Reason.LB_NO_BACKEND)
            data = result.data
        got = Ether(data)
        assert exact(data) == data
        assert (got[1].src, got[1].dst) == (
            VIP[family],
            CLIENT[family] if where == "outside" else own(A, family),
        )
        assert (got[TCP].sport, got[TCP].dport, got[TCP].dataofs) == (80, 7, 5)
        assert len(got[TCP]) == 20
        return got[TCP]

    reset = told(TCP(sport=7, dport=80, flags="S", seq=1000, options=[("MSS", 1460)]))
    assert (reset.flags, reset.seq, reset.ack) == ("RA", 0, 1004)
    reset = told(TCP(sport=7, dport=80, flags="A", seq=1000, ack=77))
    assert (reset.flags, reset.seq) == ("R", 77)
    again = outside(family) / TCP(sport=7, dport=80, flags="R")
    assert uplink.drops(again) == Reason.LB_NO_BACKEND


def quoted(data: bytes, family: int) -> tuple[Any, Any, int]:
    """An ICMP error's header, what it quotes, and its MTU."""
    got = Ether(data)
    assert exact(data) == data
    if family == 4:
        icmp = got[ICMP]
        return icmp, IP(bytes(icmp.payload)), icmp.nexthopmtu
    icmp = got[ICMPv6PacketTooBig] if ICMPv6PacketTooBig in got else got[ICMPv6DestUnreach]
    return icmp, IPv6(bytes(icmp.payload)), getattr(icmp, "mtu", 0)


@BOTH
@pytest.mark.parametrize("where", ["pod", "outside"])
@pytest.mark.parametrize("size", [0, 1, 30, 1000])
def test_nobody_there_is_told_by_icmp(uplink: Uplink, family: int, where: str, size: int) -> None:
    uplink.lab.serve(family, [], UDP)
    payload = UDP(sport=7, dport=80) / bytes(range(256)).ljust(size)[:size]
    if where == "outside":
        packet = Ether(arriving(outside(family) / payload))
        action, data = uplink.run(bytes(packet))
        assert action == REDIRECT
    else:
        packet = ether() / ip(VIP[family], family) / payload
        data = uplink.lab.dp.run(bytes(packet)).data
    icmp, quote, _ = quoted(data, family)
    assert (icmp.type, icmp.code) == ((3, 3) if family == 4 else (1, 4))
    assert bytes(quote) == bytes(packet[1])[: len(bytes(quote))] and len(bytes(quote)) == min(
        120, len(bytes(packet[1]))
    )
    assert Ether(data)[1].src == VIP[family]


@BOTH
def test_a_packet_too_big_is_told_so(uplink: Uplink, family: int) -> None:
    uplink.lab.cluster.know(host(PEER[family]), IDENTITY, OVERLAY)
    ways = {81: (PEER[family], 1400), 82: (NARROW[family], 1300), 83: (own(SMALL, family), 1300)}
    for port, (backend, mtu) in ways.items():
        uplink.lab.serve(family, [(backend, 8080)], port=port)
        header = 40 if family == 4 else 60
        fits = (
            outside(family, **({"flags": "DF"} if family == 4 else {}))
            / TCP(sport=7, dport=port)
            / bytes(mtu - header)
        )
        uplink.sends(fits)
        action, data = uplink.run(arriving(fits / b"x"))
        assert action == REDIRECT and Reason(uplink.event().reason) == Reason.LB_TOO_BIG
        icmp, quote, told = quoted(data, family)
        assert (icmp.type, told) == (3 if family == 4 else 2, mtu)
        assert (quote.dst, Ether(data)[1].dst) == (VIP[family], CLIENT[family])
        # Segments fit, though the whole does not.
        packet = outside(family) / TCP(sport=7, dport=port) / bytes(3000)
        assert uplink.run(arriving(packet), gso_size=mtu - header)[0] == REDIRECT
        assert Reason(uplink.event().reason) == Reason.NONE
        uplink.run(arriving(packet), gso_size=mtu - header + 1)
        assert Reason(uplink.event().reason) == Reason.LB_TOO_BIG


@BOTH
def test_no_way_to_the_backend(uplink: Uplink, family: int) -> None:
    uplink.lab.serve(family, [({4: "198.18.0.1", 6: "2001:db8:ff::1"}[family], 80)])
    assert uplink.drops(outside(family) / TCP(dport=80)) == Reason.LB_NO_ROUTE
    uplink.lab.tables.snat()
    assert uplink.drops(outside(family) / TCP(dport=80)) == Reason.LB_NO_ROUTE


@BOTH
def test_maglev_chooses_as_everywhere(uplink: Uplink, family: int) -> None:
    addresses = [f"192.168.7.{50 + n}" if family == 4 else f"fd77::{50 + n:x}" for n in range(7)]
    uplink.lab.serve(family, [(address, 8080) for address in addresses])
    for sport in range(1, 40):
        _, data = uplink.run(arriving(outside(family) / TCP(sport=sport, dport=80)))
        sig = abi.flow_hash(
            uplink.lab.tables.config.seed, ip_address(CLIENT[family]), sport, ip_address(VIP[family]), 80, 6
        )
        assert Ether(data)[1].dst == addresses[(sig >> 32) * len(addresses) >> 32]
