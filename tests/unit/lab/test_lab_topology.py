"""Names and addresses of labs of every shape."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from lab import topology
from lab.topology import Lab
from services.common import config
from services.common.errors import InvalidArgument
from services.common.etcd.config import EtcdConfig
from services.common.network import NetworkConfig
from services.common.network import Underlay as NetworkUnderlay
from services.ipam.pools.config import PoolsConfig
from services.lb.config import LbSection

SHAPES = [
    Lab("x", 2, 3),
    Lab("x", 2, 5, subnets=3, mode="auto"),
    Lab("x", 1, 3, mode="cloud", underlay="ipv4", ipv6=False),
    Lab("x", 1, 3, underlay="ipv6", etcd_members=3, mtu=9000),
]


@pytest.mark.parametrize("lab", SHAPES)
def test_no_address_is_given_twice_and_each_lies_in_its_subnet(lab: Lab) -> None:
    given = [address for node in lab.nodes() for address, _ in lab.underlay_of(node)]
    given += [address for subnet in range(1, lab.subnets + 1) for address, _ in lab.gateways(subnet)]
    given += [address for side in (0, 1) for address, _ in lab.transit(side)] + list(lab.world)
    assert len(set(given)) == len(given)
    for node in lab.nodes():
        networks = {ip_interface(f"{a}/{length}").network for a, length in lab.gateways(node.subnet)}
        assert {ip_interface(f"{a}/{length}").network for a, length in lab.underlay_of(node)} == networks
        assert {n.version for n in networks} == {
            4 if have and i == 0 else 6 for i, have in enumerate(lab.families) if have
        }
        assert all(any(n.subnet_of(ip_network(every)) for every in topology.ALL_UNDERLAYS  # type: ignore[arg-type]
                       if ip_network(every).version == n.version) for n in networks)  # fmt: skip


def test_nodes_are_dealt_out_to_subnets_in_turn() -> None:
    lab = Lab("x", 1, 5, subnets=2)
    assert [n.subnet for n in lab.nodes()] == [1, 2, 1, 2, 1]
    assert lab.node_at("c1n4") == lab.node(1, 4)
    assert lab.node_at("world") is None
    # The first subnet has the addresses a lab without subnets has.
    assert lab.node(1, 1).addresses == Lab("x").node(1, 1).addresses == ("172.30.1.1", "fd30::1:1")
    assert lab.has_router and not Lab("x").has_router


def test_a_provider_gives_each_node_addresses_of_the_pool_that_lead_to_it() -> None:
    lab = Lab("x", 2, 4, mode="cloud")
    everything = []
    for node in lab.nodes():
        for addresses, prefix, pool in zip(node.cloud_addresses(), node.delegated, node.pool, strict=True):
            assert len(addresses) == topology.CLOUD_ADDRESSES
            assert all(ip_address(a) in ip_network(prefix) for a in addresses)
            assert ip_network(prefix).subnet_of(ip_network(pool))  # type: ignore[arg-type]
            everything += addresses
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("lab", SHAPES)
def test_the_services_take_the_environment(lab: Lab) -> None:
    env = lab.environment(lab.node(1, 2))

    def section(name: str, kind: type) -> object:
        return config.load(kind, env_prefix=f"FIBRIL_{name}", env=env)

    network = section("NETWORK", NetworkConfig)
    assert isinstance(network, NetworkConfig)
    assert network.mode.value == lab.mode
    assert (network.underlay is NetworkUnderlay.AUTO) == (lab.underlay == "dual")
    pools = section("POOLS", PoolsConfig)
    assert isinstance(pools, PoolsConfig)
    assert bool(pools.ipv6) == (lab.ipv6 and lab.mode != "cloud")
    etcd = section("ETCD", EtcdConfig)
    assert isinstance(etcd, EtcdConfig)
    assert (etcd.node, etcd.cluster_id) == ("x-c1n2", 1)
    balancing = section("LB", LbSection)
    assert isinstance(balancing, LbSection)
    assert balancing.cgroup == "fibril/x-c1n2"


@pytest.mark.parametrize("lab", SHAPES)
def test_a_shape_can_be_written_down(lab: Lab) -> None:
    assert Lab.load(lab.dump()) == lab
    with pytest.raises(InvalidArgument):
        Lab.load('{"name": "x"}')


def test_an_etcd_of_three_lives_on_the_first_three_nodes() -> None:
    lab = Lab("x", 2, 4, etcd_members=3)
    assert lab.etcd_addresses(2) == ["172.30.2.1", "172.30.2.2", "172.30.2.3"]
    assert replace(lab, underlay="ipv6").etcd_addresses(1) == ["fd30::1:1", "fd30::1:2", "fd30::1:3"]
    assert Lab("x").etcd_addresses(1) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "magic"},
        {"underlay": "token-ring"},
        {"subnets": 9},
        {"mtu": 1279},
        {"ipv4": False, "ipv6": False},
        {"etcd_members": 2},
        {"etcd_members": 3, "nodes_each": 2},
    ],
)
def test_impossible_shapes_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument) as refused:
        Lab("x", **wrong)  # type: ignore[arg-type]
    assert refused.value.field in wrong or refused.value.field == "nodes"
