"""Packets to pods of other nodes, and from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.layers.vxlan import VXLAN

from services.common.instance import Instance
from services.common.kernel import progs
from services.common.pipeline import abi
from services.common.pipeline.reasons import Reason
from services.identity.network.install import FROM_HOST, FROM_OVERLAY, FROM_UPLINK
from services.identity.numbers import Reserved
from tests.datapath.cluster import (
    CLOUD,
    DIRECT,
    HERE,
    HOST_MAC,
    MTU,
    NOWHERE,
    OVERLAY,
    OVERLAY_PORT,
    OVERLAY_V6,
    ROUTED,
    UNDERLAY,
    Cluster,
    Tunnel,
    loaded,
)
from tests.datapath.harness import REDIRECT, SHAPED, SHOT, UNSPEC, A, B, Datapath
from tests.datapath.packets import delivered, ether, ip

PEER = {4: "10.2.0.9", 6: "fd00:2::9"}
BLOCK = {4: "10.2.0.0/24", 6: "fd00:2::/64"}
IDENTITY = (1 << 20) + 4711
FAR_CLUSTER = (300 << 20) + 1
"""An identity that needs the upper eight bits."""


def host(address: str) -> str:
    return address + ("/128" if ":" in address else "/32")


def inner(**fields: Any) -> Ether:
    """A frame as nodes send it: its addresses mean nothing. Without any, scapy would ask the network for them."""
    return Ether(**{"src": "02:00:00:00:00:77", "dst": "02:00:00:00:00:78", **fields})


@pytest.fixture(scope="module")
def with_identity(instance: Instance) -> Iterator[None]:
    with loaded(instance):
        yield


@pytest.fixture
def cluster(with_identity: None, dp: Datapath) -> Iterator[Cluster]:
    # Another module of this session may have emptied the slot in between.
    made = Cluster(dp)
    yield made
    made.close()


# -- from a pod


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("node", [OVERLAY, OVERLAY_V6])
@pytest.mark.parametrize("known", ["address", "block"])
def test_a_pod_reaches_other_nodes_by_the_overlay(cluster: Cluster, family: int, node: int, known: str) -> None:
    cluster.know(host(PEER[family]) if known == "address" else BLOCK[family], IDENTITY, node)
    packet = ether() / ip(PEER[family], family, ttl=9) / TCP(dport=80)
    result = cluster.dp.run(bytes(packet))
    assert (result.action, result.verdict) == (REDIRECT, abi.Verdict.TO_OVERLAY)
    after = Ether(result.data)
    assert (after[IP].ttl if family == 4 else after[IPv6].hlim) == 8
    assert (result.event.src_identity, result.event.dst_identity) == (A.identity, IDENTITY)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("identity", [A.identity, FAR_CLUSTER])
def test_to_neighbours_the_overlay_is_written_here(cluster: Cluster, family: int, identity: int) -> None:
    """Every field of the outer headers, as scapy reads them."""
    cluster.know(host(PEER[family]), IDENTITY, DIRECT)
    sender = abi.Endpoint.from_buffer_copy(bytes(A))
    sender.identity = identity
    cluster.dp.put(sender)
    ecn_and_more = {"tos": 0xBA} if family == 4 else {"tc": 0xBA}
    packet = ether() / ip(PEER[family], family, ttl=9, **ecn_and_more) / TCP(dport=80) / b"abc"
    try:
        result = cluster.dp.run(bytes(packet))
    finally:
        cluster.dp.put(A)
    assert (result.action, result.verdict) == (REDIRECT, abi.Verdict.TO_OVERLAY)
    outer = Ether(result.data)
    assert (outer[IP].src, outer[IP].dst) == (UNDERLAY[HERE][0], UNDERLAY[DIRECT][0])
    assert (outer[IP].flags, outer[IP].ttl, outer[IP].tos, outer[IP].proto) == ("DF", 64, 2, 17)
    assert (outer[IP].len, outer[UDP].len) == (len(result.data) - 14, len(result.data) - 34)
    sum_given = outer[IP].chksum
    del outer[IP].chksum
    assert IP(bytes(outer[IP])).chksum == sum_given
    assert (outer[UDP].dport, outer[UDP].sport >> 15, outer[UDP].chksum) == (OVERLAY_PORT, 1, 0)
    vxlan = VXLAN(bytes(outer[UDP].payload))
    assert vxlan.vni == identity & 0xFFFFFF
    assert (int(vxlan.flags), vxlan.gpid or 0) == ((0x88, identity >> 24) if identity >> 24 else (0x08, 0))
    inside = bytes(vxlan.payload)
    assert inside[12:] == delivered(packet, B)[12:]  # one hop less, else as it was


@pytest.mark.parametrize("family", [4, 6])
def test_a_pod_reaches_other_nodes_by_a_route(cluster: Cluster, family: int) -> None:
    cluster.know(host(PEER[family]), IDENTITY, ROUTED)
    result = cluster.dp.run(bytes(ether() / ip(PEER[family], family) / UDP()))
    assert (result.action, result.verdict) == (REDIRECT, abi.Verdict.TO_NODE)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("where", ["cloud", "world", "own block", "own host"])
def test_the_host_has_routes_for_the_rest(cluster: Cluster, family: int, where: str) -> None:
    node, identity = {"cloud": (CLOUD, IDENTITY), "world": (0, 0), "own block": (HERE, Reserved.UNMANAGED),
                      "own host": (HERE, Reserved.HOST)}[where]  # fmt: skip
    if identity:
        cluster.know(BLOCK[family] if where == "own block" else host(PEER[family]), identity, node)
    packet = bytes(ether() / ip(PEER[family], family) / UDP())
    result = cluster.dp.run(packet)
    assert (result.action, result.verdict, result.data) == (UNSPEC, abi.Verdict.TO_STACK, packet)
    assert result.event.dst_identity == (identity or Reserved.WORLD)


@pytest.mark.parametrize("node", [OVERLAY, ROUTED])
def test_what_needs_an_error_goes_to_the_stack_unchanged(cluster: Cluster, node: int) -> None:
    cluster.know(host(PEER[4]), IDENTITY, node)
    for packet in (ether() / ip(PEER[4], ttl=1) / UDP(), ether() / ip(PEER[4], flags="DF") / UDP() / bytes(MTU)):
        result = cluster.dp.run(bytes(packet))
        assert (result.verdict, result.data) == (abi.Verdict.TO_STACK, bytes(packet))
    # Segments fit, though the whole does not.
    super_packet = ether() / ip(PEER[4]) / TCP() / bytes(3000)
    assert cluster.dp.run(bytes(super_packet), gso_size=MTU - 40).verdict != abi.Verdict.TO_STACK
    assert cluster.dp.run(bytes(super_packet), gso_size=MTU - 39).verdict == abi.Verdict.TO_STACK


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("known", ["world", "cloud", "too big"])
def test_a_pod_cannot_forge_overlay_packets(cluster: Cluster, family: int, known: str) -> None:
    """The host would give them its own address, and peers would believe them."""
    if known != "world":
        cluster.know(host(PEER[family]), IDENTITY, CLOUD if known == "cloud" else OVERLAY)
    size = MTU if known == "too big" else 60
    packet = ether() / ip(PEER[family], family) / UDP(dport=OVERLAY_PORT) / bytes(size)
    assert cluster.dp.run(bytes(packet)).reason == Reason.OVERLAY_FORGED
    packet[UDP].dport = OVERLAY_PORT + 1
    assert cluster.dp.run(bytes(packet)).verdict == abi.Verdict.TO_STACK


def test_a_node_that_cannot_be_reached_is_named(cluster: Cluster) -> None:
    cluster.know(host(PEER[4]), IDENTITY, NOWHERE)
    assert cluster.dp.run(bytes(ether() / ip(PEER[4]) / UDP())).reason == Reason.NODE_UNREACHABLE


def test_a_pod_of_this_node_is_never_sent_away(cluster: Cluster) -> None:
    cluster.know(host(str(B.ipv4)), IDENTITY, OVERLAY)
    assert cluster.dp.run(bytes(ether() / ip(B) / UDP())).event.dst_id == B.id


def test_without_the_service_the_stack_gets_it(cluster: Cluster) -> None:
    cluster.know(host(PEER[4]), IDENTITY, OVERLAY)
    array = cluster.dp.path(abi.SLOTS_MAP)
    program = cluster.dp.instance.pin_dir / "prog/identity/fib_remote"
    progs.clear_slot(array, abi.Slot.REMOTE)
    try:
        assert cluster.dp.run(bytes(ether() / ip(PEER[4]) / UDP())).verdict == abi.Verdict.TO_STACK
    finally:
        with progs.opened(program) as fd:
            progs.set_slot(array, abi.Slot.REMOTE, fd)


# -- out of the overlay


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("node", [OVERLAY, OVERLAY_V6])
@pytest.mark.parametrize("identity", [IDENTITY, FAR_CLUSTER])
def test_a_pod_is_reached_by_other_nodes(cluster: Cluster, family: int, node: int, identity: int) -> None:
    cluster.know(host(PEER[family]), identity, node)
    remote = next(address for address in UNDERLAY[node] if address)
    packet = inner() / ip(B, family, source=PEER[family], ttl=9) / TCP(dport=80)
    result = cluster.run(bytes(packet), FROM_OVERLAY, Tunnel.of(remote, identity))
    assert (result.action, result.verdict) == (REDIRECT, abi.Verdict.DELIVERED)
    assert result.data == delivered(packet, B)
    event = result.event
    assert (event.src_identity, event.dst_identity, event.dst_id) == (identity, B.identity, B.id)
    assert event.direction == abi.Direction.FROM_OVERLAY


def test_a_shaped_pod_is_reached_through_its_queue(cluster: Cluster) -> None:
    cluster.know(host(PEER[4]), IDENTITY, OVERLAY)
    result = cluster.run(bytes(inner() / ip(SHAPED, source=PEER[4]) / UDP()), FROM_OVERLAY,
                         Tunnel.of(UNDERLAY[OVERLAY][0], IDENTITY))  # fmt: skip
    assert (result.verdict, result.event.dst_id) == (abi.Verdict.DELIVERED, SHAPED.id)


@pytest.mark.parametrize("why", ["it is the host", "error"])
def test_the_host_gets_its_own_by_the_interface_its_routes_name(cluster: Cluster, why: str) -> None:
    cluster.know(host(PEER[4]), IDENTITY, OVERLAY)
    cluster.know("10.1.0.1/32", Reserved.HOST, HERE)
    packet = ip("10.1.0.1", source=PEER[4]) / ICMP() if why == "it is the host" else ip(B, source=PEER[4], ttl=1) / UDP()
    result = cluster.run(bytes(inner() / packet), FROM_OVERLAY, Tunnel.of(UNDERLAY[OVERLAY][0], IDENTITY))
    assert (result.action, result.verdict) == (REDIRECT, abi.Verdict.TO_STACK)
    assert Ether(result.data).dst == HOST_MAC
    assert result.data[14:] == bytes(packet)


@pytest.mark.parametrize("packet", [
    inner() / ip("10.3.0.1", source=PEER[4]) / UDP(),
    inner() / ip("10.2.0.77", source=PEER[4]) / UDP(),
], ids=["world", "another node"])
def test_nothing_is_passed_on_to_others(cluster: Cluster, packet: Ether) -> None:
    cluster.know(host(PEER[4]), IDENTITY, OVERLAY)
    cluster.know(BLOCK[4], Reserved.UNMANAGED, OVERLAY)
    result = cluster.run(bytes(packet), FROM_OVERLAY, Tunnel.of(UNDERLAY[OVERLAY][0], IDENTITY))
    assert (result.action, result.reason) == (SHOT, Reason.OVERLAY_DESTINATION)


@pytest.mark.parametrize(("packet", "reason"), [
    (inner() / ARP(), Reason.ETHERTYPE),
    (inner() / Dot1Q(vlan=3) / ip(B, source=PEER[4]) / UDP(), Reason.VLAN),
    (inner() / ip(B, source=PEER[4], ihl=4) / UDP(), Reason.MALFORMED),
], ids=["arp", "vlan", "malformed"])
def test_what_is_no_plain_packet_is_dropped(cluster: Cluster, packet: Ether, reason: Reason) -> None:
    cluster.know(host(PEER[4]), IDENTITY, OVERLAY)
    assert cluster.run(bytes(packet), FROM_OVERLAY, Tunnel.of(UNDERLAY[OVERLAY][0], IDENTITY)).reason == reason


def test_a_packet_without_a_tunnel_is_dropped(cluster: Cluster) -> None:
    cluster.know(host(PEER[4]), IDENTITY, OVERLAY)
    assert cluster.run(bytes(inner() / ip(B, source=PEER[4]) / UDP()), FROM_OVERLAY).reason == Reason.OVERLAY_KEY


def believed(entry: str, entry_node: int, sent_by: int, carried: int, before: int, grace: bool) -> Reason | int:
    """The rule in plain words: the reason it is not believed, or the sender's identity."""
    if entry == "none" or entry_node != sent_by or entry_node in (HERE, ROUTED):
        return Reason.OVERLAY_SOURCE
    if entry == "block":
        may_be_pods = carried == Reserved.INIT or 1 <= carried >> 20 <= 4094
        return carried if may_be_pods else Reason.OVERLAY_IDENTITY
    if carried == IDENTITY or (grace and before and carried == before):
        return IDENTITY
    return Reason.OVERLAY_IDENTITY


