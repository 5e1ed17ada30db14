"""Direct server return at XDP: what the backend gets, byte by byte, and who it is."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import Dot1Q, Ether

from services.common.pipeline.abi import FibAddr
from services.lb import abi
from services.lb.xdp import abi as xdp_abi
from tests.datapath.lbtables import UDP as UDP_PROTO
from tests.datapath.lbtables import LbTables
from tests.datapath.xdpkit import (
    CLIENT,
    FAMILIES,
    NODE,
    NODE_MAC,
    PASS,
    REDIRECT,
    TX,
    VIP,
    XdpRig,
    backend_address,
    backend_mac,
    frame,
    ip,
)  # fmt: skip

BOTH = pytest.mark.parametrize("family", FAMILIES)
DSR = abi.ServiceFlag.DSR | abi.ServiceFlag.DSR_UDP
MAGLEV = abi.ServiceFlag.MAGLEV


@pytest.fixture
def rig(xdp_rig: XdpRig) -> XdpRig:
    return xdp_rig


@pytest.fixture
def tables(rig: XdpRig) -> Iterator[LbTables]:
    with rig.fresh() as made:
        yield made


def serve(rig: XdpRig, family: int, backends: int = 3, flags: int = DSR | MAGLEV, proto: int = 6, port: int = 80,
          direct: bool = True) -> list[int]:
    """A service on the VIP; ids of its backends, which listen on 8080."""
    wanted = [(backend_address(family, number), 8080) for number in range(backends)]
    _, ids = rig.tables.service([(VIP[family], port)], wanted, proto, flags)
    for number, ident in enumerate(ids):
        if direct:
            rig.direct(ident, number)
    return ids


def outer(family: int, to: str, port: int, tos: int = 0) -> IP | IPv6:
    if family == 4:
        return IP(src=NODE[4], dst=to, id=port, flags="DF", ttl=64, tos=tos)
    return IPv6(src=NODE[6], dst=to, fl=port, hlim=64, tc=tos)


def backend_of(packet: Ether) -> str:
    return str(packet[1].dst)


@BOTH
@pytest.mark.parametrize("layer", [TCP, UDP])
@pytest.mark.parametrize("direct", [True, False])
def test_a_backend_gets_the_packet_as_it_is_in_another(
    rig: XdpRig, tables: LbTables, family: int, layer: type[TCP] | type[UDP], direct: bool
) -> None:
    serve(rig, family, 1, proto=6 if layer is TCP else UDP_PROTO, direct=direct)
    packet = ip(family, **({"tos": 0x2a} if family == 4 else {"tc": 0x2a})) / layer(sport=1234, dport=80) / b"hello"
    action, data = rig.run(frame(packet))
    wanted = Ether(src=NODE_MAC, dst=backend_mac(0)) / outer(family, backend_address(family, 0), 8080, 0x2a) / packet
    assert action == TX
    assert data == bytes(wanted)
    assert tables.stats()[abi.Stat.XDP_TX] >= 1


@BOTH
def test_padding_of_short_frames_is_no_part_of_the_packet(rig: XdpRig, tables: LbTables, family: int) -> None:
    serve(rig, family, 1, proto=UDP_PROTO)
    packet = ip(family) / UDP(sport=1234, dport=80) / b"x"
    action, data = rig.run(frame(packet) + b"padding")
    wanted = Ether(src=NODE_MAC, dst=backend_mac(0)) / outer(family, backend_address(family, 0), 8080) / packet
    assert (action, data) == (TX, bytes(wanted) + b"padding")


@BOTH
def test_a_connection_keeps_its_backend_and_maglev_is_what_python_says(
    rig: XdpRig, tables: LbTables, family: int
) -> None:
    ids = serve(rig, family, 5)
    for sport in range(1, 200):
        chosen = backend_of(rig.send(ip(family) / TCP(sport=sport, dport=80, flags="S")))
        bits = abi.flow_hash(tables.config.seed, ip_address(CLIENT[family]), sport, ip_address(VIP[family]), 80, 6) >> 32
        assert chosen == backend_address(family, bits * len(ids) >> 32)
        assert backend_of(rig.send(ip(family) / TCP(sport=sport, dport=80, flags="A"))) == chosen


@BOTH
def test_random_choice_is_remembered(rig: XdpRig, tables: LbTables, family: int) -> None:
    index, _ = tables.service([(VIP[family], 80)], [(backend_address(family, n), 8080) for n in range(5)], flags=DSR)
    chosen = {}
    for flags in ("S", "A", "PA", "FA", "A"):
        for sport in range(1, 60):
            backend = backend_of(rig.send(ip(family) / TCP(sport=sport, dport=80, flags=flags)))
            assert chosen.setdefault(sport, backend) == backend
    assert len(set(chosen.values())) == 5
    assert tables.line(abi.Table.SERVICES, index, abi.Service).connections == 59


@BOTH
def test_affinity_gives_a_client_one_backend(rig: XdpRig, tables: LbTables, family: int) -> None:
    tables.service([(VIP[family], 80)], [(backend_address(family, n), 8080) for n in range(5)],
                   flags=DSR | abi.ServiceFlag.AFFINITY, affinity_s=60)
    seen = {backend_of(rig.send(ip(family) / TCP(sport=sport, dport=80, flags="S"))) for sport in range(1, 40)}
    assert len(seen) == 1


@BOTH
def test_ports_of_a_range_keep_their_distance(rig: XdpRig, tables: LbTables, family: int) -> None:
    index, ids = tables.service([], [(backend_address(family, 0), 7000)], flags=DSR)
    with tables.fronts() as fronts:
        fronts.update(abi.FrontKey.of(ip_address(VIP[family]), 3000, 6),
                      abi.Front(service=index, first=3000, flags=abi.FrontFlag.OUTSIDE))
    with tables.ranges() as ranges:
        ranges.update(abi.RangeKey.of(ip_address(VIP[family]), 6, 3000, 12),
                      abi.Front(service=index, first=3000, flags=abi.FrontFlag.OUTSIDE))
        try:
            tables.hint(VIP[family], abi.Hint.VIP | abi.Hint.RANGE)
            for flags in ("S", "A"):
                sent = rig.send(ip(family) / TCP(sport=5, dport=3005, flags=flags))
                assert (sent[1].id if family == 4 else sent[1].fl) == 7005
        finally:
            ranges.delete(abi.RangeKey.of(ip_address(VIP[family]), 6, 3000, 12))
    assert ids


@BOTH
def test_a_backend_that_is_gone_is_not_spoken_to(rig: XdpRig, tables: LbTables, family: int) -> None:
    ids = serve(rig, family, 2)
    sports = range(1, 40)
    before = {sport: backend_of(rig.send(ip(family) / TCP(sport=sport, dport=80, flags="S"))) for sport in sports}
    assert len(set(before.values())) == 2
    line = tables.line(abi.Table.BACKENDS, ids[0], abi.Backend)
    line.id = (1 << 20) | ids[0]  # the place has been given to another
    for sport in sports:
        after = backend_of(rig.send(ip(family) / TCP(sport=sport, dport=80, flags="A")))
        assert after == backend_address(family, 1)


@BOTH
def test_a_terminating_backend_keeps_what_it_has_and_gets_nothing_new(
    rig: XdpRig, tables: LbTables, family: int
) -> None:
    index, ids = tables.service([(VIP[family], 80)], [(backend_address(family, n), 8080) for n in range(2)], flags=DSR)
    old = {sport: backend_of(rig.send(ip(family) / TCP(sport=sport, dport=80, flags="S"))) for sport in range(1, 30)}
    tables.line(abi.Table.BACKENDS, ids[0], abi.Backend).state = abi.BackendState.TERMINATING
    service = tables.line(abi.Table.SERVICES, index, abi.Service)
    service.outside = abi.Stretch(first=service.outside.first + 1, count=1)
    for sport, backend in old.items():
        assert backend_of(rig.send(ip(family) / TCP(sport=sport, dport=80, flags="A"))) == backend
        assert backend_of(rig.send(ip(family) / TCP(sport=sport, dport=80, flags="FA"))) == backend
        # The client uses the port again.
        assert backend_of(rig.send(ip(family) / TCP(sport=sport, dport=80, flags="S"))) == backend_address(family, 1)


@BOTH
def test_sources_that_are_not_admitted_are_left_to_tc(rig: XdpRig, tables: LbTables, family: int) -> None:
    serve(rig, family, flags=DSR | abi.ServiceFlag.SOURCES)
    rig.passes(ip(family) / TCP(sport=1, dport=80, flags="S"))


@BOTH
def test_what_is_not_certain_goes_on_as_it_came(rig: XdpRig, tables: LbTables, family: int) -> None:
    ids = serve(rig, family, 1)
    echo = ICMP() if family == 4 else ICMPv6EchoRequest()
    tcp = TCP(sport=1, dport=80, flags="S")
    rig.passes(ip(family) / echo)
    rig.passes(ip(family) / TCP(sport=1, dport=81, flags="S"))
    rig.passes(ip(family) / UDP(sport=1, dport=80))
    rig.passes(ip(family, dst=CLIENT[family]) / tcp)
    rig.passes(Dot1Q(vlan=5) / ip(family) / tcp)
    rig.passes(ip(family) / tcp, dst="02:00:00:00:00:77")
    rig.passes(ip(family) / tcp, dst="ff:ff:ff:ff:ff:ff")
    rig.passes(ip(family) / tcp / bytes(1460))
    if family == 4:
        rig.passes(ip(4, flags="MF") / tcp)
        rig.passes(ip(4, frag=3) / tcp)
        rig.passes(ip(4, options=IPOption(b"\x01\x01\x01\x01")) / tcp)
        rig.passes(ip(4, len=200) / tcp)
    else:
        rig.passes(ip(6) / IPv6ExtHdrDestOpt() / tcp)
        rig.passes(ip(6, plen=200) / tcp)
    whole = frame(ip(family) / tcp)
    for end in range(14, len(whole)):
        assert rig.run(whole[:end]) == (PASS, whole[:end])
    line = tables.line(abi.Table.BACKENDS, ids[0], abi.Backend)
    line.flags = abi.BackendFlag.LOCAL
    rig.passes(ip(family) / tcp)
    line.flags = 0
    line.addr = FibAddr.of("203.0.113.9" if family == 4 else "2001:db8:9::9")  # no route
    rig.passes(ip(family) / tcp)
    assert tables.flows() == []
    assert tables.line(abi.Table.SERVICES, 1, abi.Service).connections == 0


@BOTH
def test_a_packet_whose_checksum_a_device_is_to_fill_in_is_left_to_tc(
    rig: XdpRig, tables: LbTables, family: int
) -> None:
    serve(rig, family, 1)
    for size in (0, 7):
        packet = ip(family) / TCP(sport=1, dport=80, flags="S") / bytes(size)
        pseudo = sum(ip_address(a).packed[n] << (8 if n % 2 == 0 else 0)
                     for a in (CLIENT[family], VIP[family]) for n in range(4 if family == 4 else 16))
        total = pseudo + 6 + 20 + size
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        packet[TCP].chksum = total
        rig.passes(packet)


@BOTH
def test_a_next_hop_behind_another_device_needs_one_that_takes_frames(
    rig: XdpRig, tables: LbTables, family: int
) -> None:
    ids = serve(rig, family, 1)
    rig.direct(ids[0], 0, mtu=1400, ifindex=rig.other)
    packet = ip(family) / TCP(sport=1, dport=80, flags="S")
    rig.passes(packet)
    with rig.ports() as ports:
        ports.update(rig.other, xdp_abi.Port(mac=xdp_abi.mac_word("02:00:00:00:00:02")))
        try:
            action, data = rig.run(frame(packet))
        finally:
            ports.delete(rig.other)
    assert action == REDIRECT
    assert (Ether(data).src, Ether(data).dst) == ("02:00:00:00:00:02", backend_mac(0))


@BOTH
def test_without_a_node_address_tc_decides(rig: XdpRig, tables: LbTables, family: int) -> None:
    serve(rig, family, 1)
    tables.snat()
    rig.passes(ip(family) / TCP(sport=1, dport=80, flags="S"))


def test_node_ports_are_served_at_the_nodes_addresses(rig: XdpRig, tables: LbTables) -> None:
    index, _ = tables.service([], [(backend_address(4, 0), 8080)], flags=DSR)
    with tables.fronts() as fronts:
        fronts.update(abi.FrontKey.of(ip_address("0.0.0.0"), 30080, 6),
                      abi.Front(service=index, first=30080, flags=abi.FrontFlag.OUTSIDE))
    packet = ip(4, dst=NODE[4]) / TCP(sport=1, dport=30080, flags="S")
    rig.passes(packet)
    tables.node_address(NODE[4])
    assert rig.send(packet)[1].id == 8080
