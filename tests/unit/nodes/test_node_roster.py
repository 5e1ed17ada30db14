"""Nodes put together out of what etcd says, in any order."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from fibril.ipam.v1 import ipam_pb2
from fibril.node.v1 import node_pb2 as pb
from services.common.network import Mode
from services.identity.nodes.model import NodeState
from services.identity.nodes.roster import Alive, Roster, decode_block, decode_node

NAMES = ("a", "b", "c")
BLOCKS = ("default/10.1.0.0_24", "default/10.1.1.0_24", "default/fd00::_112")


def record(name: str, address: str = "192.168.0.1") -> Any:
    stored = pb.StoredNode(name=name, ipv4=address, mode=pb.NETWORK_MODE_AUTO, overlay_port=8472,
                           underlay_networks=["192.168.0.0/24"])  # fmt: skip
    return decode_node(name, stored.SerializeToString(), 7)


def block(key: str, node: str) -> Any:
    cidr = key.partition("/")[2].replace("_", "/")
    gateway = str(ip_network(cidr)[1])
    return decode_block(ipam_pb2.Block(cidr=cidr, node=node, gateway=gateway).SerializeToString())


STEPS = st.lists(st.one_of(
    st.tuples(st.just("record"), st.sampled_from(NAMES), st.sampled_from(["192.168.0.1", "192.168.0.2"])),
    st.tuples(st.just("no record"), st.sampled_from(NAMES)), st.tuples(st.just("alive"), st.sampled_from(NAMES)),
    st.tuples(st.just("dead"), st.sampled_from(NAMES)),
    st.tuples(st.just("block"), st.sampled_from(BLOCKS), st.sampled_from(NAMES)),
    st.tuples(st.just("no block"), st.sampled_from(BLOCKS)),
), max_size=30)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_what_changed_is_named_and_the_rest_is_as_it_was(steps: list[tuple[str, ...]]) -> None:
    roster = Roster("a", lambda name: NAMES.index(name) + 1)
    records: dict[str, str] = {}
    alive: set[str] = set()
    blocks: dict[str, str] = {}
    for kind, name, *rest in steps:
        if kind == "record":
            touched = {roster.put_record(record(name, rest[0]))}
            records[name] = rest[0]
        elif kind == "no record":
            touched = {roster.delete_record(name)}
            records.pop(name, None)
        elif kind == "alive":
            touched = {roster.put_alive(name, Alive("t", 1))}
            alive.add(name)
        elif kind == "dead":
            touched = {roster.delete_alive(name)}
            alive.discard(name)
        elif kind == "block":
            touched = roster.put_block(name, block(name, rest[0]))
            blocks[name] = rest[0]
        else:
            touched = roster.delete_block(name)
            blocks.pop(name, None)
        for each in touched:
            roster.refresh(each)
        assert roster.nodes.keys() == records.keys()
        for each, node in roster.nodes.items():
            own = [block(key, each) for key, owner in blocks.items() if owner == each]
            assert str(node.ipv4) == records[each]
            assert (node.index, node.local) == (NAMES.index(each) + 1, each == "a")
            assert (node.state is NodeState.ALIVE) == (each in alive)
            assert node.blocks == {entry.network for entry in own}
            assert node.gateways == {entry.gateway for entry in own}


def test_a_record_is_read_as_written() -> None:
    node = record("a")
    assert (node.ipv4, node.ipv6, node.configured_mode) == (ip_address("192.168.0.1"), None, Mode.AUTO)
    assert node.underlay_networks == (ip_network("192.168.0.0/24"),)


@pytest.mark.parametrize("value", [
    b"\xff\xff", pb.StoredNode(name="other").SerializeToString(), pb.StoredNode(name="a", ipv4="x").SerializeToString(),
    pb.StoredNode(name="a", underlay_networks=["10.0.0.1/8"]).SerializeToString(),
    pb.StoredNode(name="a", ipv4="0.0.0.0").SerializeToString(), pb.StoredNode(name="a", ipv6="ff02::1").SerializeToString(),
    pb.StoredNode(name="a", probe_port=65536).SerializeToString(),
])  # fmt: skip
def test_what_is_no_record_is_refused(value: bytes) -> None:
    with pytest.raises((ValueError, DecodeError)):
        decode_node("a", value, 1)


@pytest.mark.parametrize("value", [
    b"\xff\xff", ipam_pb2.Block(cidr="10.0.0.0/24").SerializeToString(),
    ipam_pb2.Block(cidr="10.0.0.1/8", node="a").SerializeToString(),
    ipam_pb2.Block(cidr="10.0.0.0/24", node="a", gateway="10.0.1.1").SerializeToString(),
])  # fmt: skip
def test_what_is_no_block_is_refused(value: bytes) -> None:
    with pytest.raises((ValueError, DecodeError)):
        decode_block(value)
