"""Direct server return: in a tunnel to the backend's node, which translates, and whose pod answers to the client itself."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6
from scapy.layers.l2 import Ether

from services.common.pipeline import abi as pipeline
from services.common.pipeline.reasons import Reason
from services.identity.network.install import FROM_OVERLAY, FROM_UPLINK
from services.identity.numbers import Reserved
from services.lb import abi, install
from tests.datapath.cluster import OVERLAY, ROUTED, UNDERLAY, Tunnel
from tests.datapath.harness import REDIRECT, UNSPEC, A, B
from tests.datapath.lbkit import (
    CLIENT,
    NARROW,
    NODE,
    NODE_MAC,
    ROUTER,
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
from tests.datapath.packets import ether
from tests.datapath.test_between_nodes import IDENTITY, PEER, host, inner
from tests.datapath.test_lb_related import check, error, fragments, joined, original

BOTH = pytest.mark.parametrize("family", [4, 6])
EACH = pytest.mark.parametrize("layer", [TCP, UDP])
DSR = abi.ServiceFlag.DSR | abi.ServiceFlag.DSR_UDP | abi.ServiceFlag.MAGLEV
EXAMPLES = {
    "max_examples": 25,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
}
BALANCER = {
    OVERLAY: {4: UNDERLAY[OVERLAY][0], 6: "fd77::2"},
    ROUTED: {4: UNDERLAY[ROUTED][0], 6: UNDERLAY[ROUTED][1]},
}


def tunnel(family: int, src: str, dst: str, port: int, ttl: int = 64, tos: int = 0) -> Any:
    if family == 4:
        return IP(src=src, dst=dst, id=port, flags="DF", ttl=ttl, tos=tos, proto=4)
    return IPv6(src=src, dst=dst, fl=port, hlim=ttl, tc=tos, nh=41)


@BOTH
@EACH
@pytest.mark.parametrize("where", ["server", "overlay", "routed"])
def test_a_backend_gets_the_packet_as_it_is_in_another(
    uplink: Uplink, family: int, layer: Any, where: str
) -> None:
    backend = SERVER[family] if where == "server" else PEER[family]
    if where != "server":
        uplink.lab.cluster.know(host(backend), IDENTITY, OVERLAY if where == "overlay" else ROUTED)
    uplink.lab.serve(family, [(backend, 8080)], layer, flags=DSR)

    @settings(**EXAMPLES)
    @given(sport=st.integers(1, 65535), said=st.binary(max_size=64), tos=st.integers(0, 255))
    def same(sport: int, said: bytes, tos: int) -> None:
        packet = (
            outside(family, **({"tos": tos} if family == 4 else {"tc": tos}))
            / layer(sport=sport, dport=80)
            / said
        )
        action, data = uplink.run(arriving(packet))
        assert action == REDIRECT and exact(data) == data
        ttl = 64 if where == "server" else 63
        assert data[14:] == bytes(tunnel(family, NODE[family], backend, 8080, ttl, tos) / packet)
        event = uplink.event()
        if where == "server":
            assert (Ether(data).src, Ether(data).dst) == (NODE_MAC, SERVER_MAC)
        else:
            verdict = pipeline.Verdict.TO_OVERLAY if where == "overlay" else pipeline.Verdict.TO_NODE
            assert (event.verdict, event.src_identity) == (verdict, Reserved.REMOTE_NODE)

    same()
    with uplink.lab.tables.nats() as nats:
        assert not list(nats.keys())


def test_the_pods_node_finds_the_port_in_the_option(uplink: Uplink) -> None:
    """As what was cut into segments carries it, for identification is counted up then."""
    balancer = BALANCER[OVERLAY][4]
    uplink.lab.cluster.know(host(balancer), Reserved.REMOTE_NODE, OVERLAY)
    uplink.lab.serve(4, [(own(A, 4), 8080)], flags=DSR)
    packet = outside(4) / TCP(sport=7, dport=80, flags="A") / b"x"
    sender = Tunnel.of(UNDERLAY[OVERLAY][0], Reserved.REMOTE_NODE)
    for option, port in ((b"\x9e\x04\x1f\x90", 8080), (b"\x9e\x04\x1f\x91", 8081), (b"\x9f\x04\x1f\x90", 0)):
        outer = IP(src=balancer, dst=own(A, 4), id=9, proto=4, options=IPOption(option))
        got = uplink.lab.cluster.run(bytes(inner() / outer / packet), FROM_OVERLAY, sender)
        if port:
            assert (got.verdict, Ether(got.data)[TCP].dport) == (pipeline.Verdict.DELIVERED, port)
        else:
            assert Reason(got.event.reason) == Reason.MALFORMED


@BOTH
@EACH
@pytest.mark.parametrize("node", [OVERLAY, ROUTED])
def test_the_pods_node_translates_and_the_pod_answers_the_client(
    uplink: Uplink, family: int, layer: Any, node: int
) -> None:
    balancer = BALANCER[node][family]
    uplink.lab.cluster.know(host(balancer), Reserved.REMOTE_NODE, node)
    uplink.lab.serve(family, [(own(A, family), 8080)], layer, flags=DSR)

    @settings(**EXAMPLES)
    @given(
        sport=st.integers(1, 65535),
        said=st.binary(max_size=64),
        heard=st.binary(max_size=64),
        ttl=st.integers(2, 255),
    )
    def there_and_back(sport: int, said: bytes, heard: bytes, ttl: int) -> None:
        packet = outside(family, ttl=ttl) / layer(sport=sport, dport=80) / said
        both = inner() / tunnel(family, balancer, own(A, family), 8080) / packet
        if node == OVERLAY:
            there = uplink.lab.cluster.run(
                bytes(both), FROM_OVERLAY, Tunnel.of(UNDERLAY[OVERLAY][0], Reserved.REMOTE_NODE)
            )
        else:
            both.dst = "00:00:00:00:00:00"
            there = uplink.lab.cluster.run(bytes(both), FROM_UPLINK)
        assert (there.verdict, there.event.dst_id, there.event.src_identity) == (
            pipeline.Verdict.DELIVERED,
            A.id,
            Reserved.WORLD,
        )
        assert there.data[14:] == rewritten(inner() / packet, dst=own(A, family), dport=8080)
        reply = ether() / answer(there.data, layer) / heard
        back = uplink.from_pod(reply)
        assert back.action == REDIRECT and back.data[14:] == rewritten(reply, src=VIP[family], sport=80)
        assert (Ether(back.data).src, Ether(back.data).dst) == (NODE_MAC, ROUTER_MAC)

    there_and_back()


@BOTH
def test_nobody_but_nodes_is_believed(uplink: Uplink, family: int) -> None:
    """A pod's own tunnel reaches a pod as it is."""
    uplink.lab.cluster.know(host(PEER[family]), IDENTITY, OVERLAY)
    uplink.lab.serve(family, [(own(A, family), 8080)], flags=DSR)
    packet = inner() / tunnel(family, PEER[family], own(A, family), 8080) / outside(family) / TCP(dport=80)
    got = uplink.lab.cluster.run(bytes(packet), FROM_OVERLAY, Tunnel.of(UNDERLAY[OVERLAY][0], IDENTITY))
    assert got.event.dst_id == A.id and Ether(got.data)[1].src == PEER[family]
    # To this host's own address.
    uplink.lab.tables.service([(VIP[family], 81)], {(NODE[family], 8080): abi.BackendFlag.LOCAL}, flags=DSR)
    uplink.lab.tables.node_address(NODE[family])
    packet = tunnel(family, CLIENT[family], NODE[family], 8080) / outside(family) / TCP(dport=81)
    assert uplink.drops(packet) == Reason.LB_DSR_SOURCE