IDENTITIES = st.sampled_from(
    [IDENTITY, IDENTITY + 1, FAR_CLUSTER, IDENTITY + (16 << 20), 0, 1, 5, 6, 4095 << 20, (4094 << 20) + 9])


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    family=st.sampled_from([4, 6]), entry=st.sampled_from(["none", "block", "address", "both"]),
    entry_node=st.sampled_from([HERE, OVERLAY, OVERLAY_V6, ROUTED]),
    sent_by=st.sampled_from([HERE, OVERLAY, OVERLAY_V6, ROUTED]), carried=IDENTITIES, before=IDENTITIES, grace=st.booleans(),
    by_v6=st.booleans(),
)
def test_senders_are_believed_by_the_rule(
    cluster: Cluster, family: int, entry: str, entry_node: int, sent_by: int, carried: int, before: int, grace: bool,
    by_v6: bool,
) -> None:  # fmt: skip
    cluster.forget()
    if entry in ("block", "both"):
        cluster.know(BLOCK[family], Reserved.UNMANAGED, ROUTED if entry == "both" else entry_node)
    if entry in ("address", "both"):
        cluster.know(host(PEER[family]), IDENTITY, entry_node, before=before, grace_s=60 if grace else -60)
    remote = UNDERLAY[sent_by][by_v6] or UNDERLAY[sent_by][not by_v6]
    result = cluster.run(bytes(inner() / ip(B, family, source=PEER[family]) / UDP()), FROM_OVERLAY,
                         Tunnel.of(remote, carried))  # fmt: skip
    expected = believed("address" if entry == "both" else entry, entry_node, sent_by, carried, before, grace)
    if isinstance(expected, Reason):
        assert (result.action, result.reason) == (SHOT, expected)
    else:
        assert (result.verdict, result.event.src_identity) == (abi.Verdict.DELIVERED, expected)


