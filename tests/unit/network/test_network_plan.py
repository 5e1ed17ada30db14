"""What the kernel shall have, however what is known came about."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.network import Mode, NetworkConfig
from services.common.underlay import Facts
from services.identity.network.devices import Found
from services.identity.network.plan import Changed, Own, Plan
from services.identity.nodes.model import Node, NodeState

BLOCKS = {
    4: [f"10.9.{number}.0/24" for number in range(4)],
    6: [f"fd09:{number}::/64" for number in range(4)],
}
FACTS = Facts("eth0", 2, 1500, IPv4Address("172.29.1.1"), IPv6Address("fd29:1::1"),
              (ip_network("172.29.1.0/24"), ip_network("fd29:1::/64")))  # fmt: skip
FOUND = Found(7, 5, 2, "02:00:00:00:00:05", (ip_address("10.9.0.1"), ip_address("fd09::1")))


def node(name: str, subnet: int = 1, mode: Mode = Mode.AUTO, blocks: Any = (), v6: bool = True) -> Node:
    number = int(name[1:])
    networks = [ip_network(f"172.29.{subnet}.0/24")] + ([ip_network(f"fd29:{subnet}::/64")] if v6 else [])
    return Node(
        name, number, number == 1, IPv4Address(f"172.29.{subnet}.{number}"),
        IPv6Address(f"fd29:{subnet}::{number}") if v6 else None, mode, 8472, 4240, 1500, tuple(networks), "",
        NodeState.ALIVE, frozenset(map(ip_network, blocks)),
    )  # fmt: skip


NAMES = [f"h{number}" for number in range(1, 5)]
# Each node has blocks of its own: who has one is decided by etcd.
NODES = st.sampled_from(NAMES).flatmap(
    lambda name: st.builds(
        node,
        st.just(name),
        st.integers(1, 2),
        st.sampled_from(Mode),
        st.sets(
            st.sampled_from([f"10.9.{name[1:]}.0/26", f"10.9.{name[1:]}.64/26", f"fd09:{name[1:]}::/64"])
        ),
        st.booleans(),
    )
)
OWNS = st.builds(
    Own,
    st.sampled_from([FACTS, Facts(), Facts("eth0", 2, 1400, FACTS.ipv4, None, FACTS.networks[:1])]),
    st.sampled_from([FOUND, Found(), Found(0, 5, 2, "", FOUND.sources[:1])]),
    st.just(frozenset({ip_network("10.9.1.0/26")})),
)
FOREIGN = st.sets(st.sampled_from([ip_network("10.9.2.0/26"), ip_network("fd09:3::/64")]))
STEPS = st.lists(st.one_of(NODES, OWNS, FOREIGN, st.sampled_from(NAMES)), max_size=20)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(Mode), STEPS)
def test_steps_lead_where_a_fresh_start_does(mode: Mode, steps: list[Any]) -> None:
    """And each step names every key that it changed, and no other."""
    foreign: set[Any] = set()
    plan = Plan(NetworkConfig(mode=mode), lambda block: block in foreign)
    nodes: dict[str, Node] = {}
    own = plan.own
    for step in steps:
        entries, routes, pairs = dict(plan.entries), dict(plan.routes), dict(plan.pairs)
        if isinstance(step, Node):
            nodes[step.name] = step
            changes = [plan.put(step)]
        elif isinstance(step, Own):
            own = step
            changes = [plan.set_own(own)]
        elif isinstance(step, str):
            nodes.pop(step, None)
            changes = [plan.drop(step)]
        else:
            before, foreign = foreign, step
            changes = [plan.again(plan.owner(block)) for block in before ^ foreign]
        assert union(change.indexes for change in changes) == differing(entries, plan.entries)
        assert union(change.blocks for change in changes) == differing(routes, plan.routes)
        assert any(change.pairs for change in changes) == (pairs != plan.pairs)
    fresh = Plan(NetworkConfig(mode=mode), lambda block: block in foreign)
    fresh.set_own(own)
    for each in nodes.values():
        fresh.put(each)
    assert (plan.routes, plan.pairs, plan.entries) == (fresh.routes, fresh.pairs, fresh.entries)


def union(sets: Any) -> set[Any]:
    return set().union(*sets)


def differing(before: dict[Any, Any], after: dict[Any, Any]) -> set[Any]:
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def test_a_node_costs_work_for_that_node() -> None:
    plan = Plan(NetworkConfig(), lambda block: False)
    plan.set_own(Own(FACTS, FOUND))
    for number in range(2, 200):
        plan.put(node(f"h{number}", blocks=[f"10.{number}.0.0/24"]))
    assert plan.put(node("h7", subnet=2, blocks=["10.7.0.0/24", "10.7.1.0/24"])) == Changed(
        frozenset({7}), frozenset({ip_network("10.7.1.0/24")}), True
    )
    assert not plan.put(node("h7", subnet=2, blocks=["10.7.0.0/24", "10.7.1.0/24"]))
    assert plan.drop("h7").blocks == {ip_network("10.7.0.0/24"), ip_network("10.7.1.0/24")}


def test_a_block_belongs_to_whoever_had_it_last() -> None:
    plan = Plan(NetworkConfig(mode=Mode.ROUTED), lambda block: False)
    plan.set_own(Own(FACTS, FOUND))
    block = ip_network("10.9.9.0/24")
    plan.put(node("h2", mode=Mode.ROUTED, blocks=[block]))
    plan.put(node("h3", mode=Mode.ROUTED, blocks=[block]))
    assert plan.routes[block].gateway == ip_address("172.29.1.3")
    plan.put(node("h2", mode=Mode.ROUTED))
    assert plan.routes[block].gateway == ip_address("172.29.1.3")
    assert plan.drop("h3").blocks == {block}
    assert not plan.routes
