"""Translation of both ends at XDP: there and back again."""

from __future__ import annotations

import ctypes as ct
import socket
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from services.common.pipeline.abi import FibAddr
from services.lb import abi
from tests.datapath.lbtables import LbTables
from tests.datapath.xdpkit import (
    CLIENT,
    FAMILIES,
    NODE,
    NODE_MAC,
    PASS,
    ROUTER_MAC,
    TX,
    VIP,
    XdpRig,
    backend_address,
    backend_mac,
    exact,
    frame,
    ip,
    looks_unsummed,
)  # fmt: skip

BOTH = pytest.mark.parametrize("family", FAMILIES)
PROTO = {TCP: 6, UDP: 17}


@pytest.fixture
def rig(xdp_rig: XdpRig) -> XdpRig:
    return xdp_rig


@pytest.fixture
def tables(rig: XdpRig) -> Iterator[LbTables]:
    with rig.fresh() as made:
        yield made


def serve(tables: LbTables, family: int, backends: int = 3, proto: int = 6) -> tuple[int, list[int]]:
    return tables.service([(VIP[family], 80)], [(backend_address(family, n), 8080) for n in range(backends)], proto,
                          abi.ServiceFlag.MAGLEV)


def answer_to(sent: Ether, layer: type[TCP] | type[UDP], payload: bytes = b"", flags: str = "SA") -> IP | IPv6:
    """What the backend says to a packet it got."""
    fields: dict[str, Any] = {"flags": flags} if layer is TCP else {}
    header = type(sent[1])(src=sent[1].dst, dst=sent[1].src)
    return header / layer(sport=sent[layer].dport, dport=sent[layer].sport, **fields) / payload


def in_ranges(port: int) -> bool:
    return 1024 <= port <= 29999 or port >= 61000


@BOTH
@pytest.mark.parametrize("layer", [TCP, UDP])
def test_there_and_back(rig: XdpRig, tables: LbTables, family: int, layer: type[TCP] | type[UDP]) -> None:
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(sport=st.integers(1, 65535), said=st.binary(max_size=64), heard=st.binary(max_size=64),
           client=st.integers(1, 200), ttl=st.integers(2, 255))
    def check(sport: int, said: bytes, heard: bytes, client: int, ttl: int) -> None:
        source = f"192.0.2.{client}" if family == 4 else f"2001:db8:1::{client:x}"
        packet = ip(family, src=source, ttl=ttl) / layer(sport=sport, dport=80) / said
        assume(not looks_unsummed(frame(packet)))
        there = rig.send(packet)
        number = next(n for n in range(3) if backend_address(family, n) == there[1].dst)
        assert (there.src, there.dst) == (NODE_MAC, backend_mac(number))
        assert there[1].src == NODE[family] and there[layer].dport == 8080 and in_ranges(there[layer].sport)
        expected = Ether(frame(packet))
        expected.src, expected.dst = there.src, there.dst
        expected[1].src, expected[1].dst = there[1].src, there[1].dst
        expected[layer].sport, expected[layer].dport = there[layer].sport, 8080
        if family == 4:
            expected[IP].ttl = ttl - 1
            del expected[IP].chksum
        else:
            expected[IPv6].hlim = ttl - 1
        del expected[layer].chksum
        assert bytes(there) == bytes(expected)

        assume(not looks_unsummed(frame(answer_to(there, layer, heard))))
        back = rig.send(answer_to(there, layer, heard))
        wanted = type(there[1])(src=VIP[family], dst=source, **({"ttl": 63} if family == 4 else {"hlim": 63}))
        wanted /= answer_to(there, layer, heard)[layer]
        wanted[layer].sport, wanted[layer].dport = 80, sport
        del wanted[layer].chksum
        if family == 4:
            wanted[IP].id = back[IP].id
        assert bytes(back) == bytes(Ether(src=NODE_MAC, dst=ROUTER_MAC) / wanted)

    serve(tables, family, proto=PROTO[layer])
    check()
    assert tables.stats()[abi.Stat.REVERSED] >= 1


