"""The cgroup v2 hierarchy: find it, make and remove groups, tell which one a process is in.

In hybrid systems it is mounted beside v1 (often /sys/fs/cgroup/unified), so it is looked up, never assumed.
"""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

from services.common import errors


def mount_point() -> Path:
    """Where cgroup2 is mounted. FailedPrecondition if nowhere."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split(" ")
        if kind == "cgroup2":
            return Path(where.replace("\\040", " "))
    raise errors.FailedPrecondition(
        "no cgroup2 file system is mounted", fix="mount -t cgroup2 none /sys/fs/cgroup/unified"
    )


def path_of(name: str) -> Path:
    """The directory of a group named relative to the root, e.g. "fibril/node"."""
    return mount_point() / name


def create(name: str) -> Path:
    """Make a group and its parents; already there is fine."""
    path = path_of(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except PermissionError as error:
        raise errors.PermissionDenied(
            f"may not create cgroup {path}: {error.strerror}", fix="run as root"
        ) from None
    except OSError as error:
        raise errors.FailedPrecondition(f"cannot create cgroup {path}: {error.strerror}") from None
    return path


def cgroup_id(path: Path | str) -> int:
    """The number bpf_get_current_cgroup_id gives for processes of this group. NotFound if it is gone."""
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        raise errors.NotFound(f"cgroup {path} does not exist") from None


def of_process(pid: int) -> Path | None:
    """The cgroup2 group of a process, None if the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    name = next((line[3:] for line in lines if line.startswith("0::")), None)
    return None if name is None else mount_point() / name.lstrip("/")


def move(path: Path, pid: int) -> None:
    """Put a process into a group. NotFound if either is gone."""
    try:
        (path / "cgroup.procs").write_text(str(pid))
    except (FileNotFoundError, ProcessLookupError):
        raise errors.NotFound(f"cgroup {path} or process {pid} does not exist") from None
    except OSError as error:
        raise errors.FailedPrecondition(
            f"cannot move process {pid} to cgroup {path}: {error.strerror}"
        ) from None


def processes(path: Path) -> list[int]:
    """Processes of a group and all below it; none if it is gone."""
    found = []
    for directory, _, _ in os.walk(path):
        try:
            found += [int(pid) for pid in (Path(directory) / "cgroup.procs").read_text().split()]
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
    return found


async def remove(path: Path, kill: bool = False, timeout_s: float = 5.0) -> bool:
    """Remove a group and all below it; whether it was there.

    With `kill` every process in it is killed first (cgroup.kill, which forks cannot outrun).
    FailedPrecondition with the processes' ids if some remain.
    """
    if not _exists(path) or (kill and not _kill(path)):
        return False
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not _remove_tree(path):
        if not kill or asyncio.get_running_loop().time() > deadline:
            raise errors.FailedPrecondition(
                f"cgroup {path} still has processes {processes(path)[:10]}", fix="end them first"
            )
        await asyncio.sleep(0.01)
    return True


def _exists(path: Path) -> bool:
    return path.is_dir()


def _kill(path: Path) -> bool:
    try:
        (path / "cgroup.kill").write_text("1")
    except FileNotFoundError:
        return False
    return True


def _remove_tree(path: Path) -> bool:
    """rmdir from the leaves up; False if a group is busy."""
    for directory, _, _ in os.walk(path, topdown=False):
        try:
            os.rmdir(directory)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise errors.FailedPrecondition(
                    f"cannot remove cgroup {directory}: {error.strerror}"
                ) from None
    return True
