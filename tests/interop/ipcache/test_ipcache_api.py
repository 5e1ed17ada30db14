"""IpcacheService through its socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from fibril.ipcache.v1 import ipcache_pb2 as pb
from fibril.ipcache.v1 import ipcache_pb2_grpc
from fibril.types.v1 import types_pb2
from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from services.common.rpc.client import channel
from services.common.rpc.server import RpcConfig, RpcServer
from services.common.telemetry import Telemetry
from services.identity.ipcache.api import IpcacheApi
from tests.interop.etcd.etcdrig import until
from tests.interop.ipcache.ipcacherig import PREFIX, Member, member, put_node, stored_address

PUT, DELETE, SYNCED = types_pb2.WATCH_KIND_PUT, types_pb2.WATCH_KIND_DELETE, types_pb2.WATCH_KIND_SYNCED


class Served:
    def __init__(self, member: Member, stub: ipcache_pb2_grpc.IpcacheServiceStub) -> None:
        self.member = member
        self.stub = stub


@pytest.fixture
async def served(etcd: EmbeddedEtcd, place: Path) -> AsyncIterator[Served]:
    async with serving(etcd, place) as made:
        await made.member.ipcache.synced.wait()
        yield made


@asynccontextmanager
async def serving(etcd: EmbeddedEtcd, place: Path) -> AsyncIterator[Served]:
    async with member(etcd.endpoint, "a", place) as a:
        server = RpcServer(place / "identity.sock", RpcConfig(), Telemetry())
        api = IpcacheApi(a.ipcache, "a", lambda node: f"tunnel-of-{node}")
        server.add(ipcache_pb2_grpc.add_IpcacheServiceServicer_to_server, api)
        await server.start()
        try:
            async with channel(f"unix:{place / 'identity.sock'}") as to:
                yield Served(a, ipcache_pb2_grpc.IpcacheServiceStub(to))
        finally:
            await server.drain(0)


async def fill(client: EtcdClient, served: Served, count: int) -> None:
    for number in range(count):
        address = f"10.1.0.{number}"
        node = "a" if number % 2 else "b"
        await client.put(PREFIX + address, stored_address(address, 100 + number % 3, node, pod=f"p{number}"))
    await client.put(PREFIX + "fd00::5", stored_address("fd00::5", 100, "b"))
    await until(lambda: len(served.member.pods()) == count + 1, "all pods")


async def prefixes(served: Served, size: int, **filters: object) -> list[str]:
    """Pods' prefixes, in the order listed. The host's own come and go with what else runs on it."""
    found: list[str] = []
    token = ""
    while True:
        page = types_pb2.PageRequest(size=size, token=token)
        answer = await served.stub.ListEntries(pb.ListEntriesRequest(page=page, **filters), timeout=5)
        assert len(answer.entries) <= size
        found += [entry.prefix for entry in answer.entries if entry.source == pb.ENTRY_SOURCE_POD]
        token = answer.next_token
        if not token:
            return found


async def told_of_pods(watch: Any) -> pb.WatchEntriesResponse:
    """The next change of one of those that `fill` has made. The host's own addresses come and go with what else runs on it."""
    while True:
        answer: pb.WatchEntriesResponse = await watch.read()
        if answer.entry.prefix.startswith("10.1.0."):
            return answer


async def refused(call: object, code: grpc.StatusCode, text: str = "") -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call  # type: ignore[misc]
    assert error.value.code() is code
    assert text in (error.value.details() or "")


async def test_the_longest_prefix_that_holds_an_address_is_found(served: Served, client: EtcdClient) -> None:
    await fill(client, served, 4)
    await put_node(client, "b", "198.18.77.2")
    await served.stub.PutLocalEntries(
        pb.PutLocalEntriesRequest(owner="o", entries=[pb.LocalEntry(prefix="10.1.0.0/16", identity=9)])
    )
    found = (await served.stub.GetEntry(pb.GetEntryRequest(address="10.1.0.2"))).entry
    assert found == pb.Entry(
        prefix="10.1.0.2/32", identity=102, node="b", source=pb.ENTRY_SOURCE_POD, pod="p2",
        revision=found.revision, tunnel_endpoint="tunnel-of-b",
    )  # fmt: skip
    own = (await served.stub.GetEntry(pb.GetEntryRequest(address="10.1.0.3"))).entry
    assert (own.local, own.tunnel_endpoint) == (True, "")
    wide = (await served.stub.GetEntry(pb.GetEntryRequest(address="10.1.0.200"))).entry
    assert (wide.prefix, wide.source, wide.node) == ("10.1.0.0/16", pb.ENTRY_SOURCE_LOCAL, "")
    await refused(served.stub.GetEntry(pb.GetEntryRequest(address="198.51.100.1")), grpc.StatusCode.NOT_FOUND)
    for text in ("", "10.1.0.0/16", "nonsense"):
        await refused(
            served.stub.GetEntry(pb.GetEntryRequest(address=text)), grpc.StatusCode.INVALID_ARGUMENT
        )