@BOTH
@EACH
def test_one_port_of_a_client_to_several_frontends_of_a_backend(uplink: Uplink, family: int, layer: Any) -> None:
    """The backend would take that for one connection: it sees other ports, and the client does not."""
    cluster, balancer = uplink.lab.cluster, BALANCER[ROUTED][family]
    cluster.know(host(balancer), Reserved.REMOTE_NODE, ROUTED)
    for port in (80, 81, 82):
        uplink.lab.serve(family, [(own(A, family), 8080)], layer, port, flags=DSR)

    def said(port: int, **flags: str) -> Any:
        packet = outside(family, ttl=9) / layer(sport=700, dport=port, **flags)
        frame = inner() / tunnel(family, balancer, own(A, family), 8080) / packet
        frame.dst = "00:00:00:00:00:00"
        got = cluster.run(bytes(frame), FROM_UPLINK)
        assert got.verdict == pipeline.Verdict.DELIVERED and exact(got.data) == got.data
        return Ether(got.data)

    seen = {}
    for flags in ("S", "A") if layer is TCP else ("",):
        for port in (80, 81, 82):
            there = said(port, **({"flags": flags} if flags else {}))
            assert seen.setdefault(port, there[layer].sport) == there[layer].sport
            back = Ether(uplink.from_pod(ether() / answer(bytes(there), layer)).data)
            assert (back[1].src, back[layer].sport, back[layer].dport) == (VIP[family], port, 700)
    assert seen[80] == 700 and len(set(seen.values())) == 3
    # An error about an answer names the port that the backend knows.
    frame = bytes(Ether(said(81, **({"flags": "A"} if layer is TCP else {}))))
    reply = answer(frame, layer)
    sent = Ether(uplink.from_pod(ether() / reply).data)
    about = error(sent[1], CLIENT[family])
    tunnelled = inner() / tunnel(family, balancer, own(A, family), 8080) / about
    tunnelled.dst = "00:00:00:00:00:00"
    got = cluster.run(bytes(tunnelled), FROM_UPLINK)
    at = 14 + 2 * (20 if family == 4 else 40) + 8
    assert struct.unpack_from("!2H", got.data, at) == (8080, seen[81])


