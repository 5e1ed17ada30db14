"""Traces and metrics by OpenTelemetry, and a Prometheus endpoint. Off by default and then free of cost:
nothing of OpenTelemetry is imported (it takes 10 MB and more), a span is one shared object, an instrument
does nothing.

Call `setup` before any instrument is created: one created while metrics are off stays off.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.version import version

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Observation
    from opentelemetry.metrics import Meter as OtelMeter
    from opentelemetry.sdk.metrics.export import MetricReader
    from opentelemetry.trace import Tracer

log = logging.getLogger(__name__)

Value = str | int | float | bool
# What a gauge reports when it is read: value and attributes, once for every combination of attributes.
Reading = tuple[float, Mapping[str, Value]]
# Seconds an export may take, retries included: a process that stops must not wait long for a dead collector.
_EXPORT_TIMEOUT_S = 2
# Seconds. RPCs over a unix socket take 200 µs, pods 10 ms, etcd in trouble 3 s.
_DURATION_BOUNDARIES = (
    0.0002,
    0.0005,
    0.001,
    0.002,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
)


@dataclass(frozen=True)
class TelemetryConfig:
    """Where traces and metrics go; everything is off when empty."""

    otlp: str = field(
        default="",
        metadata={"help": "OTLP gRPC endpoint for traces and metrics, http://host:4317; empty: off"},
    )
    prometheus: str = field(
        default="",
        metadata={"help": "loopback address:port of the Prometheus endpoint, as host.rpc.tcp; empty: off"},
    )
    sample_ratio: float = field(
        default=1.0, metadata={"help": "share of new traces that is recorded, 0 to 1"}
    )
    metrics_interval_s: float = field(
        default=15.0, metadata={"help": "seconds between two OTLP metric exports"}
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.sample_ratio <= 1.0:
            raise InvalidArgument(f"{self.sample_ratio} is outside 0..1", field="sample_ratio")
        if not 1.0 <= self.metrics_interval_s <= 3600.0:
            raise InvalidArgument(f"{self.metrics_interval_s} is outside 1..3600", field="metrics_interval_s")
        if self.otlp and not self.otlp.startswith(("http://", "https://")):
            raise InvalidArgument(
                f"{self.otlp!r} is not an OTLP endpoint", field="otlp", fix="write http://host:port"
            )
        if self.prometheus:
            prometheus_address(self.prometheus)


def prometheus_address(text: str) -> tuple[str, int]:
    """Split "127.0.0.1:9464" or "[::1]:9464". Raises InvalidArgument for anything but a loopback address: the
    endpoint has no authentication.
    """
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
        number = int(port)
    except ValueError:
        raise InvalidArgument(
            f"{text!r} is not address:port", field="prometheus", fix="write 127.0.0.1:9464"
        ) from None
    if not address.is_loopback:
        raise InvalidArgument(
            f"{host} is not a loopback address",
            field="prometheus",
            fix="use 127.0.0.1 and put a proxy with authentication in front of it",
        )
    if not 0 <= number <= 65535:
        raise InvalidArgument(f"port {number} is outside 0..65535", field="prometheus")
    return str(address), number


class Counter:
    """A sum that only grows."""

    def add(self, amount: float = 1, **attributes: Value) -> None:
        """Count `amount` more."""


class Histogram:
    """A distribution."""

    def record(self, value: float, **attributes: Value) -> None:
        """Add one observation."""


class Meter:
    """Makes instruments. This one, used while metrics are off, makes such that do nothing."""

    def counter(self, name: str, *, unit: str = "1", description: str = "") -> Counter:
        """A counter, for example "fibril.rpc.errors"."""
        return Counter()

    def histogram(self, name: str, *, unit: str = "s", description: str = "") -> Histogram:
        """A histogram; with unit "s" the boundaries reach from 200 µs to 30 s."""
        return Histogram()

    def gauge(
        self, name: str, read: Callable[[], Iterable[Reading]], *, unit: str = "1", description: str = ""
    ) -> None:
        """Call `read` whenever metrics are collected. It runs on a collector's thread: copy what it reads."""

    def sum(
        self, name: str, read: Callable[[], Iterable[Reading]], *, unit: str = "1", description: str = ""
    ) -> None:
        """Like `gauge`, for a value that only grows and is counted elsewhere (in the kernel)."""


class Span(Protocol):
    """What `span` yields."""

    def set_attribute(self, key: str, value: Value) -> None:
        """Add what became known during the span."""


class _NoSpan:
    """Stands for every span while tracing is off; one object, so that entering it costs two calls and no
    allocation.
    """

    def __enter__(self) -> _NoSpan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def set_attribute(self, key: str, value: Value) -> None:
        return None


_NO_SPAN = _NoSpan()
_OFF = Meter()


class Telemetry:
    """The process's telemetry. Made by `setup`; `close` flushes what is queued."""

    def __init__(self) -> None:
        self.tracer: Tracer | None = None
        self.meter: Meter = _OFF
        self._closers: list[Callable[[], Any]] = []
        self.prometheus_port = 0

    @property
    def tracing(self) -> bool:
        """Whether spans are recorded."""
        return self.tracer is not None

    @property
    def metering(self) -> bool:
        """Whether metrics are recorded."""
        return self.meter is not _OFF

    def span(self, name: str, **attributes: Value) -> AbstractContextManager[Span]:
        """A span around a block; an exception marks it as failed."""
        if self.tracer is None:
            return _NO_SPAN
        return self.tracer.start_as_current_span(name, attributes=attributes)

    def close(self) -> None:
        """Export what is queued and stop the exporters; blocks for up to a few seconds if a collector does
        not answer.
        """
        closers, self._closers = self._closers, []
        self.tracer, self.meter = None, _OFF
        for closer in reversed(closers):
            try:
                closer()
            except Exception:
                log.warning("telemetry could not be flushed", exc_info=True)


