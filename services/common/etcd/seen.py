"""How far a follower of etcd has come, for those who want to read what they have written themselves."""

from __future__ import annotations

import asyncio
import heapq
from itertools import count
from typing import Final

WAIT_S: Final = 2.0
"""After which an answer goes out all the same: what was written is in etcd, and the follower comes to it."""


class Seen:
    """Used from one event loop.

    seen.reach(event.mod_revision)  # the follower, after it has taken an event in
    await seen.wait(revision)       # who has written at that revision
    """

    def __init__(self) -> None:
        self._revision = 0
        self.restarts = 0
        """Revisions from before the last one are no more: nobody may wait for them."""
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = count()

    def reach(self, revision: int) -> None:
        """All up to that revision is known, or will be before this task gives way."""
        self._revision = max(self._revision, revision)
        while self._waiting and self._waiting[0][0] <= self._revision:
            *_, done = heapq.heappop(self._waiting)
            if not done.done():
                done.set_result(None)

    def restart(self) -> None:
        """What follows is another etcd's, whose revisions are its own."""
        self._revision = 0
        self.restarts += 1

    async def wait(self, revision: int, seconds: float = WAIT_S) -> bool:
        """Whether it was reached in that time."""
        if revision <= self._revision:
            return True
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (revision, next(self._order), done))
        try:
            await asyncio.wait_for(done, seconds)
        except TimeoutError:
            return False
        return True
