"""A locked pid file: proof that one process, and only one, hosts a service.

The lock (flock) is what counts; the kernel drops it when the process dies, however it dies. The content, pid
and the process's start time, tells a supervisor which process that is even after the number has been used
again.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from services.common.errors import FailedPrecondition


@dataclass(frozen=True)
class ProcessRef:
    """A process that cannot be confused with a later one of the same number.

    start_time: field 22 of /proc/<pid>/stat, clock ticks since boot.
    """

    pid: int
    start_time: int

    @classmethod
    def of(cls, pid: int) -> ProcessRef | None:
        """The process that has this number now; None when there is none, or only a zombie."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # The second field is the name in parentheses and may hold anything, closing parentheses included.
        fields = stat.rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else cls(pid, int(fields[19]))

    def alive(self) -> bool:
        """Whether that very process still runs."""
        return ProcessRef.of(self.pid) == self

    def open(self) -> int | None:
        """A pidfd, which the caller closes; None when the process has ended. Polls readable when it ends."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        # The number may have changed hands before the descriptor pinned it.
        if self.alive():
            return fd
        os.close(fd)
        return None


class Pidfile:
    """Context manager that holds the pid file of this process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> Pidfile:
        """Raises FailedPrecondition naming the process that holds the file."""
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _parse(os.pread(fd, 64, 0))
                os.close(fd)
                who = f"process {holder.pid}" if holder else "another process"
                raise FailedPrecondition(
                    f"{self._path.stem} already runs: {who} holds {self._path}",
                    fix="stop it first, or choose another instance name",
                ) from None
            # The holder before us may have unlinked the file between our open and our lock.
            if _same(fd, self._path):
                break
            os.close(fd)
        me = ProcessRef.of(os.getpid())
        assert me is not None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{me.pid} {me.start_time}\n".encode(), 0)
        self._fd = fd
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Unlinked while still locked, so that nobody locks a file that is about to vanish.
        self._path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1


def read(path: Path) -> ProcessRef | None:
    """The living process that a pid file names; None when the file is absent, empty or left by a dead
    process.
    """
    try:
        ref = _parse(path.read_bytes())
    except FileNotFoundError:
        return None
    return ref if ref is not None and ref.alive() else None


def _parse(content: bytes) -> ProcessRef | None:
    parts = content.split()
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        return None
    return ProcessRef(int(parts[0]), int(parts[1]))


def _same(fd: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
