"""Wiring a pod, with traffic as the proof.

node: <prefix>g (gateways 198.18.x.1, fd00:...::1)
      <prefix>0 ---------------------------------- eth0 in the pod's namespace (.5, ::5)
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from services.common import errors
from services.common.kernel import netlink as nl
from services.common.kernel import netns, podlink, sysctl
from services.common.kernel.netlink import Netlink, Rtnl
from services.common.kernel.netns import NetNs
from services.common.kernel.podlink import PodLink, WiredLink


@pytest.fixture
async def link(netlink: Netlink, prefix: str, pod: Path) -> AsyncIterator[PodLink]:
    """A pod not wired yet; its gateways are addresses of the node."""
    net4 = f"198.18.{secrets.randbelow(256)}"
    net6 = f"fd00:{secrets.token_hex(2)}:{secrets.token_hex(2)}"
    spec = PodLink(
        host_ifname=f"{prefix}0", host_mac="02:00:00:00:00:01", pod_mac="02:00:00:00:00:02", mtu=1400,
        netns=str(pod), v4=IPv4Address(f"{net4}.5"), v6=IPv6Address(f"{net6}::5"),
        gateway4=IPv4Address(f"{net4}.1"), gateway6=IPv6Address(f"{net6}::1"),
    )  # fmt: skip
    index = await netlink.call(
        Rtnl.create_veth, f"{prefix}g", "02:00:00:00:01:01", f"{prefix}h", "02:00:00:00:01:02", 1500
    )
    assert spec.gateway4 is not None
    assert spec.gateway6 is not None
    await netlink.apply(
        [nl.address_add(index, spec.gateway4), nl.address_add(index, spec.gateway6), nl.link_up(index)]
    )
    yield spec


def echo(listen: NetNs, send: NetNs, address: IPv4Address | IPv6Address, payload: bytes) -> bytes:
    """What a UDP server in one namespace gets from a client in the other. Netlink thread only.

    A queue of the CPU's that a flood elsewhere has filled may lose one datagram, not many in a row.
    """
    family = nl.family_of(address)
    with listen.socket(family, socket.SOCK_DGRAM) as server, send.socket(family, socket.SOCK_DGRAM) as client:
        server.settimeout(0.5)
        server.bind((str(address), 0))
        for _ in range(6):
            client.sendto(payload, (str(address), server.getsockname()[1]))
            with contextlib.suppress(TimeoutError):
                return server.recv(2000)
    raise TimeoutError(f"nothing came to {address}")


def traffic(node: Rtnl, link: PodLink) -> None:
    with NetNs.open(link.netns) as pod, NetNs.current() as home:
        for address, gateway in link.families():
            assert echo(pod, home, address, b"to the pod") == b"to the pod"
            assert echo(home, pod, gateway, b"to the node") == b"to the node"


async def test_both_families_flow_both_ways_and_nothing_is_asked_for(netlink: Netlink, link: PodLink) -> None:
    wired = await netlink.call(podlink.wire, link)
    await netlink.call(traffic, link)
    assert await netlink.call(podlink.problems, link) == []
    host = await netlink.call(Rtnl.neighbours, wired.host_ifindex)
    assert {entry.address for entry in host if entry.permanent} == {link.v4, link.v6}
    inside = await netlink.call_in(link.netns, Rtnl.neighbours, wired.pod_ifindex)
    assert {entry.address for entry in inside if entry.permanent} == {link.gateway4, link.gateway6}
    asked = [e for e in [*host, *inside] if not e.permanent and not e.address.is_multicast]
    assert asked == []


async def test_only_the_pods_own_addresses_are_on_its_interface(netlink: Netlink, link: PodLink) -> None:
    wired = await netlink.call(podlink.wire, link)
    found = await netlink.call_in(link.netns, Rtnl.addresses, wired.pod_ifindex)
    assert {(a.address, a.prefix) for a in found} == {(link.v4, 32), (link.v6, 128)}
    assert await netlink.call(Rtnl.addresses, wired.host_ifindex) == []


async def test_attach_runs_before_the_first_packet_can_pass(netlink: Netlink, link: PodLink) -> None:
    seen: list[tuple[WiredLink, bool]] = []

    def wire(node: Rtnl) -> WiredLink:
        def hook(wired: WiredLink) -> None:
            host = node.link(link.host_ifname)
            assert host is not None
            seen.append((wired, host.up))

        return podlink.wire(node, link, hook)

    wired = await netlink.call(wire)
    assert seen == [(wired, False)]
    with NetNs.open(link.netns) as ns:
        assert wired.netns_inode == ns.inode
        assert wired.netns_cookie == await netlink.run(ns.cookie)


async def test_one_family_only(netlink: Netlink, link: PodLink) -> None:
    single = replace(link, v6=None, gateway6=None)
    wired = await netlink.call(podlink.wire, single)
    await netlink.call(traffic, single)
    inside = await netlink.call_in(link.netns, Rtnl.addresses, wired.pod_ifindex)
    assert [entry.address for entry in inside] == [link.v4]


async def test_ipv6_is_switched_on_where_a_runtime_switched_it_off(netlink: Netlink, link: PodLink) -> None:
    def off() -> None:
        with NetNs.open(link.netns) as pod, pod.entered():
            for scope in ("all", "default"):
                sysctl.ensure(f"net.ipv6.conf.{scope}.disable_ipv6", 1)

    await netlink.run(off)
    await netlink.call(podlink.wire, link)
    await netlink.call(traffic, link)


async def test_configuring_twice_repairs_what_is_missing(netlink: Netlink, link: PodLink) -> None:
    wired = await netlink.call(podlink.wire, link)
    assert link.v4 is not None
    await netlink.apply(
        [nl.route_del(podlink.host_network(link.v4)), nl.neighbour_del(wired.host_ifindex, link.v4)]
    )

    def spoil(pod: Rtnl) -> None:
        pod.apply([nl.route_del(podlink.host_network(link.gateway4), wired.pod_ifindex)])  # type: ignore[arg-type]

    await netlink.call_in(link.netns, spoil)
    found = await netlink.call(podlink.problems, link)
    assert any(f"route to {link.v4}/32" in problem for problem in found)
    assert any(f"neighbour {link.v4}" in problem for problem in found)
    # With its link-scope route the gateway's default route goes too, or stays: only the first is certain.
    assert any(f"route to {link.gateway4}/32" in problem for problem in found)

    def repair(node: Rtnl) -> None:
        podlink.host_side(node, link, wired.host_ifindex)
        with NetNs.open(link.netns) as ns, Rtnl(ns) as pod:
            podlink.pod_side(pod, ns, link, wired.pod_ifindex)

    await netlink.call(repair)
    assert await netlink.call(podlink.problems, link) == []
    await netlink.call(traffic, link)


async def left_over(netlink: Netlink, link: PodLink) -> list[str]:
    node = await netlink.call(Rtnl.links, link.host_ifname)
    inside = await netlink.call_in(link.netns, Rtnl.links, link.pod_ifname)
    routes = [r for r in await netlink.call(Rtnl.routes) if r.source in (link.gateway4, link.gateway6)]
    return [*map(str, node), *map(str, inside), *map(str, routes)]


async def test_a_gateway_the_node_does_not_have_leaves_nothing(netlink: Netlink, link: PodLink) -> None:
    with pytest.raises(errors.FailedPrecondition, match=r"192\.0\.2\.1"):
        await netlink.call(podlink.wire, replace(link, gateway4=IPv4Address("192.0.2.1")))
    assert await left_over(netlink, link) == []


async def test_a_failing_attach_leaves_nothing(netlink: Netlink, link: PodLink) -> None:
    def fail(_: WiredLink) -> None:
        raise errors.ResourceExhausted("map full")

    with pytest.raises(errors.ResourceExhausted):
        await netlink.call(podlink.wire, link, fail)
    assert await left_over(netlink, link) == []


async def test_names_in_use_say_on_which_side(netlink: Netlink, link: PodLink) -> None:
    await netlink.call(podlink.wire, link)
    with pytest.raises(errors.AlreadyExists, match=f"{link.host_ifname} exists already on the node"):
        await netlink.call(podlink.wire, link)
    with pytest.raises(errors.AlreadyExists, match="eth0 exists already in"):
        await netlink.call(podlink.wire, replace(link, host_ifname=link.host_ifname[:-1] + "1"))
    # Neither attempt may have touched the pod that was there.
    await netlink.call(traffic, link)


async def test_a_vanished_namespace_is_not_found_and_a_file_is_no_namespace(
    netlink: Netlink, link: PodLink, tmp_path: Path
) -> None:
    with pytest.raises(errors.NotFound, match="does not exist"):
        await netlink.call(podlink.wire, replace(link, netns="/run/netns/never-there"))
    (tmp_path / "file").write_text("")
    for other in (str(tmp_path / "file"), "/proc/self/ns/mnt", str(tmp_path)):
        with pytest.raises(errors.InvalidArgument, match="not a network namespace"):
            await netlink.call(podlink.wire, replace(link, netns=other))


async def test_a_namespace_deleted_under_a_wired_pod_takes_the_link_along(
    netlink: Netlink, link: PodLink, pod: Path
) -> None:
    await netlink.call(podlink.wire, link)
    await netlink.run(netns.remove, pod)
    [problem] = [p for p in await netlink.call(podlink.problems, link) if "missing" in p or "exist" in p][-1:]
    assert link.netns in problem or link.host_ifname in problem
    # The kernel may or may not have got to it yet; deleting is fine both ways.
    await netlink.call(Rtnl.delete_link, link.host_ifname)
    assert await netlink.call(Rtnl.link, link.host_ifname) is None
