"""SetEndpointIdentities for many callers: one call at a time, with all that was wanted while the one before ran."""

from __future__ import annotations

import asyncio
import itertools

import grpc

from fibril.endpoint.v1 import endpoint_pb2 as pb
from fibril.endpoint.v1.endpoint_pb2_grpc import EndpointServiceStub
from services.common import errors
from services.common.rpc.status import from_rpc_error

TIMEOUT_S = 10.0
MOST = 5000


class Teller:
    """Lives as long as its stub's channel."""

    def __init__(self, stub: EndpointServiceStub) -> None:
        self._stub = stub
        self._waiting: dict[int, tuple[pb.EndpointIdentity, asyncio.Future[None]]] = {}
        self._sender: asyncio.Task[None] | None = None

    async def tell(self, number: int, container_id: str, identity: int) -> None:
        """Back when ipam has recorded it; an endpoint that is gone is success. Raises what the call does. One caller an
        endpoint at a time.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        message = pb.EndpointIdentity(id=number, container_id=container_id, identity=identity)
        self._waiting[number] = message, done
        if self._sender is None:
            self._sender = loop.create_task(self._send())
        await done

    async def _send(self) -> None:
        try:
            while self._waiting:
                batch = [self._waiting.pop(number) for number in list(itertools.islice(self._waiting, MOST))]
                error = await self._call([message for message, _ in batch])
                for _, done in batch:
                    if done.done():
                        continue
                    if error is None:
                        done.set_result(None)
                    else:
                        done.set_exception(error)
        finally:
            self._sender = None

    async def _call(self, identities: list[pb.EndpointIdentity]) -> errors.FibrilError | None:
        request = pb.SetEndpointIdentitiesRequest(identities=identities)
        try:
            await self._stub.SetEndpointIdentities(request, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error)
        except (asyncio.CancelledError, grpc.aio.UsageError):
            # That is how gRPC says that the channel was closed during the call, or before; nobody cancels this task.
            return errors.Unavailable("the connection to ipam was closed")
        return None
