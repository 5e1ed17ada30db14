"""The VXLAN device, programs on devices, and what becomes of them."""

from __future__ import annotations

import time

import pytest

from services.common.kernel import netlink as nl
from services.common.kernel import vxlan
from services.common.network import NetworkConfig
from services.identity.network.network import DEVICES_RESYNC_S
from tests.e2e.endpoints.podkit import wait_until
from tests.e2e.network.meshkit import Fabric, Host, node

BLOCKS = ("10.9.2.0/24", "fd09:0:0:2::/64")


def attached(host: Host) -> bool:
    return (
        host.filters(host.vxlan, "ingress") == ["fib_from_overla"]
        and host.filters(host.host_device, "egress") == ["fib_from_host"]
        and host.filters("eth0", "ingress") == ["fib_from_uplink"]
    )


def test_the_overlay_is_there_while_a_node_needs_it(host: Host) -> None:
    host.settle()
    assert host.ifindex(host.vxlan) == 0
    assert host.devices().uplink_ifindex == host.ifindex("eth0")
    host.know("h2", node(2, *BLOCKS))
    wait_until(lambda: host.devices().overlay_ifindex, "overlay device")
    [link] = host.json(f"ip -d -j link show {host.vxlan}")
    data = link["linkinfo"]["info_data"]
    assert (data["port"], data["learning"], data.get("external"), data.get("gbp")) == (
        8472,
        False,
        True,
        True,
    )
    assert "UP" in link["flags"]
    assert host.json(f"ip -j addr show dev {host.vxlan}")[0]["addr_info"] == []
    assert host.devices().overlay_ifindex == link["ifindex"]
    assert host.devices().host_ifindex == host.ifindex(host.host_device)
    assert attached(host)
    host.know("h2", None)
    wait_until(lambda: host.ifindex(host.vxlan) == 0, "overlay device removed")
    wait_until(lambda: host.devices().overlay_ifindex == 0, "overlay forgotten")


def lose_overlay(host: Host) -> None:
    host.sh(f"ip link del {host.vxlan}")


def wrong_overlay(host: Host) -> None:
    wrong = vxlan.Vxlan(8472, gbp=False)
    host.run(host.netlink.apply([nl.link_del(host.ifindex(host.vxlan)), vxlan.vxlan_add(host.vxlan, wrong)]))


def overlay_down(host: Host) -> None:
    host.sh(f"ip link set {host.vxlan} down")


def lose_filters(host: Host) -> None:
    for device in (host.vxlan, host.host_device, "eth0"):
        host.sh(f"tc qdisc del dev {device} clsact")


def lose_one_filter(host: Host) -> None:
    host.sh("tc filter del dev eth0 ingress")


def lose_host_device(host: Host) -> None:
    host.sh(f"ip link del {host.host_device}")
    wait_until(lambda: host.devices().host_ifindex == 0, "loss noticed")
    host.ipam("10.9.1.0/24", "fd09:0:0:1::/64")


def test_damage_heals_at_once(host: Host) -> None:
    host.know("h2", node(2, *BLOCKS))
    wait_until(lambda: host.devices().overlay_ifindex and attached(host), "set up")
    routes = wait_until(lambda: len(host.routes()) == 2 and host.routes(), "routes")

    def healed() -> bool:
        [link] = host.json(f"ip -d -j link show {host.vxlan} 2>/dev/null || echo '[{{}}]'")
        now = host.ifindex(host.host_device)
        return (
            bool(link)
            and "UP" in link["flags"]
            and link["linkinfo"]["info_data"].get("gbp") is True
            and host.devices().overlay_ifindex == link["ifindex"]
            and host.devices().host_ifindex == now
            and bytes(host.devices().host_mac).hex(":") == host.mac(host.host_device)
            and attached(host)
            and host.routes() == routes
        )

    for damage in (
        lose_overlay,
        wrong_overlay,
        overlay_down,
        lose_filters,
        lose_one_filter,
        lose_host_device,
    ):
        damage(host)
        wait_until(healed, damage.__name__, DEVICES_RESYNC_S - 1)


def test_a_restart_touches_nothing(host: Host) -> None:
    host.know("h1", node(1, "10.9.1.0/24", "fd09:0:0:1::/64", local=True))
    host.know("h2", node(2, *BLOCKS))
    wait_until(lambda: host.devices().overlay_ifindex and len(host.routes()) == 2, "set up")
    before = (host.ifindex(host.vxlan), host.routes(), host.sh("tc filter show dev eth0 ingress"))
    entries = {index: bytes(entry) for index, entry in host.entries().items()}
    host.stop()
    host.start(synced=False)
    host.settle()

    def now() -> object:
        return (host.ifindex(host.vxlan), host.routes(), host.sh("tc filter show dev eth0 ingress"))

    assert now() == before
    assert {index: bytes(entry) for index, entry in host.entries().items()} == entries
    host.know("h1", node(1, "10.9.1.0/24", "fd09:0:0:1::/64", local=True))
    host.know("h2", node(2, *BLOCKS))
    host.on_loop(host.directory.synced.set)
    host.settle()
    assert now() == before
    # Only now is it known that the node is gone.
    host.know("h2", None)
    wait_until(lambda: not host.routes() and set(host.entries()) == {1}, "gone")