_current = Telemetry()


def setup(service: str, cfg: TelemetryConfig | None = None, instance: str = "") -> Telemetry:
    """Start what `cfg` asks for and make it the process's telemetry. Raises FailedPrecondition when the
    Prometheus port is taken.
    """
    global _current
    cfg = cfg or TelemetryConfig()
    made = Telemetry()
    if cfg.otlp or cfg.prometheus:
        _start(made, service, cfg, instance)
    _current = made
    return made


def current() -> Telemetry:
    """The process's telemetry; everything off before `setup`."""
    return _current


def metrics() -> Meter:
    """The process's meter."""
    return _current.meter


def span(name: str, **attributes: Value) -> AbstractContextManager[Span]:
    """A span of the process's tracer; under 1 µs while tracing is off."""
    if _current.tracer is None:
        return _NO_SPAN
    return _current.span(name, **attributes)


def trace_ids() -> dict[str, str]:
    """trace_id and span_id of the active span for log records, empty without one."""
    if _current.tracer is None:
        return {}
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": format(context.trace_id, "032x"), "span_id": format(context.span_id, "016x")}


def _start(made: Telemetry, service: str, cfg: TelemetryConfig, instance: str) -> None:
    from opentelemetry.sdk.metrics import Histogram as SdkHistogram
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
    from opentelemetry.sdk.resources import Resource

    resource = Resource.create(
        {
            "service.namespace": "fibril",
            "service.name": service,
            "service.version": version(),
            "fibril.instance": instance,
        }
    )
    readers: list[MetricReader] = []
    if cfg.prometheus:
        readers.append(_prometheus(made, cfg.prometheus))
    if cfg.otlp:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        exporter = OTLPMetricExporter(
            endpoint=cfg.otlp, insecure=cfg.otlp.startswith("http://"), timeout=_EXPORT_TIMEOUT_S
        )
        readers.append(
            PeriodicExportingMetricReader(exporter, export_interval_millis=cfg.metrics_interval_s * 1000)
        )
        _start_traces(made, cfg, resource)
    seconds = View(
        instrument_type=SdkHistogram,
        instrument_unit="s",
        aggregation=ExplicitBucketHistogramAggregation(_DURATION_BOUNDARIES),
    )
    provider = MeterProvider(metric_readers=readers, resource=resource, views=[seconds])
    made._closers.append(provider.shutdown)
    made.meter = _OtelMeter(provider.get_meter("fibril", version()))


def _prometheus(made: Telemetry, address: str) -> MetricReader:
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from prometheus_client import CollectorRegistry, start_http_server

    host, port = prometheus_address(address)
    registry = CollectorRegistry()
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise FailedPrecondition(
            f"Prometheus endpoint {address} cannot be opened: {error.strerror}",
            field="telemetry.prometheus",
            fix="choose another port, or 0 for any",
        ) from error

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join(2)

    made._closers.append(close)
    made.prometheus_port = server.server_port
    return PrometheusMetricReader(scope_info_enabled=False, registry=registry)


def _start_traces(made: Telemetry, cfg: TelemetryConfig, resource: Any) -> None:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(cfg.sample_ratio)))
    exporter = OTLPSpanExporter(
        endpoint=cfg.otlp, insecure=cfg.otlp.startswith("http://"), timeout=_EXPORT_TIMEOUT_S
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    made._closers.append(provider.shutdown)
    made.tracer = provider.get_tracer("fibril", version())


class _OtelCounter(Counter):
    def __init__(self, instrument: Any) -> None:
        self._instrument = instrument

    def add(self, amount: float = 1, **attributes: Value) -> None:
        self._instrument.add(amount, attributes)


class _OtelHistogram(Histogram):
    def __init__(self, instrument: Any) -> None:
        self._instrument = instrument

    def record(self, value: float, **attributes: Value) -> None:
        self._instrument.record(value, attributes)


class _OtelMeter(Meter):
    def __init__(self, meter: OtelMeter) -> None:
        self._meter = meter

    def counter(self, name: str, *, unit: str = "1", description: str = "") -> Counter:
        return _OtelCounter(self._meter.create_counter(name, unit=unit, description=description))

    def histogram(self, name: str, *, unit: str = "s", description: str = "") -> Histogram:
        return _OtelHistogram(self._meter.create_histogram(name, unit=unit, description=description))

    def gauge(
        self, name: str, read: Callable[[], Iterable[Reading]], *, unit: str = "1", description: str = ""
    ) -> None:
        self._meter.create_observable_gauge(name, [_observe(name, read)], unit=unit, description=description)

    def sum(
        self, name: str, read: Callable[[], Iterable[Reading]], *, unit: str = "1", description: str = ""
    ) -> None:
        self._meter.create_observable_counter(
            name, [_observe(name, read)], unit=unit, description=description
        )


def _observe(
    name: str, read: Callable[[], Iterable[Reading]]
) -> Callable[[CallbackOptions], Iterable[Observation]]:
    from opentelemetry.metrics import Observation

    def callback(_options: CallbackOptions) -> Iterable[Observation]:
        try:
            return [Observation(value, dict(attributes)) for value, attributes in read()]
        except Exception:
            # One failing reading must not take the whole page down.
            log.warning("metric could not be read", extra={"metric": name}, exc_info=True)
            return []

    return callback
