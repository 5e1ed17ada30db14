"""What becomes of a pod's packet to another node, against the rule in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw
from scapy.utils import checksum

from services.common.instance import Instance
from services.common.pipeline import abi
from services.common.pipeline.reasons import Reason
from services.identity.numbers import Reserved
from tests.datapath.cluster import Cluster, loaded, node_entry
from tests.datapath.harness import A, Datapath, make_pod
from tests.datapath.packets import ether, ip

NODE = 40
IDENTITY = (1 << 20) + 12
PLACES = {
    "a known pod": ({4: "10.2.0.9", 6: "fd00:2::9"}, IDENTITY, True),
    "a node's block": ({4: "10.2.0.77", 6: "fd00:2::77"}, Reserved.UNMANAGED, True),
    "a declared prefix": ({4: "10.7.1.1", 6: "fd00:7::1"}, 4095 << 20, False),
    "the world": ({4: "198.51.100.1", 6: "2001:db8::1"}, Reserved.WORLD, False),
}
"""Addresses of each, the identity, whether it is behind the node."""


@dataclass(frozen=True)
class Case:
    place: str
    family: int
    mode: abi.NodeMode
    flags: int
    v4: str
    v6: str
    mtu: int
    shaped: bool
    ttl: int
    payload: int
    gso: int

    @property
    def longest(self) -> int:
        """Bytes of the longest IP packet that leaves."""
        headers = (20 if self.family == 4 else 40) + (20 if self.gso else 8)
        return headers + (self.gso if self.gso and self.gso < self.payload else self.payload)


def due(case: Case) -> abi.Verdict:
    if not PLACES[case.place][2]:
        return abi.Verdict.TO_STACK
    if case.mode == abi.NodeMode.NONE:
        return abi.Verdict.DROPPED
    if case.mode in (abi.NodeMode.LOCAL, abi.NodeMode.STACK) or case.shaped or case.longest > case.mtu or case.ttl <= 1:
        return abi.Verdict.TO_STACK
    if case.mode == abi.NodeMode.OVERLAY:
        return abi.Verdict.TO_OVERLAY
    by_v6 = case.family == 6 or case.flags & abi.NodeFlag.HOP_V6
    return abi.Verdict.TO_NODE if (case.v6 if by_v6 else case.v4) else abi.Verdict.TO_STACK


@pytest.fixture(scope="module")
def with_identity(instance: Instance) -> Iterator[None]:
    with loaded(instance):
        yield


@pytest.fixture
def cluster(with_identity: None, dp: Datapath) -> Iterator[Cluster]:
    made = Cluster(dp)
    try:
        for family, bits, block, prefix in ((4, 32, "10.2.0.0/24", "10.7.0.0/16"), (6, 128, "fd00:2::/64", "fd00:7::/64")):
            made.know(block, Reserved.UNMANAGED, NODE)
            made.know(prefix, 4095 << 20, 0)
            made.know(f"{PLACES['a known pod'][0][family]}/{bits}", IDENTITY, NODE)
        yield made
    finally:
        dp.ifaces.update(A.ifindex, A)
        made.nodes.update(NODE, abi.NodeEntry())
        made.close()


CASES = st.builds(
    Case, place=st.sampled_from([*PLACES, *["a known pod"] * 4]), family=st.sampled_from([4, 6]),
    mode=st.sampled_from([*abi.NodeMode, *[abi.NodeMode.OVERLAY, abi.NodeMode.ROUTED] * 3]),
    flags=st.sampled_from([0, 0, abi.NodeFlag.TUNNEL_V6, abi.NodeFlag.HOP_V6]), v4=st.sampled_from(["192.168.7.9", ""]),
    v6=st.sampled_from(["fd77::9", ""]), mtu=st.integers(1278, 1402), shaped=st.sampled_from([False] * 5 + [True]),
    ttl=st.sampled_from([64, 64, 64, 255, 2, 1]),
    payload=st.integers(0, 40) | st.integers(1200, 1400) | st.integers(2800, 3200),
    gso=st.sampled_from([0, 0, 1]) | st.integers(1200, 1400),
)  # fmt: skip


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=CASES)
def test_packets_leave_by_the_rule(cluster: Cluster, case: Case) -> None:
    if case.gso >= case.payload:  # no super-packet
        case = Case(**{**case.__dict__, "gso": 0})
    addresses, identity, _ = PLACES[case.place]
    cluster.nodes.update(NODE, node_entry(case.mode, case.v4, case.v6, case.mtu, case.flags))
    flags = abi.EndpointFlag.SHAPED_OUT if case.shaped else 0
    cluster.dp.ifaces.update(A.ifindex, make_pod(A.id, A.ifindex, flags=flags))
    packet = ether() / ip(addresses[case.family], case.family, ttl=case.ttl)
    raw = bytes(packet / (TCP() if case.gso else UDP()) / Raw(bytes(case.payload)))
    result = cluster.dp.run(raw, gso_size=case.gso)
    verdict = due(case)
    event(verdict.name)
    assert (result.verdict, result.reason) == (
        verdict, Reason.NODE_UNREACHABLE if verdict == abi.Verdict.DROPPED else Reason.NONE)
    assert (result.event.src_identity, result.event.dst_identity) == (A.identity, identity)
    if verdict not in (abi.Verdict.TO_OVERLAY, abi.Verdict.TO_NODE):
        assert result.data == raw
        return
    after = Ether(result.data)
    assert (after[IP].ttl if case.family == 4 else after[IPv6].hlim) == case.ttl - 1
    if case.family == 4:
        assert checksum(result.data[14:34]) == 0
    ttl = slice(22, 26) if case.family == 4 else slice(21, 22)
    assert (result.data[:ttl.start], result.data[ttl.stop:]) == (raw[:ttl.start], raw[ttl.stop:])
