"""Looks at something in the kernel whenever an event says it may be other than it was, and now and again all the same.

    following = Following("xdp", groups, self._concerns, self._work, resync_s=10.0)
    await following.start()     # `_work` has been called once, and no change after that is missed
    following.wake()            # something else has changed
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

from services.common.kernel import events as ev

SETTLE_S: Final = 0.05


class Following:
    """Used from one event loop, in the network namespace that events are to be of."""

    def __init__(
        self,
        name: str,
        groups: Sequence[int],
        concerns: Callable[[ev.Event], bool],
        look: Callable[[], Awaitable[None]],
        *,
        resync_s: float | Callable[[], float],
        settle_s: float = SETTLE_S,
    ) -> None:
        """name: of the tasks. groups: of events. look: what it raises ends this. resync_s: how long without a change until
        it is called all the same. settle_s: between a change and the look, since changes come in bunches.
        """
        self._name, self._groups = name, tuple(groups)
        self._concerns, self._look = concerns, look
        self._resync_s, self._settle_s = resync_s, settle_s
        self._events: ev.Events | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._dirty = asyncio.Event()

    @property
    def running(self) -> bool:
        """Whether the first look is over."""
        return bool(self._tasks)

    def wake(self) -> None:
        """Look again soon."""
        self._dirty.set()

    async def start(self) -> None:
        """Look once, and follow what changes."""
        # Before looking, so that no change falls between.
        self._events = ev.Events(self._groups)
        await self._look()
        self._tasks = [
            asyncio.create_task(self._follow(self._events), name=f"{self._name}.events"),
            asyncio.create_task(self._run(), name=f"{self._name}.look"),
        ]

    async def stop(self) -> None:
        """Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._events is not None:
            self._events.close()
            self._events = None

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Tasks that run until `stop`; the end of one is a failure."""
        return tuple(self._tasks)

    async def _follow(self, events: ev.Events) -> None:
        async for event in events:
            if self._concerns(event):
                self._dirty.set()

    async def _run(self) -> None:
        while True:
            pause = self._resync_s() if callable(self._resync_s) else self._resync_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._dirty.wait()
                await asyncio.sleep(self._settle_s)
            self._dirty.clear()
            await self._look()
