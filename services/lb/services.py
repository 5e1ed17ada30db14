"""The services of the cluster as etcd has them, followed. What every node serves.

One watch covers services and backends, so changes come in the order they were made. Backends of a service that is
not there (one being made or removed) are kept aside and count for nothing.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Final, TypeVar

from google.protobuf.message import DecodeError

from services.common.errors import FibrilError, NotFound
from services.common.etcd.client import EtcdClient, KeyValue
from services.common.etcd.seen import Seen
from services.common.etcd.watch import Delete, Put, Snapshot, Synced, watch_prefix
from services.common.feed import Feed
from services.common.keeping import keeping
from services.lb import keys
from services.lb.model import BackendKey, Backends, Spec

log = logging.getLogger(__name__)

HISTORY: Final = 4096
TURN: Final = 256
T = TypeVar("T")
Callback = Callable[[str, frozenset[BackendKey] | None], None]


class Services:
    """Used from one event loop."""

    def __init__(self, etcd: EtcdClient, cluster: str) -> None:
        self._etcd = etcd
        self._root = keys.root(cluster)
        self.specs: dict[str, Spec] = {}
        self.backends: dict[str, Backends] = {}
        """By service; also of some that are not in `specs`."""
        self.revisions: dict[str, int] = {}
        """etcd's revision of a service's last change, backends included."""
        self._backend_revisions: dict[str, int] = {}
        self.synced = asyncio.Event()
        """Set when all there is has been read once; nobody is told of anything before."""
        self.feed: Feed[str] = Feed(lambda: list(self.specs), HISTORY)
        """Names. `tell` says that the way a service is served here has changed."""
        self.seen = Seen()
        self._callbacks: list[Callback] = []
        self._unusable: dict[str, str] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to follow."""
        self._tasks.append(asyncio.create_task(self._follow(), name="lb.services"))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Tasks that run until `stop`; the end of one is a failure."""
        return tuple(self._tasks)

    def on_change(self, callback: Callback) -> None:
        """Call back with the name of a service and which of its backends have changed; None: the service itself."""
        self._callbacks.append(callback)

    def missing(self, name: str, field: str) -> NotFound:
        """That there is no such service. Kubernetes' services are one for each of their ports: those are named."""
        ports = heapq.nsmallest(3, (each for each in self.specs if each.startswith(f"{name}:")))
        fix = f"there is {' and '.join(map(repr, ports))}" if ports else "see: fibril service ls"
        return NotFound(f"there is no service {name!r}", field=field, fix=fix)

    def tell(self, name: str) -> None:
        """Tell watchers that a service is served otherwise than before."""
        if name in self.specs:
            self.feed.publish("put", name)

    @property
    def unread(self) -> frozenset[str]:
        """Services that are declared, and that this process has never understood: those of another version."""
        names = {keys.service_of(key) for key in self._unusable if key.startswith(keys.SERVICES)}
        return frozenset(name for name in names - self.specs.keys() if keys.service_key(name) in self._unusable)

    @property
    def problem(self) -> str:
        """One sentence, empty when all that etcd says is understood."""
        if not self._unusable:
            return ""
        key, why = min(self._unusable.items())
        more = f" and {len(self._unusable) - 1} more" if len(self._unusable) > 1 else ""
        return f"etcd's key {self._root}{key}{more} is not usable: {why}"

    async def _follow(self) -> None:
        async with aclosing(watch_prefix(self._etcd, self._root, self._replaced)) as events:
            async for event in events:
                match event:
                    case Snapshot(kvs):
                        await self._take_all(kvs)
                    case Put(key, value, revision):
                        self._changed(*self._put(key.removeprefix(self._root), value, revision))
                        self.seen.reach(revision)
                    case Delete(key, revision):
                        self._changed(*self._delete(key.removeprefix(self._root), revision))
                        self.seen.reach(revision)
                    case Synced(revision):
                        self.seen.reach(revision)
                        if not self.synced.is_set():
                            await self._begin()

    async def _begin(self) -> None:
        self.synced.set()
        for names in _turns(list(self.specs)):
            for name in names:
                self._call_back(name, None)
            await asyncio.sleep(0)

    async def _take_all(self, kvs: Sequence[KeyValue]) -> None:
        """What there is at first. Hundreds of thousands of keys take seconds: others must have their turns."""
        with keeping():
            for several in _turns(kvs):
                for kv in several:
                    self._put(kv.key.removeprefix(self._root), kv.value, kv.mod_revision)
                await asyncio.sleep(0)

    def _replaced(self) -> None:
        """What follows is another etcd's, with revisions of its own."""
        self.seen.restart()
        self._backend_revisions.clear()
        self.revisions = dict.fromkeys(self.revisions, 0)

    def _put(self, key: str, value: bytes, revision: int) -> tuple[str, BackendKey | None]:
        """Which service has changed, "" for none, and which backend of it."""
        if self._unusable:
            self._unusable.pop(key, None)
        try:
            if key.startswith(keys.SERVICES):
                spec = keys.decode_spec(value)
                if keys.service_key(spec.name) != key:
                    raise ValueError(f"it holds the service {spec.name!r}")
                before = self.specs.get(spec.name)
                self.specs[spec.name] = spec
                self.revisions[spec.name] = max(revision, self._backend_revisions.get(spec.name, 0))
                # Written anew, perhaps for its revision's sake only.
                return (spec.name, None) if spec != before else ("", None)
            if key.startswith(keys.BACKENDS):
                name, backend = keys.read_backend(key, value)
                which = backend.key
                known = self.backends.get(name)
                if known is None:
                    known = self.backends[name] = {}
                known[which] = backend
                self._backend_revisions[name] = max(revision, self._backend_revisions.get(name, 0))
                if name in self.specs:
                    self.revisions[name] = max(revision, self.revisions[name])
                return name, which
        except (FibrilError, ValueError, DecodeError) as error:
            # Written by another version, or by hand: what was known before goes on.
            self._unusable[key] = str(error)
            log.error("not usable", extra={"key": self._root + key, "cause": str(error)})
        return "", None

    def _delete(self, key: str, revision: int) -> tuple[str, BackendKey | None]:
        self._unusable.pop(key, None)
        if key.startswith(keys.SERVICES):
            name = keys.service_of(key)
            if keys.service_key(name) != key:
                return "", None  # written by hand, never usable: the service of that name has a key of its own
            self.specs.pop(name, None)
            self.revisions.pop(name, None)
            return name, None
        elif key.startswith(keys.BACKENDS):
            try:
                name, which = keys.backend_of(key)
            except ValueError:
                return "", None
            known = self.backends.get(name)
            if keys.backend_key(name, which) == key and known is not None and known.pop(which, None) is not None:
                if not known:
                    del self.backends[name]
                    self._backend_revisions.pop(name, None)
                return name, which
        return "", None

    def _changed(self, name: str, which: BackendKey | None) -> None:
        if not name or not self.synced.is_set() or (which is not None and name not in self.specs):
            return
        self._call_back(name, frozenset((which,)) if which is not None else None)
        self.feed.publish("put" if name in self.specs else "delete", name)

    def _call_back(self, name: str, which: frozenset[BackendKey] | None) -> None:
        for callback in self._callbacks:
            callback(name, which)


def _turns(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """As many at a time as take a few milliseconds."""
    return (items[at : at + TURN] for at in range(0, len(items), TURN))