def test_a_restart_that_knows_all_nodes_early_keeps_the_overlay(host: Host) -> None:
    nodes = {"h1": node(1, "10.9.1.0/24", "fd09:0:0:1::/64", local=True), "h2": node(2, *BLOCKS)}
    for name, known in nodes.items():
        host.know(name, known)
    wait_until(lambda: host.devices().overlay_ifindex and len(host.routes()) == 2, "set up")
    before = host.ifindex(host.vxlan)
    host.stop()
    host.start(knowing=nodes)
    host.settle()
    assert host.ifindex(host.vxlan) == before


def failures(host: Host) -> int:
    return host.on_loop(lambda: host.network._devices_loop.status()["devices"].failures)


@pytest.mark.parametrize("taker", ["vxlan", "external", "socket"])
def test_a_taken_port_is_named(host: Host, taker: str) -> None:
    if taker == "socket":
        host.sh("timeout 20 python3 -c 'import socket, time; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
                's.bind(("", 8472)); time.sleep(20)\' >/dev/null 2>&1 &')  # fmt: skip
        wait_until(lambda: ":8472" in host.sh("ss -uln"), "port taken")
    elif taker == "vxlan":
        host.sh("ip link add flannel type vxlan id 1 dstport 8472; ip link set flannel up")
    else:
        host.sh("ip link add other type vxlan external gbp dstport 8472; ip link set other up")
    host.know("h2", node(2, *BLOCKS))
    name = {"socket": "another program", "vxlan": "flannel", "external": "other"}[taker]
    wait_until(lambda: name in host.parts()["reconcile.devices"][1], "named")
    state, message = host.parts()["reconcile.devices"]
    assert state == "degraded" and "network.overlay_port" in message
    assert host.devices().overlay_ifindex == 0
    [link] = host.json(f"ip -j link show {host.vxlan} 2>/dev/null || echo '[{{}}]'")
    assert "UP" not in link.get("flags", ())
    # It is tried again, but not all the time.
    tried = failures(host)
    time.sleep(1)
    assert failures(host) <= tried + 8
    # The rest works.
    assert host.filters("eth0", "ingress") == ["fib_from_uplink"]


def test_other_filters_on_the_uplink_stay(host: Host) -> None:
    pin = host.instance.pin_dir / "prog" / "identity" / "fib_from_host"
    other = f"tc filter add dev eth0 ingress prio 7 bpf da object-pinned {pin}"
    wait_until(lambda: host.filters("eth0", "ingress") == ["fib_from_uplink"[:15]], "attached")
    host.sh(f"tc qdisc del dev eth0 clsact; tc qdisc add dev eth0 clsact || true; {other}")
    wait_until(
        lambda: sorted(host.filters("eth0", "ingress")) == ["fib_from_host", "fib_from_uplink"],
        "attached again",
    )


def test_two_nodes_share_an_uplink(host: Host) -> None:
    other = Host(NetworkConfig(overlay_port=4790), within=host)
    try:
        other.ipam("10.9.8.0/24")
        other.start()
        for each in (host, other):
            each.know("h2", node(2, *BLOCKS, port=each.cfg.overlay_port))
        wait_until(lambda: host.filters("eth0", "ingress") == ["fib_from_uplink"] * 2, "both attached")
        wait_until(
            lambda: host.routes() and other.routes() and other.devices().overlay_ifindex, "both set up"
        )
        other.stop()
        other.teardown()
        assert host.filters("eth0", "ingress") == ["fib_from_uplink"]
        assert len(host.routes()) == 2 and not other.routes() and host.ifindex(host.vxlan)
        other.start()
    finally:
        other.teardown()
        other.close()


def test_the_uplink_moves(host: Host, fabric: Fabric) -> None:
    host.know("h2", node(2, *BLOCKS))
    wait_until(lambda: host.filters("eth0", "ingress"), "attached")
    fabric.connect(host, 77, 2, "eth7")
    host.sh(
        "ip route replace default via 172.29.2.254 dev eth7; ip route replace default via fd29:2::ff dev eth7"
    )
    wait_until(lambda: host.filters("eth7", "ingress") == ["fib_from_uplink"], "attached to the new one")
    wait_until(lambda: "clsact" not in host.sh("tc qdisc show dev eth0"), "taken off the old one")
    wait_until(lambda: host.devices().uplink_ifindex == host.ifindex("eth7"), "device map")
    assert str(host.underlay.ipv4) == "172.29.2.77"
