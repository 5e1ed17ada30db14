"""VXLAN devices, and routes of all kinds as they are read back."""

from __future__ import annotations

import subprocess
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from services.common import errors
from services.common.kernel import netlink as nl
from services.common.kernel import vxlan
from services.common.kernel.netlink import Netlink, Rtnl
from services.common.kernel.vxlan import Vxlan


def command(pod: Path, line: str) -> None:
    subprocess.run(["nsenter", f"--net={pod}", "sh", "-ec", line], check=True)


async def test_a_vxlan_device_is_what_was_asked_for(netlink: Netlink, pod: Path) -> None:
    def work(node: Rtnl) -> None:
        for wanted in (Vxlan(8472), Vxlan(4789, gbp=False, learning=True)):
            node.apply([vxlan.vxlan_add("v", wanted)])
            found = vxlan.read(node, "v")
            assert found is not None and found[1] == wanted
            assert (found[0].kind, found[0].mtu, found[0].up) == ("vxlan", vxlan.MTU_MAX, False)
            assert vxlan.others(node, wanted.port, "w") == ["v"] and vxlan.others(node, 1, "w") == []
            with pytest.raises(errors.AlreadyExists):
                node.apply([vxlan.vxlan_add("w", wanted)])
            node.delete_link("v")
        assert vxlan.read(node, "v") is None
        assert vxlan.read(node, "lo") == (node.link("lo"), None)

    await netlink.call_in(pod, work)


async def test_a_route_is_found_by_its_destination_alone(netlink: Netlink, pod: Path) -> None:
    command(pod, "ip link add name v0 type veth peer name v1; ip link set v0 up; ip link set v1 up;"
                 "ip addr add 10.0.0.1/24 dev v0; ip addr add fd00::1/64 dev v0 nodad")  # fmt: skip

    def work(node: Rtnl) -> None:
        index = node.ifindex("v0")
        for block, hop in (("10.9.0.0/16", "10.0.0.9"), ("10.8.0.0/16", "fd00::9"), ("fd09::/48", "fd00::9")):
            network, gateway = ip_network(block), ip_address(hop)
            assert node.route_for(network) is None
            node.apply([nl.route_put(network, index, gateway, mtu=1400, metric=70000)])
            found = node.route_for(network)
            assert found is not None
            assert (found.gateway, found.metric, found.mtu, found.proto) == (
                gateway,
                70000,
                1400,
                nl.PROTO_FIBRIL,
            )
            # A part of it is another network.
            inside = next(network.subnets(new_prefix=network.prefixlen + 8))
            assert node.route_for(inside) is None
            node.apply([nl.route_del(network, metric=70001)])
            assert node.route_for(network) is not None
            node.apply([nl.route_del(network, metric=70000)])
            assert node.route_for(network) is None

    await netlink.call_in(pod, work)


async def test_of_several_next_hops_the_first_is_read(netlink: Netlink, pod: Path) -> None:
    command(pod, "ip link add name v0 type veth peer name v1; ip link set v0 up; ip link set v1 up;"
                 "ip addr add 10.0.0.1/24 dev v0; ip route add default nexthop via 10.0.0.8 nexthop via 10.0.0.9")  # fmt: skip

    def work(node: Rtnl) -> None:
        [route] = [route for route in node.routes(proto=0) if route.destination.prefixlen == 0]
        assert (route.ifindex, str(route.gateway)) == (node.ifindex("v0"), "10.0.0.8")

    await netlink.call_in(pod, work)
