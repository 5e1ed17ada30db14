"""What pods send to services by packets, and what comes back."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP, SCTPChunkData

from services.common.pipeline import abi as pipeline
from services.common.pipeline.reasons import Reason
from services.identity.network.install import FROM_OVERLAY, FROM_UPLINK
from services.identity.numbers import Reserved
from services.lb import abi
from tests.datapath.cluster import OVERLAY, ROUTED, UNDERLAY, Tunnel
from tests.datapath.harness import REDIRECT, UNSPEC, A, B
from tests.datapath.lbkit import HAIRPIN, VIP, Lab, exact, own, rewritten
from tests.datapath.packets import ether, ip
from tests.datapath.test_between_nodes import IDENTITY, PEER, arriving, host, inner

BOTH = pytest.mark.parametrize("family", [4, 6])
EACH = pytest.mark.parametrize("layer", [TCP, UDP])
UNCHANGED = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def answer(sent: bytes, layer: Any, **fields: Any) -> Any:
    """What the backend says to a packet it got."""
    got = Ether(sent)
    return type(got[1])(src=got[1].dst, dst=got[1].src) / layer(
        sport=got[layer].dport, dport=got[layer].sport, **fields
    )


@BOTH
@EACH
def test_to_a_pod_of_another_node_and_back(lab: Lab, family: int, layer: Any) -> None:
    lab.cluster.know(host(PEER[family]), IDENTITY, OVERLAY)
    lab.serve(family, [(PEER[family], 8080)], layer)

    @settings(max_examples=30, **UNCHANGED)
    @given(
        sport=st.integers(1, 65535),
        said=st.binary(max_size=64),
        heard=st.binary(max_size=64),
        ttl=st.integers(2, 255),
    )
    def check(sport: int, said: bytes, heard: bytes, ttl: int) -> None:
        packet = ether() / ip(VIP[family], family, ttl=ttl) / layer(sport=sport, dport=80) / said
        there = lab.dp.run(bytes(packet))
        assert (there.action, there.verdict) == (REDIRECT, pipeline.Verdict.TO_OVERLAY)
        assert there.data[14:] == rewritten(packet, dst=PEER[family], dport=8080)
        assert exact(there.data) == there.data
        event = there.event
        assert (str(event.dst.ip()), socket.ntohs(event.dport)) == (PEER[family], 8080)
        assert (event.src_identity, event.dst_identity) == (A.identity, IDENTITY)

        reply = inner() / answer(there.data, layer) / heard
        back = lab.cluster.run(bytes(reply), FROM_OVERLAY, Tunnel.of(UNDERLAY[OVERLAY][0], IDENTITY))
        assert (back.action, back.verdict) == (REDIRECT, pipeline.Verdict.DELIVERED)
        assert back.data[14:] == rewritten(reply, src=VIP[family], sport=80)
        assert exact(back.data) == back.data
        assert (back.event.src_identity, back.event.dst_id) == (IDENTITY, A.id)

    check()
    assert lab.tables.stats()[abi.Stat.REVERSED] >= 1


@BOTH
@EACH
def test_to_a_pod_of_this_node(lab: Lab, family: int, layer: Any) -> None:
    lab.serve(family, [(own(B, family), 8080)], layer)
    packet = ether() / ip(VIP[family], family) / layer(sport=7, dport=80) / b"abc"
    there = lab.dp.run(bytes(packet))
    assert (there.verdict, there.event.dst_id) == (pipeline.Verdict.DELIVERED, B.id)
    assert there.data[14:] == rewritten(packet, dst=own(B, family), dport=8080)
    assert Ether(there.data).dst == bytes(B.pod_mac).hex(":")


@BOTH
@EACH
def test_a_pod_reaches_itself(lab: Lab, family: int, layer: Any) -> None:
    lab.serve(family, [(own(A, family), 8080)], layer)
    packet = ether() / ip(VIP[family], family) / layer(sport=7, dport=80) / b"abc"
    there = lab.dp.run(bytes(packet))
    assert (there.verdict, there.event.dst_id) == (pipeline.Verdict.DELIVERED, A.id)
    assert there.data[14:] == rewritten(packet, src=HAIRPIN[family], dst=own(A, family), dport=8080)
    reply = ether() / answer(there.data, layer) / b"defg"
    back = lab.dp.run(bytes(reply))
    assert (back.verdict, back.event.dst_id) == (pipeline.Verdict.DELIVERED, A.id)
    assert back.data[14:] == rewritten(reply, src=VIP[family], dst=own(A, family), sport=80)


@BOTH
def test_answers_that_come_by_a_route_or_by_the_stack(lab: Lab, family: int) -> None:
    lab.cluster.know(host(PEER[family]), IDENTITY, ROUTED)
    lab.serve(family, [(PEER[family], 8080)])
    there = lab.dp.run(bytes(ether() / ip(VIP[family], family) / TCP(sport=7, dport=80)))
    assert there.verdict == pipeline.Verdict.TO_NODE
    reply = answer(there.data, TCP, flags="SA")
    back = lab.cluster.run(bytes(arriving() / reply), FROM_UPLINK)
    assert back.verdict == pipeline.Verdict.DELIVERED
    assert back.data[14:] == rewritten(arriving() / reply, src=VIP[family], sport=80)
    by_stack = lab.dp.run(
        bytes(ether(src="02:00:00:00:00:01", dst=bytes(A.pod_mac).hex(":")) / reply), "fib_to_pod"
    )
    assert (by_stack.action, by_stack.verdict) == (UNSPEC, pipeline.Verdict.DELIVERED)
    assert by_stack.data[14:] == rewritten(arriving() / reply, src=VIP[family], sport=80, ttl=64)


@BOTH
def test_what_is_no_services_is_not_touched(lab: Lab, family: int) -> None:
    lab.serve(family, [(own(B, family), 8080)])
    for dport, layer in ((81, TCP), (80, UDP)):
        packet = ether() / ip(VIP[family], family) / layer(sport=7, dport=dport)
        assert lab.dp.run(bytes(packet)).data == bytes(packet)
    direct = ether() / ip(B, family) / TCP(sport=7, dport=8080)
    assert lab.dp.run(bytes(direct)).data[14:] == rewritten(direct)


@BOTH
def test_without_a_checksum_udp_stays_without(lab: Lab, family: int) -> None:
    lab.serve(family, [(own(B, family), 8080)], UDP)
    packet = ether() / ip(VIP[family], family) / UDP(sport=7, dport=80, chksum=0) / b"abc"
    after = Ether(lab.dp.run(bytes(packet)).data)
    assert (after[UDP].chksum, after[UDP].dport) == (0, 8080)


@BOTH
def test_sctp_keeps_its_ports(lab: Lab, family: int) -> None:
    lab.tables.service([(VIP[family], 80)], [(own(B, family), 80)], 132)
    packet = ether() / ip(VIP[family], family) / SCTP(sport=7, dport=80) / SCTPChunkData(data=b"abc")
    if family == 6:
        packet[IPv6].nh = 132
    there = lab.dp.run(bytes(packet))
    assert there.data[14:] == rewritten(packet, dst=own(B, family)) and there.event.dst_id == B.id


@BOTH
def test_maglev_chooses_as_everywhere(lab: Lab, family: int) -> None:
    addresses = [f"10.9.0.{n}" if family == 4 else f"fd00:9::{n:x}" for n in range(1, 8)]
    lab.serve(family, [(address, 8080) for address in addresses])
    for sport in range(1, 60):
        data = lab.dp.run(bytes(ether() / ip(VIP[family], family) / TCP(sport=sport, dport=80))).data
        client, vip = (
            Ether(bytes(ether() / ip(VIP[family], family)))[1].fields[end] for end in ("src", "dst")
        )
        from ipaddress import ip_address

        sig = abi.flow_hash(lab.tables.config.seed, ip_address(client), sport, ip_address(vip), 80, 6)
        assert Ether(data)[1].dst == addresses[(sig >> 32) * len(addresses) >> 32]


@BOTH
@pytest.mark.parametrize("flags", [0, abi.ServiceFlag.MAGLEV])
def test_a_connection_stays_and_a_client_with_affinity_does(lab: Lab, family: int, flags: int) -> None:
    addresses = [f"10.9.0.{n}" if family == 4 else f"fd00:9::{n:x}" for n in range(1, 8)]

    def goes_to(sport: int, port: int = 80) -> str:
        data = lab.dp.run(bytes(ether() / ip(VIP[family], family) / TCP(sport=sport, dport=port))).data
        return str(Ether(data)[1].dst)

    lab.serve(family, [(address, 8080) for address in addresses], flags=flags)
    assert len({goes_to(7) for _ in range(20)}) == 1
    assert len({goes_to(sport) for sport in range(100, 140)}) > 1
    lab.serve(
        family,
        [(address, 8080) for address in addresses],
        port=81,
        flags=flags | abi.ServiceFlag.AFFINITY,
        affinity_s=60,
    )
    assert len({goes_to(sport, 81) for sport in range(100, 140)}) == 1


@BOTH
def test_two_connections_that_the_backend_would_take_for_one(lab: Lab, family: int) -> None:
    """From one port to two services with the same backend."""
    lab.serve(family, [(own(B, family), 8080)], port=80)
    lab.serve(family, [(own(B, family), 8080)], port=81)
    sent = {}
    for port in (80, 81, 80, 81):
        data = lab.dp.run(bytes(ether() / ip(VIP[family], family) / TCP(sport=7, dport=port, flags="A"))).data
        sent.setdefault(port, Ether(data)[TCP].sport)
        assert sent[port] == Ether(data)[TCP].sport
    assert sent[80] == 7 != sent[81]
    with lab.tables.nats() as nats:
        found = {
            socket.ntohs(key.lport): (socket.ntohs(nat.cport), socket.ntohs(nat.vport))
            for key, nat in nats.items()
        }
    assert found == {7: (7, 80), sent[81]: (7, 81)}


@BOTH
def test_without_a_backend(lab: Lab, family: int) -> None:
    lab.serve(family, [], flags=abi.ServiceFlag.DROP)
    packet = ether() / ip(VIP[family], family) / TCP(sport=7, dport=80)
    assert lab.dp.run(bytes(packet)).reason == Reason.LB_NO_BACKEND


@BOTH
def test_a_client_of_another_node_that_speaks_to_this_one(lab: Lab, family: int) -> None:
    """To a node port, by the overlay."""
    gateway = {4: "10.1.0.1", 6: "fd00:1::1"}[family]
    unspecified = {4: "0.0.0.0", 6: "::"}[family]
    lab.cluster.know(host(PEER[family]), IDENTITY, OVERLAY)
    lab.cluster.know(host(gateway), Reserved.HOST, 1)
    lab.tables.service([(unspecified, 30080)], [(own(A, family), 8080)])
    lab.tables.node_address(gateway)
    packet = inner() / ip(gateway, family, source=PEER[family]) / TCP(sport=7, dport=30080)
    there = lab.cluster.run(bytes(packet), FROM_OVERLAY, Tunnel.of(UNDERLAY[OVERLAY][0], IDENTITY))
    assert (there.verdict, there.event.dst_id) == (pipeline.Verdict.DELIVERED, A.id)
    assert there.data[14:] == rewritten(packet, dst=own(A, family), dport=8080)
    reply = ether() / answer(there.data, TCP, flags="SA")
    back = lab.dp.run(bytes(reply))
    assert (back.verdict, back.event.src_identity) == (pipeline.Verdict.TO_OVERLAY, Reserved.REMOTE_NODE)
    assert back.data[14:] == rewritten(reply, src=gateway, sport=30080)
