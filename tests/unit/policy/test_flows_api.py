"""FlowService through its socket."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from fibril.flow.v1 import flow_pb2 as pb
from fibril.flow.v1 import flow_pb2_grpc
from fibril.types.v1 import reasons_pb2, types_pb2
from services.common.rpc.client import channel
from services.common.rpc.server import RpcConfig, RpcServer
from services.common.telemetry import Telemetry
from services.policy import abi
from services.policy.flows.part import FlowsPart
from tests.unit.policy import flowrig
from tests.unit.policy.flowrig import raw

SIZE = 16


@pytest.fixture
def part() -> FlowsPart:
    made = flowrig.part(SIZE)
    made._offset_ns = time.time_ns() - time.monotonic_ns()
    return made


@pytest.fixture
async def stub(part: FlowsPart) -> AsyncIterator[Any]:
    place = Path(tempfile.mkdtemp(prefix="fibril-unit-"))
    server = RpcServer(place / "policy.sock", RpcConfig(), Telemetry())
    server.add(flow_pb2_grpc.add_FlowServiceServicer_to_server, part)
    await server.start()
    try:
        async with channel(f"unix:{place / 'policy.sock'}") as to:
            yield flow_pb2_grpc.FlowServiceStub(to)
    finally:
        await server.drain(0)
        shutil.rmtree(place)


async def flows(stub: Any, **request: Any) -> list[int]:
    """Sequence numbers of what is answered; the mark comes once, and last."""
    answers = [each async for each in stub.GetFlows(pb.GetFlowsRequest(**request), timeout=10)]
    assert [each.kind for each in answers] == [types_pb2.WATCH_KIND_PUT] * (len(answers) - 1) + [
        types_pb2.WATCH_KIND_SYNCED
    ]
    return [each.flow.sequence for each in answers[:-1]]


def ago(seconds: Sequence[float]) -> list[bytes]:
    return [raw(time=time.monotonic_ns() - int(each * 1e9)) for each in seconds]


async def test_a_flow_has_names(part: FlowsPart, stub: Any) -> None:
    part.store.add(
        [
            raw(
                src_id=1,
                src_identity=4,
                rule=16,
                revision=3,
                suppressed=2,
                reason=5,
                verdict=2,
                type=4,
                direction=1,
            )
        ]
    )
    answers = [each async for each in stub.GetFlows(pb.GetFlowsRequest(), timeout=10)]
    flow = answers[0].flow
    assert abs(flow.time_unix_seconds - time.time()) < 30
    flow.time_unix_seconds = 0
    assert flow == pb.Flow(
        sequence=1, verdict=pb.FLOW_VERDICT_DROPPED, type=pb.FLOW_TYPE_DROP, direction=pb.FLOW_DIRECTION_EGRESS, protocol=6,
        tcp_flags=2, drop_reason=reasons_pb2.DROP_REASON_TRUNCATED,
        policy="Policy shop/api", rule="rule16", rule_id=16, generation=3, node="n1", suppressed=2,
        source=pb.FlowEnd(
            address="10.0.0.1", port=40000, identity=4, endpoint=1, pod="shop/p1", labels={"app": "1", "id": "4"}
        ),
        destination=pb.FlowEnd(address="10.0.0.2", port=80),
    )  # fmt: skip


async def test_which_are_answered(part: FlowsPart, stub: Any) -> None:
    assert await flows(stub) == []
    part.store.add(ago([500, 400, 300, 200, 100]))
    now = time.time()
    assert await flows(stub) == [1, 2, 3, 4, 5]
    assert await flows(stub, last=2) == [4, 5]
    assert await flows(stub, last=4_000_000_000) == [1, 2, 3, 4, 5]
    assert await flows(stub, after_sequence=3) == [4, 5]
    assert await flows(stub, after_sequence=1 << 63) == []
    assert await flows(stub, since_unix_seconds=now - 350) == [3, 4, 5]
    assert await flows(stub, since_unix_seconds=now - 350, until_unix_seconds=now - 150) == [3, 4]
    assert await flows(stub, until_unix_seconds=now - 150, last=1) == [4]
    assert await flows(stub, allow=[pb.FlowFilter(port=81)]) == []
    assert await flows(stub, deny=[pb.FlowFilter(port=80)]) == []


async def test_what_follows_comes_after_the_mark(part: FlowsPart, stub: Any) -> None:
    part.store.add([raw(), raw(dport=81)])
    call = stub.GetFlows(pb.GetFlowsRequest(follow=True, allow=[pb.FlowFilter(port=80)]), timeout=10)
    assert (await call.read()).flow.sequence == 1
    assert (await call.read()).kind == types_pb2.WATCH_KIND_SYNCED
    part.store.add([raw(dport=81), raw()])
    part.store.add([raw()])
    assert [(await call.read()).flow.sequence for _ in range(2)] == [4, 5]
    call.cancel()


async def test_nothing_is_missed_between_what_was_and_what_follows(part: FlowsPart, stub: Any) -> None:
    part.store.add([raw() for _ in range(5)])
    call, found = stub.GetFlows(pb.GetFlowsRequest(follow=True), timeout=10), []
    for _ in range(SIZE):
        answer = await call.read()
        if answer.kind == types_pb2.WATCH_KIND_PUT:
            found.append(answer.flow.sequence)
        part.store.add([raw()])
        await asyncio.sleep(0)
    call.cancel()
    assert found == list(range(1, SIZE))


async def test_who_does_not_read_is_told_that_flows_were_forgotten(part: FlowsPart, stub: Any) -> None:
    call = stub.GetFlows(pb.GetFlowsRequest(follow=True), timeout=20)
    assert (await call.read()).kind == types_pb2.WATCH_KIND_SYNCED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        for _ in range(100):
            part.store.add([raw()] * (2 * SIZE))
            await call.read()
    assert caught.value.code() == grpc.StatusCode.ABORTED


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GetFlowsRequest(since_unix_seconds=-1), "since_unix_seconds"),
        (pb.GetFlowsRequest(until_unix_seconds=float("nan")), "until_unix_seconds"),
        (pb.GetFlowsRequest(until_unix_seconds=5, follow=True), "until_unix_seconds"),
        (pb.GetFlowsRequest(deny=[pb.FlowFilter(), pb.FlowFilter(port=70000)]), "deny[1].port"),
    ],
)
async def test_wishes_that_make_no_sense_are_refused(
    stub: Any, request_: pb.GetFlowsRequest, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetFlows(request_, timeout=10).read()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert field in str(caught.value.details()) + str(caught.value.trailing_metadata())


async def test_status_counts(part: FlowsPart, stub: Any) -> None:
    part.store.add([raw()] * (SIZE + 3))
    assert await stub.GetFlowStatus(pb.GetFlowStatusRequest(), timeout=10) == pb.GetFlowStatusResponse(
        remembered=SIZE,
        capacity=SIZE,
        seen=SIZE + 3,
        lost=10 + abi.Stat.LOST,
        suppressed=10 + abi.Stat.SUPPRESSED,
    )


def test_different_connections_that_were_allowed(part: FlowsPart) -> None:
    part.store.add(
        [
            *ago([900]),
            raw(dport=80, sport=1),
            raw(dport=80, sport=2),
            raw(dport=81),
            raw(dport=82, verdict=2, type=4),
            raw(dport=83, type=2),
            raw(proto=17),
        ]
    )
    found = list(part.allowed(60))
    assert [(each.protocol, each.destination.port) for each in found] == [(6, 80), (6, 81), (17, 80)]
    assert [each.sequence for each in part.allowed(0)] == [1, 4, 7]


def test_metrics_name_verdict_and_reason(part: FlowsPart) -> None:
    part.store.add([raw(), raw(), raw(verdict=2, reason=1), raw(verdict=2, reason=60000)])
    assert part._counts() == [
        (2, {"verdict": "forwarded", "reason": ""}),
        (1, {"verdict": "dropped", "reason": "no_endpoint"}),
        (1, {"verdict": "dropped", "reason": "60000"}),
    ]


async def test_without_a_ring_the_status_says_so(part: FlowsPart) -> None:
    task = asyncio.create_task(part.run())
    async with asyncio.timeout(10):
        while "no BPF map" not in part.status()[0].message:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    (status,) = part.status()
    assert status.state == "degraded"
    task.cancel()
