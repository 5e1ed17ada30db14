"""Finding, holding and ending the processes of an instance.

A process the supervisor starts carries `FIBRIL_PROCESS=<run dir>#<name>` in its environment. /proc shows
it as long as the process lives, so processes are found even after the supervisor was killed between
starting a child and writing that down, or somebody removed the run directory. A process is held by a
pidfd taken *before* its marker is read: the number cannot be given to another process in between.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MARK = "FIBRIL_PROCESS"


def environment(run_dir: Path, name: str) -> dict[str, str]:
    """What a process `name` of the instance is started with: marked, and finding this very Fibril wherever it runs."""
    root = str(Path(__file__).parents[2])
    path = [root, *(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != root)]
    return {**os.environ, MARK: mark(run_dir, name), "PYTHONPATH": os.pathsep.join(path)}


def mark(run_dir: Path, name: str) -> str:
    """The marker's value for process `name` of the instance that has this run directory."""
    return f"{run_dir}#{name}"


@dataclass(frozen=True)
class Stat:
    """What is read of /proc/<pid>/stat."""

    parent: int
    state: str
    start_ticks: int


@dataclass(frozen=True)
class Process:
    """A running process known by number and start time, held by a pidfd. Close it, or use it as a context
    manager."""

    pid: int
    start_ticks: int
    name: str
    argv: tuple[str, ...]
    fd: int

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it; it runs on."""
        os.close(self.fd)

    def signal(self, number: int) -> None:
        """Send a signal; one that has ended already is left alone."""
        try:
            signal.pidfd_send_signal(self.fd, number)
        except ProcessLookupError:
            pass

    def wait(self, seconds: float) -> bool:
        """Wait for its end; whether it ended within that time. A dead child that nobody reaped counts as
        ended."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(max(0.0, seconds) * 1000))


def stat(pid: int) -> Stat | None:
    """Parent, state and start time (clock ticks since boot); None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may hold anything, blanks and parentheses included.
    fields = text.rpartition(")")[2].split()
    return Stat(parent=int(fields[1]), state=fields[0], start_ticks=int(fields[19]))


def hold(pid: int, name: str = "") -> Process | None:
    """Hold a process by number; None when it is gone or only waits to be reaped."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    found = stat(pid)
    if found is None or found.state in "ZX":
        os.close(fd)
        return None
    return Process(pid, found.start_ticks, name, _argv(pid), fd)


def _argv(pid: int) -> tuple[str, ...]:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(part.decode(errors="replace") for part in raw.split(b"\0")[:-1])


def name_of(pid: int, run_dir: Path) -> str | None:
    """Under which name a process belongs to the instance; None when it does not (or cannot be read, or is
    gone)."""
    wanted = f"{MARK}={run_dir}#".encode()
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    # Cheap test first: a scan of /proc looks at every process of the machine.
    if wanted not in environ:
        return None
    for variable in environ.split(b"\0"):
        if variable.startswith(wanted):
            return variable[len(wanted) :].decode(errors="replace")
    return None


def find(run_dir: Path) -> list[Process]:
    """Every process of the instance except this one, what they started included, each held; the caller
    closes them."""
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        pid = int(entry.name)
        name = name_of(pid, run_dir)
        process = hold(pid, name) if name is not None else None
        if process is None:
            continue
        # Asked again now that the number is held and cannot become another process's.
        if name_of(pid, run_dir) == name:
            found.append(process)
        else:
            process.close()
    return found


def end(processes: Iterable[Process], grace: float) -> list[Process]:
    """SIGTERM to all, SIGKILL to those that are still there after `grace` seconds; gives those that
    outlive even that by 5 s (stuck in the kernel)."""
    waiting = list(processes)
    for process in waiting:
        process.signal(signal.SIGTERM)
    deadline = time.monotonic() + grace
    stubborn = [p for p in waiting if not p.wait(deadline - time.monotonic())]
    for process in stubborn:
        process.signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    return [p for p in stubborn if not p.wait(deadline - time.monotonic())]