@BOTH
def test_nobody_speaks_in_a_tunnel_for_a_pod_of_the_overlay(uplink: Uplink, family: int) -> None:
    """XDP at another node puts into tunnels what comes, whoever it says it is from."""
    cluster, balancer = uplink.lab.cluster, BALANCER[ROUTED][family]
    cluster.know(host(balancer), Reserved.REMOTE_NODE, ROUTED)
    cluster.know(host(PEER[family]), IDENTITY, OVERLAY)
    uplink.lab.serve(family, [(own(A, family), 8080)], flags=DSR)

    def said(src: str) -> Any:
        packet = outside(family, src=src, ttl=9) / TCP(sport=7, dport=80, flags="S")
        frame = inner() / tunnel(family, balancer, own(A, family), 8080) / packet
        frame.dst = "00:00:00:00:00:00"
        return cluster.run(bytes(frame), FROM_UPLINK)

    assert said(PEER[family]).event.reason == Reason.UPLINK_SPOOFED
    assert said(CLIENT[family]).verdict == pipeline.Verdict.DELIVERED
    # As it would have been taken without a tunnel.
    cluster.know(host(PEER[family]), IDENTITY, ROUTED)
    assert said(PEER[family]).verdict == pipeline.Verdict.DELIVERED


@BOTH
def test_a_process_of_this_host(uplink: Uplink, family: int) -> None:
    balancer = BALANCER[OVERLAY][family]
    uplink.lab.cluster.know(host(balancer), Reserved.REMOTE_NODE, OVERLAY)
    uplink.lab.cluster.nodes.update(OVERLAY, node_with(family, balancer))
    uplink.lab.tables.service([(VIP[family], 80)], {(NODE[family], 8080): abi.BackendFlag.LOCAL}, flags=DSR)
    uplink.lab.tables.node_address(NODE[family])
    packet = outside(family, ttl=9) / TCP(sport=7, dport=80) / b"abc"
    action, data = uplink.run(arriving(tunnel(family, balancer, NODE[family], 8080) / packet))
    assert action == UNSPEC
    assert data[14:] == rewritten(inner() / packet, dst=NODE[family], dport=8080, ttl=9)
    reply = answer(data, TCP, flags="SA")
    action, back = uplink.run(bytes(Ether(src=NODE_MAC, dst=ROUTER_MAC) / reply), install.UPLINK_OUT)
    assert action == UNSPEC and back[14:] == rewritten(inner() / reply, src=VIP[family], sport=80, ttl=64)


