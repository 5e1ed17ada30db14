"""Telling ipam of identities over a connection that ends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fibril.endpoint.v1 import endpoint_pb2_grpc
from services.common import errors
from services.common.rpc.client import channel
from services.common.rpc.server import RpcConfig, RpcServer
from services.common.telemetry import Telemetry
from services.identity.endpoints.tell import Teller


class Silent(endpoint_pb2_grpc.EndpointServiceServicer):
    """Has heard, and says nothing."""

    def __init__(self) -> None:
        self.heard = asyncio.Event()

    async def SetEndpointIdentities(self, request: Any, context: Any) -> Any:
        self.heard.set()
        await asyncio.sleep(3600)


async def test_nobody_waits_for_a_connection_that_was_closed(run_dir: Path) -> None:
    silent = Silent()
    server = RpcServer(run_dir / "ipam.sock", RpcConfig(), Telemetry())
    server.add(endpoint_pb2_grpc.add_EndpointServiceServicer_to_server, silent)
    await server.start()
    try:
        async with channel(f"unix:{run_dir / 'ipam.sock'}") as link:
            teller = Teller(endpoint_pb2_grpc.EndpointServiceStub(link))
            asked = asyncio.create_task(teller.tell(1, "a", 100))
            await asyncio.wait_for(silent.heard.wait(), 20)
            # Its turn comes when the call under way has ended.
            queued = asyncio.create_task(teller.tell(2, "b", 100))
            await asyncio.sleep(0)
        for task in (asked, queued):
            with pytest.raises(errors.Unavailable, match="was closed"):
                await asyncio.wait_for(task, 20)
    finally:
        await server.drain(0)
