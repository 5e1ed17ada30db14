"""The kernel's side as the service sees it: programs attached, tables in step with what is wanted, pairs, reports.

    plane = Plane(instance, section, wanted)    wanted() gives what the tables are to hold; None: not known yet
    plane.need()                                something has changed

The programs behind recv() and send(), which every socket of the machine pays for, are attached while there are pairs;
until then nothing is shortened. What is attached stays when the process goes, and is adopted by the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final, TypeVar

from services.common import errors
from services.common.instance import Instance
from services.common.kernel.ringbuf import RingBuffer
from services.common.pipeline.datapath import Datapath, Parts
from services.common.pipeline.events import clock_offset
from services.common.service import ComponentStatus
from services.sockaccel import abi, hooks, install
from services.sockaccel.config import SockAccelSection
from services.sockaccel.judged import Judged
from services.sockaccel.release import Releaser
from services.sockaccel.tables import Tables, Wanted

log = logging.getLogger(__name__)
T = TypeVar("T")

RESYNC_S: Final = 5.0
"""How soon programs are back that somebody took off, and tables in order that somebody changed."""
SETTLE_S: Final = 0.01
ALONE_S: Final = 30.0
"""Without a pair for so long, the programs behind recv() and send() are taken off."""
_PAUSE_S: Final = 0.1
_RETRY_S: Final = 2.0


class Plane:
    """Used from one event loop."""

    def __init__(
        self,
        instance: Instance,
        section: SockAccelSection,
        wanted: Callable[[], Wanted | None],
        ended: Callable[[abi.Pair, int], None],
    ) -> None:
        """ended: told of each pair that ended, and what to add to its times for Unix time (ns)."""
        self._instance, self._section = instance, section
        self._wanted, self._ended = wanted, ended
        self._releaser = Releaser(lambda: self.tables)
        self._datapath = Datapath(instance, Parts("sockaccel", install.load, install.complete), self._use, self._lost)
        self._thread = ThreadPoolExecutor(1, "sockaccel.tables")
        self._dirty, self._done = asyncio.Event(), asyncio.Event()
        self._judged = Judged(instance.run_dir / "sockaccel.judged")
        self._rounds = 0
        self._calls, self._alone_since, self._made = True, time.monotonic(), 0
        self._tables: Tables | None = None
        self._problem = "not attached yet"
        self._ring_problem = ""
        self._marks: frozenset[int] = frozenset()
        self.changes = 0
        """Entries written since the start."""

    @property
    def tables(self) -> Tables:
        """Unavailable while the programs are not there."""
        if self._tables is None:
            raise errors.Unavailable(f"no socket is accelerated: {self._problem}", fix="see: fibril status")
        return self._tables

    async def start(self) -> None:
        """Adopt or load; what the host lacks is tried again in `run`."""
        await self._agree()

    async def stop(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)
        if self._tables is not None:
            self._tables.close()
            self._tables = None

    def need(self) -> None:
        """Something wanted has changed."""
        self._dirty.set()

    async def settled(self) -> None:
        """Return once all that is wanted now is in the kernel. Unavailable if it cannot be; ResourceExhausted: no room."""
        before = self._rounds
        while self._rounds < before + 1 or self._dirty.is_set():
            self._dirty.set()
            await self._done.wait()
        if self._problem:
            raise errors.Unavailable(f"kept, but not in the kernel: {self._problem}", fix="see: fibril status")

    async def run(self) -> None:
        """Keep everything in step, until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESYNC_S):
                    await self._dirty.wait()
                    # Changes come in bunches.
                    await asyncio.sleep(SETTLE_S)
            self._dirty.clear()
            await self._agree()
            self._rounds += 1
            self._done.set()
            self._done = asyncio.Event()

    async def _agree(self) -> None:
        problem = ""
        try:
            await self._attach()
            wanted = self._wanted()
            if wanted is None:
                self._problem = "waiting for the endpoints of this node"
                return
            self.changes += await self._run(self._write, replace(wanted, calls=self._calls))
            if not self._calls and not await self._run(self._let_go):
                self._alone_since = time.monotonic()
        except (errors.FibrilError, OSError) as error:
            problem = str(error)
        if problem and problem != self._problem:
            log.warning("sockets are not accelerated as wanted", extra={"cause": problem})
        self._problem = problem

    def _write(self, wanted: Wanted) -> int:
        # Asked before: what changes meanwhile is seen the next time.
        identities = self.tables.identities(wanted.endpoints)
        changed = self.tables.write(wanted, not self._judged.is_under(identities), self._judged.begin)
        if changed:
            self._judged.done(identities)
        return changed

    def _let_go(self) -> bool:
        """Nothing is shortened from here on. But if there is a pair now, what was handed to it is read under their eyes."""
        if self.tables.any_pair():
            return False
        hooks.detach_calls(self._instance)
        return True

    def _look(self) -> None:
        """Whether the programs behind recv() and send() are wanted now."""
        if self._tables is None:
            return
        now, made = time.monotonic(), self._tables.stat(abi.Stat.PAIRS)
        if made != self._made:
            self._made, self._alone_since = made, now
        elif self._calls and now - self._alone_since > ALONE_S and self._tables.any_pair():
            self._alone_since = now
        calls = now - self._alone_since <= ALONE_S
        if calls != self._calls:
            self._calls = calls
            self._dirty.set()

    async def _attach(self) -> None:
        there = self._tables is not None and await self._run(install.complete, self._instance)
        if not there and not await self._datapath.install():
            raise self._datapath.problem or errors.Unavailable("the programs are not there")
        if await self._run(hooks.missing, self._instance, self._section.cgroup, self._calls):
            await self._run(hooks.attach_all, self._instance, self._section.cgroup, self._calls, self._marks)
            self._marks = frozenset()
            log.info("programs attached", extra={"cgroup": self._section.cgroup or "root"})
        # Should all pins be lost, these tell which programs are to be replaced.
        self._marks = self._marks or await self._run(hooks.marks, self._instance)

    async def _use(self) -> None:
        if self._tables is not None:
            self._tables.close()
        self._tables = Tables(self._instance)

    def _lost(self, reason: errors.FibrilError) -> None:
        """What is attached goes on; `status` names the reason."""

    async def listen(self) -> None:
        """Read the kernel's reports, until cancelled."""
        while True:
            try:
                tables = self._tables
                with RingBuffer.open(self._instance.pin_dir / abi.MAPS["sa_events"]) as ring:
                    self._ring_problem = ""
                    # Maps that were made anew have another.
                    while tables is self._tables:
                        offset = clock_offset()
                        for record in ring.poll():
                            event = abi.Event.from_buffer_copy(record)
                            if event.kind == abi.EventKind.ENDED:
                                self._ended(event.pair, offset)
                            elif event.kind == abi.EventKind.STUCK:
                                self._releaser.stuck(event.pair)
                        self._look()
                        await asyncio.sleep(_PAUSE_S)
            except errors.FibrilError as error:
                self._ring_problem = str(error)
            await asyncio.sleep(_RETRY_S)

    async def release(self) -> None:
        """End connections that cannot go on, until cancelled."""
        await self._releaser.run()

    def status(self) -> list[ComponentStatus]:
        if self._problem:
            text = f"{self._problem}; connections go by TCP, those already shortened go on"
            return [ComponentStatus("sockets", "degraded", text)]
        tables = self.tables
        full, taken = tables.stat(abi.Stat.FULL), tables.stat(abi.Stat.TAKEN)
        more = "".join(
            f"; {count} {what}" for count, what in ((full, "found no room"), (taken, "belong to another program")) if count
        )
        found = [
            ComponentStatus(
                "sockets",
                "ok",
                f"{tables.stat(abi.Stat.PAIRS)} pairs made, {tables.stat(abi.Stat.SHORTENED)} shortened{more}",
            )
        ]
        if self._ring_problem:
            found.append(ComponentStatus("reports", "degraded", self._ring_problem))
        return found

    async def _run(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
