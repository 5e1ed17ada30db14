"""Making what is agree with what is wanted, object by object, for as long as the process lives.

Level-triggered: a wake-up says *that* an object may differ, never how; what is wanted is looked up when the
work is done. So wake-ups may be lost in a crash, repeated or merged. Work is done

- on change: `wake(key)`; costs one operation, whatever else there is;
- on retry: an object whose operation failed is tried again after its own, growing, jittered delay, and holds
  up nobody else. A change of the object cuts the delay short;
- on resync: everything that is is read and compared with everything that is wanted. Once at the start (this is
  how a restarted process adopts what it finds), then every `resync_s`, and on `wake()`.

Deletes go first, so that what is unique is free before it is taken again. Nothing is deleted before `synced`
says that all that is wanted is known: until then what nobody wants may only be what nobody has mentioned yet.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import random
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from services.common.errors import FibrilError
from services.common.service import ComponentStatus
from services.common.telemetry import metrics, span

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
D = TypeVar("D")
K_contra = TypeVar("K_contra", bound=Hashable, contravariant=True)
D_contra = TypeVar("D_contra", contravariant=True)

# How often to ask whether the sources are in sync while something waits for that.
_SYNC_POLL_S = 1.0


class Ops(Protocol[K, D_contra]):
    """How objects live where they live: in the kernel, in etcd. Called one at a time.

    Any exception counts as a failure of that one call. Each call must be bounded in time.
    """

    async def actual(self) -> Mapping[K, Any]:
        """Everything there is, and nothing that is somebody else's: what is here and not wanted is deleted."""

    async def update(self, key: K, desired: D_contra) -> None:
        """Create or change it. Idempotent, also over an attempt that was cut off half-way."""

    async def delete(self, key: K) -> None:
        """Remove it. One that is absent is a success."""

    async def same(self, desired: D_contra, actual: Any) -> bool:
        """Whether what `actual` gave for an object is what is wanted."""


@dataclass(frozen=True, slots=True)
class ObjectStatus:
    """How one object is.

    state: done; pending (to be worked on); failed (will be tried again).
    error: of the last attempt; failures: in a row; retry_s: seconds until the next attempt.
    """

    state: Literal["done", "pending", "failed"]
    error: str = ""
    failures: int = 0
    retry_s: float = 0.0


@dataclass(slots=True)
class _Failure:
    count: int
    error: str
    due: float
    # Tells the newest entry of the retry heap from those that were overtaken.
    ticket: int


