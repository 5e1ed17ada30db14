"""Nodes that probe each other over a real cable."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fibril.node.v1 import node_pb2 as pb
from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from services.identity.nodes.directory import root_of
from services.identity.nodes.health import MISSES
from tests.e2e.nodes.twospaces import INTERVAL_S, Probing, Space, connect, pod_routes
from tests.interop.nodes.noderig import CLUSTER, until

HEALTH = f"{root_of(CLUSTER)}health/"
WELL, NO_PODS, GONE = (True, True), (True, False), (False, False)


@pytest.fixture
async def two(etcd: EmbeddedEtcd, tmp_path: Path) -> AsyncIterator[tuple[list[Space], list[Probing]]]:
    """Their namespaces, and both nodes."""
    async with contextlib.AsyncExitStack() as stack:
        spaces = []
        for _ in range(2):
            spaces.append(Space())
            stack.callback(spaces[-1].close)
        connect(*spaces)
        nodes = []
        for number, space in enumerate(spaces, 1):
            nodes.append(await Probing(etcd.endpoint, space, number, tmp_path).start())
            stack.push_async_callback(nodes[-1].stop)
        await until(lambda: nodes[0].sees("n2") == WELL and nodes[1].sees("n1") == WELL)
        yield spaces, nodes


async def stored(client: EtcdClient, node: str, prober: str) -> tuple[bool, bool] | None:
    kv = await client.get(f"{HEALTH}{node}/{prober}")
    if kv is None:
        return None
    view = pb.StoredReachability.FromString(kv.value)
    return view.underlay, view.pod_network


async def is_stored(client: EtcdClient, node: str, prober: str, wanted: tuple[bool, bool] | None) -> None:
    async with asyncio.timeout(8):
        while await stored(client, node, prober) != wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_cut_cable_is_noticed_and_so_is_a_mended_one(
    two: tuple[list[Space], list[Probing]], client: EtcdClient
) -> None:
    (space, _), (a, b) = two
    view = a.health.of("n2")["n1"]
    assert 0 < view.rtt_us < 1e6 * INTERVAL_S and not a.health.problem
    await is_stored(client, "n2", "n1", WELL)
    # The other is told of what one finds out.
    await until(lambda: b.health.of("n2").keys() == {"n1"})
    space.sh("ip link set eth0 down")
    cut = asyncio.get_running_loop().time()
    await until(lambda: a.sees("n2") == GONE and b.sees("n1") == GONE)
    assert asyncio.get_running_loop().time() - cut > INTERVAL_S * (MISSES - 2)
    assert "no answer from n2" in a.health.problem
    assert a.health.of("n2")["n1"].rtt_us == 0
    await is_stored(client, "n2", "n1", GONE)
    await is_stored(client, "n1", "n2", GONE)
    # Setting the link down has flushed what was routed over it.
    space.sh("ip link set eth0 up; ip addr replace fd30::1/64 dev eth0 nodad")
    pod_routes(space, 2, "replace")
    await until(lambda: a.sees("n2") == WELL and b.sees("n1") == WELL)
    await is_stored(client, "n2", "n1", WELL)
    assert not a.health.problem


async def test_pods_way_is_asked_of_its_own(two: tuple[list[Space], list[Probing]]) -> None:
    (space, _), (a, b) = two
    pod_routes(space, 2, "del")
    await until(lambda: a.sees("n2") == NO_PODS)
    assert b.sees("n1") == WELL
    pod_routes(space, 2)
    await until(lambda: a.sees("n2") == WELL)


async def test_one_family_that_fails_is_enough(two: tuple[list[Space], list[Probing]]) -> None:
    (space, _), (a, _) = two
    space.sh("ip route replace blackhole fd30::2/128; ip route flush cache")
    await until(lambda: a.sees("n2") is not None and not a.sees("n2")[0])  # type: ignore[index]


async def test_another_address_is_asked_at_once(two: tuple[list[Space], list[Probing]]) -> None:
    (space, other), (a, b) = two
    space.sh("ip addr del 172.30.0.1/24 dev eth0; ip addr add 172.30.0.9/24 dev eth0")
    pod_routes(space, 2, "replace")
    other.sh("ip route replace 10.30.1.0/24 via 172.30.0.9")
    a.underlay.move("172.30.0.9")
    await until(lambda: str(b.directory.nodes()["n1"].ipv4) == "172.30.0.9")
    for _ in range(2 * MISSES):
        await asyncio.sleep(INTERVAL_S)
        assert a.sees("n2") == b.sees("n1") == WELL


async def test_what_an_earlier_process_told_does_not_stay(
    two: tuple[list[Space], list[Probing]], client: EtcdClient
) -> None:
    a = two[1][0]
    old = pb.StoredReachability(underlay=False).SerializeToString()
    await client.put(f"{HEALTH}long-gone/n1", old, lease=a.lease.lease)
    await is_stored(client, "long-gone", "n1", None)
    assert await stored(client, "n2", "n1") == WELL


async def test_a_new_lease_has_all_that_is_known(
    two: tuple[list[Space], list[Probing]], client: EtcdClient
) -> None:
    a = two[1][0]
    await is_stored(client, "n2", "n1", WELL)
    before = a.lease.lease
    await client.revoke(before)
    a.lease.suspect()
    await until(lambda: a.lease.lease not in (0, before))
    await is_stored(client, "n2", "n1", WELL)
    kv = await client.get(f"{HEALTH}n2/n1")
    assert kv is not None and kv.lease == a.lease.lease


async def test_a_node_that_is_deleted_is_probed_no_longer(
    two: tuple[list[Space], list[Probing]], client: EtcdClient
) -> None:
    a, b = two[1]
    await b.registry.stop()
    await client.delete(f"{root_of(CLUSTER)}nodes/n2")
    await until(lambda: a.sees("n2") is None)
    await is_stored(client, "n2", "n1", None)
