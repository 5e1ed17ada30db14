"""Follows a watch stream of another service of this node, whenever there is one: snapshot, SYNCED, changes.

A stream seldom ends but with the service itself, and then nothing but a snapshot will do: it is never resumed. What was known
before and is not in the snapshot is told as gone when the snapshot is complete, not earlier.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, AsyncIterator, Callable, Hashable
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import grpc
import grpc.aio

from fibril.types.v1 import types_pb2
from services.common import errors
from services.common.rpc.client import channel
from services.common.rpc.status import from_rpc_error
from services.common.service import ComponentStatus

log = logging.getLogger(__name__)

RECONNECT_S: Final = 0.2
BEGIN_S: Final = 10.0
"""Within which a stream's first message comes; a snapshot has one even where there is nothing."""
K = TypeVar("K", bound=Hashable)
M = TypeVar("M")
_BATCH: Final = 256


async def begun(messages: AsyncIterable[M]) -> AsyncIterator[M]:
    """The messages of a stream that begins with a snapshot. Raises Unavailable if nothing comes at first: a connection may
    have been made to a server that was just ending, and nobody would ever say so.
    """
    stream = aiter(messages)
    try:
        async with asyncio.timeout(BEGIN_S):
            first = await anext(stream)
    except TimeoutError:
        raise errors.Unavailable(f"nothing is told within {BEGIN_S:g} s") from None
    except StopAsyncIteration:
        return
    yield first
    async for message in stream:
        yield message


class Follower(Generic[K]):
    """Used from one event loop.

    watch: opens the stream on a channel. key: what an object goes by. put and gone are told of changes; synced after each
    snapshot.
    """

    def __init__(
        self,
        name: str,
        socket: Path,
        watch: Callable[[grpc.aio.Channel], AsyncIterable[Any]],
        item: str,
        key: Callable[[Any], K],
        put: Callable[[Any], None],
        gone: Callable[[K], None],
        synced: Callable[[], None] = lambda: None,
    ) -> None:
        """item: name of the field with the object."""
        self.name, self.socket = name, socket
        self._watch, self._item, self._key = watch, item, key
        self._put, self._gone, self._synced = put, gone, synced
        self.known: set[K] = set()
        self.in_step = False
        self.ever = False
        """Whether there has been a whole snapshot."""
        self._problem = "not connected yet"

    @property
    def absent(self) -> bool:
        """Whether the service does not run on this node."""
        return not self.socket.exists()

    async def run(self) -> None:
        """Until cancelled."""
        told = ""
        while True:
            if not self.absent:
                try:
                    await self._follow()
                except errors.FibrilError as error:
                    self._problem = str(error)
                    if self.in_step or self._problem != told:
                        log.info("not followed for now", extra={"source": self.name, "cause": self._problem})
                    told = self._problem
            self.in_step = False
            await asyncio.sleep(RECONNECT_S)

    async def _follow(self) -> None:
        seen: set[K] | None = set()
        async with channel(f"unix:{self.socket}") as to:
            count = 0
            try:
                async for change in begun(self._watch(to)):
                    count += 1
                    if count % _BATCH == 0:
                        await asyncio.sleep(0)
                    if change.kind == types_pb2.WATCH_KIND_SYNCED:
                        for key in self.known - (seen or set()):
                            self.known.discard(key)
                            self._gone(key)
                        seen, self.in_step, self.ever, self._problem = None, True, True, ""
                        self._synced()
                        continue
                    found = getattr(change, self._item)
                    key = self._key(found)
                    if change.kind == types_pb2.WATCH_KIND_DELETE:
                        self.known.discard(key)
                        self._gone(key)
                        continue
                    self.known.add(key)
                    if seen is not None:
                        seen.add(key)
                    self._put(found)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from None
        raise errors.Unavailable("the service ended the stream")

    def status(self) -> ComponentStatus:
        """Whether what is known is so now."""
        if self.in_step:
            return ComponentStatus(self.name, "ok", f"{len(self.known)} known")
        if self.absent and not self.ever:
            return ComponentStatus(self.name, "ok", "that service does not run on this node")
        return ComponentStatus(
            self.name, "degraded", f"not told of changes, what is known goes on: {self._problem or 'not connected'}"
        )
