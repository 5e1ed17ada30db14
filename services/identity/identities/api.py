"""fibril.identity.v1.IdentityService: proto to domain and back, no decisions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from itertools import islice
from typing import Any

from fibril.identity.v1 import identity_pb2 as pb
from fibril.identity.v1 import identity_pb2_grpc
from fibril.types.v1 import types_pb2
from services.common import errors
from services.identity.identities.allocator import Allocator
from services.identity.identities.model import Identity, check_holder, check_labels

_PAGE, _PAGE_MAX = 1_000, 10_000
_KINDS = {
    "put": types_pb2.WATCH_KIND_PUT,
    "delete": types_pb2.WATCH_KIND_DELETE,
    "synced": types_pb2.WATCH_KIND_SYNCED,
}


class IdentityApi(identity_pb2_grpc.IdentityServiceServicer):
    """See the contract."""

    def __init__(self, allocator: Allocator) -> None:
        self._allocator = allocator

    async def AllocateIdentity(
        self, request: pb.AllocateIdentityRequest, context: Any
    ) -> pb.AllocateIdentityResponse:
        labels = _labels(request.labels)
        check_holder(request.holder)
        identity = await self._allocator.allocate(labels, request.holder)
        return pb.AllocateIdentityResponse(identity=to_proto(identity))

    async def ReleaseIdentity(
        self, request: pb.ReleaseIdentityRequest, context: Any
    ) -> pb.ReleaseIdentityResponse:
        check_holder(request.holder)
        return pb.ReleaseIdentityResponse(number=await self._allocator.release(request.holder))

    async def GetIdentity(self, request: pb.GetIdentityRequest, context: Any) -> pb.GetIdentityResponse:
        if not request.number:
            raise errors.InvalidArgument("no identity has the number 0", field="number")
        identity = self._allocator.get(request.number)
        if identity is None:
            raise self._unknown(f"there is no identity {request.number}")
        return pb.GetIdentityResponse(identity=to_proto(identity))

    async def ResolveIdentity(
        self, request: pb.ResolveIdentityRequest, context: Any
    ) -> pb.ResolveIdentityResponse:
        identity = self._allocator.find(_labels(request.labels))
        if identity is None:
            raise self._unknown("no identity has these labels")
        return pb.ResolveIdentityResponse(identity=to_proto(identity))

    async def ListIdentities(
        self, request: pb.ListIdentitiesRequest, context: Any
    ) -> pb.ListIdentitiesResponse:
        self._complete()
        if request.scope and request.scope not in pb.IdentityScope.values():
            raise errors.InvalidArgument(f"scope {request.scope} is unknown", field="scope")
        size, after = _paging(request.page)
        wanted = request.labels.items()
        matching = (
            identity
            for identity in self._allocator.above(after)
            if request.scope in (0, identity.scope) and (not wanted or wanted <= identity.labels.items())
        )
        found = list(islice(matching, size + 1))
        return pb.ListIdentitiesResponse(
            identities=map(to_proto, found[:size]),
            next_token=str(found[size - 1].number) if len(found) > size else "",
        )

    async def WatchIdentities(
        self, request: pb.WatchIdentitiesRequest, context: Any
    ) -> AsyncIterator[pb.WatchIdentitiesResponse]:
        await self._allocator.synced.wait()
        async for change in self._allocator.feed.watch(request.after_revision):
            answer = pb.WatchIdentitiesResponse(kind=_KINDS[change.kind], revision=change.revision)
            if change.item is not None:
                if change.kind == "put":
                    answer.identity.CopyFrom(to_proto(change.item))
                else:
                    answer.identity.number = change.item.number
            yield answer

    async def GetUsage(self, request: pb.GetUsageRequest, context: Any) -> pb.GetUsageResponse:
        return pb.GetUsageResponse(**self._allocator.usage()._asdict())

    def _unknown(self, message: str) -> errors.FibrilError:
        """NotFound, if that is certain."""
        self._complete()
        return errors.NotFound(message)

    def _complete(self) -> None:
        if not self._allocator.synced.is_set():
            raise errors.Unavailable(
                "the cluster's identities are not known yet", fix="check etcd; it is tried again"
            )


def to_proto(identity: Identity) -> pb.Identity:
    """As the contract has it."""
    return pb.Identity(
        number=identity.number, labels=identity.labels, scope=pb.IdentityScope.ValueType(identity.scope)
    )


def _labels(given: Mapping[str, str]) -> dict[str, str]:
    labels = dict(given)
    check_labels(labels)
    return labels


def _paging(page: types_pb2.PageRequest) -> tuple[int, int]:
    """Size, and the number after which the page begins."""
    if page.size > _PAGE_MAX:
        raise errors.InvalidArgument(
            f"page size {page.size} is too large", field="page.size", fix=f"use 1 to {_PAGE_MAX}"
        )
    if page.token and not (page.token.isascii() and page.token.isdecimal() and len(page.token) <= 10):
        raise errors.InvalidArgument(
            f"page token {page.token[:60]!r} is not known",
            field="page.token",
            fix="begin with the first page again",
        )
    return page.size or _PAGE, int(page.token or 0)