# -- by the uplink


def arriving(**fields: Any) -> Ether:
    """To the MAC of the device, which for test runs is the loopback."""
    return inner(dst="00:00:00:00:00:00", **fields)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("node", [ROUTED, CLOUD])
def test_a_pod_is_reached_by_the_uplink(cluster: Cluster, family: int, node: int) -> None:
    cluster.know(host(PEER[family]), IDENTITY, node)
    packet = arriving() / ip(B, family, source=PEER[family], ttl=9) / TCP(dport=80)
    result = cluster.run(bytes(packet), FROM_UPLINK)
    assert (result.action, result.verdict, result.data) == (REDIRECT, abi.Verdict.DELIVERED, delivered(packet, B))
    assert (result.event.src_identity, result.event.direction) == (IDENTITY, abi.Direction.FROM_UPLINK)


@pytest.mark.parametrize("family", [4, 6])
def test_the_world_reaches_pods_through_the_stack(cluster: Cluster, family: int) -> None:
    packet = bytes(arriving() / ip(B, family, source=PEER[family]) / UDP())
    result = cluster.run(packet, FROM_UPLINK)
    assert (result.action, result.verdict, result.data) == (UNSPEC, abi.Verdict.TO_STACK, packet)
    assert result.event.src_identity == Reserved.WORLD


