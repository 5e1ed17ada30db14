"""Telemetry: nothing imported and next to no cost while off, spans and metrics where configured while on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import timeit
import urllib.request
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from fibril.ipam.v1.ipam_pb2 import AllocateRequest, GetPoolRequest, WatchAllocationsRequest
from services.common import telemetry
from services.common.errors import FailedPrecondition, InvalidArgument, NotFound
from services.common.telemetry import TelemetryConfig
from tests.unit.common.rig import Start, failure

pytestmark = pytest.mark.usefixtures("no_telemetry")


class Collector:
    """An OTLP collector that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.metrics: set[str] = set()
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Traces(self), self._server)
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_Metrics(self), self._server)
        self._server.start()

    def close(self) -> None:
        self._server.stop(None).wait()


class _Traces(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self._collector.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                self._collector.metrics.update(metric.name for metric in scope.metrics)
        return metrics_service_pb2.ExportMetricsServiceResponse()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def page(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def test_off_imports_nothing() -> None:
    program = (
        "import services.common.host, services.common.rpc.client, sys; from services.common import telemetry;"
        "telemetry.setup('x'); telemetry.metrics().counter('a').add(1)\n"
        "with telemetry.span('s', a=1) as span: span.set_attribute('b', 2)\n"
        "print([m for m in sys.modules if m.startswith(('opentelemetry', 'prometheus'))])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_a_span_costs_less_than_a_microsecond_while_off() -> None:
    telemetry.setup("x")

    def block() -> None:
        with telemetry.span("s", a=1):
            pass

    # The best of many short runs: the bound is about our code, not about what else the machine does.
    assert min(timeit.repeat(block, number=2000, repeat=20)) / 2000 < 1e-6


def test_the_prometheus_page_has_counters_histograms_and_gauges() -> None:
    made = telemetry.setup("ipam", TelemetryConfig(prometheus="127.0.0.1:0"), "node")
    meter = telemetry.metrics()
    meter.counter("fibril.test.count").add(2, pool="p")
    meter.histogram("fibril.test.duration").record(0.003, kind="k")
    meter.gauge("fibril.test.entries", lambda: [(5, {"map": "a"}), (6, {"map": "b"})])
    meter.sum("fibril.test.drops", lambda: [(7, {"reason": "r"})])
    text = page(made.prometheus_port)
    assert 'fibril_test_count_total{pool="p"} 2.0' in text
    assert 'fibril_test_duration_seconds_bucket{kind="k",le="0.002"} 0.0' in text
    assert 'fibril_test_duration_seconds_bucket{kind="k",le="0.005"} 1.0' in text
    assert 'fibril_test_entries{map="b"} 6.0' in text
    assert 'fibril_test_drops_total{reason="r"} 7.0' in text
    assert 'service_name="ipam"' in text and 'fibril_instance="node"' in text


def test_a_gauge_that_fails_does_not_spoil_the_page() -> None:
    made = telemetry.setup("ipam", TelemetryConfig(prometheus="127.0.0.1:0"))
    made.meter.gauge("fibril.test.broken", lambda: [(1 / 0, {})])
    made.meter.counter("fibril.test.count").add(1)
    assert "fibril_test_count" in page(made.prometheus_port)


def test_a_taken_port_is_refused_and_close_frees_it() -> None:
    first = telemetry.setup("a", TelemetryConfig(prometheus="127.0.0.1:0"))
    taken = TelemetryConfig(prometheus=f"127.0.0.1:{first.prometheus_port}")
    with pytest.raises(FailedPrecondition, match="cannot be opened"):
        telemetry.setup("b", taken)
    first.close()
    telemetry.setup("b", taken)


async def test_rpcs_are_counted_by_method_and_code(start: Start) -> None:
    made = telemetry.setup("ipam", TelemetryConfig(prometheus="127.0.0.1:0"))
    rig = await start(made=made)
    rig.servicer.messages = 1
    async with rig.stub() as stub:
        await stub.Allocate(AllocateRequest())
        watch = stub.WatchAllocations(WatchAllocationsRequest())
        await watch.read()
        watch.cancel()
        await asyncio.wait_for(rig.servicer.cancelled.wait(), 20)

        async def missing(request: Any, context: Any) -> None:
            raise NotFound("no pool x")

        rig.servicer.answer = missing
        await failure(stub.GetPool(GetPoolRequest()))
    text = await asyncio.to_thread(page, made.prometheus_port)
    counts = [line for line in text.splitlines() if line.startswith("fibril_rpc_duration_seconds_count")]
    for code, method in (("OK", "Allocate"), ("CANCELLED", "WatchAllocations"), ("NOT_FOUND", "GetPool")):
        wanted = (f'code="{code}"', f'method="fibril.ipam.v1.IpamService/{method}"')
        assert any(all(part in line for part in wanted) and line.endswith(" 1.0") for line in counts)


async def test_one_trace_spans_client_and_server(start: Start, collector: Collector) -> None:
    made = telemetry.setup("ipam", TelemetryConfig(otlp=f"http://127.0.0.1:{collector.port}"))
    rig = await start(made=made)

    async def work(request: Any, context: Any) -> Any:
        with telemetry.span("carve block", pool="p"):
            assert telemetry.trace_ids()
            raise NotFound("no pool x")

    rig.servicer.answer = work
    async with rig.stub() as stub:
        with telemetry.span("caller"):
            await failure(stub.GetPool(GetPoolRequest()))
            assert [message async for message in stream(rig, stub)] == []
    await asyncio.to_thread(made.close)
    assert "fibril.rpc.duration" in collector.metrics
    spans = {(span.name, span.kind): span for span in collector.spans}
    get, server, client = "fibril.ipam.v1.IpamService/GetPool", 2, 3
    caller, inner = spans["caller", 1], spans["carve block", 1]
    assert spans[get, client].parent_span_id == caller.span_id
    assert spans[get, server].parent_span_id == spans[get, client].span_id
    assert inner.parent_span_id == spans[get, server].span_id
    assert len({span.trace_id for span in collector.spans}) == 1
    assert spans[get, server].status.code == spans[get, client].status.code == 2
    watch = "fibril.ipam.v1.IpamService/WatchAllocations"
    assert spans[watch, server].parent_span_id == spans[watch, client].span_id
    assert spans[watch, server].status.code == 0


def stream(rig: Any, stub: Any) -> Any:
    rig.servicer.more.set()
    return stub.WatchAllocations(WatchAllocationsRequest())


async def test_a_dead_collector_disturbs_nothing(start: Start) -> None:
    made = telemetry.setup("ipam", TelemetryConfig(otlp="http://127.0.0.1:1"))
    rig = await start(made=made)
    async with rig.stub() as stub:
        await stub.Allocate(AllocateRequest())
    assert rig.servicer.calls == 1


def test_trace_ids_are_empty_without_a_span() -> None:
    assert telemetry.trace_ids() == {}


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"prometheus": "0.0.0.0:9464"}, "prometheus"),
        ({"prometheus": "127.0.0.1"}, "prometheus"),
        ({"prometheus": "127.0.0.1:99999"}, "prometheus"),
        ({"otlp": "collector:4317"}, "otlp"),
        ({"sample_ratio": 2.0}, "sample_ratio"),
        ({"metrics_interval_s": 0.0}, "metrics_interval_s"),
    ],
)
def test_a_configuration_out_of_bounds_is_refused(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        TelemetryConfig(**wrong)
    assert caught.value.field == field


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:9464", "localhost:1"])
def test_loopback_addresses_are_accepted(address: str) -> None:
    TelemetryConfig(prometheus=address)
