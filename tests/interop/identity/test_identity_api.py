"""IdentityService through its socket."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from fibril.identity.v1 import identity_pb2 as pb
from fibril.identity.v1.identity_pb2_grpc import IdentityServiceStub, add_IdentityServiceServicer_to_server
from fibril.types.v1 import types_pb2
from services.common import telemetry
from services.common.etcd.embedded import EmbeddedEtcd
from services.common.rpc.client import channel
from services.common.rpc.server import RpcConfig, RpcServer
from services.common.rpc.status import from_rpc_error
from services.common.telemetry import current
from services.identity.identities.api import IdentityApi
from services.identity.numbers import Reserved, make
from tests.interop.etcd.etcdrig import kill, until
from tests.interop.identity.identityrig import Node, Nodes


@pytest.fixture
async def node(nodes: Nodes) -> Node:
    return await nodes.start()


@pytest.fixture
async def stub(node: Node, place: Path) -> AsyncIterator[IdentityServiceStub]:
    server = RpcServer(place / "identity.sock", RpcConfig(), current())
    server.add(add_IdentityServiceServicer_to_server, IdentityApi(node.allocator))
    await server.start()
    try:
        async with channel(f"unix:{place}/identity.sock") as to_identity:
            yield IdentityServiceStub(to_identity)
    finally:
        await server.drain(0)


async def allocate(stub: IdentityServiceStub, holder: str, **labels: str) -> pb.Identity:
    answer = await stub.AllocateIdentity(pb.AllocateIdentityRequest(labels=labels, holder=holder), timeout=10)
    return answer.identity


async def test_labels_become_a_number_and_the_number_labels(stub: IdentityServiceStub) -> None:
    made = await allocate(stub, "a", app="web", **{"controller-uid": "1"})
    assert made == pb.Identity(number=made.number, labels={"app": "web"}, scope=pb.IDENTITY_SCOPE_CLUSTER)
    assert (await stub.GetIdentity(pb.GetIdentityRequest(number=made.number))).identity == made
    labels = {"app": "web", "controller-uid": "2"}
    assert (await stub.ResolveIdentity(pb.ResolveIdentityRequest(labels=labels))).identity == made
    host = (await stub.ResolveIdentity(pb.ResolveIdentityRequest(labels={"reserved:host": ""}))).identity
    assert host == (await stub.GetIdentity(pb.GetIdentityRequest(number=Reserved.HOST))).identity
    assert host.scope == pb.IDENTITY_SCOPE_RESERVED
    init = (await stub.ResolveIdentity(pb.ResolveIdentityRequest())).identity
    assert init.number == Reserved.INIT
    usage = await stub.GetUsage(pb.GetUsageRequest())
    assert usage == pb.GetUsageResponse(cluster_id=7, used=1, capacity=(1 << 20) - 1, holders=1)
    released = await stub.ReleaseIdentity(pb.ReleaseIdentityRequest(holder="a"))
    assert released.number == made.number
    assert (await stub.ReleaseIdentity(pb.ReleaseIdentityRequest(holder="a"))).number == 0


@pytest.mark.parametrize(
    ("method", "request_", "code", "field"),
    [
        ("AllocateIdentity", pb.AllocateIdentityRequest(labels={"a": "b"}), "INVALID_ARGUMENT", "holder"),
        (
            "AllocateIdentity",
            pb.AllocateIdentityRequest(labels={"": "b"}, holder="h"),
            "INVALID_ARGUMENT",
            "labels",
        ),
        (
            "AllocateIdentity",
            pb.AllocateIdentityRequest(labels={"a": "b" * 254}, holder="h"),
            "INVALID_ARGUMENT",
            "labels[a]",
        ),
        ("ReleaseIdentity", pb.ReleaseIdentityRequest(holder="h" * 254), "INVALID_ARGUMENT", "holder"),
        ("GetIdentity", pb.GetIdentityRequest(), "INVALID_ARGUMENT", "number"),
        ("GetIdentity", pb.GetIdentityRequest(number=make(7, 9)), "NOT_FOUND", ""),
        ("ResolveIdentity", pb.ResolveIdentityRequest(labels={"a": "b"}), "NOT_FOUND", ""),
        (
            "ResolveIdentity",
            pb.ResolveIdentityRequest(labels={"reserved:x": ""}),
            "INVALID_ARGUMENT",
            "labels",
        ),
        ("ListIdentities", pb.ListIdentitiesRequest(scope=9), "INVALID_ARGUMENT", "scope"),  # type: ignore[arg-type]
        (
            "ListIdentities",
            pb.ListIdentitiesRequest(page=types_pb2.PageRequest(size=10_001)),
            "INVALID_ARGUMENT",
            "page.size",
        ),
        (
            "ListIdentities",
            pb.ListIdentitiesRequest(page=types_pb2.PageRequest(token="x")),
            "INVALID_ARGUMENT",
            "page.token",
        ),
    ],
)
async def test_what_is_refused_is_named(
    node: Node, stub: IdentityServiceStub, method: str, request_: object, code: str, field: str
) -> None:
    await node.allocator.synced.wait()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(stub, method)(request_)
    error = from_rpc_error(caught.value)
    assert (caught.value.code().name, error.field) == (code, field)


async def test_lists_are_paged_by_number_and_filtered(stub: IdentityServiceStub) -> None:
    made = [await allocate(stub, str(n), app=str(n), tier="front" if n % 2 else "back") for n in range(25)]
    local = await allocate(stub, "local", **{"cidr:10.0.0.0/8": ""})
    pages, token = [], ""
    while True:
        page = types_pb2.PageRequest(size=10, token=token)
        answer = await stub.ListIdentities(pb.ListIdentitiesRequest(page=page))
        pages.append(list(answer.identities))
        token = answer.next_token
        if not token:
            break
    assert [len(page) for page in pages] == [10, 10, 10, 4]
    everything = [identity for page in pages for identity in page]
    assert [identity.number for identity in everything[:8]] == [*Reserved]
    assert everything[8:] == [*sorted(made, key=lambda identity: identity.number), local]

    async def listed(**options: object) -> list[pb.Identity]:
        return list((await stub.ListIdentities(pb.ListIdentitiesRequest(**options))).identities)  # type: ignore[arg-type]

    assert await listed(scope=pb.IDENTITY_SCOPE_LOCAL) == [local]
    assert len(await listed(scope=pb.IDENTITY_SCOPE_RESERVED)) == 8
    assert len(await listed(labels={"tier": "front"})) == 12
    assert await listed(labels={"tier": "front", "app": "3"}) == [made[3]]
    # Whoever was between two pages when an identity went away goes on behind it.
    page = types_pb2.PageRequest(size=1, token=str(everything[8].number))
    await stub.ReleaseIdentity(pb.ReleaseIdentityRequest(holder=everything[8].labels["app"]))
    rest = await stub.ListIdentities(pb.ListIdentitiesRequest(page=page))
    assert list(rest.identities) == [everything[9]]


async def test_a_watch_begins_with_what_there_is_and_can_be_resumed(stub: IdentityServiceStub) -> None:
    first = await allocate(stub, "a", app="first")
    seen: list[pb.WatchIdentitiesResponse] = []
    stream = stub.WatchIdentities(pb.WatchIdentitiesRequest())
    while not seen or seen[-1].kind != types_pb2.WATCH_KIND_SYNCED:
        seen.append(await stream.read())
    assert [message.identity.number for message in seen] == [*Reserved, first.number, 0]
    second = await allocate(stub, "b", app="second")
    message = await stream.read()
    assert (message.kind, message.identity) == (types_pb2.WATCH_KIND_PUT, second)
    stream.cancel()
    await stub.ReleaseIdentity(pb.ReleaseIdentityRequest(holder="a"))
    stream = stub.WatchIdentities(pb.WatchIdentitiesRequest(after_revision=message.revision))
    gone = await stream.read()
    assert gone == pb.WatchIdentitiesResponse(
        kind=types_pb2.WATCH_KIND_DELETE,
        identity=pb.Identity(number=first.number),
        revision=message.revision + 1,
    )
    stream.cancel()


async def test_what_is_not_known_yet_is_not_said_to_be_absent(
    etcd: EmbeddedEtcd, nodes: Nodes, place: Path
) -> None:
    await kill(etcd)
    node = await nodes.start(timeout_s=0.5, ready=False)
    api = IdentityApi(node.allocator)
    for call in (
        api.GetIdentity(pb.GetIdentityRequest(number=make(7, 1)), None),
        api.ResolveIdentity(pb.ResolveIdentityRequest(labels={"app": "web"}), None),
        api.ListIdentities(pb.ListIdentitiesRequest(), None),
    ):
        with pytest.raises(Exception, match="the cluster's identities are not known yet"):
            await call
    assert (await api.GetIdentity(pb.GetIdentityRequest(number=1), None)).identity.number == 1
    await etcd.start()
    await until(lambda: node.allocator.synced.is_set(), "etcd")
    assert len((await api.ListIdentities(pb.ListIdentitiesRequest(), None)).identities) == 8


async def test_usage_and_changes_are_metrics(nodes: Nodes) -> None:
    measured = telemetry.setup("test", telemetry.TelemetryConfig(prometheus="127.0.0.1:0"))
    try:
        node = await nodes.start()
        await node.allocate("a", app="web")
        await node.allocate("b", **{"fqdn:example.org": ""})
        url = f"http://127.0.0.1:{measured.prometheus_port}/metrics"
        page = (await asyncio.to_thread(urllib.request.urlopen, url)).read().decode()
        for line in (
            'fibril_identity_numbers{state="used"} 1.0',
            'fibril_identity_numbers{state="local"} 1.0',
            "fibril_identity_capacity 1.048575e+06",
            "fibril_identity_holders 2.0",
            'fibril_identity_changes_total{kind="create"} 1.0',
        ):
            assert line in page, page
    finally:
        measured.close()
        telemetry.setup("test")
