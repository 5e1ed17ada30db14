"""TlsService: fibril.tls.v1."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fibril.tls.v1 import tls_pb2 as pb
from fibril.tls.v1 import tls_pb2_grpc
from services.common.errors import InvalidArgument
from services.sockaccel.store import Store
from services.sockaccel.tls import model
from services.sockaccel.tls.looker import KEPT, Looker


class TlsApi(tls_pb2_grpc.TlsServiceServicer):
    """One servicer for all servers of the process."""

    def __init__(self, store: Store, looker: Looker) -> None:
        self._store, self._looker = store, looker

    async def UpsertTarget(self, request: pb.UpsertTargetRequest, context: object) -> pb.UpsertTargetResponse:
        target = model.declared(request.target, "target")
        created = self._store.upsert_target(target)
        await self._looker.agree()
        return pb.UpsertTargetResponse(target=model.message(target), created=created)

    async def DeleteTarget(self, request: pb.DeleteTargetRequest, context: object) -> pb.DeleteTargetResponse:
        self._store.delete_target(request.name)
        self._looker.forget()
        await self._looker.agree()
        return pb.DeleteTargetResponse()

    async def ListTargets(self, request: pb.ListTargetsRequest, context: object) -> pb.ListTargetsResponse:
        return pb.ListTargetsResponse(targets=[model.message(each) for _, each in sorted(self._store.targets.items())])

    async def ListProbes(self, request: pb.ListProbesRequest, context: object) -> pb.ListProbesResponse:
        return self._looker.probes()

    async def FollowMessages(
        self, request: pb.FollowMessagesRequest, context: object
    ) -> AsyncIterator[pb.FollowMessagesResponse]:
        if request.last > KEPT:
            raise InvalidArgument(f"{request.last} is more than are kept", field="last", fix=f"ask for {KEPT} at most")
        async for message in self._looker.follow(request.last):
            if message is None:
                yield pb.FollowMessagesResponse(synced=True)
            elif request.pod in ("", message.pod):
                yield pb.FollowMessagesResponse(message=message)
