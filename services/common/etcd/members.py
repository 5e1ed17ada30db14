"""The way to an etcd cluster: which member is asked, for how long, and what its failure means.

Calls go to one member until that fails, then to the next. A call that finds none within the timeout raises Unavailable.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import grpc
from aetcd import rpc

from services.common.errors import Aborted, FibrilError, ResourceExhausted, Unavailable, by_code
from services.common.etcd.endpoint import Endpoint, EtcdTls, endpoints

log = logging.getLogger(__name__)

# UNKNOWN is what etcd lets through when it has no quorum or is about to end ("context deadline exceeded",
# "raft: stopped"); every refusal has a code of its own.
_TRANSIENT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
}
_OF_NOW = (rpc.RangeResponse, rpc.PutResponse, rpc.DeleteRangeResponse, rpc.TxnResponse)


class Compacted(Aborted):
    """The revision asked for is no longer kept; list again."""


class CallFailed(Exception):
    """A stream ended with this status; as gRPC's own error, for calls of ours that are streams."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        # A stream that the server ended without complaint has still ended.
        self._code = grpc.StatusCode.UNAVAILABLE if code is grpc.StatusCode.OK else code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return str(self)


@contextlib.contextmanager
def _closing_fails() -> Iterator[None]:
    """When a channel is closed, gRPC raises CancelledError in those who wait for an answer on it. They were not
    cancelled; their call has failed.
    """
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise CallFailed(grpc.StatusCode.UNAVAILABLE, "the connection was closed") from None


async def _why(endpoint: Endpoint) -> str:
    try:
        with _closing_fails():
            return await endpoint.why()
    except CallFailed as error:
        return error.details()


