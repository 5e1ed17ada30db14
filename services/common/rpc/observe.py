"""Span and duration of every RPC, on the server and, for the span, on the client. Imported only with
telemetry on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.common.errors import FibrilError
from services.common.telemetry import Telemetry

_propagator = TraceContextTextMapPropagator()


def unary(method: str, behavior: Any, telemetry: Telemetry) -> Any:
    """`behavior` with a server span and an observation of fibril.rpc.duration."""
    scope = _scope(method, telemetry)

    async def call(request: Any, context: Any) -> Any:
        with scope(context):
            return await behavior(request, context)

    return call


def stream(method: str, behavior: Any, telemetry: Telemetry) -> Any:
    """Like `unary`, from the first to the last message."""
    scope = _scope(method, telemetry)

    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        with scope(context):
            async with aclosing(behavior(request, context)) as messages:
                async for message in messages:
                    yield message

    return call


def _scope(method: str, telemetry: Telemetry) -> Callable[[Any], Any]:
    tracer = telemetry.tracer
    duration = telemetry.meter.histogram("fibril.rpc.duration", unit="s", description="time an RPC took")
    service, _, name = method.lstrip("/").partition("/")
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}

    @contextmanager
    def scope(context: Any) -> Iterator[None]:
        begin = time.perf_counter()
        span = (
            _server_span(tracer, f"{service}/{name}", attributes, context) if tracer else trace.INVALID_SPAN
        )
        code = "OK"
        # A stream's handler may be resumed in another context than the one it began in, so the token of
        # attach() may not be valid any more at the end; use_span would then log an error for every watch that
        # is cancelled.
        token = otel_context.attach(trace.set_span_in_context(span)) if tracer else None
        try:
            yield
        except BaseException as error:
            code = _code(error, context)
            if span.is_recording() and code not in ("CANCELLED", "OK"):
                span.set_status(Status(StatusCode.ERROR, str(error)))
            raise
        finally:
            span.set_attribute("rpc.grpc.status_code", grpc.StatusCode[code].value[0])
            span.end()
            if token is not None:
                _detach(token)
            duration.record(time.perf_counter() - begin, method=f"{service}/{name}", code=code)

    return scope


def _detach(token: Any) -> None:
    try:
        token.var.reset(token)
    except ValueError:
        pass


def _server_span(tracer: Tracer, name: str, attributes: dict[str, str], context: Any) -> trace.Span:
    carrier = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    parent = _propagator.extract(carrier)
    return tracer.start_span(name, context=parent, kind=SpanKind.SERVER, attributes=attributes)


def _code(error: BaseException, context: Any) -> str:
    if isinstance(error, FibrilError):
        return error.code_name
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "CANCELLED"
    if isinstance(error, grpc.aio.AbortError):
        code = context.code()
        return code.name if isinstance(code, grpc.StatusCode) else "UNKNOWN"
    return "UNIMPLEMENTED" if isinstance(error, NotImplementedError) else "INTERNAL"


def client_interceptors(tracer: Tracer) -> list[Any]:
    """Interceptors that put a client span around each call and send its trace context along."""
    return [_UnaryClient(tracer), _StreamClient(tracer)]


class _Client:
    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def _begin(self, details: Any) -> tuple[trace.Span, Any]:
        method = details.method.decode() if isinstance(details.method, bytes) else details.method
        service, _, name = method.lstrip("/").partition("/")
        span = self._tracer.start_span(
            f"{service}/{name}",
            kind=SpanKind.CLIENT,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
        )
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, trace.set_span_in_context(span))
        metadata = grpc.aio.Metadata(*(tuple(details.metadata or ())), *carrier.items())
        return span, details._replace(metadata=metadata)

    @staticmethod
    async def _end(span: trace.Span, call: Any) -> None:
        code = await call.code()
        if code is not grpc.StatusCode.OK:
            span.set_status(Status(StatusCode.ERROR))
        span.set_attribute("rpc.grpc.status_code", code.value[0])
        span.end()


class _UnaryClient(_Client, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        span, details = self._begin(details)
        call = await continuation(details, request)
        await self._end(span, call)
        return call


class _StreamClient(_Client, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[misc]
    def __init__(self, tracer: Tracer) -> None:
        super().__init__(tracer)
        self._endings: set[asyncio.Task[None]] = set()

    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        span, details = self._begin(details)
        call = await continuation(details, request)
        # The span lasts as long as the stream, which nobody here waits for.
        ending = asyncio.create_task(self._end(span, call))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)
        return call