@pytest.mark.parametrize("source", ["a pod behind the overlay", "a pod of this node", "this host"])
def test_nobody_speaks_for_others_by_the_uplink(cluster: Cluster, source: str) -> None:
    address, node = {"a pod behind the overlay": (PEER[4], OVERLAY), "a pod of this node": (str(A.ipv4), HERE),
                     "this host": (UNDERLAY[HERE][0], HERE)}[source]  # fmt: skip
    cluster.know(host(address), IDENTITY, node)
    assert cluster.run(bytes(arriving() / ip(B, source=address) / UDP()), FROM_UPLINK).reason == Reason.UPLINK_SPOOFED


def test_a_node_itself_may_come_by_the_uplink(cluster: Cluster) -> None:
    cluster.know(host(UNDERLAY[OVERLAY][0]), Reserved.REMOTE_NODE, OVERLAY)
    result = cluster.run(bytes(arriving() / ip(B, source=UNDERLAY[OVERLAY][0]) / UDP()), FROM_UPLINK)
    assert (result.verdict, result.event.src_identity) == (abi.Verdict.DELIVERED, Reserved.REMOTE_NODE)


@pytest.mark.parametrize("packet", [
    arriving() / ARP(), arriving() / ip("192.168.7.1", source="192.168.7.4") / TCP(),
    arriving() / ip("fd77::1", 6, source="fd77::4") / UDP(), arriving(type=0x88CC) / bytes(60),
    arriving() / Dot1Q(vlan=3) / ip(B, source=PEER[4]) / UDP(),
], ids=["arp", "host v4", "host v6", "lldp", "vlan"])
def test_the_hosts_traffic_is_not_touched(cluster: Cluster, packet: Ether) -> None:
    with progs.opened(cluster.dp.instance.pin_dir / "prog/identity" / FROM_UPLINK) as fd:
        done = progs.test_run(fd, bytes(packet), out_size=2048)
    assert (done.retval, done.data) == (UNSPEC, bytes(packet))
    assert not cluster.dp.ring.poll()


