"""TLS of chosen pods, looked into while there are targets.

    looker = Looker(instance, targets, pods)    what is wanted now
    await looker.agree()                        something of it has changed

Nothing is loaded or probed while there is no target. What is seen is kept in a ring, in memory only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

from fibril.tls.v1 import tls_pb2 as pb
from services.common import errors
from services.common.instance import Instance
from services.common.kernel.ringbuf import RingBuffer
from services.common.pipeline.events import clock_offset
from services.common.service import ComponentStatus
from services.sockaccel.plan import Pod
from services.sockaccel.tls import http, programs
from services.sockaccel.tls.ktls import KernelTls
from services.sockaccel.tls.model import Target
from services.sockaccel.tls.probes import Probes
from services.sockaccel.tls.scan import File, Key, Scanner

log = logging.getLogger(__name__)
T = TypeVar("T")

SCAN_S: Final = 2.0
"""How soon processes that came later are seen."""
KEPT: Final = 1024
_PAUSE_S: Final = 0.1
_BEHIND_MAX: Final = 4096
_THREADS_MAX: Final = 4096
_TURN: Final = 128
"""Records taken in before others have a turn."""


@dataclass(frozen=True)
class Chosen:
    """A pod that targets are about, and what they show together."""

    name: str
    headers: frozenset[str]
    query: bool
    ports: frozenset[tuple[int, int]]
    """Where the kernel may do its TLS: network namespace's cookie, server's port."""


class Looker:
    """Used from one event loop."""

    def __init__(self, instance: Instance, targets: Callable[[], Iterable[Target]], pods: Callable[[], Iterable[Pod]]) -> None:
        self._instance, self._targets, self._pods = instance, targets, pods
        self._thread = ThreadPoolExecutor(1, "sockaccel.tls")
        self._turn = asyncio.Lock()
        self._scanner = Scanner()
        self._probes: Probes | None = None
        self._ring: RingBuffer | None = None
        self._kernel = KernelTls(instance)
        self._chosen: dict[int, Chosen] = {}
        self._files: dict[Key, File] = {}
        self._refused: Mapping[Key, str] = {}
        self._problem = ""
        self._unknown = 0
        self._http2 = 0
        self._salt = os.urandom(8)
        self._wrote: dict[int, bytes] = {}
        """What a thread has given to a library last, which may have given it to the kernel."""
        self._last: deque[pb.Message] = deque(maxlen=KEPT)
        self._followers: set[asyncio.Queue[pb.Message | None]] = set()

    async def stop(self) -> None:
        """Probes go."""
        async with self._turn:
            await self._run(self._let_go)
        await asyncio.to_thread(self._thread.shutdown)

    async def run(self) -> None:
        """Look for processes, until cancelled."""
        while True:
            with contextlib.suppress(errors.FibrilError):
                await self.agree()
            await asyncio.sleep(SCAN_S)

    async def agree(self) -> None:
        """Probe what is to be probed now. FailedPrecondition: the kernel lacks something."""
        async with self._turn:
            self._chosen = self._choose()
            try:
                if self._chosen and self._probes is None:
                    await programs.load(self._instance)
                await self._run(self._look)
                ports = frozenset[tuple[int, int]]().union(*(chosen.ports for chosen in self._chosen.values()))
                await self._kernel.agree(set(ports), self._run)
            except (errors.FibrilError, OSError) as error:
                if str(error) != self._problem:
                    log.warning("TLS is not looked into", extra={"cause": str(error)})
                self._problem = str(error)
                raise errors.FailedPrecondition(f"kept, but TLS is not looked into: {error}") from None
            self._problem = ""

    def _choose(self) -> dict[int, Chosen]:
        """By inode number of network namespace."""
        found = {}
        targets = list(self._targets())
        for pod in self._pods() if targets else ():
            mine = [target for target in targets if target.is_about(pod.name, pod.labels)]
            # A pod that is going may have none any more.
            with contextlib.suppress(OSError):
                if mine and pod.netns:
                    headers = frozenset[str]().union(*(target.headers for target in mine))
                    ports = frozenset((pod.netns_cookie, port) for target in mine for port in target.kernel_ports)
                    query = any(target.query for target in mine)
                    found[os.stat(pod.netns).st_ino] = Chosen(pod.name, headers, query, ports)
        return found

    def _look(self) -> None:
        if not self._chosen:
            self._let_go()
            return
        if self._probes is None:
            self._probes = Probes(self._instance)
            self._ring = RingBuffer.open(self._instance.pin_dir / programs.MAPS["tls_records"])
        if len(self._chosen) > programs.SPACES_MAX:
            raise errors.ResourceExhausted(f"{len(self._chosen)} pods are chosen, the limit is {programs.SPACES_MAX}")
        self._probes.choose(set(self._chosen))
        self._files = self._scanner.look({inode: chosen.name for inode, chosen in self._chosen.items()})
        self._refused = dict(self._probes.agree(self._files))

    def _let_go(self) -> None:
        self._kernel.close()
        if self._probes is not None:
            self._probes.choose(set())
            self._probes.close()
            self._probes = None
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._files, self._refused = {}, {}

    # ---- messages -------------------------------------------------------------------------------------------
    async def listen(self) -> None:
        """Take in what the programs report, until cancelled."""
        while True:
            if self._ring is not None:
                async with self._turn:
                    records = await self._run(self._poll)
                offset = clock_offset()
                for number, record in enumerate(records):
                    self._take(record, offset)
                    if number % _TURN == _TURN - 1:
                        await asyncio.sleep(0)
            await asyncio.sleep(_PAUSE_S)

    def _poll(self) -> list[programs.Record]:
        return [programs.Record.from_buffer_copy(raw) for raw in self._ring.poll()] if self._ring is not None else []

    def _take(self, record: programs.Record, offset_ns: int) -> None:
        chosen = self._chosen.get(record.netns)
        if chosen is None:
            return
        head = memoryview(record.head)[: record.captured].tobytes()
        if record.kernel and self._wrote.pop(record.thread, None) == head:
            return
        if not record.kernel and not record.received and chosen.ports:
            while len(self._wrote) >= _THREADS_MAX:
                del self._wrote[next(iter(self._wrote))]
            self._wrote[record.thread] = head
        seen = http.parse(head, chosen.headers, chosen.query)
        if seen is None:
            if head.startswith(http.PREFACE):
                self._http2 += 1
            else:
                self._unknown += 1
            return
        message = pb.Message(
            unix_seconds=(record.time + offset_ns) / 1e9,
            pod=chosen.name,
            pid=record.pid,
            comm=shown(record.comm),
            received=bool(record.received),
            kernel=bool(record.kernel),
            session=zlib.crc32(b"%s %d %d" % (self._salt, record.pid, record.session)),
            method=seen.method,
            path=seen.path,
            status=seen.status,
            version=seen.version,
            headers=seen.headers,
        )
        self._last.append(message)
        for queue in list(self._followers):
            if queue.qsize() >= _BEHIND_MAX:
                self._followers.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(message)

    def forget(self) -> None:
        """What was seen of pods that no target is about any more."""
        names = {chosen.name for chosen in self._choose().values()}
        self._last = deque((message for message in self._last if message.pod in names), maxlen=KEPT)

    async def follow(self, last: int) -> AsyncIterator[pb.Message | None]:
        """The last ones, None, and all that come. Aborted when the reader is too slow."""
        queue: asyncio.Queue[pb.Message | None] = asyncio.Queue()
        self._followers.add(queue)
        try:
            for message in list(self._last)[-last:] if last else ():
                yield message
            yield None
            while True:
                found = await queue.get()
                if found is None:
                    raise errors.Aborted("the reader fell too far behind", fix="follow again")
                yield found
        finally:
            self._followers.discard(queue)

    # ---- status ---------------------------------------------------------------------------------------------
    def probes(self) -> pb.ListProbesResponse:
        """What is probed."""
        found = pb.ListProbesResponse(
            seen=self._stat(programs.Stat.SEEN),
            lost=self._stat(programs.Stat.LOST),
            unknown=self._unknown,
            http2=self._http2,
        )
        if self._kernel.wanted:
            found.kernel.sockets, found.kernel.taken = self._stat(programs.Stat.HELD), self._stat(programs.Stat.TAKEN)
            found.kernel.problem = self._kernel.problem
        for key, file in sorted(self._files.items(), key=lambda each: (each[1].path, each[0])):
            found.probes.add(
                path=shown(os.fsencode(file.path)),
                library=file.library,
                functions=sorted(file.places) if key not in self._refused else [],
                pods=sorted(file.pods),
                processes=sorted(file.processes),
                problem=self._refused.get(key, file.problem),
            )
        return found

    def _stat(self, which: int) -> int:
        return self._probes.stat(which) if self._probes is not None else 0

    def status(self) -> list[ComponentStatus]:
        """Nothing while nobody asks for it."""
        if self._problem:
            return [ComponentStatus("tls", "degraded", f"not looked into: {self._problem}")]
        if not self._chosen:
            return []
        blind = sum(1 for key, file in self._files.items() if key in self._refused or not file.places)
        more = f", {blind} cannot be seen into" if blind else ""
        text = f"{len(self._chosen)} pods, {len(self._files)} libraries and programs{more}; {len(self._last)} messages kept"
        found = [ComponentStatus("tls", "ok", text)]
        if self._kernel.problem:
            found.append(ComponentStatus("tls.kernel", "degraded", f"not looked into: {self._kernel.problem}"))
        return found

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def shown(text: bytes) -> str:
    """What a process chose, fit for a terminal."""
    return text.decode("ascii", "backslashreplace").encode("unicode_escape").decode()
