"""Following every key below a prefix, across broken connections, compactions and a replaced etcd.

The prefix is listed once and watched from the next revision on. When the stream breaks, the watch goes on
after the last revision seen, on whatever server answers; nothing is lost, since etcd keeps the history. When
it keeps it no longer (compaction), or is another etcd than before (restored from a backup, created anew),
everything known becomes *stale*: the prefix is listed again, what differs is told as a Put, and what stayed
stale as a Delete.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NamedTuple

from services.common.errors import FibrilError, Unavailable
from services.common.etcd.client import EtcdClient, KeyValue, Listing, decode

log = logging.getLogger(__name__)

_BACKOFF_S = (0.02, 2.0)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The first event: everything there is, by key."""

    kvs: tuple[KeyValue, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Synced:
    """Everything up to `revision` has been told: after the snapshot, and after what a later listing found."""

    revision: int


class Put(NamedTuple):
    """The key was created or changed."""

    key: str
    value: bytes
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Delete:
    """The key is gone.

    mod_revision: when it was deleted; for one found missing by a listing, the listing's revision.
    """

    key: str
    mod_revision: int


Event = Snapshot | Synced | Put | Delete


class Mirror:
    """What a watcher has been told, and the events that bring it up to date. Pure."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        self._cluster = 0
        self.revision = 0

    def same_etcd(self, cluster_id: int, revision: int) -> bool:
        """Whether a server in this state can be the one the mirror is of: its revision never goes back."""
        return self._cluster == cluster_id and revision >= self.revision

    def listed(self, listing: Listing) -> list[Event]:
        """A snapshot the first time. Later what has changed: deletes first, so that what is unique (an
        address, a name) is free before it is taken again, then puts in the order of their revisions.
        """
        first = self.revision == 0
        # Revisions of different etcds cannot be compared: then everything counts as changed.
        stale = self._known if self.same_etcd(listing.cluster_id, listing.revision) else {}
        known, self._known = self._known, {kv.key: kv.mod_revision for kv in listing.kvs}
        self._cluster, self.revision = listing.cluster_id, listing.revision
        if first:
            return [Snapshot(listing.kvs, listing.revision), Synced(listing.revision)]
        missing = known.keys() - self._known.keys()
        changed = [kv for kv in listing.kvs if stale.get(kv.key) != kv.mod_revision]
        changed.sort(key=lambda kv: kv.mod_revision)
        events: list[Event] = [Delete(key, listing.revision) for key in sorted(missing)]
        events += [Put(kv.key, kv.value, kv.mod_revision) for kv in changed]
        return [*events, Synced(listing.revision)]

    def changed(self, changes: Iterable[tuple[bool, Put]]) -> list[Event]:
        """The events of one answer of a watch, in order: (whether it is a delete, the key as if put)."""
        seen = self.revision
        events: list[Event] = []
        for deleted, put in changes:
            if put.mod_revision <= seen:
                continue
            # One transaction changes several keys at one revision, hence no comparison with this one.
            self.revision = put.mod_revision
            if not deleted:
                self._known[put.key] = put.mod_revision
                events.append(put)
            elif self._known.pop(put.key, None) is not None:
                events.append(Delete(put.key, put.mod_revision))
        return events


async def watch_prefix(
    client: EtcdClient, prefix: str, replaced: Callable[[], None] | None = None
) -> AsyncGenerator[Event, None]:
    """Snapshot, Synced, then Put and Delete as they happen, and Synced after each further listing. Events of
    one key come in the order of their revisions.

    replaced: called before the events of a listing of another etcd than before, whose revisions cannot be compared
    with those told so far.

    Never raises on its own and never ends: while etcd is away it is silent and `client.healthy` tells. Close
    it (`contextlib.aclosing`) or cancel the task that reads it.
    """
    mirror = Mirror()
    list_first = True
    pause, trouble = _BACKOFF_S[0], ""
    while True:
        try:
            if list_first:
                listing = await client.get_prefix(prefix)
                if replaced is not None and not (
                    mirror.revision == 0 or mirror.same_etcd(listing.cluster_id, listing.revision)
                ):
                    replaced()
                for event in mirror.listed(listing):
                    yield event
                list_first = False
            async with aclosing(client.watch_stream(prefix, mirror.revision + 1)) as answers:
                async for answer in answers:
                    if answer.compact_revision or not mirror.same_etcd(
                        answer.header.cluster_id, answer.header.revision
                    ):
                        log.info("listing again what is watched", extra={"prefix": prefix})
                        list_first = True
                        break
                    if answer.canceled:
                        raise Unavailable(f"etcd ended the watch of {prefix}: {answer.cancel_reason}")
                    for event in mirror.changed(_changes(answer)):
                        yield event
                    pause, trouble = _BACKOFF_S[0], ""
        except FibrilError as error:
            # The client logs that etcd is away, once for all its users.
            if not isinstance(error, Unavailable) and trouble != str(error):
                trouble = str(error)
                log.warning("cannot watch etcd", extra={"prefix": prefix, "error": trouble})
        # Also after a listing that was compacted before the watch began: a very busy etcd needs room.
        await asyncio.sleep(pause * random.uniform(0.5, 1))
        pause = min(pause * 2, _BACKOFF_S[1])


def _changes(answer: Any) -> Iterator[tuple[bool, Put]]:
    for event in answer.events:
        kv = event.kv
        # mvccpb.Event.EventType: PUT = 0, DELETE = 1.
        yield event.type == 1, Put(decode(kv.key), kv.value, kv.mod_revision)