class Members:
    """The members of a cluster that may be asked; used from one event loop."""

    def __init__(self, urls: Sequence[str], tls: EtcdTls | None, timeout_s: float) -> None:
        """timeout_s: the most any call takes. Raises InvalidArgument for a malformed URL; connects to nothing."""
        self._endpoints = endpoints(urls, tls)
        self._timeout_s = timeout_s
        self._current = 0
        self._known = (0, 0)
        self._is_another = False
        self.healthy = False
        self.error = "not connected yet"
        self.since = time.time()

    async def close(self) -> None:
        """End every call and stream. They may be asked again."""
        for endpoint in self._endpoints:
            await endpoint.close()

    @property
    def urls(self) -> tuple[str, ...]:
        """As given."""
        return tuple(endpoint.address.url for endpoint in self._endpoints)

    def put_back(self, answer: Any) -> bool:
        """Whether the cluster is another than was known, or put back; from this answer on it is what is known."""
        found, self._is_another = self._is_another, False
        if found:
            self._known = answer.header.cluster_id, answer.header.revision
        return found

    async def read(self, call: Callable[[Endpoint, float], Awaitable[Any]]) -> Any:
        """Repeat a call without effect (or one that may be repeated) on any server until it succeeds."""
        deadline = time.monotonic() + self._timeout_s
        # A hanging server must leave time to ask another.
        share = self._timeout_s / len(self._endpoints)
        while True:
            endpoint = await self._connect(deadline)
            left, known = deadline - time.monotonic(), self._known
            try:
                with _closing_fails():
                    answer = await call(endpoint, max(0.01, min(left, share)))
            except (grpc.aio.AioRpcError, CallFailed) as error:
                translated = self._translate(error, endpoint, ambiguous=False)
                if not isinstance(translated, Unavailable):
                    raise translated from error
                self._rotate(endpoint)
                if time.monotonic() + 0.01 >= deadline:
                    raise translated from error
                await asyncio.sleep(0.01)
            else:
                self._reached()
                self._note(answer, known)
                return answer

    async def write(self, call: Callable[[Endpoint, float], Awaitable[Any]]) -> Any:
        """Make a call once, as soon as there is a connection."""
        deadline = time.monotonic() + self._timeout_s
        endpoint = await self._connect(deadline)
        known = self._known
        try:
            with _closing_fails():
                answer = await call(endpoint, max(0.01, deadline - time.monotonic()))
        except (grpc.aio.AioRpcError, CallFailed) as error:
            translated = self._translate(error, endpoint, ambiguous=True)
            if isinstance(translated, Unavailable):
                self._rotate(endpoint)
            raise translated from error
        self._reached()
        self._note(answer, known)
        return answer

    async def stream(self, begin: Callable[[Endpoint], Any], request: Any) -> AsyncGenerator[Any, None]:
        """What a member answers to one request on a stream of its own, until it breaks: then raises Unavailable."""
        endpoint = await self._connect(time.monotonic() + self._timeout_s)
        call = begin(endpoint)
        try:
            with _closing_fails():
                await call.write(request)
                # A server that hangs accepts the connection and never answers. Not wait_for: with Python 3.11 it
                # may swallow the cancellation of its caller.
                async with asyncio.timeout(self._timeout_s):
                    answer = await call.read()
            while answer is not grpc.aio.EOF:
                self._reached()
                yield answer
                with _closing_fails():
                    answer = await call.read()
            raise CallFailed(await call.code(), await call.details() or "the server ended the stream")
        except (grpc.aio.AioRpcError, CallFailed, TimeoutError, asyncio.InvalidStateError) as error:
            self._rotate(endpoint)
            raise self._translate(error, endpoint, ambiguous=False) from error
        finally:
            call.cancel()

    async def _connect(self, deadline: float) -> Endpoint:
        """The current server, or the next one that can be reached. Raises Unavailable at `deadline`."""
        alone = len(self._endpoints) == 1
        while True:
            for _ in self._endpoints:
                endpoint = self._endpoints[self._current]
                # An address that swallows packets must leave time for the others.
                limit = deadline if alone else min(deadline, time.monotonic() + self._timeout_s / 3)
                if await endpoint.ready(limit, patient=alone):
                    return endpoint
                self._rotate(endpoint)
            if time.monotonic() >= deadline:
                break
            await asyncio.sleep(0.02)
        reasons = [f"{e.address.url}: {await _why(e)}" for e in self._endpoints]
        raise self._unreachable(f"etcd cannot be reached ({'; '.join(reasons)})")

    def _note(self, answer: Any, before: tuple[int, int]) -> None:
        """Remember how far etcd has come. before: what was known when the call was made. Answers may arrive in another order
        than they were given, but none is from before what was known then.
        """
        # Of leases a member tells that may lag behind.
        if isinstance(answer, _OF_NOW):
            cluster, revision = answer.header.cluster_id, answer.header.revision
            if before[0] and (cluster != before[0] or revision < before[1]):
                self._is_another = True
            if self._known[0] in (0, cluster):
                self._known = cluster, max(self._known[1], revision)

    def _rotate(self, failed: Endpoint) -> None:
        """Turn to the next server, unless another call has done so already."""
        if self._endpoints[self._current] is failed:
            self._current = (self._current + 1) % len(self._endpoints)

    def _reached(self) -> None:
        if not self.healthy:
            log.info("etcd is reachable", extra={"endpoint": self._endpoints[self._current].address.url})
            self.healthy, self.error, self.since = True, "", time.time()

    def _unreachable(self, message: str) -> Unavailable:
        if self.healthy:
            log.warning("etcd is not reachable", extra={"error": message})
            self.healthy, self.since = False, time.time()
        self.error = message
        return Unavailable(message, fix="check that etcd runs and the endpoints are right; it is tried again")

    def _translate(self, error: Exception, endpoint: Endpoint, *, ambiguous: bool) -> FibrilError:
        code, details = grpc.StatusCode.DEADLINE_EXCEEDED, "no answer in time"
        if isinstance(error, (grpc.aio.AioRpcError, CallFailed)):
            code, details = error.code(), error.details() or code.name
        url = endpoint.address.url
        if code in _TRANSIENT:
            doubt = "; whether the change was made is unknown" if ambiguous else ""
            return self._unreachable(f"etcd at {url} failed: {details}{doubt}")
        self._reached()  # a refusal is an answer
        if code is grpc.StatusCode.OUT_OF_RANGE:
            return Compacted(f"etcd at {url}: {details}")
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return ResourceExhausted(
                f"etcd at {url} refuses changes: {details}",
                fix="compact and defragment it and disarm its alarm with etcdctl, or raise its quota",
            )
        return by_code(code.name)(f"etcd at {url}: {details}")
