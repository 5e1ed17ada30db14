"""Which interface and addresses a node is known by."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from services.common.kernel import netlink as nl
from services.common.kernel.netlink import Address, Link, Route
from services.common.network import NetworkConfig
from services.common.underlay import Facts, choose, loses

LO = Link(1, "lo", True, True, 0, 65536, "", "", 0, None)
ETH0 = Link(2, "eth0", True, True, 0, 1500, "02:00:00:00:00:02", "", 0, None)
ETH1 = Link(3, "eth1", True, True, 0, 9000, "02:00:00:00:00:03", "", 0, None)
LINKS = [LO, ETH0, ETH1]
ADDRESSES = [
    Address(1, ip_address("127.0.0.1"), 8, 254),
    Address(2, ip_address("172.29.1.1"), 24),
    Address(2, ip_address("172.29.1.9"), 24, flags=0x01),
    Address(3, ip_address("10.0.0.1"), 16),
    # As the kernel lists them: newest first.
    Address(2, ip_address("fd29:1::7"), 64, flags=0x01),
    Address(2, ip_address("fd29:1::6"), 64, flags=0x20),
    Address(2, ip_address("fd29:1::2"), 64),
    Address(2, ip_address("fd29:1::1"), 64),
    Address(2, ip_address("fe80::1"), 64, nl.SCOPE_LINK),
]


def default(ifindex: int, metric: int = 0, network: str = "0.0.0.0/0") -> Route:
    return Route(ip_network(network), None, ifindex, None, nl.UNICAST, 0, 3, nl.TABLE_MAIN, metric)


def test_the_default_route_leads_to_the_device() -> None:
    found = choose(NetworkConfig(), LINKS, ADDRESSES, [default(3, 100), default(2)])
    assert found == Facts(
        "eth0", 2, 1500, IPv4Address("172.29.1.1"), IPv6Address("fd29:1::1"),
        (ip_network("172.29.1.0/24"), ip_network("fd29:1::/64")),
    )  # fmt: skip
    assert choose(NetworkConfig(), LINKS, ADDRESSES, [default(3), default(2, 100)]).device == "eth1"


def test_a_default_route_of_ipv6_serves_if_there_is_none_of_ipv4() -> None:
    assert choose(NetworkConfig(), LINKS, ADDRESSES, [default(2, 1024, "::/0")]).device == "eth0"


def test_configuration_comes_first() -> None:
    cfg = NetworkConfig(device="eth1")
    assert choose(cfg, LINKS, ADDRESSES, []) == Facts(
        "eth1", 3, 9000, IPv4Address("10.0.0.1"), None, (ip_network("10.0.0.0/16"),)
    )
    cfg = NetworkConfig(ipv4="172.29.1.9", ipv6="fd29:1::2")
    found = choose(cfg, LINKS, ADDRESSES, [default(3)])
    assert (found.device, str(found.ipv4), str(found.ipv6)) == ("eth0", "172.29.1.9", "fd29:1::2")


def test_what_is_missing_is_named() -> None:
    assert "network.device" in choose(NetworkConfig(), LINKS, ADDRESSES, []).problem
    assert "eth9" in choose(NetworkConfig(device="eth9"), LINKS, ADDRESSES, []).problem
    found = choose(NetworkConfig(ipv4="10.9.9.9"), LINKS, ADDRESSES, [default(2)])
    assert found.ipv4 is None and found.ipv6 is not None and "10.9.9.9" in found.problem
    assert "no address" in choose(NetworkConfig(device="lo"), LINKS, ADDRESSES, []).problem


def test_only_an_address_without_a_successor_is_lost() -> None:
    one, other = (
        Facts("eth0", 2, 1500, IPv4Address("10.0.0.1")),
        Facts("eth0", 2, 1500, IPv4Address("10.0.0.2")),
    )
    assert not loses(one, other)
    assert not loses(Facts(), one)
    assert loses(one, Facts())
    assert loses(one, Facts("eth0", 2, 1500, None, IPv6Address("fd00::1")))
