"""Which backends a node gives to which clients, against the rules written out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from ipaddress import ip_address

from hypothesis import given
from hypothesis import strategies as st

from services.lb.abi import BackendState, ServiceFlag
from services.lb.locality import Locality
from services.lb.model import (
    TCP,
    Algorithm,
    Backend,
    BackendKey,
    Forwarding,
    Frontend,
    FrontendType,
    HealthCheck,
    Spec,
    TcpProbe,
    Topology,
    TrafficPolicy,
)
from services.lb.plan import Defaults, plan

HERE = Locality("n1", "z1", "c1", frozenset({ip_address("10.0.9.9")}))
FRONTS = (
    Frontend(FrontendType.CLUSTER_IP, ip_address("10.96.0.1"), TCP, 80, 80),
    Frontend(FrontendType.EXTERNAL_IP, ip_address("192.0.2.1"), TCP, 80, 80),
)
backends = st.builds(
    lambda number, node, zone, cluster, state, weight: Backend(
        BackendKey(ip_address(f"10.0.0.{number}"), 80), weight, zone, node, cluster, state
    ),
    st.integers(1, 30),
    st.sampled_from(("n1", "n2", "")),
    st.sampled_from(("z1", "z2", "")),
    st.sampled_from(("", "c1", "c2")),
    st.sampled_from([state for state in BackendState if state]),
    st.sampled_from((1, 1, 2, 6)),
)
several = st.lists(backends, max_size=12).map(lambda given: {each.key: each for each in given})
unwell = st.frozensets(st.integers(1, 30).map(lambda n: BackendKey(ip_address(f"10.0.0.{n}"), 80)))


def expected(
    spec: Spec, given: list[Backend], states: dict[BackendKey, BackendState], inside: bool
) -> set[BackendKey]:
    """The rules, one after the other."""
    if (spec.internal if inside else spec.external) is TrafficPolicy.LOCAL:
        given = [b for b in given if b.node == "n1"]
    active = [b for b in given if states[b.key] is BackendState.ACTIVE]
    if not active:
        return {b.key for b in given if states[b.key] is BackendState.TERMINATING}
    if inside and spec.internal is TrafficPolicy.CLUSTER and spec.topology is not Topology.ANY:
        own = [b for b in active if b.cluster in ("", "c1")]
        near = [b for b in active if b.node == "n1"] if spec.topology is Topology.SAME_NODE else []
        return {b.key for b in near or [b for b in own if b.zone == "z1"] or own or active}
    return {b.key for b in active}


@given(
    several, unwell, st.sampled_from(Topology), st.sampled_from(TrafficPolicy), st.sampled_from(TrafficPolicy)
)
def test_clients_get_whom_the_rules_say(
    members: dict[BackendKey, Backend],
    sick: frozenset[BackendKey],
    topology: Topology,
    internal: TrafficPolicy,
    external: TrafficPolicy,
) -> None:
    spec = Spec(
        "s",
        FRONTS,
        internal=internal,
        external=external,
        topology=topology,
        health_check=HealthCheck(TcpProbe()),
    )
    made = plan(spec, members, lambda _, key: "ill" if key in sick else "", HERE, Defaults())[4]
    states = {
        key: BackendState.QUARANTINED if b.state is BackendState.ACTIVE and key in sick else b.state
        for key, b in members.items()
    }
    assert dict(made.states) == states
    for stretch, inside in ((made.inside, True), (made.outside, False)):
        wanted = expected(spec, list(members.values()), states, inside)
        assert set(stretch.slots) == wanted
        counts = Counter(stretch.slots)
        for a in wanted:
            for b in wanted:
                assert counts[a] * members[b].weight == counts[b] * members[a].weight


@given(several.filter(lambda given: any(b.state is BackendState.ACTIVE for b in given.values())))
def test_all_nodes_choose_alike_for_clients_outside(members: dict[BackendKey, Backend]) -> None:
    spec = Spec("s", FRONTS, Algorithm.MAGLEV, topology=Topology.SAME_NODE)
    tables = {
        plan(spec, members, lambda _, key: "", Locality(node, zone, "c1"), Defaults())[4].outside
        for node, zone in (("n1", "z1"), ("n2", "z2"), ("n3", ""))
    }
    assert len(tables) == 1 and next(iter(tables)).ordered


def test_families_ports_of_one_node_and_flags() -> None:
    host = Frontend(FrontendType.HOST_PORT, ip_address("0.0.0.0"), TCP, 8080, 8080, "n2")
    six = Frontend(FrontendType.CLUSTER_IP, ip_address("fd00::1"), TCP, 80, 80)
    members = {
        key: Backend(key)
        for key in (BackendKey(ip_address("10.0.0.1"), 80), BackendKey(ip_address("fd00::9"), 80))
    }
    spec = Spec("s", (*FRONTS, host, six), affinity_s=30, forwarding=Forwarding.HYBRID)
    made = plan(spec, members, lambda _, key: "", HERE, Defaults(Forwarding.DSR))
    assert set(made) == {4, 6}
    assert host not in made[4].fronts and made[6].fronts == (six,)
    assert set(made[6].inside.slots) == {BackendKey(ip_address("fd00::9"), 80)}
    assert made[4].flags == ServiceFlag.AFFINITY | ServiceFlag.DSR
    there = plan(spec, members, lambda _, key: "", Locality("n2"), Defaults())
    assert host in there[4].fronts
    whole = plan(
        replace(spec, forwarding=Forwarding.DEFAULT),
        members,
        lambda _, key: "",
        HERE,
        Defaults(Forwarding.DSR),
    )
    assert whole[4].flags & ServiceFlag.DSR_UDP
    assert made[4].local == frozenset()
    own = {BackendKey(ip_address("10.0.9.9"), 80): Backend(BackendKey(ip_address("10.0.9.9"), 80))}
    assert plan(spec, own, lambda _, key: "", HERE, Defaults())[4].local == frozenset(own)