@BOTH
def test_connections_to_one_backend_have_ports_of_their_own(rig: XdpRig, tables: LbTables, family: int) -> None:
    tables.write_config(snat_ports=(ct.c_uint32 * 2)(2000 << 16 | 2299, 0))
    serve(tables, family, 1)
    ports: dict[int, int] = {}
    for sport in range(1, 150):
        action, data = rig.run(frame(ip(family) / TCP(sport=sport, dport=80, flags="S")))
        if action == TX:
            ports[sport] = Ether(data)[TCP].sport
    # The few tries of XDP find a free one for most; tc finds all.
    assert len(ports) > 100 and len(set(ports.values())) == len(ports)
    for sport, port in ports.items():
        assert rig.send(ip(family) / TCP(sport=sport, dport=80, flags="A"))[TCP].sport == port
    assert min(ports.values()) >= 2000 and max(ports.values()) <= 2299


@BOTH
def test_no_port_left_is_left_to_tc(rig: XdpRig, tables: LbTables, family: int) -> None:
    tables.write_config(snat_ports=(ct.c_uint32 * 2)(2000 << 16 | 2003, 0))
    index, _ = serve(tables, family, 1)
    for sport in range(1, 5):
        rig.send(ip(family) / TCP(sport=sport, dport=80, flags="S"))
    rig.passes(ip(family) / TCP(sport=5, dport=80, flags="S"))
    assert tables.line(abi.Table.SERVICES, index, abi.Service).connections == 4
    tables.write_config(snat_ports=(ct.c_uint32 * 2)(0, 0))
    rig.passes(ip(family) / TCP(sport=6, dport=80, flags="S"))


@BOTH
def test_whoever_gets_a_port_again_gets_the_answers(rig: XdpRig, tables: LbTables, family: int) -> None:
    """What is left of the port's last connection, which had settled, does not stand before the one that begins."""
    tables.write_config(snat_ports=(ct.c_uint32 * 2)(2000 << 16 | 2000, 0))
    serve(tables, family, 1)
    for sport in (1, 2, 3):
        for flags in ("S", "A", "FA"):
            there = rig.send(ip(family) / TCP(sport=sport, dport=80, flags=flags))
            assert there[TCP].sport == 2000
            assert rig.send(answer_to(there, TCP, flags="A"))[TCP].dport == sport, flags
        tables.age_flows(20)
        tables.age_nats(20)


@BOTH
def test_a_lost_flow_is_found_again_with_its_port(rig: XdpRig, tables: LbTables, family: int) -> None:
    serve(tables, family)
    before = {n: rig.send(ip(family) / TCP(sport=n, dport=80, flags="A")) for n in range(1, 30)}
    tables.forget_flows()
    for sport, sent in before.items():
        again = rig.send(ip(family) / TCP(sport=sport, dport=80, flags="A"))
        assert (again[1].dst, again[TCP].sport) == (sent[1].dst, sent[TCP].sport)


@BOTH
def test_a_lost_translation_is_written_again(rig: XdpRig, tables: LbTables, family: int) -> None:
    serve(tables, family, 1)
    packet = ip(family) / TCP(sport=7, dport=80, flags="A")
    sent = rig.send(packet)
    with tables.nats() as nats:
        for key in list(nats.keys()):
            nats.delete(key)
    rig.passes(answer_to(sent, TCP))
    tables.age_flows()
    assert rig.send(packet)[TCP].sport == sent[TCP].sport
    assert rig.send(answer_to(sent, TCP))[TCP].dport == 7


@BOTH
def test_what_ends_is_marked_on_both_sides(rig: XdpRig, tables: LbTables, family: int) -> None:
    serve(tables, family, 1)
    sent = rig.send(ip(family) / TCP(sport=7, dport=80, flags="A"))
    rig.send(answer_to(sent, TCP, flags="FA"))
    (flow,) = tables.flows()
    with tables.nats() as nats:
        ((_, nat),) = nats.items()
    assert flow.stamp & abi.FlowFlag.CLOSING and nat.stamp & abi.FlowFlag.CLOSING


