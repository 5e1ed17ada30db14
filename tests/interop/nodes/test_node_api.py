"""What NodeService answers, on a real etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fibril.node.v1 import node_pb2 as pb
from fibril.types.v1 import types_pb2
from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from services.common.network import Mode
from services.identity.nodes.api import NodeApi
from services.identity.nodes.directory import root_of
from services.identity.nodes.health import Health
from tests.interop.nodes.noderig import CLUSTER, Member, until

ROOT = root_of(CLUSTER)


@pytest.fixture
async def member(etcd: EmbeddedEtcd, tmp_path: Path) -> AsyncIterator[Member]:
    made = Member(etcd.endpoint, "n5", tmp_path, "192.168.0.5")
    yield made
    await made.stop()


def api_of(member: Member) -> NodeApi:
    health = Health(member.etcd, CLUSTER, member.name, 4240, member.lease, member.directory)
    return NodeApi(
        member.etcd, CLUSTER, member.name, member.directory, health, lambda name: (Mode.ROUTED, 1450, "")
    )


async def test_nodes_are_listed_in_pages_and_found(member: Member, client: EtcdClient) -> None:
    api = api_of(member)
    for ask in (api.GetNode(pb.GetNodeRequest(), None), api.ListNodes(pb.ListNodesRequest(), None)):
        with pytest.raises(errors.Unavailable, match="not been read"):
            await ask
    for number in range(10):
        if number != 5:
            record = pb.StoredNode(name=f"n{number}", ipv4=f"192.168.0.{number + 1}")
            await client.put(f"{ROOT}nodes/n{number}", record.SerializeToString())
    await member.start()
    await until(lambda: len(member.directory.nodes()) == 10 and not member.registry.problem)
    names, token = list[str](), ""
    while True:
        page = await api.ListNodes(pb.ListNodesRequest(page=types_pb2.PageRequest(size=3, token=token)), None)
        names += [node.name for node in page.nodes]
        token = page.next_token
        if not token:
            break
    assert names == [f"n{number}" for number in range(10)]
    with pytest.raises(errors.InvalidArgument, match="larger"):
        await api.ListNodes(pb.ListNodesRequest(page=types_pb2.PageRequest(size=1_000_000)), None)
    own = (await api.GetNode(pb.GetNodeRequest(), None)).node
    assert (own.name, own.local, own.mode) == ("n5", True, pb.NETWORK_MODE_UNSPECIFIED)
    other = (await api.GetNode(pb.GetNodeRequest(name="n1"), None)).node
    assert (other.state, other.mode, other.mtu) == (pb.NODE_STATE_LOST, pb.NETWORK_MODE_ROUTED, 1450)
    with pytest.raises(errors.NotFound, match="'n77'"):
        await api.GetNode(pb.GetNodeRequest(name="n77"), None)


async def test_watchers_wait_for_all_nodes_and_see_them_go(member: Member, client: EtcdClient) -> None:
    api, told = api_of(member), list[tuple[int, str]]()

    async def watch() -> None:
        async for answer in api.WatchNodes(pb.WatchNodesRequest(), None):
            told.append((answer.kind, answer.node.name))

    watching = asyncio.create_task(watch())
    await client.put(f"{ROOT}nodes/n1", pb.StoredNode(name="n1").SerializeToString())
    await asyncio.sleep(0.1)
    assert not told
    await member.start()
    await until(lambda: not member.registry.problem and (types_pb2.WATCH_KIND_PUT, "n5") in told)
    assert told.index((types_pb2.WATCH_KIND_PUT, "n1")) < told.index((types_pb2.WATCH_KIND_SYNCED, ""))
    with pytest.raises(errors.InvalidArgument, match="no node"):
        await api.DeleteNode(pb.DeleteNodeRequest(), None)
    with pytest.raises(errors.FailedPrecondition, match="alive"):
        await api.DeleteNode(pb.DeleteNodeRequest(name="n5"), None)
    await api.DeleteNode(pb.DeleteNodeRequest(name="n1"), None)
    await until(lambda: told[-1] == (types_pb2.WATCH_KIND_DELETE, "n1"))
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
