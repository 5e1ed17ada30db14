"""Asks backends of services with a health check, each on its own time, and keeps what came of it.

Services that have a backend in common and ask the same share one question. Verdicts are this node's own: another may reach
what this one cannot.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from services.common.service import ComponentStatus
from services.common.telemetry import metrics
from services.lb.abi import BackendState
from services.lb.health import probes
from services.lb.health.hysteresis import Hysteresis
from services.lb.model import BackendKey, Backends, HealthCheck, Spec

log = logging.getLogger(__name__)

AT_ONCE: Final = 200
"""Questions under way at once."""
LATE_S: Final = 1.0
User = tuple[str, BackendKey]


class Services(Protocol):
    """What is declared (services.lb.services)."""

    @property
    def specs(self) -> Mapping[str, Spec]: ...

    @property
    def backends(self) -> Mapping[str, Backends]: ...

    def on_change(self, callback: Callable[[str, frozenset[BackendKey] | None], None]) -> None: ...


_BEFORE: Final = "was not well before, and has not been asked often enough since"


class _Target:
    """One address and port that is asked one thing."""

    def __init__(self, check: HealthCheck, key: BackendKey) -> None:
        self.check, self.key = check, key
        self.users: set[User] = set()
        self.opinion = Hysteresis(check.unhealthy_after, check.healthy_after)
        self.why = ""
        self.asked = False


class Health:
    """Used from one event loop."""

    def __init__(
        self, services: Services, was_unwell: Callable[[str, BackendKey], bool] = lambda name, key: False
    ) -> None:
        """was_unwell: whether the kernel gives a backend nothing new, since an earlier process, or the check before this one,
        found it so. It stays so until it has answered often enough: else each restart would send clients to the dead.
        """
        self._services, self._was_unwell = services, was_unwell
        self._targets: dict[tuple[HealthCheck, BackendKey], _Target] = {}
        self._of: dict[User, _Target] = {}
        self._asked_of: dict[str, set[BackendKey]] = {}
        self._queue: list[tuple[float, int, _Target]] = []
        self._tickets = itertools.count()
        self._news = asyncio.Event()
        self._room = asyncio.Semaphore(AT_ONCE)
        self._asking: set[asyncio.Task[None]] = set()
        self._callbacks: list[Callable[[str, frozenset[BackendKey]], None]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._late = 0.0
        self._unasked = ""

    async def start(self) -> None:
        """Begin to ask."""
        self._services.on_change(self.look)
        for name in list(self._services.specs):
            self.look(name)
        self._tasks = [asyncio.create_task(self._run(), name="lb.health")]
        metrics().gauge(
            "fibril.lb.health",
            lambda: [(self._count(True), {"well": "true"}), (self._count(False), {"well": "false"})],
            description="backends that are asked, by what came of it",
        )

    async def stop(self) -> None:
        tasks = [*self._tasks, *self._asking]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks = []

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Tasks that run until `stop`; the end of one is a failure."""
        return tuple(self._tasks)

    def on_change(self, callback: Callable[[str, frozenset[BackendKey]], None]) -> None:
        """Tell of backends of a service that have become well or unwell."""
        self._callbacks.append(callback)

    def verdict(self, service: str, key: BackendKey) -> str:
        """Why a backend is not well; "" if it is, or nobody asks it."""
        target = self._of.get((service, key))
        if target is None:
            spec = self._services.specs.get(service)
            return _BEFORE if spec is not None and spec.health_check and self._was_unwell(service, key) else ""
        return target.why if not target.opinion.well else ""

    def status(self) -> list[ComponentStatus]:
        if not self._targets:
            return [ComponentStatus("health", "ok", "no service wants its backends to be checked")]
        unwell = self._count(False)
        text = f"{len(self._targets)} backends are asked, {unwell} are not well"
        if self._unasked:
            return [
                ComponentStatus("health", "degraded", f"{text}; some cannot be asked, and count as before: {self._unasked}")
            ]
        if self._late > LATE_S:
            return [
                ComponentStatus(
                    "health",
                    "degraded",
                    f"{text}; questions are {self._late:.0f} s late: ask less often, or fewer (interval_ms)",
                )
            ]
        return [ComponentStatus("health", "ok", text)]

    def _count(self, well: bool) -> int:
        return sum(target.opinion.well is well for target in self._targets.values())

    # ---- who is asked ---------------------------------------------------------------------------------------
    def look(self, name: str, keys: frozenset[BackendKey] | None = None) -> None:
        """A service, or some of its backends, are other than before."""
        spec, backends = self._services.specs.get(name), self._services.backends.get(name, {})
        if name not in self._asked_of and (spec is None or spec.health_check is None):
            return
        if keys is None:
            keys = frozenset(backends) | self._asked_of.get(name, set())
        for key in keys:
            backend = backends.get(key)
            wanted = (
                spec.health_check
                if spec is not None and backend is not None and backend.state is not BackendState.MAINTENANCE
                else None
            )
            self._set((name, key), wanted)

    def _set(self, user: User, check: HealthCheck | None) -> None:
        before = self._of.get(user)
        if before is not None:
            if before.check == check:
                return
            del self._of[user]
            mine = self._asked_of[user[0]]
            mine.discard(user[1])
            if not mine:
                del self._asked_of[user[0]]
            before.users.discard(user)
            if not before.users:
                del self._targets[before.check, before.key]
        if check is None:
            return
        key = user[1]
        target = self._targets.get((check, key))
        if target is None:
            target = self._targets[check, key] = _Target(check, key)
            # Spread over an interval, so that thousands declared at once are not asked at once; the first one soon.
            self._put(target, random.uniform(0.0, min(check.interval_s, 1.0)))
        if not target.asked and self._was_unwell(*user):
            target.opinion.well, target.why = False, _BEFORE
        target.users.add(user)
        self._of[user] = target
        self._asked_of.setdefault(user[0], set()).add(key)

    # ---- asking ---------------------------------------------------------------------------------------------
    def _put(self, target: _Target, after_s: float) -> None:
        heapq.heappush(self._queue, (time.monotonic() + after_s, next(self._tickets), target))
        self._news.set()

    async def _run(self) -> None:
        while True:
            self._news.clear()
            now = time.monotonic()
            if self._queue and self._queue[0][0] <= now:
                due, _, target = heapq.heappop(self._queue)
                self._late = 0.9 * self._late + 0.1 * (now - due)
                if target.users:
                    await self._room.acquire()
                    task = asyncio.create_task(self._ask(target), name="lb.health.ask")
                    self._asking.add(task)
                    task.add_done_callback(self._asked)
                continue
            pause = self._queue[0][0] - now if self._queue else None
            try:
                async with asyncio.timeout(pause):
                    await self._news.wait()
            except TimeoutError:
                continue

    def _asked(self, task: asyncio.Task[None]) -> None:
        self._asking.discard(task)
        self._room.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a check has failed in itself", exc_info=error)

    async def _ask(self, target: _Target) -> None:
        check, key = target.check, target.key
        began = time.monotonic()
        try:
            why = await probes.ask(check, key.address, check.port or key.port)
            self._unasked = ""
        except probes.NotAsked as error:
            self._unasked = str(error)
            return
        finally:
            # Not at the same moments for ever.
            rest = check.interval_s * random.uniform(0.95, 1.05) - (time.monotonic() - began)
            if target.users:
                self._put(target, max(0.0, rest))
        target.asked = True
        if why:
            target.why = why
        if not target.opinion.heard(not why):
            return
        log.info(
            "a backend is well again" if not why else "a backend is not well",
            extra={"backend": f"{key.address} port {key.port}", "why": why},
        )
        by_service: dict[str, set[BackendKey]] = {}
        for name, each in target.users:
            by_service.setdefault(name, set()).add(each)
        for name, several in by_service.items():
            for callback in self._callbacks:
                callback(name, frozenset(several))
