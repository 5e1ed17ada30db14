"""The addresses of all pods, as their nodes publish them: /fibril/v1/<cluster>/ip/<address>."""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import aclosing
from typing import Final, Protocol

from google.protobuf.message import DecodeError

from fibril.ipcache.v1 import ipcache_pb2 as pb
from services.common.etcd.client import EtcdClient
from services.common.etcd.watch import Delete, Put, Snapshot, Synced, watch_prefix
from services.identity.ipcache.model import Entry, Source, text_key

log = logging.getLogger(__name__)

# Events handled before others get their turn on the event loop.
_CHUNK: Final = 1024


def prefix_of(cluster: str) -> str:
    """What the keys begin with."""
    return f"/fibril/v1/{cluster}/ip/"


class Sink(Protocol):
    """Who is told. Calls come in the order of the revisions of each address."""

    def published(self, entry: Entry) -> None:
        """An address has been published, or changed."""

    def withdrawn(self, key: bytes, revision: int) -> None:
        """An address is gone."""

    def replaced(self) -> None:
        """Revisions told from now on are of another etcd than before."""

    def pause(self) -> None:
        """Nothing more to tell for now; not called before everything there is has been told once."""


def decode(address: str, value: bytes, revision: int) -> Entry:
    """A pod's entry. ValueError or DecodeError for what no Fibril wrote."""
    message = pb.StoredAddress.FromString(value)
    if not message.identity or not message.node:
        raise ValueError("it has no identity or no node")
    # One string for a node, not one for each of its pods.
    return Entry(
        text_key(address),
        message.identity,
        sys.intern(message.node),
        Source.POD,
        message.pod,
        message.previous_identity,
        revision,
    )


class AddressFollower:
    """Runs until cancelled; never fails."""

    def __init__(self, etcd: EtcdClient, cluster: str, sink: Sink) -> None:
        self._etcd = etcd
        self._prefix = prefix_of(cluster)
        self._sink = sink
        self.synced = asyncio.Event()
        """Set when everything there is has been told once."""

    async def run(self) -> None:
        handled = 0
        async with aclosing(watch_prefix(self._etcd, self._prefix, self._sink.replaced)) as events:
            async for event in events:
                match event:
                    case Snapshot():
                        for number, kv in enumerate(event.kvs):
                            self._put(kv.key, kv.value, kv.mod_revision)
                            if number % _CHUNK == 0:
                                await asyncio.sleep(0)
                    case Put():
                        self._put(event.key, event.value, event.mod_revision)
                    case Delete():
                        self._gone(event.key, event.mod_revision)
                    case Synced():
                        self.synced.set()
                if self.synced.is_set():
                    self._sink.pause()
                handled += 1
                if handled % _CHUNK == 0:
                    await asyncio.sleep(0)

    def _put(self, key: str, value: bytes, revision: int) -> None:
        try:
            entry = decode(key.removeprefix(self._prefix), value, revision)
        except (ValueError, DecodeError) as error:
            log.warning("an address in etcd is malformed", extra={"key": key, "cause": str(error)})
            self._gone(key, revision)
        else:
            self._sink.published(entry)

    def _gone(self, key: str, revision: int) -> None:
        try:
            self._sink.withdrawn(text_key(key.removeprefix(self._prefix)), revision)
        except ValueError:
            pass  # was never published
