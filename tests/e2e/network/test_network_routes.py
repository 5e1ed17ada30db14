"""Node map and routes to other nodes' pods; routes that others made."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from services.common.network import Mode, Underlay
from services.common.pipeline import abi
from tests.e2e.endpoints.podkit import wait_until
from tests.e2e.network.meshkit import Host, node

BLOCKS = ("10.9.2.0/24", "fd09:0:0:2::/64")


def test_overlay_routes_lead_to_the_hosts_device(host: Host) -> None:
    host.know("h2", node(2, *BLOCKS))
    routes = wait_until(lambda: len(host.routes()) == 2 and host.routes(), "routes")
    for block, gateway in zip(BLOCKS, ("10.9.1.1", "fd09:0:0:1::1"), strict=True):
        route = routes[block]
        assert (route["dev"], route["prefsrc"], route["metrics"][0]["mtu"]) == (
            host.host_device,
            gateway,
            1450,
        )
        assert "gateway" not in route
    entry = host.entries()[2]
    assert (entry.mode, entry.mtu, entry.flags) == (abi.NodeMode.OVERLAY, 1450, abi.NodeFlag.DIRECT)
    assert entry.ifindex
    assert entry.v4 == abi.be32(node(2).ipv4) and str(entry.v6.ip()) == "fd29:1::2"


def test_routed_routes_lead_to_the_node(make_host: Callable[..., Host]) -> None:
    host = make_host(mode=Mode.ROUTED)
    host.ipam("10.9.1.0/24", "fd09:0:0:1::/64")
    host.start()
    host.know("h2", node(2, *BLOCKS, mode=Mode.ROUTED))
    routes = wait_until(lambda: len(host.routes()) == 2 and host.routes(), "routes")
    for block, gateway in zip(BLOCKS, ("172.29.1.2", "fd29:1::2"), strict=True):
        assert (routes[block]["dev"], routes[block]["gateway"], routes[block].get("metrics")) == (
            "eth0",
            gateway,
            None,
        )
    entry = host.entries()[2]
    assert (entry.mode, entry.mtu, entry.ifindex) == (abi.NodeMode.ROUTED, 1500, host.ifindex("eth0"))
    assert host.ifindex(host.vxlan) == 0
    # The node moves to another network: nothing can be sent there directly.
    host.know("h2", node(2, *BLOCKS, subnet=2, mode=Mode.ROUTED))
    wait_until(lambda: not host.routes(), "no routes")
    assert host.entries()[2].mode == abi.NodeMode.STACK
    assert "different networks" in host.parts()["network"][1]
    # Unless others know the way, here or between the networks.
    host.sh("ip route add 10.9.2.0/24 via 172.29.1.254; ip route add fd09:0:0:2::/64 via fd29:1::ff")
    wait_until(lambda: host.parts()["network"][0] == "ok", "no complaint")
    assert host.on_loop(host.network.mode_of, "h2") == (Mode.CLOUD, 1500, "")
    host.sh("ip route del 10.9.2.0/24")
    wait_until(lambda: host.parts()["network"][0] == "degraded", "a complaint")


def test_auto_chooses_for_each_node(make_host: Callable[..., Host]) -> None:
    host = make_host(mode=Mode.AUTO)
    host.ipam("10.9.1.0/24")
    host.start()
    host.know("h2", node(2, "10.9.2.0/24", mode=Mode.AUTO))
    host.know("h3", node(3, "10.9.3.0/24", subnet=2, mode=Mode.AUTO))
    routes = wait_until(lambda: len(host.routes()) == 2 and host.routes(), "routes")
    assert (routes["10.9.2.0/24"]["dev"], routes["10.9.3.0/24"]["dev"]) == ("eth0", host.host_device)
    assert [host.entries()[index].mode for index in (2, 3)] == [abi.NodeMode.ROUTED, abi.NodeMode.OVERLAY]
    assert host.on_loop(host.network.mode_of, "h2") == (Mode.ROUTED, 1500, "")
    assert host.on_loop(host.network.mode_of, "h3") == (Mode.OVERLAY, 1450, "")
    assert host.on_loop(host.network.mode_of, "h4") == (None, 0, "")
    assert host.parts()["network"] == ("ok", "1 overlay, 1 routed")


def test_an_ipv6_underlay_is_told_to_programs(make_host: Callable[..., Host]) -> None:
    host = make_host(underlay=Underlay.IPV6)
    host.ipam("10.9.1.0/24")
    host.start()
    host.know("h2", node(2, "10.9.2.0/24"))
    routes = wait_until(host.routes, "routes")
    assert routes["10.9.2.0/24"]["metrics"][0]["mtu"] == 1430
    assert host.entries()[2].flags == abi.NodeFlag.TUNNEL_V6


def test_what_belongs_to_the_node_itself_and_to_no_node(host: Host) -> None:
    host.know("h1", node(1, "10.9.1.0/24", "fd09:0:0:1::/64", local=True))
    wait_until(lambda: set(host.entries()) == {1}, "own entry")
    entry = host.entries()[1]
    assert (entry.mode, entry.v4) == (abi.NodeMode.LOCAL, abi.be32(node(1).ipv4))
    assert host.routes() == {}


def test_routes_of_others_are_kept_and_used(make_host: Callable[..., Host]) -> None:
    host = make_host(mode=Mode.ROUTED)
    host.ipam("10.9.1.0/24")
    host.start()
    v4, v6 = "10.9.2.0/24 via 172.29.1.77", "fd09:0:0:2::/64 via fd29:1::77"
    for metric, first in product(("", "metric 1", "metric 100000"), ("ours", "theirs")):
        other = f"ip route add {v4} {metric}; ip -6 route add {v6} {metric}"
        if first == "theirs":
            host.sh(other)
        host.know("h2", node(2, *BLOCKS, mode=Mode.ROUTED))
        if first == "ours":
            wait_until(lambda: len(host.routes()) == 2, "routes")
            host.sh(other)
        wait_until(
            lambda: "foreign route kept: 10.9.2.0/24 and 1 more" in host.parts()["network"][1], "noticed"
        )
        wait_until(lambda: host.mode(2) == abi.NodeMode.STACK, "pods' packets take it, too")
        for target, gateway in (("10.9.2.7", "172.29.1.77"), ("fd09:0:0:2::7", "fd29:1::77")):
            assert host.json(f"ip -j route get {target}")[0]["gateway"] == gateway
        host.know("h2", None)
        wait_until(lambda: not host.routes(), "ours gone")
        assert "172.29.1.77" in host.sh("ip route show 10.9.2.0/24")
        host.know("h2", node(2, *BLOCKS, mode=Mode.ROUTED))
        wait_until(lambda: host.mode(2) == abi.NodeMode.STACK, "found again")
        host.sh(f"ip route del {v4}; ip -6 route del {v6}")
        wait_until(lambda: host.mode(2) == abi.NodeMode.ROUTED, "ours serve again")
        assert host.parts()["network"] == ("ok", "1 routed")
        assert host.json("ip -j route get 10.9.2.7")[0]["gateway"] == "172.29.1.2"
        host.know("h2", None)
        wait_until(lambda: not host.routes(), "gone")


def test_routes_come_back(host: Host) -> None:
    host.know("h2", node(2, *BLOCKS))
    before = wait_until(lambda: len(host.routes()) == 2 and host.routes(), "routes")
    host.sh("ip route del 10.9.2.0/24; ip -6 route del fd09:0:0:2::/64")
    wait_until(lambda: host.routes() == before, "back")
    host.sh(f"ip link set {host.host_device} down; ip link set {host.host_device} up")
    wait_until(lambda: host.routes().get(BLOCKS[0]) == before[BLOCKS[0]], "back after the device was down")


def test_a_node_that_moves_is_followed(host: Host) -> None:
    host.know("h2", node(2, "10.9.2.0/24"))
    wait_until(lambda: len(host.routes()) == 1, "route")
    host.know("h2", node(2, "10.9.2.0/24", "10.9.7.0/24", subnet=2))
    wait_until(lambda: set(host.routes()) == {"10.9.2.0/24", "10.9.7.0/24"}, "new block")
    wait_until(lambda: host.entries()[2].v4 == abi.be32(node(2, subnet=2).ipv4), "new address")
    # A block changes hands, told in either order.
    host.know("h3", node(3, "10.9.7.0/24"))
    host.know("h2", node(2, subnet=2))
    host.settle()
    wait_until(lambda: set(host.routes()) == {"10.9.7.0/24"}, "new owner")


def test_own_address_changes(host: Host) -> None:
    host.know("h1", node(1, local=True))
    host.know("h2", node(2, *BLOCKS))
    wait_until(lambda: 1 in host.entries(), "own entry")
    host.sh("ip addr add 172.29.1.111/24 dev eth0; ip addr del 172.29.1.1/24 dev eth0")
    host.sh("ip addr add 172.29.1.111/24 dev eth0; ip route replace default via 172.29.1.254", check=False)
    wait_until(lambda: str(host.underlay.ipv4) == "172.29.1.111", "noticed")
    wait_until(
        lambda: host.entries()[1].v4 == int.from_bytes(bytes((172, 29, 1, 111)), "little"),
        "own entry follows",
    )
    # Gone without another in its place: not believed at once.
    host.sh("ip addr del 172.29.1.111/24 dev eth0")
    assert host.underlay.ipv4 is not None
    wait_until(
        lambda: host.underlay.ipv4 is None and host.entries()[2].flags == abi.NodeFlag.TUNNEL_V6, "gone"
    )
    assert host.parts()["underlay"][0] == "ok"


def test_a_node_alone_needs_no_underlay(make_host: Callable[..., Host]) -> None:
    host = make_host()
    host.sh("ip route flush default; ip -6 route flush default", check=False)
    host.sh("ip route del default; ip -6 route del default", check=False)
    host.start()
    state, message = host.parts()["underlay"]
    assert state == "ok" and "no default route" in message
    assert host.devices().uplink_ifindex == 0
    host.know("h2", node(2, *BLOCKS))
    assert host.parts()["underlay"][0] == "degraded"
    assert "this node has no address" in host.parts()["network"][1]


def test_teardown_leaves_nothing_and_only_takes_ours(make_host: Callable[..., Host]) -> None:
    host = make_host(mode=Mode.AUTO)
    commands = "ip -o link; ip route; ip -6 route; tc qdisc show dev eth0"
    host.sh("ip route add 10.9.4.0/24 via 172.29.1.77")
    before = host.sh(commands)
    host.ipam("10.9.1.0/24")
    host.start()
    host.know("h2", node(2, "10.9.2.0/24", mode=Mode.AUTO))
    host.know("h3", node(3, "10.9.3.0/24", subnet=2, mode=Mode.AUTO))
    host.know("h4", node(4, "10.9.4.0/24", mode=Mode.AUTO))
    wait_until(lambda: len(host.routes()) == 3 and host.devices().overlay_ifindex, "set up")
    host.stop()
    for _ in range(2):
        host.teardown()
    assert not host.routes() and not host.ifindex(host.vxlan)
    host.teardown("services.ipam.endpoints.teardown")
    assert host.sh(commands) == before
    host.start()
