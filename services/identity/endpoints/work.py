"""Work on many objects at once, one piece at a time for each, tried again until it succeeds."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from services.common.errors import FibrilError

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)


class Work(Generic[K]):
    """Level-triggered: `wake` says that there may be something to do for a key, `do` finds out what. Used from one
    event loop.

    do: any exception means that it is to be tried again. most: pieces of work at one time. backoff: first and
    greatest delay in seconds before a key is tried again.
    """

    def __init__(
        self, do: Callable[[K], Awaitable[None]], most: int = 100, backoff: tuple[float, float] = (0.1, 5.0)
    ) -> None:
        self._do = do
        self._most = most
        self._backoff = backoff
        # Insertion-ordered set of what is to be done now.
        self._due: dict[K, None] = {}
        self._busy: dict[K, asyncio.Task[None]] = {}
        self._again: set[K] = set()
        self._later: dict[K, asyncio.TimerHandle] = {}
        self._failed: dict[K, tuple[int, str]] = {}
        self._stopped = False

    @property
    def failed(self) -> dict[K, str]:
        """Keys whose last attempt failed, and why."""
        return {key: why for key, (_, why) in self._failed.items()}

    def wake(self, key: K, after_s: float = 0.0) -> None:
        """To be worked on, now or some time later; the latest word counts."""
        later = self._later.pop(key, None)
        if later is not None:
            later.cancel()
        if self._stopped:
            return
        if after_s > 0:
            self._later[key] = asyncio.get_running_loop().call_later(after_s, self._elapsed, key)
        elif key in self._busy:
            self._again.add(key)
        else:
            self._due[key] = None
            self._pump()

    def retry(self) -> None:
        """Try at once what waits for its next attempt."""
        for key in self._failed:
            self.wake(key)

    async def stop(self) -> None:
        """Cancel everything; nothing is begun any more."""
        self._stopped = True
        self._due.clear()
        for later in self._later.values():
            later.cancel()
        for task in self._busy.values():
            task.cancel()
        await asyncio.gather(*self._busy.values(), return_exceptions=True)

    def _elapsed(self, key: K) -> None:
        del self._later[key]
        self.wake(key)

    def _pump(self) -> None:
        while self._due and len(self._busy) < self._most:
            key = next(iter(self._due))
            del self._due[key]
            self._busy[key] = asyncio.get_running_loop().create_task(self._try(key))

    async def _try(self, key: K) -> None:
        try:
            await self._do(key)
        except Exception as error:
            self._fail(key, error)
        else:
            self._failed.pop(key, None)
        finally:
            del self._busy[key]
            if key in self._again:
                self._again.discard(key)
                self.wake(key)
            elif not self._stopped:
                self._pump()

    def _fail(self, key: K, error: Exception) -> None:
        count, before = self._failed.get(key, (0, ""))
        text = str(error) or type(error).__name__
        if text != before:
            # News only: each attempt for a hundred objects would drown everything else.
            unexpected = None if isinstance(error, FibrilError) else error
            log.warning(
                "work failed, to be tried again", extra={"key": key, "cause": text}, exc_info=unexpected
            )
        self._failed[key] = (count + 1, text)
        first, most = self._backoff
        if key not in self._later:
            self.wake(key, min(most, first * 2.0 ** min(count, 30)) * random.uniform(0.5, 1))