async def test_a_list_pages_in_order_over_changes(served: Served, client: EtcdClient) -> None:
    await fill(client, served, 50)
    wanted = [*(f"10.1.0.{number}/32" for number in range(50)), "fd00::5/128"]
    for size in (1, 7, 50, 51, 1000):
        assert await prefixes(served, size) == wanted
    assert await prefixes(served, 3, node="b", identity=101) == [
        f"10.1.0.{number}/32" for number in range(50) if number % 2 == 0 and number % 3 == 1
    ]
    # An entry whose place a token marks may go.
    first = await served.stub.ListEntries(pb.ListEntriesRequest(node="b", page=types_pb2.PageRequest(size=2)))
    assert [entry.prefix for entry in first.entries] == ["10.1.0.0/32", "10.1.0.2/32"]
    await client.delete(PREFIX + "10.1.0.2")
    await until(lambda: "10.1.0.2" not in served.member.pods(), "the deletion")
    page = types_pb2.PageRequest(size=1, token=first.next_token)
    second = await served.stub.ListEntries(pb.ListEntriesRequest(node="b", page=page))
    assert [entry.prefix for entry in second.entries] == ["10.1.0.4/32"]
    for page in (types_pb2.PageRequest(size=10_001), types_pb2.PageRequest(token="?")):
        await refused(
            served.stub.ListEntries(pb.ListEntriesRequest(page=page)), grpc.StatusCode.INVALID_ARGUMENT
        )


async def test_a_watch_tells_all_then_every_change_and_resumes(served: Served, client: EtcdClient) -> None:
    await fill(client, served, 3)
    watch = served.stub.WatchEntries(pb.WatchEntriesRequest())
    told = []
    while (answer := await watch.read()).kind != SYNCED:
        told.append(answer.entry.prefix)
    assert {"10.1.0.0/32", "10.1.0.1/32", "10.1.0.2/32", "fd00::5/128"} <= set(told)
    await client.put(PREFIX + "10.1.0.1", stored_address("10.1.0.1", 555, "a"))
    await client.delete(PREFIX + "10.1.0.2")
    changed, gone = await told_of_pods(watch), await told_of_pods(watch)
    assert (changed.kind, changed.entry.prefix, changed.entry.identity) == (PUT, "10.1.0.1/32", 555)
    assert (gone.kind, gone.entry) == (DELETE, pb.Entry(prefix="10.1.0.2/32"))
    watch.cancel()
    await client.delete(PREFIX + "10.1.0.0")
    again = served.stub.WatchEntries(pb.WatchEntriesRequest(after_revision=gone.revision))
    missed = await told_of_pods(again)
    assert (missed.kind, missed.entry.prefix) == (DELETE, "10.1.0.0/32")
    again.cancel()


async def test_nothing_is_told_before_everything_is_known(etcd: EmbeddedEtcd, place: Path) -> None:
    await etcd.stop()
    async with serving(etcd, place) as served:
        request = pb.GetEntryRequest(address="10.0.0.1")
        await refused(served.stub.GetEntry(request), grpc.StatusCode.UNAVAILABLE, "waiting for")
        await refused(served.stub.ListEntries(pb.ListEntriesRequest()), grpc.StatusCode.UNAVAILABLE)
        watch = served.stub.WatchEntries(pb.WatchEntriesRequest())
        assert "waiting for" in served.member.ipcache.problem
        await etcd.start()
        while (await watch.read()).kind != SYNCED:
            pass
        assert served.member.ipcache.synced.is_set()
        watch.cancel()


def local(owner: str, *entries: tuple[str, int]) -> pb.PutLocalEntriesRequest:
    return pb.PutLocalEntriesRequest(
        owner=owner, entries=[pb.LocalEntry(prefix=prefix, identity=identity) for prefix, identity in entries]
    )


async def test_local_declarations_are_the_owners(served: Served) -> None:
    put, delete = served.stub.PutLocalEntries, served.stub.DeleteLocalEntries
    await put(local("a", ("198.51.100.0/24", 7), ("2001:db8:99::/48", 8)))
    await put(local("a", ("198.51.100.0/24", 7)))  # again
    await refused(
        put(local("b", ("203.0.113.0/24", 7), ("198.51.100.0/24", 9))),
        grpc.StatusCode.FAILED_PRECONDITION,
        "declared by 'a'",
    )
    await refused(served.stub.GetEntry(pb.GetEntryRequest(address="203.0.113.1")), grpc.StatusCode.NOT_FOUND)
    assert (await delete(pb.DeleteLocalEntriesRequest(owner="b"))).deleted == 0
    assert (
        await delete(pb.DeleteLocalEntriesRequest(owner="a", prefixes=["198.51.100.0/24", "10.0.0.0/8"]))
    ).deleted == 1
    assert (await delete(pb.DeleteLocalEntriesRequest(owner="a"))).deleted == 1
    for request in (
        local("", ("10.0.0.0/8", 1)),
        local("x" * 254, ("10.0.0.0/8", 1)),
        local("a", ("10.0.0.1/8", 1)),
        local("a", ("10.0.0.0/33", 1)),
        local("a", ("::ffff:10.0.0.0/120", 1)),
        local("a", ("10.0.0.0/8", 0)),
        local("a", ("10.0.0.0/8", 1), ("10.0.0.0/8", 2)),
        local("a", *((f"10.{n >> 8}.{n & 255}.0/24", 1) for n in range(10_001))),
    ):
        await refused(put(request), grpc.StatusCode.INVALID_ARGUMENT)
