"""What the RPC server promises whatever the service does: errors, limits, deadlines, drain, health."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fibril.ipam.v1.ipam_pb2 import (
    AllocateRequest,
    AllocateResponse,
    GetPoolRequest,
    ReleaseRequest,
    WatchAllocationsRequest,
)
from fibril.ipam.v1.ipam_pb2_grpc import add_IpamServiceServicer_to_server
from services.common.errors import (
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from services.common.rpc.client import channel
from services.common.rpc.handlers import _deadline_of_parts
from services.common.rpc.server import RpcConfig
from services.common.rpc.status import from_rpc_error
from tests.unit.common.rig import Start, failure

SERVICE = "fibril.ipam.v1.IpamService"


def raises(error: Exception) -> Any:
    async def answer(request: Any, context: Any) -> Any:
        raise error

    return answer


async def test_an_expected_error_arrives_whole(start: Start) -> None:
    rig = await start()
    rig.servicer.answer = raises(ResourceExhausted("pool p is full: 254 of 254", field="pool", fix="grow it"))
    async with rig.stub() as stub:
        error = await failure(stub.Allocate(AllocateRequest()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == "pool p is full: 254 of 254 (field: pool); grow it"
    back = from_rpc_error(error)
    assert (type(back), back.field, back.fix) == (ResourceExhausted, "pool", "grow it")


async def test_a_bug_is_internal_logged_and_not_told(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    rig = await start()
    rig.servicer.answer = raises(KeyError("secret"))
    async with rig.stub() as stub:
        with caplog.at_level(logging.ERROR):
            error = await failure(stub.Allocate(AllocateRequest()))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert f"/{SERVICE}/Allocate failed unexpectedly" in error.details()
    assert "secret" not in error.details()
    assert "secret" in caplog.text and "Traceback" in caplog.text


async def test_a_method_the_servicer_lacks_is_unimplemented(start: Start) -> None:
    rig = await start()
    async with rig.stub() as stub:
        error = await failure(stub.Release(ReleaseRequest()))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_service_nobody_added_is_unimplemented(start: Start) -> None:
    rig = await start()
    async with channel(rig.target) as link:
        error = await failure(link.unary_unary("/no.such.Service/Method")(b""))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_bytes_that_are_no_request_do_not_reach_the_service(start: Start) -> None:
    rig = await start()
    async with channel(rig.target) as link:
        error = await failure(link.unary_unary(f"/{SERVICE}/Allocate")(b"\xff\xff\xff"))
    assert error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    assert rig.servicer.calls == 0


async def test_an_abort_of_the_handler_passes_unchanged(start: Start) -> None:
    rig = await start()

    async def answer(request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.DATA_LOSS, "as is")

    rig.servicer.answer = answer
    async with rig.stub() as stub:
        error = await failure(stub.Allocate(AllocateRequest()))
    assert (error.code(), error.details()) == (grpc.StatusCode.DATA_LOSS, "as is")


async def test_an_oversized_request_is_refused(start: Start) -> None:
    rig = await start(RpcConfig(max_message_bytes=4096))
    async with rig.stub() as stub:
        assert await stub.Allocate(AllocateRequest(owner="x" * 4000)) == AllocateResponse()
        error = await failure(stub.Allocate(AllocateRequest(owner="x" * 5000)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert rig.servicer.calls == 1


@pytest.mark.parametrize("client_s", [None, 30.0])
async def test_the_server_bounds_a_call_whose_deadline_is_later_or_absent(
    start: Start, client_s: float | None
) -> None:
    rig = await start(RpcConfig(max_deadline_s=0.1))
    rig.servicer.answer = lambda request, context: asyncio.sleep(3600)
    async with rig.stub() as stub:
        error = await failure(stub.Allocate(AllocateRequest(), timeout=client_s))
    assert isinstance(from_rpc_error(error), DeadlineExceeded)
    assert "server's limit of 0.1 s" in error.details()
    assert rig.servicer.cancelled.is_set()


async def test_what_comes_in_parts_may_take_longer_as_long_as_it_goes_on() -> None:
    got: list[int] = []

    async def take(request: AsyncIterator[int], context: Any) -> int:
        async for part in request:
            got.append(part)
            await asyncio.sleep(0.16)
        return len(got)

    async def parts(pause: float) -> AsyncIterator[int]:
        for part in range(8):
            yield part
        await asyncio.sleep(pause)

    call = _deadline_of_parts("/x", take, 1.2)
    assert await call(parts(0), None) == 8
    with pytest.raises(DeadlineExceeded, match="without progress"):
        await call(parts(3600), None)


async def test_a_timeout_of_the_handlers_own_is_not_taken_for_the_deadline(start: Start) -> None:
    rig = await start()
    rig.servicer.answer = raises(TimeoutError())
    async with rig.stub() as stub:
        error = await failure(stub.Allocate(AllocateRequest()))
    assert error.code() is grpc.StatusCode.INTERNAL


async def test_the_clients_deadline_cancels_the_handler(start: Start) -> None:
    rig = await start()
    rig.servicer.answer = lambda request, context: asyncio.sleep(3600)
    async with rig.stub() as stub:
        for timeout_s in (0.1, 1.0, 10.0):
            error = await failure(stub.Allocate(AllocateRequest(), timeout=timeout_s))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            if rig.servicer.entered.is_set():  # else it came to an end on its way
                break
    await asyncio.wait_for(rig.servicer.cancelled.wait(), 20)


async def test_calls_beyond_the_limit_are_refused(start: Start) -> None:
    rig = await start(RpcConfig(max_concurrent_rpcs=1))
    gate = asyncio.Event()

    async def answer(request: Any, context: Any) -> AllocateResponse:
        await gate.wait()
        return AllocateResponse()

    rig.servicer.answer = answer
    async with rig.stub() as stub:
        first = asyncio.ensure_future(stub.Allocate(AllocateRequest()))
        await asyncio.wait_for(rig.servicer.entered.wait(), 20)
        error = await failure(stub.Allocate(AllocateRequest()))
        gate.set()
        await first
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_stream_may_fail_half_way(start: Start) -> None:
    rig = await start()
    rig.servicer.messages = 2
    rig.servicer.failure = Unavailable("etcd is away")
    rig.servicer.more.set()
    async with rig.stub() as stub:
        call = stub.WatchAllocations(WatchAllocationsRequest())
        seen = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for message in call:
                seen.append(message.revision)
    assert seen == [0, 1]
    assert isinstance(from_rpc_error(caught.value), Unavailable)


async def test_a_watcher_that_leaves_ends_its_generator(start: Start) -> None:
    rig = await start()
    rig.servicer.messages = 1
    async with rig.stub() as stub:
        call = stub.WatchAllocations(WatchAllocationsRequest())
        assert (await call.read()).revision == 0
        call.cancel()
        await asyncio.wait_for(rig.servicer.cancelled.wait(), 20)


async def test_drain_ends_watches_with_unavailable_and_lets_calls_finish(start: Start) -> None:
    rig = await start()
    rig.servicer.messages = 1
    gate = asyncio.Event()

    async def answer(request: Any, context: Any) -> AllocateResponse:
        await gate.wait()
        return AllocateResponse()

    rig.servicer.answer = answer
    async with rig.stub() as stub:
        watch = stub.WatchAllocations(WatchAllocationsRequest())
        await watch.read()
        call = asyncio.ensure_future(stub.Allocate(AllocateRequest()))
        await asyncio.wait_for(rig.servicer.entered.wait(), 20)
        drain = asyncio.ensure_future(rig.server.drain(30))
        error = await failure(asyncio.wait_for(watch.read(), 20))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert not drain.done()
        gate.set()
        assert await call == AllocateResponse()
        await asyncio.wait_for(drain, 20)


async def test_a_call_that_outlasts_the_grace_is_cancelled(start: Start) -> None:
    rig = await start()
    rig.servicer.answer = lambda request, context: asyncio.sleep(3600)
    async with rig.stub() as stub:
        call = asyncio.ensure_future(stub.Allocate(AllocateRequest()))
        await asyncio.wait_for(rig.servicer.entered.wait(), 20)
        await asyncio.wait_for(rig.server.drain(0.05), 20)
        await failure(call)
    await asyncio.wait_for(rig.servicer.cancelled.wait(), 20)


async def test_health_says_serving_until_the_drain(start: Start) -> None:
    rig = await start()
    async with channel(rig.target) as link:
        stub = health_pb2_grpc.HealthStub(link)
        for name in ("", SERVICE):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        unknown = await failure(stub.Check(health_pb2.HealthCheckRequest(service="no.such")))
        assert unknown.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        drain = asyncio.ensure_future(rig.server.drain(5))
        # The last word of the watch is either the new status or the end of the stream, whichever comes first.
        try:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
        await drain


async def test_reflection_lists_and_describes_every_service(start: Start) -> None:
    rig = await start()
    async with channel(rig.target) as link:
        call = reflection_pb2_grpc.ServerReflectionStub(link).ServerReflectionInfo(
            iter(
                [
                    reflection_pb2.ServerReflectionRequest(list_services=""),
                    reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
                ]
            )
        )
        listed, described = [answer async for answer in call]
    names = {service.name for service in listed.list_services_response.service}
    assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert described.file_descriptor_response.file_descriptor_proto


async def test_one_service_cannot_be_added_twice(start: Start) -> None:
    rig = await start()
    with pytest.raises(RuntimeError, match="before the server starts"):
        rig.server.add(add_IpamServiceServicer_to_server, rig.servicer)


async def test_a_call_still_works_after_many_errors(start: Start) -> None:
    rig = await start()
    async with rig.stub() as stub:
        for _ in range(50):
            rig.servicer.answer = raises(Unavailable("no"))
            await failure(stub.GetPool(GetPoolRequest()))
        rig.servicer.answer = None
        await stub.GetPool(GetPoolRequest())


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"max_message_bytes": 1}, "max_message_bytes"),
        ({"max_deadline_s": 0.0}, "max_deadline_s"),
        ({"max_concurrent_rpcs": 0}, "max_concurrent_rpcs"),
        ({"keepalive_s": 0.0}, "keepalive_s"),
        ({"tcp": "127.0.0.1:1", "tls_ca": "/a", "tls_cert": "/b"}, "tls_key"),
    ],
)
def test_limits_out_of_bounds_are_refused(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        RpcConfig(**wrong)
    assert caught.value.field == field
