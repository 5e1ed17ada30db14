"""What happens around every RPC. Handlers are wrapped once, when they are registered, with only the layers
that are
switched on: no interceptor runs per call. From outside to inside:

    errors    the only place where an exception becomes a status
    observe   span and duration, only with telemetry
    role      role of the TLS peer, only on TCP
    deadline  unary answers: the longest an RPC may take whatever the client asked for
    drain     streams: end with UNAVAILABLE when the server drains, so that watchers reconnect at once
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc

from services.common.errors import DeadlineExceeded, FibrilError, Internal, Unavailable, Unimplemented
from services.common.rpc import auth, status
from services.common.telemetry import Telemetry

log = logging.getLogger(__name__)

Unary = Callable[[Any, Any], Awaitable[Any]]
Stream = Callable[[Any, Any], AsyncIterator[Any]]


class Layers:
    """Wraps the handlers of one server."""

    def __init__(self, *, check_roles: bool, max_deadline_s: float, telemetry: Telemetry) -> None:
        self._check_roles = check_roles
        self._max_deadline_s = max_deadline_s
        self._telemetry = telemetry
        self._streams: set[asyncio.Task[Any]] = set()
        self._draining = False

    def wrap(self, method: str, handler: Any) -> Any:
        """A grpc.RpcMethodHandler that does what `handler` does, with the layers around it."""
        behavior = (
            handler.stream_unary or handler.unary_unary or handler.stream_stream or handler.unary_stream
        )
        if handler.response_streaming:
            wrapped: Any = self._wrap_stream(method, behavior)
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
        else:
            wrapped = self._wrap_unary(method, behavior, handler.request_streaming)
            make = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
        return make(
            wrapped,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def end_streams(self) -> None:
        """End all open streams with UNAVAILABLE, and new ones at once."""
        self._draining = True
        for task in self._streams:
            task.cancel()

    def _wrap_unary(self, method: str, behavior: Unary, in_parts: bool) -> Unary:
        call = (_deadline_of_parts if in_parts else _deadline)(method, behavior, self._max_deadline_s)
        if self._check_roles:
            call = _role_unary(method, call)
        if self._telemetry.tracing or self._telemetry.metering:
            from services.common.rpc import observe

            call = observe.unary(method, call, self._telemetry)
        return _errors_unary(method, call)

    def _wrap_stream(self, method: str, behavior: Any) -> Stream:
        call = self._drain(method, _as_stream(behavior))
        if self._check_roles:
            call = _role_stream(method, call)
        if self._telemetry.tracing or self._telemetry.metering:
            from services.common.rpc import observe

            call = observe.stream(method, call, self._telemetry)
        return _errors_stream(method, call)

    def _drain(self, method: str, behavior: Stream) -> Stream:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            task = asyncio.current_task()
            assert task is not None
            self._streams.add(task)
            try:
                if self._draining:
                    raise _drained(method)
                async with _closing(behavior(request, context)) as messages:
                    async for message in messages:
                        yield message
            except asyncio.CancelledError:
                # Cancelled by end_streams, or by gRPC because the client has gone: only the first has a
                # reader left.
                if not self._draining:
                    raise
                task.uncancel()
                raise _drained(method) from None
            finally:
                self._streams.discard(task)

        return call


def _drained(method: str) -> FibrilError:
    return Unavailable(f"{method} ended because the service is stopping", fix="call again")


def _closing(messages: AsyncIterator[Any]) -> Any:
    return aclosing(messages)


def _as_stream(behavior: Any) -> Stream:
    """gRPC also allows a coroutine that calls context.write (its own health service does that)."""

    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        result = behavior(request, context)
        if hasattr(result, "__aiter__"):
            async with _closing(result) as messages:
                async for message in messages:
                    yield message
        else:
            await result

    return behavior if inspect.isasyncgenfunction(behavior) else call


def _deadline(method: str, behavior: Unary, limit_s: float) -> Unary:
    async def call(request: Any, context: Any) -> Any:
        remaining = context.time_remaining()
        if remaining is not None and remaining <= limit_s:
            # gRPC itself cancels the handler then; a timer of ours would cost 20 µs a call and add nothing.
            return await behavior(request, context)
        try:
            async with asyncio.timeout(limit_s) as scope:
                return await behavior(request, context)
        except TimeoutError:
            if not scope.expired():
                raise
            raise DeadlineExceeded(f"{method} took longer than the server's limit of {limit_s:g} s") from None

    return call


def _deadline_of_parts(method: str, behavior: Unary, limit_s: float) -> Unary:
    """Of requests that come in parts: how many there are is the client's affair, so each has as long as others have in all."""

    async def call(request: Any, context: Any) -> Any:
        async def parts() -> AsyncIterator[Any]:
            async for part in request:
                scope.reschedule(asyncio.get_running_loop().time() + limit_s)
                yield part

        try:
            async with asyncio.timeout(limit_s) as scope:
                return await behavior(parts(), context)
        except TimeoutError:
            if not scope.expired():
                raise
            raise DeadlineExceeded(
                f"{method} went without progress for longer than the server's limit of {limit_s:g} s"
            ) from None

    return call


def _role_unary(method: str, behavior: Unary) -> Unary:
    async def call(request: Any, context: Any) -> Any:
        auth.check(method, context.auth_context())
        return await behavior(request, context)

    return call


def _role_stream(method: str, behavior: Stream) -> Stream:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        auth.check(method, context.auth_context())
        async with _closing(behavior(request, context)) as messages:
            async for message in messages:
                yield message

    return call


def _errors_unary(method: str, behavior: Unary) -> Unary:
    async def call(request: Any, context: Any) -> Any:
        try:
            return await behavior(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(method, context, error)

    return call


def _errors_stream(method: str, behavior: Stream) -> Stream:
    async def call(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async with _closing(behavior(request, context)) as messages:
                async for message in messages:
                    yield message
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(method, context, error)

    return call


async def _abort(method: str, context: Any, error: Exception) -> None:
    code, text, metadata = status.encode(as_fibril_error(method, error))
    await context.abort(code, text, metadata)


def as_fibril_error(method: str, error: Exception) -> FibrilError:
    """What the caller is told. An exception nobody expected is logged here and named by RPC and process only,
    since its text may hold what is none of the caller's business.
    """
    if isinstance(error, FibrilError):
        if isinstance(error, Internal):
            log.error("RPC failed", extra={"method": method}, exc_info=error)
        return error
    if isinstance(error, NotImplementedError):
        return Unimplemented(f"{method} is not implemented by this service")
    log.error("RPC failed", extra={"method": method}, exc_info=error)
    return Internal(f"{method} failed unexpectedly", fix=f"see the log of process {os.getpid()}")
