"""Supervision of background tasks: the first that fails stops the process, and its cause is kept.

Unlike asyncio.TaskGroup this is not a block: services spawn tasks as long as they live, and the host waits in
`wait`. A task that returns is done; a task that raises is a failure, since nothing would do its work any
more. Work that may fail and be retried must handle that itself (see the reconciler).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from services.common.errors import Internal

log = logging.getLogger(__name__)


class Tasks:
    """Background tasks of one process; used from one event loop."""

    def __init__(self) -> None:
        # asyncio holds only weak references to tasks: without this set a waiting task may be collected.
        self._running: set[asyncio.Task[Any]] = set()
        self._failed = asyncio.Event()
        self._cause: BaseException | None = None
        self._source = ""
        self._closing = False

    def spawn(self, name: str, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run `coro` in the background. After `close` began it is refused: the task comes back cancelled."""
        task = asyncio.get_running_loop().create_task(coro, name=name)
        self._running.add(task)
        task.add_done_callback(self._done)
        if self._closing:
            task.cancel()
        return task

    def adopt(self, task: asyncio.Task[None]) -> None:
        """A task that somebody else began and ends, and that must not end by itself."""
        self.spawn(f"{task.get_name()}.watch", _watch(task))

    @property
    def cause(self) -> BaseException | None:
        """What the first failed task raised; None while none has."""
        return self._cause

    @property
    def source(self) -> str:
        """Name of the task that failed first, "" while none has."""
        return self._source

    async def wait_failed(self) -> None:
        """Return when a task has failed."""
        await self._failed.wait()

    async def close(self, timeout_s: float = 5.0) -> None:
        """Cancel what still runs and wait for it, at most `timeout_s` seconds; what ignores that is logged by
        name.
        """
        self._closing = True
        pending = {task for task in self._running if task is not asyncio.current_task()}
        for task in pending:
            task.cancel()
        if pending:
            _, stuck = await asyncio.wait(pending, timeout=timeout_s)
            for task in stuck:
                log.warning(
                    "task did not stop when cancelled", extra={"task": task.get_name(), "waited_s": timeout_s}
                )

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        error = _strayed(task) if task.cancelled() else task.exception()
        if error is None:
            return
        if self._cause is None and not self._closing:
            self._cause, self._source = error, task.get_name()
            self._failed.set()
        else:
            log.error("another task failed", extra={"task": task.get_name()}, exc_info=error)


async def _watch(task: asyncio.Task[None]) -> None:
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.cancelled():
            raise
        if (error := _strayed(task)) is not None:
            raise error from None
        return
    raise Internal(f"task {task.get_name()} ended")


def _strayed(task: asyncio.Task[Any]) -> Internal | None:
    """Whether a cancelled task was cancelled by nobody: gRPC also says so that a channel was closed during a call."""
    return None if task.cancelling() else Internal(f"task {task.get_name()} was cancelled by nobody")
