"""Calls to etcd: bounded in time, transactional, over several servers.

A client connects with the first call and again whenever a connection is gone; nobody has to tell it that etcd
is back. Calls go to one server until that fails, then to the next. A call that finds no server within the
timeout raises Unavailable and has had no effect. A *write* whose connection breaks under way raises
Unavailable too, and may have had its effect: it is not repeated here, since a repeated `create` would take
its own first attempt for a stranger's. Callers put their name into what they write and read it again.

Keys are str (UTF-8 in etcd), values bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import grpc
from aetcd import rpc

from services.common.errors import InvalidArgument, NotFound
from services.common.etcd.endpoint import Endpoint, EtcdTls
from services.common.etcd.members import CallFailed, Compacted, Members

__all__ = ["Compacted", "EtcdClient", "EtcdTls", "KeyValue", "Listing"]

# etcd's own default of --max-txn-ops.
TXN_OPS_MAX = 128
# Keys in the first page of a listing, and in each later one: as many as a page of so many bytes holds, but not more. For each
# page etcd looks at all keys to the end, which in pages of 2,000 took it ten seconds for 300,000 keys.
_PAGE, _PAGE_BYTES, _PAGE_MAX = 2000, 2 << 20, 16_000
# Keys that are taken from a page before others have their turn.
_TURN = 2000


class KeyValue(NamedTuple):
    """A key as it was at some revision.

    mod_revision: of its last change; create_revision: of its creation; lease: id, 0 for none.
    """

    key: str
    value: bytes
    mod_revision: int
    create_revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Listing:
    """Every key below a prefix, or of those asked for, all as of `revision`; and which cluster said so."""

    kvs: tuple[KeyValue, ...]
    revision: int
    cluster_id: int


class EtcdClient:
    """A session with an etcd cluster; used from one event loop. See the module's text for failures."""

    def __init__(self, urls: Sequence[str], *, tls: EtcdTls | None = None, timeout_s: float = 3.0) -> None:
        """urls: https://host:port, http://host:port or unix:/path, of as many members as may be asked.

        timeout_s: the most any call takes. Raises InvalidArgument for a malformed URL; connects to nothing.
        """
        self._members = Members(urls, tls, timeout_s)

    async def __aenter__(self) -> EtcdClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End every call and watch. The client may be used again."""
        await self._members.close()

    @property
    def healthy(self) -> bool:
        """Whether the last call or watch reached etcd."""
        return self._members.healthy

    @property
    def error(self) -> str:
        """Why not healthy, one sentence; "" when healthy."""
        return self._members.error

    @property
    def since(self) -> float:
        """Unix time of the last change of `healthy`."""
        return self._members.since

    @property
    def urls(self) -> tuple[str, ...]:
        """The endpoints, as given."""
        return self._members.urls

    # Reading

    async def check(self) -> None:
        """A read that needs a quorum. Raises Unavailable."""
        await self._range(rpc.RangeRequest(key=b"\0", count_only=True))

    async def put_back(self) -> bool:
        """Whether etcd is another than this client has known, or in a state from before something it has been told: restored
        from a snapshot, made anew. Told once; what etcd is now is what counts from then on.
        """
        return self._members.put_back(await self._range(rpc.RangeRequest(key=b"\0", count_only=True)))

    async def get(self, key: str) -> KeyValue | None:
        """The key, or None. Linearizable, as every read here."""
        request = rpc.RangeRequest(key=encode(key))
        answer = await self._range(request)
        return key_value(answer.kvs[0]) if answer.kvs else None

    async def get_many(self, keys: Collection[str]) -> Listing:
        """Those of these keys that exist, all as of the same revision. Raises InvalidArgument above 128 keys."""
        if len(keys) > TXN_OPS_MAX:
            raise InvalidArgument(f"{len(keys)} keys exceed the limit of {TXN_OPS_MAX} in one read")
        return await self._at_once(rpc.RangeRequest(key=encode(key)) for key in keys)

    async def get_below(self, prefixes: Collection[str]) -> Listing:
        """Every key that begins with one of these, all as of the same revision and in one answer: for few keys each. Raises
        InvalidArgument above 128 prefixes.
        """
        if len(prefixes) > TXN_OPS_MAX:
            raise InvalidArgument(f"{len(prefixes)} prefixes exceed the limit of {TXN_OPS_MAX} in one read")
        return await self._at_once(
            rpc.RangeRequest(key=encode(prefix) or b"\0", range_end=range_end(encode(prefix)))
            for prefix in prefixes
        )

    async def _at_once(self, ranges: Iterable[Any]) -> Listing:
        request = rpc.TxnRequest(success=[rpc.RequestOp(request_range=each) for each in ranges])
        answer = await self._members.read(lambda e, t: e.kv.Txn(request, timeout=t))
        found = tuple(key_value(kv) for part in answer.responses for kv in part.response_range.kvs)
        return Listing(found, answer.header.revision, answer.header.cluster_id)

    async def get_prefix(self, prefix: str, *, keys_only: bool = False) -> Listing:
        """Every key that begins with `prefix`, read in pages that all show the same revision."""
        start, end = encode(prefix) or b"\0", range_end(encode(prefix))
        while True:
            try:
                return await self._list(start, end, keys_only)
            except Compacted:
                continue  # between two pages; possible only with thousands of keys, so rare

    async def _list(self, start: bytes, end: bytes, keys_only: bool) -> Listing:
        found: list[KeyValue] = []
        revision = cluster = 0
        limit = _PAGE
        while True:
            request = rpc.RangeRequest(
                key=start, range_end=end, limit=limit, revision=revision, keys_only=keys_only
            )
            answer = await self._range(request)
            revision, cluster = revision or answer.header.revision, answer.header.cluster_id
            for at in range(0, len(answer.kvs), _TURN):
                found += map(key_value, answer.kvs[at : at + _TURN])
                await asyncio.sleep(0)
            if not answer.more:
                return Listing(tuple(found), revision, cluster)
            start = answer.kvs[-1].key + b"\0"
            average = max(1, answer.ByteSize() // len(answer.kvs))
            limit = min(max(_PAGE_BYTES // average, 1), _PAGE_MAX)

    async def _range(self, request: Any) -> Any:
        return await self._members.read(lambda endpoint, limit_s: endpoint.kv.Range(request, timeout=limit_s))

    # Writing

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        """Set the key whatever it was; its new revision. Raises NotFound for a lease that has ended."""
        request = rpc.PutRequest(key=encode(key), value=value, lease=lease)
        answer = await self._members.write(lambda e, t: e.kv.Put(request, timeout=t))
        return int(answer.header.revision)

    async def delete(self, key: str) -> bool:
        """Delete the key; whether there was one."""
        request = rpc.DeleteRangeRequest(key=encode(key))
        answer = await self._members.write(lambda e, t: e.kv.DeleteRange(request, timeout=t))
        return bool(answer.deleted)

    async def delete_prefix(self, prefix: str) -> int:
        """Delete every key that begins with `prefix`; how many."""
        start = encode(prefix)
        request = rpc.DeleteRangeRequest(key=start or b"\0", range_end=range_end(start))
        answer = await self._members.write(lambda e, t: e.kv.DeleteRange(request, timeout=t))
        return int(answer.deleted)

    async def create(self, items: Mapping[str, bytes], *, lease: int = 0) -> bool:
        """Create all these keys, or none and give False because at least one exists."""
        return await self.transact(dict.fromkeys(items, 0), put=items, lease=lease) is not None

    async def cas(self, key: str, mod_revision: int, value: bytes, *, lease: int = 0) -> int | None:
        """Set the key if its last change is `mod_revision` (0: it must not exist); its new revision, else
        None.
        """
        return await self.transact({key: mod_revision}, put={key: value}, lease=lease)

    async def delete_if(self, key: str, mod_revision: int) -> bool:
        """Delete the key if its last change is `mod_revision`; whether it was deleted by this call."""
        return await self.transact({key: mod_revision}, delete=(key,)) is not None

    async def transact(
        self,
        expect: Mapping[str, int],
        *,
        nothing_below: Collection[str] = (),
        put: Mapping[str, bytes] | None = None,
        delete: Collection[str] = (),
        delete_below: Collection[str] = (),
        lease: int = 0,
        leases: Mapping[str, int] | None = None,
    ) -> int | None:
        """If every key of `expect` was last changed at the revision given (0: does not exist), and no key begins
        with any of `nothing_below`, put and delete all these, and what begins with any of `delete_below`; the revision
        at which it happened, else None and nothing has changed.

        lease: what the keys put are attached to, 0 for none; leases: where it is another one, by key.

        Raises InvalidArgument above 128 conditions, or 128 keys and prefixes to be changed together, and for a key
        named twice; NotFound for a lease that has ended.
        """
        puts, own = put or {}, leases or {}
        conditions, changes = len(expect) + len(nothing_below), len(puts) + len(delete) + len(delete_below)
        for what, count in (("conditions", conditions), ("changes", changes)):
            if count > TXN_OPS_MAX:
                raise InvalidArgument(
                    f"an etcd transaction of {count} {what} exceeds the limit of {TXN_OPS_MAX}"
                )
        request = rpc.TxnRequest()
        for key, revision in expect.items():
            request.compare.add(key=encode(key), target=rpc.Compare.MOD, mod_revision=revision)
        for prefix in nothing_below:
            # A comparison with no key at all is one with a key of revision 0.
            start = encode(prefix)
            request.compare.add(
                key=start or b"\0", range_end=range_end(start), target=rpc.Compare.MOD, mod_revision=0
            )
        for key, value in puts.items():
            request.success.add().request_put.MergeFrom(
                rpc.PutRequest(key=encode(key), value=value, lease=own.get(key, lease))
            )
        for key in delete:
            request.success.add().request_delete_range.key = encode(key)
        for prefix in delete_below:
            start = encode(prefix)
            request.success.add().request_delete_range.MergeFrom(
                rpc.DeleteRangeRequest(key=start or b"\0", range_end=range_end(start))
            )
        answer = await self._members.write(lambda e, t: e.kv.Txn(request, timeout=t))
        return int(answer.header.revision) if answer.succeeded else None

    # Leases; see lease.py for one that is kept alive.

    async def grant(self, ttl_s: int) -> int:
        """A new lease's id. Keys attached to it vanish when it is not renewed for `ttl_s` seconds."""
        answer = await self._members.write(
            lambda e, t: e.lease.LeaseGrant(rpc.LeaseGrantRequest(TTL=ttl_s), timeout=t)
        )
        return int(answer.ID)

    async def renew(self, lease: int) -> int:
        """Renew it; seconds it now lasts, 0 when it has ended already."""

        async def once(endpoint: Endpoint, limit_s: float) -> int:
            stream = endpoint.lease.LeaseKeepAlive(timeout=limit_s)
            try:
                await stream.write(rpc.LeaseKeepAliveRequest(ID=lease))
                answer = await stream.read()
                if answer is grpc.aio.EOF:
                    # The status says why; a stream that ends well without an answer is a broken one too.
                    raise CallFailed(await stream.code(), await stream.details() or "no answer")
                return int(answer.TTL)
            finally:
                stream.cancel()

        return int(await self._members.read(once))

    async def keys_of(self, lease: int) -> list[str]:
        """The keys attached to it; none when it has ended."""
        request = rpc.LeaseTimeToLiveRequest(ID=lease, keys=True)
        answer = await self._members.read(lambda e, t: e.lease.LeaseTimeToLive(request, timeout=t))
        return [decode(key) for key in answer.keys]

    async def revoke(self, lease: int) -> None:
        """End it and delete its keys; one that has ended is fine."""
        try:
            await self._members.write(
                lambda e, t: e.lease.LeaseRevoke(rpc.LeaseRevokeRequest(ID=lease), timeout=t)
            )
        except NotFound:
            pass

    async def watch_stream(self, prefix: str, revision: int) -> AsyncGenerator[Any, None]:
        """One watch of a prefix from `revision` on, as etcd's WatchResponse messages, until it breaks: then
        raises Unavailable. `watch.watch_prefix` is what mends it.
        """
        start = encode(prefix)
        create = rpc.WatchCreateRequest(
            key=start or b"\0", range_end=range_end(start), start_revision=revision
        )
        request = rpc.WatchRequest(create_request=create)
        # A server cut off from its cluster ends the watch instead of keeping it silent.
        async with contextlib.aclosing(
            self._members.stream(lambda e: e.watch.Watch(metadata=(("hasleader", "true"),)), request)
        ) as answers:
            async for answer in answers:
                yield answer


def encode(key: str) -> bytes:
    """The key in etcd's bytes; what was not UTF-8 there comes back unchanged."""
    return key.encode("utf-8", "surrogateescape")


def decode(key: bytes) -> str:
    """The key from etcd's bytes."""
    return key.decode("utf-8", "surrogateescape")


def key_value(kv: Any) -> KeyValue:
    """From etcd's message."""
    return KeyValue(decode(kv.key), kv.value, kv.mod_revision, kv.create_revision, kv.lease)


def range_end(prefix: bytes) -> bytes:
    """The first key after all that begin with `prefix`; b"\\0", etcd's "to the end", when there is none."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes((stem[-1] + 1,)) if stem else b"\0"
