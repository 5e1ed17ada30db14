"""fibril.ipam.v1.IpamService: proto to domain and back, no decisions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from fibril.ipam.v1 import ipam_pb2 as pb
from fibril.ipam.v1 import ipam_pb2_grpc
from fibril.types.v1 import types_pb2
from services.common import errors
from services.ipam.pools.book import AddressBook
from services.ipam.pools.store import from_proto, to_proto
from services.ipam.pools.types import BATCH_MAX, Allocation, BlockInfo, Family, Pool

_PAGE, _PAGE_MAX = 1_000, 10_000
T = TypeVar("T")
_KINDS = {
    "put": types_pb2.WATCH_KIND_PUT,
    "delete": types_pb2.WATCH_KIND_DELETE,
    "synced": types_pb2.WATCH_KIND_SYNCED,
}


class IpamApi(ipam_pb2_grpc.IpamServiceServicer):
    """See the contract."""

    def __init__(self, book: AddressBook) -> None:
        self._book = book

    async def PutPool(self, request: pb.PutPoolRequest, context: Any) -> pb.PutPoolResponse:
        message = request.pool
        pool = await self._book.put_pool(
            from_proto(message, message.revision), message.block_prefix_v4, message.block_prefix_v6
        )
        return pb.PutPoolResponse(pool=to_proto(pool))

    async def DeletePool(self, request: pb.DeletePoolRequest, context: Any) -> pb.DeletePoolResponse:
        await self._book.delete_pool(request.name)
        return pb.DeletePoolResponse()

    async def GetPool(self, request: pb.GetPoolRequest, context: Any) -> pb.GetPoolResponse:
        pool = self._book.pool(request.name)
        return pb.GetPoolResponse(pool=self._status(pool, await self._claimed()))

    async def ListPools(self, request: pb.ListPoolsRequest, context: Any) -> pb.ListPoolsResponse:
        claimed = await self._claimed()
        page, token = paged(self._book.pools(), request.page, lambda pool: pool.name)
        return pb.ListPoolsResponse(pools=[self._status(pool, claimed) for pool in page], next_token=token)

    async def AddAddresses(self, request: pb.AddAddressesRequest, context: Any) -> pb.AddAddressesResponse:
        addresses = _batch(request.addresses)
        return pb.AddAddressesResponse(
            results=_results(addresses, await self._book.add_cloud(request.pool, addresses))
        )

    async def RemoveAddresses(
        self, request: pb.RemoveAddressesRequest, context: Any
    ) -> pb.RemoveAddressesResponse:
        addresses = _batch(request.addresses)
        return pb.RemoveAddressesResponse(
            results=_results(addresses, await self._book.remove_cloud(request.pool, addresses))
        )

    async def Allocate(self, request: pb.AllocateRequest, context: Any) -> pb.AllocateResponse:
        if request.family not in (0, *Family):
            raise errors.InvalidArgument(
                f"family {request.family} is unknown",
                field="family",
                fix="use FAMILY_IPV4, FAMILY_IPV6 or leave it out",
            )
        made = await self._book.allocate(
            request.owner,
            request.pool,
            Family(request.family) if request.family else None,
            request.address or None,
            request.ttl_seconds,
        )
        return pb.AllocateResponse(allocations=map(_allocation, made))

    async def Release(self, request: pb.ReleaseRequest, context: Any) -> pb.ReleaseResponse:
        return pb.ReleaseResponse(released=await self._book.release(request.owner, request.address))

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewResponse:
        return pb.RenewResponse(
            allocations=map(_allocation, await self._book.renew(request.owner, request.ttl_seconds))
        )

    async def GetAllocation(self, request: pb.GetAllocationRequest, context: Any) -> pb.GetAllocationResponse:
        return pb.GetAllocationResponse(allocation=_allocation(self._book.allocation(request.address)))

    async def ListAllocations(
        self, request: pb.ListAllocationsRequest, context: Any
    ) -> pb.ListAllocationsResponse:
        found = [a for a in self._book.allocations(request.owner) if request.pool in ("", a.pool)]
        page, token = paged(found, request.page, lambda a: a.address)
        return pb.ListAllocationsResponse(allocations=map(_allocation, page), next_token=token)

    async def WatchAllocations(
        self, request: pb.WatchAllocationsRequest, context: Any
    ) -> AsyncIterator[pb.WatchAllocationsResponse]:
        async for change in self._book.feed.watch(request.after_revision):
            answer = pb.WatchAllocationsResponse(kind=_KINDS[change.kind], revision=change.revision)
            if (item := change.item) is not None:
                if request.pool not in ("", item.pool):
                    continue
                answer.allocation.CopyFrom(
                    _allocation(item)
                    if change.kind == "put"
                    else pb.Allocation(address=item.address, pool=item.pool, owner=item.owner)
                )
            yield answer

    async def ListBlocks(self, request: pb.ListBlocksRequest, context: Any) -> pb.ListBlocksResponse:
        blocks = await self._book.all_blocks() if request.all_nodes else self._book.blocks()
        return pb.ListBlocksResponse(
            blocks=[
                pb.Block(cidr=b.cidr, pool=b.pool, node=b.node, gateway=b.gateway)
                for b in blocks
                if request.pool in ("", b.pool)
            ]
        )

    async def _claimed(self) -> list[BlockInfo] | None:
        try:
            return await self._book.all_blocks()
        except errors.Unavailable:
            return None

    def _status(self, pool: Pool, claimed: list[BlockInfo] | None) -> pb.PoolStatus:
        usage = [
            pb.Usage(
                family=pb.Family.ValueType(u.family),
                total=u.total,
                blocks_claimed=u.blocks_claimed,
                blocks_total=u.blocks_total,
                node_allocated=u.node_allocated,
                node_free=u.node_free,
                node_quarantined=u.node_quarantined,
            )
            for u in self._book.usage(pool, claimed)
        ]
        return pb.PoolStatus(pool=to_proto(pool), usage=usage)


def paged(
    items: Sequence[T], page: types_pb2.PageRequest, name: Callable[[T], str]
) -> tuple[Sequence[T], str]:
    """The page asked for of a sorted list, and the token of the next. The token is the name of the last object given out.

    InvalidArgument for a size out of range, or a token whose object is gone: list again then.
    """
    if page.size > _PAGE_MAX:
        raise errors.InvalidArgument(
            f"page size {page.size} is too large", field="page.size", fix=f"use 1 to {_PAGE_MAX}"
        )
    start = 0
    if page.token:
        start = next((i for i, item in enumerate(items, 1) if name(item) == page.token), -1)
        if start < 0:
            raise errors.InvalidArgument(
                f"page token {page.token[:60]!r} is not known",
                field="page.token",
                fix="begin with the first page again",
            )
    end = start + (page.size or _PAGE)
    return items[start:end], name(items[end - 1]) if end < len(items) else ""


def _allocation(a: Allocation) -> pb.Allocation:
    return pb.Allocation(
        address=a.address,
        family=pb.Family.ValueType(a.family),
        pool=a.pool,
        owner=a.owner,
        gateway=a.gateway,
        block=a.block,
        expires_unix_seconds=a.expires_unix_seconds,
        created_unix_seconds=a.created_unix_seconds,
    )


def _batch(addresses: Sequence[str]) -> list[str]:
    if not 0 < len(addresses) <= BATCH_MAX:
        raise errors.InvalidArgument(
            f"{len(addresses)} addresses", field="addresses", fix=f"give 1 to {BATCH_MAX} a call"
        )
    return list(addresses)


def _results(addresses: list[str], found: list[errors.FibrilError | None]) -> list[pb.AddressResult]:
    return [
        pb.AddressResult(address=address)
        if error is None
        else pb.AddressResult(address=address, code=error.code.value[0], message=str(error))
        for address, error in zip(addresses, found, strict=True)
    ]
