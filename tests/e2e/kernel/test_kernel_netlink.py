"""Namespaces, idempotent requests and events."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address, ip_network
from pathlib import Path

import pytest

from services.common import errors
from services.common.kernel import events, netns
from services.common.kernel import netlink as nl
from services.common.kernel.netlink import Netlink, Rtnl
from services.common.kernel.netns import NetNs


async def test_a_namespace_can_be_made_once_and_removed_once(netlink: Netlink, prefix: str) -> None:
    path = Path("/run/netns") / f"{prefix}-x"
    await netlink.run(netns.add, path)
    try:
        with pytest.raises(errors.AlreadyExists):
            await netlink.run(netns.add, path)
        links = await netlink.call_in(path, Rtnl.links)
        assert [link.name for link in links] == ["lo"]
    finally:
        assert await netlink.run(netns.remove, path) is True
    assert await netlink.run(netns.remove, path) is False
    with pytest.raises(errors.NotFound):
        NetNs.open(path)


async def test_the_netlink_thread_comes_home_even_after_an_error(netlink: Netlink, pod: Path) -> None:
    def fail() -> None:
        with NetNs.open(pod) as ns, ns.entered():
            raise ValueError

    with NetNs.current() as home:
        with pytest.raises(ValueError):
            await netlink.run(fail)

        def here() -> bool:
            with NetNs.current() as now:
                return now.same_as(home)

        assert await netlink.run(here)


async def test_requests_can_be_repeated(netlink: Netlink, pod: Path, prefix: str) -> None:
    def work(node: Rtnl) -> None:
        index = node.create_veth(f"{prefix}0", "02:00:00:00:00:01", f"{prefix}1", "02:00:00:00:00:02", 1500)
        gateway, block = IPv4Address("192.0.2.1"), ip_network("192.0.2.0/24")
        for _ in range(2):
            node.apply([nl.link_up(index), nl.address_add(index, gateway),
                        nl.route_put(block, route_type=nl.UNREACHABLE)])  # fmt: skip
        assert [a.address for a in node.addresses(index)] == [gateway]
        assert [(r.destination, r.type) for r in node.routes()] == [(block, nl.UNREACHABLE)]
        for _ in range(2):
            node.apply([nl.address_del(index, gateway), nl.route_del(block)])
        assert node.addresses(index) == []
        assert node.routes() == []
        assert node.delete_link(f"{prefix}0") is True
        assert node.delete_link(f"{prefix}0") is False

    await netlink.call_in(pod, work)


async def test_all_failures_of_a_batch_are_reported_and_the_rest_is_done(netlink: Netlink, pod: Path) -> None:
    def work(node: Rtnl) -> list[errors.FibrilError]:
        return node.try_apply([nl.link_up(77), nl.link_up(1), nl.link_up(78)])

    failures = await netlink.call_in(pod, work)
    assert [type(failure) for failure in failures] == [errors.NotFound, errors.NotFound]
    assert "interface 77" in str(failures[0])
    [lo] = await netlink.call_in(pod, Rtnl.links)
    assert lo.up


async def test_links_and_qdiscs_announce_themselves(netlink: Netlink, prefix: str) -> None:
    with events.Events() as stream:
        name = f"{prefix}0"

        async def collect() -> list[events.Event]:
            found = []
            async for event in stream:
                if event.link is not None and event.link.name == name:
                    found.append(event)
                    if event.kind == "link-gone":
                        return found
            return found

        collecting = asyncio.create_task(collect())
        index = await netlink.call(
            Rtnl.create_veth, name, "02:00:00:00:00:01", f"{prefix}1", "02:00:00:00:00:02", 1500
        )
        await netlink.apply([nl.link_up(index)])
        await netlink.call(Rtnl.delete_link, name)
        found = await asyncio.wait_for(collecting, 10)
        assert {event.link.ifindex for event in found if event.link} == {index}
        assert any(event.link.up for event in found if event.link)


async def test_the_thread_ends_with_the_adapter() -> None:
    async with Netlink() as adapter:
        await adapter.call(Rtnl.links)
    with pytest.raises(RuntimeError):
        await adapter.call(Rtnl.links)
