"""SockAccelService: fibril.sockaccel.v1 to the declared classes and the kernel's pairs and back."""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator
from typing import Final, Protocol

from fibril.sockaccel.v1 import sockaccel_pb2 as pb
from fibril.sockaccel.v1 import sockaccel_pb2_grpc
from services.common.errors import InvalidArgument
from services.sockaccel import abi, convert, pairs
from services.sockaccel.plane import Plane
from services.sockaccel.store import Store

PAGE_DEFAULT: Final = 1000
PAGE_MAX: Final = 10_000
_INTERVAL_MS: Final = (100, 60_000)


class Registry(Protocol):
    """What the service knows besides."""

    amiss: dict[str, str]
    watches: set[pairs.Watch]

    async def shown(self) -> list[pb.Pair]: ...
    async def switch_pair(self, cookie: int, on: bool) -> None: ...
    async def pairs_of(self, bit: int) -> set[int]: ...
    def forget(self, cookies: set[int]) -> None: ...


class SockAccelApi(sockaccel_pb2_grpc.SockAccelServiceServicer):
    """One servicer for all servers of the process. Without the kernel's tables nothing is changed."""

    def __init__(self, store: Store, plane: Plane, registry: Registry) -> None:
        self._store, self._plane, self._registry = store, plane, registry

    async def UpsertClass(self, request: pb.UpsertClassRequest, context: object) -> pb.UpsertClassResponse:
        wanted = convert.declared(request.declared, "declared")
        _ = self._plane.tables
        created = self._store.upsert(wanted)
        await self._plane.settled()
        return pb.UpsertClassResponse(declared=(await self._classes())[wanted.name], created=created)

    async def DeleteClass(self, request: pb.DeleteClassRequest, context: object) -> pb.DeleteClassResponse:
        _ = self._plane.tables
        bit = self._store.require(request.name)[0]
        concerned = await self._registry.pairs_of(bit)
        self._store.delete(request.name)
        self._registry.forget(concerned)
        await self._plane.settled()
        # Those that were made meanwhile, unless the bit is another's already.
        more = await self._registry.pairs_of(bit) - concerned
        if more and not self._store.name_of(bit):
            self._registry.forget(more)
            await self._plane.settled()
        return pb.DeleteClassResponse()

    async def ListClasses(self, request: pb.ListClassesRequest, context: object) -> pb.ListClassesResponse:
        known = await self._classes()
        return pb.ListClassesResponse(classes=[known[name] for name in sorted(known)])

    async def _classes(self) -> dict[str, pb.Class]:
        count: dict[str, int] = {}
        for pair in await self._registry.shown():
            count[pair.class_name] = count.get(pair.class_name, 0) + 1
        found = {}
        for name, (_, each) in self._store.classes.items():
            found[name] = convert.class_message(each)
            found[name].message = self._registry.amiss.get(name, "")
            found[name].pairs = count.get(name, 0)
        return found

    async def Switch(self, request: pb.SwitchRequest, context: object) -> pb.SwitchResponse:
        _ = self._plane.tables
        match request.WhichOneof("what"):
            case "all":
                if not request.all:
                    raise InvalidArgument("it is true or not given", field="all", fix="say `on: false` to turn all off")
                self._store.switch(request.on)
            case "class_name":
                each = self._store.require(request.class_name)[1]
                message = convert.class_message(each)
                message.enabled = request.on
                self._store.upsert(convert.declared(message, "class_name"))
            case "pair":
                await self._registry.switch_pair(request.pair, request.on)
            case _:
                raise InvalidArgument("nothing is named", field="what", fix="give `all`, `class_name` or `pair`")
        await self._plane.settled()
        return pb.SwitchResponse()

    async def ListPairs(self, request: pb.ListPairsRequest, context: object) -> pb.ListPairsResponse:
        pairs.check(request.filter)
        if request.page.size > PAGE_MAX:
            raise InvalidArgument(f"a page of {request.page.size} is larger than {PAGE_MAX}", field="page.size")
        size, after = request.page.size or PAGE_DEFAULT, 0
        if request.page.token:
            if not request.page.token.isascii() or not request.page.token.isdigit() or len(request.page.token) > 20:
                raise InvalidArgument("that is no token of an earlier page", field="page.token")
            after = int(request.page.token)
        wanted = (
            pair for pair in await self._registry.shown() if pair.id > after and pairs.matches(pair, request.filter)
        )
        found = heapq.nsmallest(size + 1, wanted, key=lambda pair: pair.id)
        return pb.ListPairsResponse(
            pairs=found[:size], next_token=str(found[size - 1].id) if len(found) > size else ""
        )

    async def WatchPairs(
        self, request: pb.WatchPairsRequest, context: object
    ) -> AsyncIterator[pb.WatchPairsResponse]:
        pairs.check(request.filter)
        least, most = _INTERVAL_MS
        if request.interval_ms and not least <= request.interval_ms <= most:
            raise InvalidArgument(f"{request.interval_ms} is outside {least}..{most}", field="interval_ms")
        watch = pairs.Watch(request.filter, (request.interval_ms or 1000) / 1000)
        self._registry.watches.add(watch)
        try:
            async for answer in watch.run(self._registry.shown):
                yield answer
        finally:
            self._registry.watches.discard(watch)

    async def GetUsage(self, request: pb.GetUsageRequest, context: object) -> pb.GetUsageResponse:
        tables = self._plane.tables
        stat = tables.stat
        return pb.GetUsageResponse(
            enabled=self._store.on,
            pairs=len(await self._registry.shown()),
            pairs_capacity=tables.capacity,
            made=stat(abi.Stat.PAIRS),
            shortened=stat(abi.Stat.SHORTENED),
            short_bytes=stat(abi.Stat.BYTES),
            short_sends=stat(abi.Stat.SENDS),
            tcp_bytes=stat(abi.Stat.TCP_BYTES),
            tcp_sends=stat(abi.Stat.TCP_SENDS),
            alone=stat(abi.Stat.ALONE),
            full=stat(abi.Stat.FULL),
            taken=stat(abi.Stat.TAKEN),
            events_lost=stat(abi.Stat.LOST),
            ended={
                reason.name.lower(): stat(abi.Stat.ENDED + reason)
                for reason in abi.EndReason
                if reason is not abi.EndReason.NOT_ENDED
            },
        )
