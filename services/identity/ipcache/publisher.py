"""What this node tells the others about the addresses of its pods: keys ip/<address> under the node's lease.

What is wanted and what etcd has are two tables, and every difference is written: after a change of either, after a
new lease (whose predecessor took its keys along) and after a restart, when what etcd has is what the ipcache has
listed. So a write that failed, one whose answer was lost and a key that vanished are all the same case.

A key is deleted only while it is the one this node has written. An address that another node publishes, too, is
overwritten once, when it becomes a pod's here; if the other node then overwrites it, both mean to have it, and that
is reported instead of written to and fro.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from fibril.ipcache.v1 import ipcache_pb2 as pb
from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.kernel.netlink import IPAddress
from services.identity.ipcache.follow import prefix_of
from services.identity.ipcache.model import Entry, address_key, address_of

log = logging.getLogger(__name__)

BATCH: Final = 100
_BACKOFF_S: Final = (0.1, 5.0)


@dataclass(frozen=True)
class Published:
    """What is told of an address. previous: the identity it had just before, 0: none; pod: for people."""

    identity: int
    previous: int = 0
    pod: str = ""

    def tells(self, other: Published) -> bool:
        """Whether the other says nothing new: what was before is of interest only when something is new."""
        return self.identity == other.identity and self.pod == other.pod


class Lease(Protocol):
    """What is needed of lease.NodeLease."""

    def on_grant(self, callback: Callable[[int], Awaitable[None]]) -> None: ...

    @property
    def lease(self) -> int: ...

    def suspect(self) -> None: ...

    def replace(self) -> None: ...


class Addresses(Protocol):
    """What is needed of Ipcache."""

    addresses_synced: asyncio.Event

    def tell(self, watcher: Publisher) -> None: ...


class _Held(NamedTuple):
    """What etcd has of this node, since which revision."""

    value: Published
    revision: int


class _Other(NamedTuple):
    node: str
    revision: int


class Publisher:
    """Used from one event loop. To be made before the ipcache and the lease are started."""

    def __init__(self, etcd: EtcdClient, cluster: str, node: str, lease: Lease, addresses: Addresses) -> None:
        self._etcd = etcd
        self._prefix = prefix_of(cluster)
        self._node = node
        self._synced = addresses.addresses_synced
        self._lease = 0
        self._complete = False
        self._wanted: dict[bytes, Published] = {}
        self._held: dict[bytes, _Held] = {}
        self._others: dict[bytes, _Other] = {}
        """Wanted addresses that another node has published after this one did."""
        self._dirty: dict[bytes, None] = {}
        self._in_flight: frozenset[bytes] = frozenset()
        self._waiting: dict[bytes, list[asyncio.Future[None]]] = {}
        self._wake = asyncio.Event()
        self._granted_anew = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._error = ""
        self._node_lease = lease
        lease.on_grant(self._granted)
        addresses.tell(self)

    # -- life

    async def start(self) -> None:
        """Begin to write."""
        self._task = asyncio.create_task(self._run(), name="ipcache.publish")

    async def stop(self) -> None:
        """Stop writing. What is published stays for as long as the lease does."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._fail(list(self._waiting), errors.Unavailable("the service is stopping"))

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Background work; never ends by itself."""
        return () if self._task is None else (self._task,)

    @property
    def problem(self) -> str:
        """One sentence; empty when etcd has what it shall have."""
        if not self._others:
            return self._error
        key, other = next(iter(self._others.items()))
        more = f" ({len(self._others)} such addresses)" if len(self._others) > 1 else ""
        return f"node {other.node}, too, publishes {address_of(key)} of a pod here{more}; end one of the pods"

    # -- what is wanted

    def want(self, records: Mapping[IPAddress, Published]) -> None:
        """These are all the addresses of this node. To be called once before `remove`: only from then on is known
        which of those published before a restart are to be withdrawn.
        """
        wanted = {address_key(address): record for address, record in records.items()}
        touched = self._wanted.keys() | wanted.keys() | self._held.keys()
        self._complete = True
        self._wanted = wanted
        for key in self._others.keys() - wanted.keys():
            del self._others[key]
        for key in touched:
            self._check(key)

    async def put(self, address: IPAddress, identity: int, previous: int = 0, pod: str = "") -> None:
        """Publish an address, or what is new about it; back when etcd has it. Raises Unavailable when it cannot be
        written now; it will be as soon as it can.
        """
        key = address_key(address)
        self._wanted[key] = Published(identity, previous, pod)
        self._others.pop(key, None)
        self._check(key)
        await self._written(key)

    async def remove(self, address: IPAddress) -> None:
        """Withdraw an address; back when etcd has forgotten it, or else will when it can be reached."""
        key = address_key(address)
        self._wanted.pop(key, None)
        self._others.pop(key, None)
        self._check(key)
        with contextlib.suppress(errors.FibrilError):
            await self._written(key)

    # -- what is there

    async def _granted(self, lease: int) -> None:
        """For NodeLease: all keys are to be under this lease."""
        if self._lease and lease != self._lease:
            self._held.clear()
            for key in self._wanted.keys() | self._dirty.keys():
                self._check(key)
        self._lease = lease
        self._wake.set()
        self._granted_anew.set()

    def replaced(self) -> None:
        """For Ipcache: etcd is another than before, or has been put back. Its revisions say nothing about those known, and
        the lease may have outlived its keys: all is written anew under another.
        """
        self._node_lease.replace()

    def seen(self, key: bytes, entry: Entry | None, revision: int) -> None:
        """For Ipcache: what etcd has for an address since `revision`."""
        held = self._held.get(key)
        if held is not None and held.revision >= revision:
            return  # of before our last write
        if entry is not None and entry.node == self._node:
            value = Published(entry.identity, entry.previous_identity, entry.pod)
            self._held[key] = _Held(value, revision)
            self._others.pop(key, None)
        elif held is not None or key in self._wanted:
            self._held.pop(key, None)
            self._others.pop(key, None)
            if entry is not None and key in self._wanted and (held is not None or key in self._in_flight):
                self._taken(key, _Other(entry.node, revision))
        else:
            return
        self._check(key)

    def _taken(self, key: bytes, other: _Other) -> None:
        self._others[key] = other
        log.error(
            "another node publishes the address of a pod here",
            extra={"address": str(address_of(key)), "node": other.node},
        )

    # -- writing the difference

    def _differs(self, key: bytes) -> bool:
        wanted, held = self._wanted.get(key), self._held.get(key)
        if wanted is None:
            return held is not None and self._complete
        return key not in self._others and (held is None or not held.value.tells(wanted))

    def _check(self, key: bytes) -> None:
        if key in self._in_flight:
            return  # looked at again when the answer is here
        if self._differs(key):
            self._dirty[key] = None
            self._wake.set()
        else:
            self._dirty.pop(key, None)
            self._settle(key)

    async def _written(self, key: bytes) -> None:
        if not self._differs(key) and key not in self._in_flight:
            return
        if not self._may_write:
            raise errors.Unavailable(
                f"{address_of(key)} cannot be published: this node has no lease in etcd", fix="check etcd"
            )
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append(done)
        await done

    def _settle(self, key: bytes) -> None:
        for done in self._waiting.pop(key, ()):
            if not done.done():
                done.set_result(None)

    def _fail(self, keys: Iterable[bytes], error: errors.FibrilError) -> None:
        for key in keys:
            for done in self._waiting.pop(key, ()):
                if not done.done():
                    done.set_exception(error)

    async def _run(self) -> None:
        await self._synced.wait()
        pause = _BACKOFF_S[0]
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._dirty and self._may_write:
                keys = list(itertools.islice(self._dirty, BATCH))
                try:
                    await self._write(keys)
                except errors.FibrilError as error:
                    if isinstance(error, errors.NotFound):
                        self._node_lease.suspect()
                    if self._error != str(error):
                        log.warning("cannot publish addresses", extra={"cause": str(error)})
                    self._error = str(error)
                    self._fail(list(self._waiting), errors.Unavailable(f"not published yet: {error}"))
                    self._granted_anew.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(pause * random.uniform(0.5, 1)):
                            await self._granted_anew.wait()
                    pause = min(pause * 2, _BACKOFF_S[1])
                else:
                    pause = _BACKOFF_S[0]
            self._error = ""

    @property
    def _may_write(self) -> bool:
        """Whether there is a lease and all keys are known to be its own. Without, another node may have this one's name by
        now, and what looks like left over from this one is the other's.
        """
        return self._lease != 0 and self._lease == self._node_lease.lease

    async def _write(self, keys: list[bytes]) -> None:
        puts = {key: self._wanted[key] for key in keys if key in self._wanted}
        deletes = {key: self._held[key].revision for key in keys if key not in puts}
        self._in_flight = frozenset(keys)
        for key in keys:
            del self._dirty[key]
        try:
            if puts:
                await self._put(puts)
            if deletes:
                await self._delete(deletes)
        finally:
            self._in_flight = frozenset()
            for key in keys:
                self._check(key)

    async def _put(self, puts: Mapping[bytes, Published]) -> None:
        lease = self._lease
        values = {
            self._path(key): pb.StoredAddress(
                address=str(address_of(key)),
                identity=value.identity,
                node=self._node,
                pod=value.pod,
                previous_identity=value.previous,
            ).SerializeToString()
            for key, value in puts.items()
        }
        revision = await self._etcd.transact({}, put=values, lease=lease)
        assert revision is not None  # there was no condition
        if lease != self._lease:
            return  # gone with its lease: `held` is about the new one
        for key, value in puts.items():
            held, other = self._held.get(key), self._others.get(key)
            if other is not None and other.revision > revision:
                continue  # its news have overtaken our answer
            self._others.pop(key, None)
            if held is None or held.revision < revision:
                self._held[key] = _Held(value, revision)

    async def _delete(self, deletes: Mapping[bytes, int]) -> None:
        paths = {self._path(key): revision for key, revision in deletes.items()}
        if await self._etcd.transact(paths, delete=paths.keys()) is None:
            for path, revision in paths.items():
                await self._etcd.delete_if(path, revision)
        for key, revision in deletes.items():
            held = self._held.get(key)
            # Where it was not this node's any more, the ipcache tells what it is.
            if held is not None and held.revision == revision:
                del self._held[key]

    def _path(self, key: bytes) -> str:
        return f"{self._prefix}{address_of(key)}"
