"""fibril.lb.v1 as clients see it, with a real etcd and no kernel."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

from fibril.lb.v1 import lb_pb2 as pb
from fibril.types.v1 import types_pb2
from services.common.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from services.common.etcd.embedded import EmbeddedEtcd
from services.common.instance import Instance
from services.lb.api import LbApi
from services.lb.kernel.writer import Plane
from services.lb.locality import Locality
from tests.interop.etcd.etcdrig import until
from tests.interop.lb.lbrig import Node


async def no_trace(request: pb.TraceServiceRequest) -> pb.TraceServiceResponse:
    raise AssertionError("nobody asks")


def api_of(node: Node) -> LbApi:
    """Of a node whose kernel has nothing."""
    plane = Plane(Instance("x"), node.services, lambda name, key: "", lambda: Locality("x"))
    return LbApi(node.services, node.store, plane, lambda name, key: "", no_trace)  # type: ignore[arg-type]


@pytest.fixture
def api(nodes: list[Node]) -> LbApi:
    return api_of(nodes[0])


def declared(name: str, vip: str, *ports: int) -> pb.Service:
    return pb.Service(
        name=name,
        frontends=[pb.Frontend(address=vip, port=80)],
        backends=[pb.Backend(address="10.0.0.1", port=port) for port in ports],
    )


async def upsert(api: LbApi, service: pb.Service) -> pb.UpsertServiceResponse:
    return await api.UpsertService(pb.UpsertServiceRequest(service=service), None)


async def test_what_is_read_can_be_written_again(api: LbApi, nodes: list[Node]) -> None:
    await nodes[0].services.synced.wait()
    first = await upsert(api, declared("a", "10.96.0.1", 1, 2))
    assert first.created and first.service.algorithm == pb.ALGORITHM_RANDOM
    # At once: who has written reads it.
    got = (await api.GetService(pb.GetServiceRequest(name="a"), None)).service
    assert got.revision == first.service.revision
    assert {b.effective_state for b in got.backends} == {pb.BACKEND_STATE_ACTIVE}
    assert not got.status.programmed
    again = await upsert(api, got)
    assert not again.created and again.service.revision == got.revision
    got.affinity_timeout_s = 7
    changed = (await upsert(api, got)).service.revision
    assert changed > got.revision
    assert (await api.GetService(pb.GetServiceRequest(name="a"), None)).service.revision == changed
    with pytest.raises(FailedPrecondition):
        await upsert(api, got)
    with pytest.raises(NotFound):
        await api.GetService(pb.GetServiceRequest(name="b"), None)
    for request, field in (
        (pb.UpsertServiceRequest(), "service"),
        (pb.UpsertServiceRequest(service=pb.Service(name="b")), "service.frontends"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            await api.UpsertService(request, None)
        assert caught.value.field == field


async def test_backends_come_and_go(api: LbApi, nodes: list[Node]) -> None:
    await nodes[0].services.synced.wait()
    await upsert(api, declared("a", "10.96.0.1", 1, 2))
    more = [pb.Backend(address="10.0.0.1", port=2, weight=5), pb.Backend(address="10.0.0.1", port=3)]
    added = await api.AddBackends(pb.AddBackendsRequest(service="a", backends=more), None)
    assert (added.added, added.changed) == (1, 1)
    gone = [pb.BackendKey(address="10.0.0.1", port=port) for port in (1, 9)]
    removed = await api.RemoveBackends(pb.RemoveBackendsRequest(service="a", backends=gone), None)
    assert removed.removed == 1
    set_state = pb.SetBackendStateRequest(service="a", backends=gone, state=pb.BACKEND_STATE_TERMINATING)
    with pytest.raises(NotFound) as caught:
        await api.SetBackendState(set_state, None)
    assert caught.value.field == "backends[0]"
    # Everywhere it is.
    await upsert(api, declared("b", "10.96.0.2", 3))
    three = [pb.BackendKey(address="10.0.0.1", port=3)]
    everywhere = pb.SetBackendStateRequest(backends=three, state=pb.BACKEND_STATE_MAINTENANCE)
    assert (await api.SetBackendState(everywhere, None)).changed == 2
    assert (await api.SetBackendState(everywhere, None)).changed == 0
    sctp = declared("c", "10.96.0.3")
    sctp.frontends[0].protocol = pb.PROTOCOL_SCTP
    await upsert(api, sctp)
    for request, field in (
        (pb.AddBackendsRequest(service="c", backends=more), "backends[0].port"),
        (pb.AddBackendsRequest(service="c"), "backends"),
        (pb.AddBackendsRequest(service="", backends=more), "service"),
        (pb.AddBackendsRequest(service="c", backends=[more[0]] * 2), "backends[1]"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            await api.AddBackends(request, None)
        assert refused.value.field == field
    with pytest.raises(InvalidArgument) as refused:
        await api.RemoveBackends(pb.RemoveBackendsRequest(service="nobody"), None)
    assert refused.value.field == "backends"
    with pytest.raises(InvalidArgument) as refused:
        await api.SetBackendState(pb.SetBackendStateRequest(state=pb.BACKEND_STATE_ACTIVE), None)
    assert refused.value.field == "backends"


async def test_many_are_imported_and_read_in_pages(api: LbApi, nodes: list[Node]) -> None:
    await nodes[0].services.synced.wait()
    services = [declared(f"ns/{n:04}", f"10.96.{n // 250}.{n % 250 + 1}", 1) for n in range(600)]

    async def stream(*batches: list[pb.Service]) -> AsyncIterator[pb.ImportServicesRequest]:
        for batch in batches:
            yield pb.ImportServicesRequest(services=batch)

    done = await api.ImportServices(stream(services[:300], services[300:], services[:1]), None)
    assert (done.created, done.changed, done.unchanged) == (600, 0, 1)
    for wrong, field in ((services[:1] * 2, "services[1].name"), (services * 2, "services")):
        with pytest.raises(InvalidArgument) as caught:
            await api.ImportServices(stream(wrong), None)
        assert caught.value.field == field
    await until(lambda: len(nodes[0].services.specs) == 600, "all")
    names, token = [], ""
    while True:
        page = types_pb2.PageRequest(size=250, token=token)
        answer = await api.ListServices(pb.ListServicesRequest(page=page, without_backends=True), None)
        assert not any(service.backends for service in answer.services)
        names += [service.name for service in answer.services]
        token = answer.next_token
        if not token:
            break
    assert names == [service.name for service in services]
    some = await api.ListServices(pb.ListServicesRequest(prefix="ns/059"), None)
    assert [service.name for service in some.services] == names[590:] and some.services[0].backends
    for page, field in (
        (types_pb2.PageRequest(size=10_001), "page.size"),
        (types_pb2.PageRequest(token="?"), "page.token"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            await api.ListServices(pb.ListServicesRequest(page=page), None)
        assert refused.value.field == field


async def test_a_watch_can_be_resumed(api: LbApi, nodes: list[Node]) -> None:
    await nodes[0].services.synced.wait()

    async def watch(after: int = 0) -> AsyncGenerator[pb.WatchServicesResponse, None]:
        async for each in api.WatchServices(pb.WatchServicesRequest(after_revision=after), None):
            yield each

    async with contextlib.aclosing(watch()) as seen:
        async for first in seen:
            if first.kind == types_pb2.WATCH_KIND_SYNCED:
                break
    await upsert(api, declared("b", "10.96.0.2", 1))
    await api.DeleteService(pb.DeleteServiceRequest(name="b"), None)
    kinds = []
    async with contextlib.aclosing(watch(first.revision)) as seen:
        async for each in seen:
            kinds.append(each.kind)
            if each.kind == types_pb2.WATCH_KIND_DELETE:
                assert each.service.name == "b"
                break
    assert types_pb2.WATCH_KIND_SYNCED not in kinds


async def test_nothing_is_said_before_all_is_known(etcd: EmbeddedEtcd) -> None:
    node = Node(etcd.endpoint)
    api = api_of(node)
    with pytest.raises(Unavailable):
        await api.ListServices(pb.ListServicesRequest(), None)
    with pytest.raises(Unavailable):
        await upsert(api, declared("a", "10.96.0.1"))
    await node.stop()
