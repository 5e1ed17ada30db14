"""Nodes that join, die, move, share a name, and are forgotten, on a real etcd."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from fibril.ipam.v1 import ipam_pb2
from fibril.ipcache.v1 import ipcache_pb2
from fibril.node.v1 import node_pb2 as pb
from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from services.identity.db import open_db
from services.identity.nodes import directory, index, removal
from services.identity.nodes.directory import Directory, root_of
from services.identity.nodes.index import NodeIndex
from services.identity.nodes.model import NodeState
from tests.interop.etcd.etcdrig import WAIT_S, compact, kill
from tests.interop.nodes.noderig import CLUSTER, Member, until

ROOT = root_of(CLUSTER)
Join = Callable[..., Awaitable[Member]]


@pytest.fixture
async def join(etcd: EmbeddedEtcd, tmp_path: Path) -> AsyncIterator[Join]:
    """Make and start members; those not stopped by the test are stopped at its end."""
    members: list[Member] = []

    async def make(name: str, address: str, ttl_s: int = 20, place: str = "") -> Member:
        members.append(await Member(etcd.endpoint, name, tmp_path, address, ttl_s, place).start())
        return members[-1]

    yield make
    for member in members:
        await member.stop()


async def written(client: EtcdClient, key: str) -> None:
    """Wait until etcd has it."""
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.suppress(errors.Unavailable):
                if await client.get(ROOT + key) is not None:
                    return
            await asyncio.sleep(0.02)


async def test_nodes_see_each_other_come_and_move(join: Join) -> None:
    a = await join("a", "192.168.0.1")
    b = await join("b", "192.168.0.2")
    for member in (a, b):
        await until(
            lambda m=member: (
                {n for n, v in m.directory.nodes().items() if v.state is NodeState.ALIVE} == {"a", "b"}
            )
        )
    assert a.directory.local is not None and a.directory.local.local
    await until(lambda: not a.registry.problem)
    before = a.directory.nodes()["b"].index
    changed: list[str] = []
    a.directory.on_change(changed.append)
    b.underlay.move("192.168.0.9")
    await until(lambda: str(a.directory.nodes()["b"].ipv4) == "192.168.0.9")
    assert a.directory.nodes()["b"].index == before
    assert set(changed) == {"b"}


async def test_a_node_that_dies_is_lost_and_keeps_its_record(join: Join) -> None:
    a = await join("a", "192.168.0.1")
    b = await join("b", "192.168.0.2", ttl_s=2)
    await until(lambda: "b" in a.directory.nodes() and a.directory.nodes()["b"].state is NodeState.ALIVE)
    await b.stop()
    await until(lambda: a.directory.nodes()["b"].state is NodeState.LOST)
    assert str(a.directory.nodes()["b"].ipv4) == "192.168.0.2"


async def test_one_name_is_one_machines(join: Join, client: EtcdClient) -> None:
    first = await join("a", "192.168.0.1")
    await until(lambda: first.directory.local and not first.registry.problem)
    lease = first.lease.lease
    other = await join("a", "192.168.0.7", place="another machine")
    await until(lambda: "is registered as 'a'" in other.registry.problem)
    assert not first.registry.problem
    # Nor is anything else done in the other's name.
    told: list[int] = []

    async def tell(lease: int) -> None:
        told.append(lease)

    other.lease.on_grant(tell)
    await asyncio.sleep(0.3)
    assert not told and not other.lease.lease and not other.lease.valid
    held = await client.get(ROOT + "nodes/a")
    assert held is not None and pb.StoredNode.FromString(held.value).ipv4 == "192.168.0.1"
    # Once the first is gone, the other takes its place by itself.
    await first.stop()
    await client.revoke(lease)
    await until(
        lambda: not other.registry.problem and str(other.directory.nodes()["a"].ipv4) == "192.168.0.7"
    )
    await until(lambda: told == [other.lease.lease] and other.lease.valid)


async def test_a_copy_of_a_machine_is_told_from_it(join: Join, client: EtcdClient) -> None:
    first = await join("a", "192.168.0.1")
    await until(lambda: not first.registry.problem)
    lease = first.lease.lease
    copied = open_db(first.home.parent / "copy" / "identity.db")
    with copied:
        copied.execute("INSERT INTO lease (id, owner) VALUES (?, 'a')", (lease,))
    copied.close()
    copy = await join("a", "192.168.0.7", place="copy")
    # It cannot be told from the first after a boot, so it is the one; and the first is told, though it has the lease.
    await until(lambda: not copy.registry.problem and "is registered as 'a'" in first.registry.problem)
    await until(lambda: not first.lease.lease)
    assert copy.lease.lease == lease
    for _ in range(10):
        await asyncio.sleep(0.1)
        held = await client.get(ROOT + "nodes/a")
        assert held is not None and pb.StoredNode.FromString(held.value).ipv4 == "192.168.0.7"


async def test_what_is_no_sign_of_life_is_somebody_elses(join: Join, client: EtcdClient) -> None:
    lease = await client.grant(20)
    await client.put(ROOT + "alive/a", b"\xff\xff", lease=lease)
    a = await join("a", "192.168.0.1")
    await until(lambda: "is registered as 'a'" in a.registry.problem)
    await client.revoke(lease)
    await until(lambda: not a.registry.problem)
    assert all(not task.done() for task in (*a.registry.tasks(), *a.directory.tasks()))


async def test_a_sign_of_life_that_is_gone_is_given_again(join: Join, client: EtcdClient) -> None:
    a = await join("a", "192.168.0.1")
    await until(lambda: not a.registry.problem and a.directory.local)
    assert await client.delete(ROOT + "alive/a")
    await written(client, "alive/a")
    await client.put(ROOT + "nodes/a", b"\xff\xff")
    await until(lambda: a.directory.local is not None and not a.directory.problem)


async def test_the_same_machine_goes_on_at_once(join: Join) -> None:
    first = await join("a", "192.168.0.1")
    await until(lambda: first.directory.local and first.directory.local.state is NodeState.ALIVE)
    await first.stop()
    again = await join("a", "192.168.0.1")
    await until(lambda: not again.registry.problem and again.directory.local)
    await until(lambda: again.directory.local.state is NodeState.ALIVE)  # type: ignore[union-attr]


async def test_an_address_of_two_nodes_is_reported(join: Join) -> None:
    a = await join("a", "192.168.0.1")
    await join("b", "192.168.0.1")
    await until(lambda: "b is registered with this node's address 192.168.0.1" in a.registry.problem)


async def test_a_record_that_is_gone_is_written_again(join: Join, client: EtcdClient) -> None:
    a = await join("a", "192.168.0.1")
    await until(lambda: a.directory.local)
    assert a.directory.local is not None
    before = a.directory.local.revision
    assert await client.delete(ROOT + "nodes/a")
    # It may be back before anybody has looked.
    await until(lambda: a.directory.local is not None and a.directory.local.revision > before)


async def test_malformed_keys_do_not_hide_the_others(join: Join, client: EtcdClient) -> None:
    for key in ("nodes/x", "alive/x", "blocks/default/10.0.0.0_24"):
        await client.put(ROOT + key, b"\xff\xff")
    a = await join("a", "192.168.0.1")
    await until(lambda: a.directory.local)
    assert set(a.directory.nodes()) == {"a"}
    assert "alive/x (and 2 more) is not usable" in a.directory.problem
    for key in ("nodes/x", "alive/x", "blocks/default/10.0.0.0_24"):
        await client.delete(ROOT + key)
    await until(lambda: not a.directory.problem)


async def test_no_number_for_a_node_is_told_and_tried_again(
    join: Join, client: EtcdClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "RETRY_S", 0.1)
    monkeypatch.setattr(index, "ND_MAX", 3)
    monkeypatch.setattr(index, "REST_S", 0.5)
    for name in ("b", "c"):
        await client.put(ROOT + f"nodes/{name}", pb.StoredNode(name=name).SerializeToString())
    a = await join("a", "192.168.0.1")
    await until(lambda: "cannot be taken in: 2 nodes are known" in a.directory.problem)
    assert len(a.directory.nodes()) == 2
    # Nobody is told of one that is not known.
    (unknown,) = {"a", "b", "c"} - a.directory.nodes().keys()
    gone = next(iter({"b", "c"} - {unknown}))
    assert await removal.remove(client, CLUSTER, gone) == []
    await until(lambda: unknown in a.directory.nodes() and not a.directory.problem)


async def test_nodes_are_known_again_after_all_was_lost(
    join: Join, etcd: EmbeddedEtcd, client: EtcdClient, place: Path
) -> None:
    a = await join("a", "192.168.0.1", ttl_s=3)
    b = await join("b", "192.168.0.2", ttl_s=3)
    await until(lambda: {"a", "b"} == a.directory.nodes().keys() == b.directory.nodes().keys())
    await kill(etcd)
    shutil.rmtree(place / "data")
    await etcd.start()
    for key in ("nodes/a", "nodes/b", "alive/a", "alive/b"):
        await written(client, key)
    for member in (a, b):
        await until(
            lambda m=member: not m.registry.problem
            and {n for n, v in m.directory.nodes().items() if v.state is NodeState.ALIVE} == {"a", "b"}
        )  # fmt: skip


async def test_a_node_that_was_down_forgets_what_went_meanwhile(
    join: Join, etcd: EmbeddedEtcd, client: EtcdClient
) -> None:
    a = await join("a", "192.168.0.1")
    await client.put(ROOT + "nodes/x", pb.StoredNode(name="x").SerializeToString())
    await until(lambda: {"a", "x"} == a.directory.nodes().keys())
    await a.directory.stop()
    await client.delete(ROOT + "nodes/x")
    for name in ("y", "z"):
        await client.put(ROOT + f"nodes/{name}", pb.StoredNode(name=name).SerializeToString())
    await compact(etcd, (await client.get_prefix(ROOT)).revision)
    again = Directory(a.etcd, CLUSTER, "a", NodeIndex(a.db))
    await again.start()
    await until(lambda: {"a", "y", "z"} == again.nodes().keys())
    await until(lambda: "x" not in NodeIndex(a.db).names())
    await again.stop()


async def test_a_dead_node_is_forgotten_with_all_it_had(join: Join, client: EtcdClient) -> None:
    a = await join("a", "192.168.0.1")
    await client.put(ROOT + "nodes/dead", pb.StoredNode(name="dead", ipv4="192.168.0.3").SerializeToString())
    for node, cidr in (("dead", "10.1.0.0/24"), ("dead", "10.1.1.0/24"), ("a", "10.1.2.0/24")):
        key = f"{ROOT}blocks/default/{cidr.replace('/', '_')}"
        await client.put(
            key,
            ipam_pb2.Block(cidr=cidr, pool="default", node=node, gateway=cidr[:-4] + "1").SerializeToString(),
        )
    for node, address in [("dead", f"10.1.0.{n}") for n in range(2, 250)] + [("a", "10.1.2.2")]:
        stored = ipcache_pb2.StoredAddress(address=address, identity=1 << 20 | 7, node=node)
        await client.put(f"{ROOT}ip/{address}", stored.SerializeToString())
    await until(lambda: "dead" in a.directory.nodes() and len(a.directory.nodes()["dead"].blocks) == 2)
    assert await removal.remove(client, CLUSTER, "dead") == ["10.1.0.0/24", "10.1.1.0/24"]
    await until(lambda: "dead" not in a.directory.nodes())
    left = (await client.get_prefix(ROOT)).kvs
    assert {kv.key.removeprefix(ROOT) for kv in left if kv.key.split("/")[4] in ("blocks", "ip")} == {
        "blocks/default/10.1.2.0_24",
        "ip/10.1.2.2",
    }
    assert await removal.remove(client, CLUSTER, "dead") == []


async def test_a_node_that_lives_is_not_forgotten(join: Join, client: EtcdClient) -> None:
    a = await join("a", "192.168.0.1")
    await until(lambda: a.directory.local and a.directory.local.state is NodeState.ALIVE)
    with pytest.raises(errors.FailedPrecondition, match="a is alive"):
        await removal.remove(client, CLUSTER, "a")
    assert await client.get(ROOT + "nodes/a") is not None
