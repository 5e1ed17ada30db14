"""What the kernel's side of endpoints should look like, as far as it is decided without a kernel."""

from __future__ import annotations

import dataclasses
import ipaddress

import pytest

from services.common.instance import Instance
from services.common.kernel.events import Event
from services.common.kernel.netlink import Link, Qdisc
from services.common.pipeline import abi
from services.ipam.endpoints import epmaps, node, observe
from services.ipam.endpoints.epmaps import MapView
from services.ipam.endpoints.index import Index
from services.ipam.endpoints.model import EndpointRecord, EndpointSpec, State
from services.ipam.endpoints.observe import Observed
from services.ipam.endpoints.reconcile import concerned

INSTANCE = Instance("test")
ROOT = 0xFFFF_FFFF
NAME = INSTANCE.host_ifname(1)
RECORD = EndpointRecord(
    1, EndpointSpec("c", netns="/n").checked(), State.READY, 1.0, netns_cookie=7, cgroup_id=9, ipv4="10.0.0.2",
    ipv6="fd00::2", ipv4_gateway="10.0.0.1", ipv6_gateway="fd00::1", mac="02:00:00:00:00:02",
    host_mac="02:00:00:00:00:01", host_ifname=NAME, host_ifindex=5, mtu=1500,
)  # fmt: skip
LINK = Link(
    ifindex=5, name=NAME, up=True, carrier=True, xdp_prog_id=0, mtu=1500, mac="02:00:00:00:00:01", kind="veth",
    peer_ifindex=2, peer_nsid=0,
)  # fmt: skip


def seen(**changes: object) -> Observed:
    value = bytes(epmaps.value_of(RECORD, 5, 0))
    view = MapView(
        {5: value}, {bytes(abi.FibAddr.of(a)): value for a in (RECORD.ipv4, RECORD.ipv6)}, {7: 1}, {9: 1})  # fmt: skip
    whole = Observed(
        {1: LINK}, {5: frozenset({"10.0.0.2/32", "fd00::2/128"})}, {5: {a: RECORD.mac for a in ("10.0.0.2", "fd00::2")}},
        {}, view, frozenset({1}),
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


def test_a_whole_endpoint_has_no_differences() -> None:
    assert list(observe.differences(RECORD, seen())) == []
    assert list(observe.differences(RECORD, seen(maps=None))) == []


def test_another_identity_than_recorded_is_a_difference() -> None:
    told = dataclasses.replace(RECORD, identity=0x100001)
    assert len(list(observe.differences(told, seen()))) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"links": {}}, "is missing"),
        ({"links": {1: dataclasses.replace(LINK, up=False)}}, "is down"),
        ({"links": {1: dataclasses.replace(LINK, mtu=1400)}}, "MTU 1400"),
        ({"links": {1: dataclasses.replace(LINK, mac="02:00:00:00:00:09")}}, "MAC"),
        ({"links": {1: dataclasses.replace(LINK, ifindex=6)}}, "index 6"),
        ({"routes": {5: frozenset({"10.0.0.2/32"})}}, "route to fd00::2"),
        ({"neighbours": {5: {"10.0.0.2": RECORD.mac}}}, "neighbour fd00::2"),
        ({"neighbours": {}}, "neighbour 10.0.0.2"),
        ({"flags": {5: 1}}, "ep_iface"),
        ({"maps": MapView({}, {}, {}, {})}, "ep_cgroup"),
    ],
)
def test_each_difference_is_told(changes: dict[str, object], words: str) -> None:
    assert any(words in sentence for sentence in observe.differences(RECORD, seen(**changes)))


@pytest.mark.parametrize(
    ("name", "number"),
    [
        (NAME, 1), (INSTANCE.host_ifname(65_535), 65_535), (INSTANCE.node_ifname, 0), (INSTANCE.node_peer_ifname, 0),
        (f"fb{INSTANCE.tag}", 0), (f"fb{INSTANCE.tag}01", 0), (f"fb{INSTANCE.tag}0", 0), (f"fb{INSTANCE.tag}10000", 0),
        (f"fb{INSTANCE.tag}A", 0), ("eth0", 0), (Instance("other").host_ifname(1), 0),
    ],
)  # fmt: skip
def test_only_our_host_side_names_have_numbers(name: str, number: int) -> None:
    assert observe.endpoint_id(INSTANCE, name) == number


@pytest.mark.parametrize(
    ("qdisc", "flag"),
    [
        (Qdisc(5, "noqueue", 0, ROOT), 0), (Qdisc(5, "clsact", 0xFFFF0000, 0xFFFFFFF1), 0),
        (Qdisc(5, "tbf", 0x10000, ROOT), 1), (Qdisc(5, "ingress", 0xFFFF0000, 0xFFFFFFF1), 2),
        (Qdisc(5, "pfifo", 0x20000, 0x10001), 0),
    ],
)  # fmt: skip
def test_a_qdisc_shapes_or_does_not(qdisc: Qdisc, flag: int) -> None:
    assert observe.shaping_flag(qdisc) == flag


@pytest.mark.parametrize(
    ("event", "number"),
    [
        (Event("link", link=LINK), 0), (Event("link", link=dataclasses.replace(LINK, up=False)), 1),
        (Event("link", link=dataclasses.replace(LINK, mtu=9000)), 1), (Event("link-gone", link=LINK), 1),
        (Event("link-gone", link=dataclasses.replace(LINK, ifindex=6)), 0),
        (Event("qdisc", qdisc=Qdisc(5, "tbf", 1, ROOT)), 1), (Event("qdisc-gone", qdisc=Qdisc(5, "tbf", 1, ROOT)), 1),
        (Event("qdisc", qdisc=Qdisc(5, "clsact", 0xFFFF0000, 0xFFFFFFF1)), 0), (Event("lost"), 0),
    ],
)  # fmt: skip
def test_an_event_concerns_an_endpoint_or_nobody(event: Event, number: int) -> None:
    index = Index()
    index.put(RECORD)
    assert concerned(event, index) == number
    index.put(RECORD.to(State.DELETING))
    assert concerned(event, index) == 0


def test_the_rules_spare_pods_and_gateways() -> None:
    net = node.NodeNet(
        frozenset({ipaddress.IPv4Network("10.0.0.0/24"), ipaddress.IPv6Network("fd00::/112")}),
        frozenset({ipaddress.IPv4Address("10.0.0.1")}),
        frozenset({ipaddress.IPv4Network("10.0.0.0/16")}),
    )
    rules = node.ruleset(INSTANCE, net, True, 8472)
    assert "set pods4 { type ipv4_addr; flags interval; elements = { 10.0.0.0/24 }; }" in rules
    # Overlapping elements would be refused: the block lies in the cluster's network.
    assert "set peers4 { type ipv4_addr; flags interval; elements = { 10.0.0.0/16 }; }" in rules
    assert "set gates6 { type ipv6_addr; }" in rules
    assert rules.count("udp dport 8472 notrack") == 2
    assert "to_world" in rules and "to_world" not in node.ruleset(INSTANCE, net, False, 8472)
