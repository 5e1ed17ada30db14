"""IpcacheService: fibril.ipcache.v1 to the ipcache and back. No decisions here."""

from __future__ import annotations

import bisect
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from ipaddress import ip_address, ip_network
from typing import Final

from fibril.ipcache.v1 import ipcache_pb2 as pb
from fibril.ipcache.v1 import ipcache_pb2_grpc
from fibril.types.v1 import types_pb2
from services.common import errors
from services.identity.ipcache.ipcache import Ipcache
from services.identity.ipcache.model import Entry, prefix_key, sort_key

PAGE_DEFAULT: Final = 1000
PAGE_MAX: Final = 10_000
LOCAL_MAX: Final = 10_000
OWNER_MAX: Final = 253


class IpcacheApi(ipcache_pb2_grpc.IpcacheServiceServicer):
    """One servicer for all servers of the process."""

    def __init__(self, ipcache: Ipcache, node: str, tunnel_endpoint: Callable[[str], str]) -> None:
        """node: this node's name. tunnel_endpoint: where overlay packets to a node go, empty if there are none."""
        self._ipcache = ipcache
        self._node = node
        self._tunnel_endpoint = tunnel_endpoint
        self._sorted: list[tuple[bytes, Entry]] = []
        self._sorted_version = -1

    async def GetEntry(self, request: pb.GetEntryRequest, context: object) -> pb.GetEntryResponse:
        try:
            address = ip_address(request.address)
        except ValueError:
            raise errors.InvalidArgument(f"{request.address[:60]!r} is no address", field="address") from None
        self._require_synced()
        entry = self._ipcache.lookup(address)
        if entry is None:
            raise errors.NotFound(f"no entry holds {address}: it is in the world", field="address")
        return pb.GetEntryResponse(entry=self._to_proto(entry))

    async def ListEntries(self, request: pb.ListEntriesRequest, context: object) -> pb.ListEntriesResponse:
        size = request.page.size or PAGE_DEFAULT
        if size > PAGE_MAX:
            raise errors.InvalidArgument(f"a page of {size} is larger than {PAGE_MAX}", field="page.size")
        try:
            after = bytes.fromhex(request.page.token)
        except ValueError:
            raise errors.InvalidArgument(
                f"page token {request.page.token[:60]!r} is not one a list has given", field="page.token"
            ) from None
        self._require_synced()
        lines = self._lines()
        found: list[tuple[bytes, Entry]] = []
        for number in range(bisect.bisect_right(lines, after, key=_first), len(lines)):
            entry = lines[number][1]
            if request.node in ("", entry.node) and request.identity in (0, entry.identity):
                if len(found) == size:
                    return self._page(found, found[-1][0].hex())
                found.append(lines[number])
        return self._page(found, "")

    async def WatchEntries(
        self, request: pb.WatchEntriesRequest, context: object
    ) -> AsyncIterator[pb.WatchEntriesResponse]:
        # A snapshot of a part would have others believe that the rest is not there.
        await self._ipcache.synced.wait()
        async for change in self._ipcache.feed.watch(request.after_revision):
            answer = pb.WatchEntriesResponse(revision=change.revision)
            if change.item is None:
                answer.kind = types_pb2.WATCH_KIND_SYNCED
            elif change.kind == "delete":
                answer.kind = types_pb2.WATCH_KIND_DELETE
                answer.entry.prefix = str(change.item.prefix)
            else:
                answer.kind = types_pb2.WATCH_KIND_PUT
                answer.entry.CopyFrom(self._to_proto(change.item))
            yield answer

    async def PutLocalEntries(
        self, request: pb.PutLocalEntriesRequest, context: object
    ) -> pb.PutLocalEntriesResponse:
        if len(request.entries) > LOCAL_MAX:
            raise errors.InvalidArgument(
                f"{len(request.entries)} entries", field="entries", fix=f"give at most {LOCAL_MAX} a call"
            )
        self._ipcache.put_local(_owner(request.owner), _local(request.entries))
        return pb.PutLocalEntriesResponse()

    async def DeleteLocalEntries(
        self, request: pb.DeleteLocalEntriesRequest, context: object
    ) -> pb.DeleteLocalEntriesResponse:
        keys = [_key(prefix, f"prefixes[{number}]") for number, prefix in enumerate(request.prefixes)]
        deleted = self._ipcache.delete_local(_owner(request.owner), set(keys) if keys else None)
        return pb.DeleteLocalEntriesResponse(deleted=deleted)

    def _require_synced(self) -> None:
        if not self._ipcache.synced.is_set():
            raise errors.Unavailable(self._ipcache.problem, fix="check etcd and ask again")

    def _lines(self) -> list[tuple[bytes, Entry]]:
        """The table in order; sorted anew when it has changed."""
        if self._sorted_version != self._ipcache.version:
            self._sorted_version = self._ipcache.version
            self._sorted = sorted(
                ((sort_key(entry.key), entry) for entry in self._ipcache.entries()), key=_first
            )
        return self._sorted

    def _page(self, found: list[tuple[bytes, Entry]], token: str) -> pb.ListEntriesResponse:
        return pb.ListEntriesResponse(entries=[self._to_proto(entry) for _, entry in found], next_token=token)

    def _to_proto(self, entry: Entry) -> pb.Entry:
        local = entry.node == self._node
        return pb.Entry(
            prefix=str(entry.prefix),
            identity=entry.identity,
            node=entry.node,
            source=pb.EntrySource.ValueType(entry.source),
            pod=entry.pod,
            local=local,
            revision=entry.revision,
            tunnel_endpoint=self._tunnel_endpoint(entry.node) if entry.node and not local else "",
        )


def _first(line: tuple[bytes, Entry]) -> bytes:
    return line[0]


def _owner(owner: str) -> str:
    if not 0 < len(owner) <= OWNER_MAX:
        raise errors.InvalidArgument(
            f"an owner of {len(owner)} characters", field="owner", fix=f"use 1 to {OWNER_MAX} characters"
        )
    return owner


def _key(prefix: str, field: str) -> bytes:
    try:
        if "%" in prefix:
            raise ValueError("a prefix has no zone")
        return prefix_key(ip_network(prefix))
    except ValueError as error:
        raise errors.InvalidArgument(
            f"{prefix[:60]!r} is no prefix: {error}", field=field, fix='write "10.0.0.0/8" or "fd00::/64"'
        ) from None


def _local(entries: Iterable[pb.LocalEntry]) -> Mapping[bytes, int]:
    found: dict[bytes, int] = {}
    for number, entry in enumerate(entries):
        key = _key(entry.prefix, f"entries[{number}].prefix")
        if not entry.identity:
            raise errors.InvalidArgument("identity 0 is none", field=f"entries[{number}].identity")
        if found.setdefault(key, entry.identity) != entry.identity:
            raise errors.InvalidArgument(
                f"{entry.prefix} is given two identities", field=f"entries[{number}].identity"
            )
    return found