class Reconciler(Generic[K, D]):
    """Reconciles one kind of object. Used from one event loop; `wake` must be called on it too."""

    def __init__(
        self,
        name: str,
        desired: Callable[[], Mapping[K, D]],
        ops: Ops[K, D],
        synced: Callable[[], bool] = lambda: True,
        resync_s: float = 60.0,
        backoff: tuple[float, float] = (0.1, 30.0),
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = lambda: random.uniform(0.5, 1.0),
    ) -> None:
        """name: of the objects, plural ("routes"), for logs, metrics and status.

        desired: gives the mapping of all that is wanted, without copying: it is asked for each object. Whoever
        changes it calls `wake` with the key. synced: whether that mapping is complete; call `wake()` when it
        becomes so. backoff: first and greatest delay in seconds before an object is tried again.
        """
        self.name = name
        self._desired = desired
        self._ops = ops
        self._synced = synced
        self._resync_s = resync_s
        self._backoff = backoff
        self._clock = clock
        self._jitter = jitter
        # Insertion-ordered sets of what is to be done now.
        self._deletes: dict[K, None] = {}
        self._updates: dict[K, None] = {}
        self._failed: dict[K, _Failure] = {}
        self._retries: list[tuple[float, int, K]] = []
        self._tickets = itertools.count()
        self._compare_due = clock()
        self._compare_failures = 0
        self._compare_error = ""
        self._compared = False
        # Something unwanted was left alone because not every source was in sync.
        self._unpruned = False
        self._awake = asyncio.Event()
        self._settled = asyncio.Event()
        self._state: tuple[str, float] = ("", 0.0)
        self._operations = metrics().counter("fibril.reconcile.operations", description="operations tried")
        self._durations = metrics().histogram("fibril.reconcile.duration", description="time of an operation")

    def wake(self, *keys: K) -> None:
        """These objects may have changed; without keys: all may have."""
        for key in keys:
            self._enqueue(key)
        if not keys:
            self._compare_due = self._clock()
        self._settled.clear()
        self._awake.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._awake.clear()
            pause = await self.work()
            if self._awake.is_set():
                continue
            self._settled.set()
            try:
                async with asyncio.timeout(pause):
                    await self._awake.wait()
            except TimeoutError:
                self._settled.clear()

    async def settled(self) -> None:
        """Wait until `run` has worked off all there was to do. What failed and waits for its retry is not
        waited for.
        """
        await self._settled.wait()

    async def work(self) -> float:
        """Do all that is due; seconds until something will be. `run` is this in a loop."""
        while True:
            now = self._clock()
            self._collect_due(now)
            may_prune = self._unpruned and not self._compare_error and self._synced()
            if now >= self._compare_due or may_prune:
                await self._compare()
            elif self._deletes or self._updates:
                await self._apply(_pop(self._deletes or self._updates))
                # Operations that never wait must not keep others from the loop.
                await asyncio.sleep(0)
            else:
                return self._pause(now)

    def status(self, key: K | None = None) -> dict[K, ObjectStatus]:
        """The state of every object, wanted or on its way out; or of one, empty when there is no such."""
        wanted = self._desired()
        keys = wanted.keys() | self._failed.keys() | self._deletes.keys() if key is None else {key}
        known = (k for k in keys if k in wanted or k in self._failed or k in self._deletes)
        return {k: self._status(k) for k in known}

    def health(self) -> ComponentStatus:
        """All objects in one line. Degraded while any fails or nothing has been compared yet."""
        wanted = len(self._desired())
        message, bad = f"{wanted} {self.name}", False
        if self._compare_error:
            message, bad = f"{self.name} cannot be read: {self._compare_error}", True
        elif self._failed:
            key, failure = max(self._failed.items(), key=lambda item: item[1].count)
            more = f", and {len(self._failed) - 1} more" if len(self._failed) > 1 else ""
            message = f"{len(self._failed)} of {wanted} {self.name} fail and are tried again: {key}: {failure.error}"
            message, bad = message + more, True
        elif not self._compared:
            message, bad = f"{self.name} have not been compared with what there is yet", True
        elif self._unpruned:
            message, bad = f"{message}; leftovers stay until every source is in sync", False
        state: Literal["ok", "degraded"] = "degraded" if bad else "ok"
        if self._state[0] != state:
            self._state = (state, time.time())
        return ComponentStatus(f"reconcile.{self.name}", state, message, self._state[1])

    def _status(self, key: K) -> ObjectStatus:
        failure = self._failed.get(key)
        if failure is not None:
            retry_s = max(0.0, failure.due - self._clock())
            return ObjectStatus("failed", failure.error, failure.count, retry_s)
        if key in self._updates or key in self._deletes or not self._compared:
            return ObjectStatus("pending")
        return ObjectStatus("done")

    def _enqueue(self, key: K) -> None:
        """To be done now, as an update or a delete by what is wanted at this moment."""
        wanted = key in self._desired()
        (self._deletes if wanted else self._updates).pop(key, None)
        (self._updates if wanted else self._deletes).setdefault(key)

    def _collect_due(self, now: float) -> None:
        while self._retries and self._retries[0][0] <= now:
            _, ticket, key = heapq.heappop(self._retries)
            failure = self._failed.get(key)
            if failure is not None and failure.ticket == ticket:
                self._enqueue(key)

    def _pause(self, now: float) -> float:
        due = [self._compare_due]
        if self._retries:
            due.append(self._retries[0][0])
        if self._unpruned:
            due.append(now + _SYNC_POLL_S)
        return max(0.0, min(due) - now)

    async def _compare(self) -> None:
        """Read all there is and enqueue what differs. Objects that wait for their retry go on waiting."""
        # Set before reading: a wake() that comes meanwhile is about what may have been read already.
        self._compare_due = self._clock() + self._resync_s
        try:
            with span("reconcile.compare", objects=self.name):
                actual = await self._ops.actual()
                unwanted = [key for key in actual if key not in self._desired()]
                differs = [
                    key
                    for key, wanted in list(self._desired().items())
                    if key not in actual or not await self._ops.same(wanted, actual[key])
                ]
        except Exception as error:
            self._note(f"{self.name} cannot be read", self._compare_error, error)
            self._compare_failures += 1
            self._compare_error = _sentence(error)
            self._compare_due = min(self._compare_due, self._clock() + self._delay(self._compare_failures))
            return
        self._compared, self._compare_failures, self._compare_error = True, 0, ""
        self._unpruned = bool(unwanted) and not self._synced()
        if not self._unpruned:
            differs = unwanted + differs
        # What failed and is as wanted now: somebody else mended it, or the failure came after the effect.
        for key in self._failed.keys() - differs:
            del self._failed[key]
        for key in differs:
            if key not in self._failed:
                self._enqueue(key)

    async def _apply(self, key: K) -> None:
        """One operation on one object."""
        desired = self._desired()
        deleting = key not in desired
        if deleting and not self._synced():
            # The comparison that follows when all is in sync finds it again.
            self._unpruned = True
            self._failed.pop(key, None)
            return
        operation = "delete" if deleting else "update"
        began = time.perf_counter()
        try:
            with span(f"reconcile.{operation}", objects=self.name, key=str(key)):
                await (self._ops.delete(key) if deleting else self._ops.update(key, desired[key]))
        except Exception as error:
            self._fail(key, operation, error)
            self._operations.add(1, objects=self.name, operation=operation, result="error")
        else:
            if self._failed.pop(key, None) is not None:
                log.info(f"{operation} succeeded at last", extra={"objects": self.name, "key": str(key)})
            self._operations.add(1, objects=self.name, operation=operation, result="ok")
        self._durations.record(time.perf_counter() - began, objects=self.name, operation=operation)

    def _fail(self, key: K, operation: str, error: Exception) -> None:
        before = self._failed.get(key)
        self._note(f"{operation} of {key} in {self.name} failed", before.error if before else "", error)
        count = before.count + 1 if before else 1
        due, ticket = self._clock() + self._delay(count), next(self._tickets)
        self._failed[key] = _Failure(count, _sentence(error), due, ticket)
        heapq.heappush(self._retries, (due, ticket, key))

    def _delay(self, failures: int) -> float:
        first, most = self._backoff
        # The exponent is bounded as well: 2.0 ** 1100 does not exist.
        return min(most, first * 2.0 ** min(failures - 1, 60)) * self._jitter()

    def _note(self, what: str, before: str, error: Exception) -> None:
        """Log a failure when it is news: each retry of a hundred objects would drown everything else. What is
        not one of our errors is a bug and comes with its traceback.
        """
        text = _sentence(error)
        if text != before:
            expected = isinstance(error, (FibrilError, OSError))
            log.warning(what, extra={"error": text}, exc_info=None if expected else error)


def _pop(queue: dict[K, None]) -> K:
    key = next(iter(queue))
    del queue[key]
    return key


def _sentence(error: Exception) -> str:
    return str(error) or type(error).__name__