@BOTH
def test_answers_that_are_none_go_on_as_they_came(rig: XdpRig, tables: LbTables, family: int) -> None:
    serve(tables, family, 1)
    sent = rig.send(ip(family) / TCP(sport=7, dport=80, flags="S"))
    right = answer_to(sent, TCP)
    for field, value in (("sport", 8081), ("dport", (right[TCP].dport + 1) % 65536)):
        wrong = right.copy()
        setattr(wrong[TCP], field, value)
        rig.passes(wrong)
    rig.passes(type(right)(src=CLIENT[family], dst=NODE[family]) / right[TCP])
    rig.passes(right, dst="02:00:00:00:00:77")
    low = right.copy()
    setattr(low, "ttl" if family == 4 else "hlim", 1)
    rig.passes(low)
    rig.passes(ip(family, ttl=1) / TCP(sport=7, dport=80, flags="A"))
    rig.passes(right / bytes(1461 if family == 4 else 1441))
    rig.send(right)


@BOTH
def test_a_connection_goes_on_as_it_began(rig: XdpRig, tables: LbTables, family: int) -> None:
    index, _ = serve(tables, family, 1)
    port = rig.send(ip(family) / TCP(sport=7, dport=80, flags="S"))[TCP].sport
    service = tables.line(abi.Table.SERVICES, index, abi.Service)
    service.flags |= abi.ServiceFlag.DSR
    assert rig.send(ip(family) / TCP(sport=7, dport=80, flags="A"))[TCP].sport == port
    encapsulated = rig.send(ip(family) / TCP(sport=8, dport=80, flags="S"))
    assert encapsulated[2].dst == VIP[family]
    service.flags &= ~int(abi.ServiceFlag.DSR)
    # tc knows what else such a connection could be.
    rig.passes(ip(family) / TCP(sport=8, dport=80, flags="A"))


def test_udp_without_checksum_stays_without(rig: XdpRig, tables: LbTables) -> None:
    serve(tables, 4, 1, proto=17)
    action, data = rig.run(frame(ip(4) / UDP(sport=7, dport=80, chksum=0) / b"x"))
    assert action == TX and Ether(data)[UDP].chksum == 0 and exact(data) == data


def test_udp_whose_checksum_becomes_zero_says_ffff(rig: XdpRig, tables: LbTables) -> None:
    serve(tables, 6, 1, proto=17)
    probe = rig.send(ip(6) / UDP(sport=7, dport=80) / b"\0\0")
    # Payload that makes the sum after translation all ones.
    fill = probe[UDP].chksum
    sent = rig.send(ip(6) / UDP(sport=7, dport=80) / fill.to_bytes(2, "big"))
    assert sent[UDP].chksum == 0xFFFF


def test_a_neighbour_that_is_not_known_is_left_to_the_stack(rig: XdpRig, tables: LbTables) -> None:
    index, _ = tables.service([(VIP[4], 80)], [("192.168.7.99", 8080)])
    data = frame(ip(4) / TCP(sport=7, dport=80, flags="S"))
    assert rig.run(data) == (PASS, data)
    assert tables.flows() == [] and not list(tables.nats().keys())
    assert tables.line(abi.Table.SERVICES, index, abi.Service).connections == 0


def test_an_overlooked_byte_order_would_show(rig: XdpRig, tables: LbTables) -> None:
    """The records are what the abi says, field by field."""
    _, (ident,) = serve(tables, 4, 1)
    sent = rig.send(ip(4) / TCP(sport=0x1234, dport=80, flags="S"))
    with tables.begun() as nats:
        ((key, nat),) = nats.items()
    assert (bytes(key.remote), bytes(key.local)) == (bytes(FibAddr.of(backend_address(4, 0))), bytes(FibAddr.of(NODE[4])))
    assert (socket.ntohs(key.rport), socket.ntohs(key.lport), key.proto) == (8080, sent[TCP].sport, 6)
    assert (bytes(nat.client), bytes(nat.vip)) == (bytes(FibAddr.of(CLIENT[4])), bytes(FibAddr.of(VIP[4])))
    assert (socket.ntohs(nat.cport), socket.ntohs(nat.vport), nat.backend) == (0x1234, 80, ident)
    assert nat.flags == abi.NatFlag.SNAT
    (flow,) = tables.flows()
    expected = abi.flow_hash(tables.config.seed, ip_address(CLIENT[4]), 0x1234, ip_address(VIP[4]), 80, 6)
    assert (flow.sig, flow.backend ^ flow.sig >> 32, socket.ntohs(flow.port)) == (expected, ident, sent[TCP].sport)
    assert not flow.stamp & abi.FlowFlag.CONFIRMED and flow.stamp & abi.FlowFlag.TCP
