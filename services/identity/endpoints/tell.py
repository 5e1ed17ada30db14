"""SetEndpointIdentities for many callers: what they want in one turn of the event loop goes in one call."""

from __future__ import annotations

import asyncio

import grpc

from fibril.endpoint.v1 import endpoint_pb2 as pb
from fibril.endpoint.v1.endpoint_pb2_grpc import EndpointServiceStub
from services.common import errors

TIMEOUT_S = 10.0
MOST = 5000


class Teller:
    """Lives as long as its stub's channel."""

    def __init__(self, stub: EndpointServiceStub) -> None:
        self._stub = stub
        self._waiting: dict[int, pb.EndpointIdentity] = {}
        self._call: asyncio.Task[None] | None = None

    async def tell(self, number: int, container_id: str, identity: int) -> None:
        """Back when ipam has recorded it; an endpoint that is gone is success. Raises what the call does."""
        if self._call is None or len(self._waiting) >= MOST:
            self._waiting = {}
            self._call = asyncio.get_running_loop().create_task(self._send(self._waiting))
        self._waiting[number] = pb.EndpointIdentity(id=number, container_id=container_id, identity=identity)
        # A caller that is cancelled takes no others along.
        await asyncio.shield(self._call)

    async def _send(self, wanted: dict[int, pb.EndpointIdentity]) -> None:
        await asyncio.sleep(0)
        if wanted is self._waiting:
            self._call = None
        request = pb.SetEndpointIdentitiesRequest(identities=wanted.values())
        try:
            await self._stub.SetEndpointIdentities(request, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc_error(error) from None