def node_with(family: int, address: str) -> pipeline.NodeEntry:
    from tests.datapath.cluster import node_entry

    return node_entry(
        pipeline.NodeMode.OVERLAY, *((address, "") if family == 4 else (UNDERLAY[OVERLAY][0], address))
    )


@BOTH
def test_a_packet_too_big_for_its_tunnel_is_told_so(uplink: Uplink, family: int) -> None:
    uplink.lab.cluster.know(host(PEER[family]), IDENTITY, OVERLAY)
    # Room for an option, too, that is needed only by what is still to be cut into segments.
    room, header = (24, 40) if family == 4 else (40, 60)
    for port, (backend, mtu) in {
        81: (PEER[family], 1400),
        82: (NARROW[family], 1300),
        83: (SERVER[family], 1500),
    }.items():
        uplink.lab.serve(family, [(backend, 8080)], port=port, flags=DSR)
        fits = outside(family) / TCP(sport=7, dport=port) / bytes(mtu - header - room)
        assert uplink.run(arriving(fits))[0] == REDIRECT
        assert Reason(uplink.event().reason) == Reason.NONE
        _, data = uplink.run(arriving(fits / b"x"))
        assert Reason(uplink.event().reason) == Reason.LB_TOO_BIG and exact(data) == data
        told = Ether(data)[ICMP].nexthopmtu if family == 4 else Ether(data)[ICMPv6PacketTooBig].mtu
        assert told == mtu - room


@BOTH
@EACH
def test_hybrid_tunnels_tcp_alone(uplink: Uplink, family: int, layer: Any) -> None:
    uplink.lab.serve(family, [(SERVER[family], 8080)], layer, flags=abi.ServiceFlag.DSR)
    data = uplink.run(arriving(outside(family) / layer(sport=7, dport=80)))[1]
    assert Ether(data)[1].payload.__class__ is (type(Ether(data)[1]) if layer is TCP else layer)


@BOTH
def test_a_pod_here_needs_no_tunnel(uplink: Uplink, family: int) -> None:
    uplink.lab.serve(family, [(own(B, family), 8080)], flags=DSR)
    assert uplink.sends(outside(family) / TCP(sport=7, dport=80))[1].dst == own(B, family)


@BOTH
def test_errors_and_fragments_take_the_same_way(uplink: Uplink, family: int) -> None:
    """From the balancer, and out at the backend's node: here one and the same."""
    balancer = BALANCER[OVERLAY][family]
    uplink.lab.cluster.know(host(balancer), Reserved.REMOTE_NODE, OVERLAY)
    uplink.lab.serve(family, [(SERVER[family], 8080)], UDP, flags=DSR)
    opened = uplink.run(arriving(outside(family) / UDP(sport=7, dport=80)))[1]
    assert Ether(opened)[1].dst == SERVER[family]
    reply = type(Ether(opened)[1])(src=VIP[family], dst=CLIENT[family]) / UDP(sport=80, dport=7) / b"abc"
    about = type(reply)(bytes(reply))
    action, data = uplink.run(arriving(error(about, ROUTER[family])))
    assert action == REDIRECT
    assert data[14:] == bytes(
        tunnel(family, NODE[family], SERVER[family], 8080) / error(about, ROUTER[family])
    )

    def arrives(packet: Any) -> bytes:
        whole = inner() / tunnel(family, balancer, own(A, family), 8080) / packet
        return uplink.lab.cluster.run(
            bytes(whole), FROM_OVERLAY, Tunnel.of(UNDERLAY[OVERLAY][0], Reserved.REMOTE_NODE)
        ).data

    arrives(outside(family) / UDP(sport=7, dport=80))
    check(arrives(error(about, ROUTER[family])), original(inner() / about, own(A, family), CLIENT[family], 8080, 7),
          ROUTER[family], own(A, family))  # fmt: skip

    packet = outside(family) / UDP(sport=9, dport=80) / bytes(1700)
    parts = fragments(family, type(packet)(bytes(packet)))
    got = [Ether(arrives(part))[1] for part in parts]
    assert {part.dst for part in got} == {own(A, family)} and UDP(joined(family, got)).dport == 8080
