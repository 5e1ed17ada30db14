"""One process that a supervisor keeps running: started, adopted, watched, started again, ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from services.common.errors import FibrilError
from services.ctl import procs

log = logging.getLogger("fibril.supervisor")

BACKOFF_FIRST, BACKOFF_MOST = 0.1, 30.0
STEADY_S = 10.0  # a child that lived this long starts again without delay
GRACE_S = 10.0  # for a child to drain after SIGTERM


@dataclass(frozen=True)
class ChildSpec:
    """One process to keep running.

    env: added to the supervisor's own environment.
    prepare: run before each start, not before an adoption; what it raises counts as a start that failed.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path = Path("/")
    prepare: Callable[[], None] | None = None

    def matches(self, process: procs.Process) -> bool:
        """Whether that process is one of ours by name and command line."""
        return process.name == self.name and process.argv == self.argv


@dataclass
class ChildState:
    """What is told of a child in supervisor.json. `state`: running, waiting (to be started again),
    stopped."""

    name: str
    state: str = "stopped"
    pid: int = 0
    start_ticks: int = 0
    adopted: bool = False
    restarts: int = 0
    last_exit: str = ""


class Child:
    """Keeps one process running until it is told to stop."""

    def __init__(self, spec: ChildSpec, run_dir: Path, changed: asyncio.Event) -> None:
        self.spec = spec
        self.state = ChildState(spec.name)
        self._run_dir = run_dir
        self._changed = changed
        self._stopping = asyncio.Event()
        self._popen: subprocess.Popen[bytes] | None = None
        self._adopted: procs.Process | None = None

    def adopt(self, process: procs.Process) -> None:
        """Before `run`: keep this one, which an earlier supervisor left, instead of starting one."""
        self._adopted = process
        self.state.adopted = True
        self.state.pid = process.pid
        log.info("adopted %s, pid %d", self.spec.name, process.pid)

    @property
    def reachable(self) -> bool:
        """Whether the run directory it was started with is still there, and so its sockets. They come back only with
        a new start."""
        return self.log_file.exists()

    @property
    def log_file(self) -> Path:
        """Where its standard output and error go."""
        return self._run_dir / "log" / f"{self.spec.name}.log"

    async def run(self) -> None:
        """Adopt or start; wait for the end; start again. Returns after stop()."""
        delay = BACKOFF_FIRST
        process, self._adopted = self._adopted, None
        while not self._stopping.is_set():
            if process is None:
                process = self._start()
            began = time.monotonic()
            if process is not None:
                self._set("running", process.pid, process.start_ticks)
                try:
                    await self._watch(process)
                finally:
                    process.close()
                self.state.last_exit = self._reap()
                process = None
            if self._stopping.is_set():
                break
            if time.monotonic() - began >= STEADY_S:
                delay = BACKOFF_FIRST
            self.state.restarts += 1
            log.warning(
                "%s ended (%s); starting it again in %.1f s, its log is %s",
                self.spec.name,
                self.state.last_exit,
                delay,
                self.log_file,
            )
            self._set("waiting")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
            delay = min(delay * 2, BACKOFF_MOST)
        self._set("stopped")

    def stop(self) -> None:
        """Ask it to end; `run` returns when it has, at the latest GRACE_S later."""
        self._stopping.set()

    def _set(self, state: str, pid: int = 0, start_ticks: int = 0) -> None:
        self.state.state, self.state.pid, self.state.start_ticks = state, pid, start_ticks
        self._changed.set()

    def _start(self) -> procs.Process | None:
        self.state.adopted = False
        env = {**procs.environment(self._run_dir, self.spec.name), **self.spec.env}
        try:
            self.log_file.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            if self.spec.prepare is not None:
                self.spec.prepare()
            with self.log_file.open("ab") as output:
                # A session of its own: Ctrl-C of a supervisor in the foreground must not reach it out of
                # order.
                self._popen = subprocess.Popen(
                    self.spec.argv,
                    env=env,
                    cwd=self.spec.cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
        except (OSError, FibrilError) as error:
            self.state.last_exit = f"cannot be started: {error}"
            return None
        process = procs.hold(self._popen.pid, self.spec.name)
        if process is None:
            self.state.last_exit = self._reap()
        else:
            log.info("started %s, pid %d", self.spec.name, process.pid)
        return process

    def _reap(self) -> str:
        """How our child ended; nobody tells how an adopted one did."""
        if self._popen is None:
            return "ended (adopted: exit code unknown)"
        code = self._popen.wait()
        self._popen = None
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    async def _watch(self, process: procs.Process) -> None:
        """Until it has ended; after stop() it is told to, and killed when it does not within GRACE_S."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(process.fd, ended.set)
        end = asyncio.ensure_future(ended.wait())
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((end, stop), return_when=asyncio.FIRST_COMPLETED)
            if not end.done():
                process.signal(signal.SIGTERM)
                done, _ = await asyncio.wait((end,), timeout=GRACE_S)
                if not done:
                    log.warning("%s did not end within %.0f s; killing it", self.spec.name, GRACE_S)
                    process.signal(signal.SIGKILL)
                    await end
        finally:
            loop.remove_reader(process.fd)
            end.cancel()
            stop.cancel()