# -- from the host


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("source", ["host", "pod"])
def test_the_host_reaches_other_nodes_pods(cluster: Cluster, family: int, source: str) -> None:
    cluster.know(host(PEER[family]), IDENTITY, OVERLAY)
    address = {"host": {4: "10.1.0.1", 6: "fd00:1::1"}[family], "pod": str(A.ipv4 if family == 4 else A.ipv6)}[source]
    packet = bytes(inner() / ip(PEER[family], family, source=address) / TCP())
    result = cluster.run(packet, FROM_HOST)
    assert (result.action, result.verdict, result.data) == (REDIRECT, abi.Verdict.TO_OVERLAY, packet)
    assert result.event.src_identity == (Reserved.REMOTE_NODE if source == "host" else A.identity)


@pytest.mark.parametrize("node", [0, HERE, ROUTED, CLOUD])
def test_what_else_leaves_by_that_interface_is_left_alone(cluster: Cluster, node: int) -> None:
    if node:
        cluster.know(host(PEER[4]), IDENTITY, node)
    packet = bytes(inner() / ip(PEER[4], source="10.1.0.1") / UDP())
    with progs.opened(cluster.dp.instance.pin_dir / "prog/identity" / FROM_HOST) as fd:
        done = progs.test_run(fd, packet, out_size=2048)
    assert (done.retval, done.data) == (UNSPEC, packet)
