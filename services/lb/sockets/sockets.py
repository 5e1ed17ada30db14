"""Load balancing at sockets as the lb service runs it: programs on a control group, and the end of stuck connections.

    sockets = Sockets(instance, plane.configure, cfg.lb.cgroup, cfg.lb.sockets)
    plane.on_removed(sockets.backends_removed)
    await sockets.start()              # raises nothing for what the host lacks: see `status`

At the root of all control groups only sockets of the node's own network namespace and of its pods are translated; a group
that the configuration names is taken as a whole. What is on it stays when the process goes, and is adopted by the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol, TypeVar

from services.common import errors
from services.common.instance import Instance
from services.common.kernel.netns import NetNs
from services.common.pipeline.datapath import Datapath
from services.common.service import ComponentStatus
from services.lb import abi
from services.lb.sockets import hooks
from services.lb.sockets.destroy import Destroyer
from services.lb.sockets.hooks import Hooks

log = logging.getLogger(__name__)

T = TypeVar("T")

RESYNC_S: Final = 5.0
"""How soon programs are back that somebody took off."""
SWEEP_S: Final = 30.0
AGAIN_S: Final = (0.0, 0.25, 1.0)
"""When sockets of a removed backend are looked for: one that was about to connect comes a moment later."""
_FORGET: Final = 20
"""With each so many sweeps entries are compared with the sockets there are."""
_SHARE: Final = 3
"""After a look of so many seconds, so many times as long a rest: backends may change all the time."""


class Removed(Protocol):
    """A backend that is gone."""

    @property
    def id(self) -> int: ...


class Sockets:
    """Used from one event loop, in the node's network namespace."""

    def __init__(
        self, instance: Instance, configure: Callable[..., None], cgroup: str, wanted: bool = True
    ) -> None:
        """configure: sets fields of lb_config. cgroup: relative to the root, "": the root itself."""
        self._instance, self._configure = instance, configure
        self._cgroup, self._wanted = cgroup.strip("/"), wanted
        self._hooks = Hooks(instance)
        self._destroyer = Destroyer(instance)
        self._datapath = Datapath(instance, hooks.parts(), self._use, self._lost)
        # It enters namespaces.
        self._thread = ThreadPoolExecutor(1, "lb.sockets")
        self._due: deque[tuple[float, frozenset[int]]] = deque()
        self._news = asyncio.Event()
        self._problem = "not attached yet"
        # Whether what an earlier configuration left elsewhere is gone.
        self._alone = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Have the programs where they belong, or say why not, and keep them there."""
        self._configure(**await self._run(self._fields))
        await self._agree()
        self._tasks = [
            asyncio.create_task(self._keep(), name="sockets.hooks"),
            asyncio.create_task(self._end(), name="sockets.end"),
            asyncio.create_task(self._sweep(), name="sockets.sweep"),
        ]

    async def stop(self) -> None:
        """The programs stay."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await asyncio.to_thread(self._thread.shutdown)
        self._hooks.close()

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Tasks that run until `stop`; the end of one is a failure."""
        return tuple(self._tasks)

    def backends_removed(self, backends: Iterable[Removed]) -> None:
        """Nothing is to go on with these; their lines in the kernel are free."""
        ids = frozenset(backend.id for backend in backends)
        now = time.monotonic()
        self._due.extend((now + later, ids) for later in AGAIN_S)
        self._news.set()

    @property
    def destroyed(self) -> int:
        """Sockets ended so far."""
        return self._destroyer.destroyed

    def status(self) -> list[ComponentStatus]:
        if not self._wanted:
            return [ComponentStatus("sockets", "ok", "off (lb.sockets)")]
        where = f"cgroup {self._cgroup}" if self._cgroup else "the root of all cgroups"
        if self._problem:
            return [
                ComponentStatus(
                    "sockets",
                    "degraded",
                    f"{self._problem}; pods are served by packets, processes of the host where packets reach tc",
                )
            ]
        if self._destroyer.problem:
            return [ComponentStatus("sockets", "degraded", self._destroyer.problem)]
        text = f"attached to {where}; {self.destroyed} sockets of removed backends ended"
        return [ComponentStatus("sockets", "ok", text)]

    # ---- programs -------------------------------------------------------------------------------------------
    def _fields(self) -> dict[str, Any]:
        with NetNs.current() as netns:
            own = netns.cookie()
        return {"host_netns": own, "flags": 0 if self._cgroup else int(abi.ConfigFlag.NETNS)}

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(RESYNC_S)
            await self._agree()

    async def _agree(self) -> None:
        try:
            await self._attach()
            problem = ""
        except (errors.FibrilError, OSError) as error:
            problem = str(error)
        if problem and problem != self._problem:
            log.warning("sockets are not balanced", extra={"cause": problem})
        self._problem = problem

    async def _attach(self) -> None:
        if not self._wanted:
            if not self._alone:
                await self._run(hooks.remove, self._instance)
            self._alone = True
            return
        there = self._hooks.ready and await self._run(hooks.complete, self._instance)
        if not there and not await self._datapath.install():
            raise self._datapath.problem or errors.Unavailable("the programs for sockets are not there")
        missing = await self._run(self._hooks.attach, self._cgroup)
        if missing:
            log.info("programs attached to a cgroup", extra={"cgroup": self._cgroup, "programs": missing})
        if not self._alone:
            await self._run(self._hooks.detach_others, self._cgroup)
            self._alone = True

    async def _use(self) -> None:
        await self._run(self._hooks.open)

    def _lost(self, reason: errors.FibrilError) -> None:
        """What is attached goes on; `status` names the reason."""

    # ---- connections ----------------------------------------------------------------------------------------
    async def _end(self) -> None:
        """Look for sockets of removed backends when they are due, of many at once."""
        while True:
            if not self._due:
                self._news.clear()
                await self._news.wait()
            now = time.monotonic()
            ids: set[int] = set()
            later: list[tuple[float, frozenset[int]]] = []
            for at, some in self._due:
                if at <= now:
                    ids |= some
                else:
                    later.append((at, some))
            self._due = deque(later)
            if ids:
                await self._look(self._destroyer.destroy, ids)
                await asyncio.sleep(_SHARE * (time.monotonic() - now))
            elif self._due:
                self._news.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(at for at, _ in self._due) - now):
                        await self._news.wait()

    async def _sweep(self) -> None:
        for number in itertools.count():
            if number % _FORGET == 0:
                await self._look(self._destroyer.forget_closed)
            await self._look(self._destroyer.sweep)
            await asyncio.sleep(SWEEP_S)

    async def _look(self, work: Callable[..., int], *args: object) -> None:
        try:
            await self._run(work, *args)
        except errors.NotFound:
            pass  # no programs, no sockets of theirs
        except (errors.FibrilError, OSError) as error:
            log.warning("sockets of removed backends were not looked for", extra={"cause": str(error)})

    async def _run(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
