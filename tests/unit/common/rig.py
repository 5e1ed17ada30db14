"""A gRPC service whose answers a test scripts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from fibril.ipam.v1 import ipam_pb2, ipam_pb2_grpc
from services.common.rpc.client import TlsFiles, channel
from services.common.rpc.server import RpcServer


class Scripted(ipam_pb2_grpc.IpamServiceServicer):
    """GetPool (a reader's method) and Allocate (a writer's) run `answer`; WatchAllocations yields `messages`
    messages and then waits for `more`.
    """

    def __init__(self) -> None:
        self.answer: Callable[[Any, Any], Awaitable[Any]] | None = None
        self.messages = 0
        self.more = asyncio.Event()
        self.failure: Exception | None = None
        self.calls = 0
        self.cancelled = asyncio.Event()
        self.entered = asyncio.Event()

    async def GetPool(self, request: ipam_pb2.GetPoolRequest, context: Any) -> Any:
        return await self._run(request, context, ipam_pb2.GetPoolResponse())

    async def Allocate(self, request: ipam_pb2.AllocateRequest, context: Any) -> Any:
        return await self._run(request, context, ipam_pb2.AllocateResponse())

    async def _run(self, request: Any, context: Any, default: Any) -> Any:
        self.calls += 1
        self.entered.set()
        try:
            return await self.answer(request, context) if self.answer else default
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def WatchAllocations(
        self, request: ipam_pb2.WatchAllocationsRequest, context: Any
    ) -> AsyncIterator[ipam_pb2.WatchAllocationsResponse]:
        try:
            for revision in range(self.messages):
                yield ipam_pb2.WatchAllocationsResponse(revision=revision)
            await self.more.wait()
            if self.failure:
                raise self.failure
        finally:
            self.cancelled.set()


class Rig:
    """A running server, its scripted servicer and a stub of it."""

    def __init__(self, server: RpcServer, servicer: Scripted, target: str) -> None:
        self.server = server
        self.servicer = servicer
        self.target = target

    @asynccontextmanager
    async def stub(self, tls: TlsFiles | None = None) -> AsyncIterator[ipam_pb2_grpc.IpamServiceStub]:
        async with channel(self.target, tls=tls, server_name="fibril" if tls else "") as link:
            yield ipam_pb2_grpc.IpamServiceStub(link)


Start = Callable[..., Awaitable[Rig]]


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """The error a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value
