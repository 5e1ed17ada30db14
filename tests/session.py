"""What one run of the tests makes outside its process, and how all of it goes however the run ends.

A run takes a tag, and every namespace, control group, instance, device, pin and directory it makes has that tag at
the start of its name, or after a dash, underline or the like: kits ask `name()`. Its temporary directory is
<temporary directory>/<tag>. Processes carry the tag in their environment, which what they start inherits.

The run holds a locked file /run/fibril-tests/<tag>.pid; the kernel drops the lock when the run dies. A reaper, a
process that does nothing but wait for that, then removes what has the tag. Should the reaper have been killed too, the
next run does it when it begins. Nobody sweeps for a tag whose lock he does not hold, so nothing of a run that lives,
let alone of a node that is no test's, is touched.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from services.common.errors import FailedPrecondition, FibrilError
from services.common.instance import Instance
from services.common.kernel import cgroup, netns
from services.common.pidfile import Pidfile
from services.ctl import node, procs

ROOT: Final = Path(__file__).parents[1]
MARK: Final = "FIBRIL_TEST_RUN"
LOCKS: Final = Path("/run/fibril-tests")
_TEMPORARY: Final = Path(tempfile.gettempdir())
_NETNS: Final = Path("/run/netns")
_CGROUPS: Final = Path("/sys/fs/cgroup")
_EPHEMERAL: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST: Final = 20_000
_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
_TAG: Final = re.compile(r"q[0-9a-f]{4}")
_PATIENCE_S: Final = 10.0

_tag = ""
_directory = Path()
_held: Pidfile | None = None
_reaper: subprocess.Popen[bytes] | None = None
_numbers = itertools.count()
_ports = itertools.count()


def name() -> str:
    """A name for something of this run: seven letters and digits, never given twice."""
    begin()
    number = next(_numbers)
    assert number < len(_DIGITS) ** 2, "a run has no more names; take one and add to it"
    return f"{_tag}{_DIGITS[number // len(_DIGITS)]}{_DIGITS[number % len(_DIGITS)]}"


def begin() -> str:
    """Sweep for those that died, and be a run until `end` or the end of this process; its tag. Again does nothing."""
    global _tag, _directory, _held, _reaper
    if _tag:
        return _tag
    if os.geteuid() == 0:  # Others can make nothing that outlives them but files.
        LOCKS.mkdir(exist_ok=True)
        for line in sweep_dead():
            print(f"left by tests that were killed, removed: {line}", file=sys.stderr)
        _tag, _held = _claim()
        _reaper = _start_reaper(_tag)
    else:
        _tag = _fresh()
    _directory = _TEMPORARY / _tag
    _directory.mkdir()
    os.environ[MARK] = _tag
    os.environ["TMPDIR"] = tempfile.tempdir = str(_directory)
    keep_bytecode()
    return _tag


def loopback() -> str:
    """An address that only this process uses, of this host alone: a port on it may be chosen ahead, since nobody else listens
    there and no connection takes one."""
    return str(IPv4Address("127.1.0.0") + os.getpid())


def port() -> int:
    """A port for all of this host's addresses, which no connection takes by itself. Never given twice."""
    room = max(int(_EPHEMERAL.read_text().split()[0]) - _LOWEST, 1000)
    for _ in range(room):
        found = _LOWEST + (os.getpid() * 61 + next(_ports)) % room
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                stack.enter_context(socket.socket(socket.AF_INET6, kind)).bind(("::", found))
            return found
    raise AssertionError("every port is taken")


def keep_bytecode() -> None:
    """Have the processes that are started compile Fibril once, not each, where bytecode is not to lie beside the source: a
    node's start takes three quarters of the time."""
    if sys.dont_write_bytecode and os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        os.environ["PYTHONPYCACHEPREFIX"] = str(ROOT / "build" / "pycache")


def _fresh() -> str:
    return f"q{os.urandom(2).hex()}"


def _claim() -> tuple[str, Pidfile]:
    """A tag that is this run's alone."""
    while True:
        tag = _fresh()
        held = Pidfile(LOCKS / f"{tag}.pid")
        with contextlib.suppress(FailedPrecondition):
            held.__enter__()
            if not _named(tag) and not _devices(tag) and not (_TEMPORARY / tag).exists():
                return tag, held
            held.__exit__(None, None, None)  # Somebody else's things are called so.


def _start_reaper(tag: str) -> subprocess.Popen[bytes]:
    me = os.pidfd_open(os.getpid())
    # A session of its own: what ends the run's whole process group (Ctrl-C, a killed job) leaves it alone.
    reaper = subprocess.Popen(
        [sys.executable, "-m", "tests.session", tag, str(me)],
        pass_fds=(me,),
        env={key: text for key, text in os.environ.items() if key != MARK},
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(me)
    return reaper


def end() -> None:
    """The run ends as it should: there is nothing left, or some test is to be mended. Without this the reaper does it."""
    if _held is not None:
        for line in sweep(_tag):
            print(f"left by these tests, removed: {line}", file=sys.stderr)
    _remove_directory(_directory)
    if _held is not None and _reaper is not None:
        _reaper.kill()
        _reaper.wait()
        _held.__exit__(None, None, None)


def sweep_dead(tag: str = "*") -> list[str]:
    """Remove what runs have left that ended without doing so; what there was."""
    told = []
    for lock in LOCKS.glob(f"{tag}.pid"):
        if not _TAG.fullmatch(lock.stem):
            continue
        try:
            with contextlib.suppress(FailedPrecondition), Pidfile(lock):
                told += sweep(lock.stem)
                _remove_directory(_TEMPORARY / lock.stem)
        except BaseException:
            lock.touch()  # The next one is to try again.
            raise
    return told


def sweep(tag: str) -> list[str]:
    """Remove all that has the tag but its temporary directory; what there was. Whoever calls holds the tag's lock."""
    assert _TAG.fullmatch(tag), tag
    spaces: set[int] = set()
    told = _end_processes(tag, spaces)
    told += _unmount(tag, spaces)
    # What an instance has in the kernel under names that do not show it, `fibril down` knows.
    for instance in _instances(tag):
        told.append(f"instance {instance.name}")
        try:
            told += node.down(instance)
        except FibrilError as error:
            told.append(str(error))
    for path in _named(tag):
        told.append(str(path))
        if path.is_relative_to(_CGROUPS):
            _remove_groups(path)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for device in _devices(tag):
        told.append(f"device {device}")
        subprocess.run(["ip", "link", "delete", device], check=False, stderr=subprocess.DEVNULL)
    return told


def _has(text: str, tag: str) -> bool:
    return re.search(rf"(?<![a-z0-9]){tag}", text) is not None


def _named(tag: str) -> list[Path]:
    """Files and directories that are called so; of what lies in one another the outermost."""
    places = ["/run", "/run/fibril", _NETNS, "/var/lib/fibril", "/sys/fs/bpf", "/sys/fs/bpf/fibril"]
    near = [path for place in places for path in Path(place).glob("*") if path.parent != LOCKS]
    groups = [path for deep in ("*", "*/*", "*/*/*", "*/*/*/*") for path in _CGROUPS.glob(deep)]
    found = {path for path in (*near, *groups) if _has(path.name, tag)}
    return sorted(path for path in found if found.isdisjoint(path.parents))


def _devices(tag: str) -> list[str]:
    """Of this network namespace."""
    return [device for _, device in socket.if_nameindex() if _has(device, tag)]


def _instances(tag: str) -> list[Instance]:
    where = [cgroup.path_of("fibril"), *map(Path, ("/sys/fs/bpf/fibril", "/run/fibril", "/var/lib/fibril"))]
    found = {path.name for place in where for path in place.glob("*") if _has(path.name, tag)}
    return [Instance(name) for name in sorted(found)]


def _end_processes(tag: str, spaces: set[int]) -> list[str]:
    """SIGKILL until there are none: some may be starting others just now. Adds the network namespaces they were in."""
    told: dict[int, str] = {}
    until = time.monotonic() + _PATIENCE_S
    while (found := _processes(tag)) and time.monotonic() < until:
        held = [process for pid in found if (process := procs.hold(pid)) is not None]
        # Asked again now that the numbers are held and cannot become other processes'.
        still = _processes(tag)
        for process in held:
            with process:
                if process.pid in still:
                    told[process.pid] = f"process {process.pid}: {' '.join(process.argv)[:100]}"
                    spaces.add(still[process.pid])
                    process.signal(signal.SIGKILL)
        time.sleep(0.02)
    spaces.discard(_here())
    return list(told.values())


def _processes(tag: str) -> dict[int, int]:
    """Those marked, those in the run's namespaces and control groups, and what all of these have started; with the
    network namespace of each."""
    ours = {_inode(path) for path in _NETNS.glob("*") if _has(path.name, tag)} - {_here()}
    parents, spaces, found = {}, {}, set()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) in (os.getpid(), os.getppid()):
            continue
        pid = int(entry.name)
        with contextlib.suppress(OSError):
            at = procs.stat(pid)
            if at is None or at.state in "ZX":
                continue
            parents[pid], spaces[pid] = at.parent, os.stat(f"{entry.path}/ns/net").st_ino
            marked = f"{MARK}={tag}".encode() in Path(entry.path, "environ").read_bytes().split(b"\0")
            if marked or spaces[pid] in ours or _has(Path(entry.path, "cgroup").read_text(), tag):
                found.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: spaces[pid] for pid in found}


def _here() -> int:
    return os.stat("/proc/self/ns/net").st_ino


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _unmount(tag: str, spaces: set[int]) -> list[str]:
    """What is mounted at places with the tag in their path, and the run's network namespaces, whatever their names."""
    told = []
    for path in _NETNS.glob("*"):
        if _has(path.name, tag) or _inode(path) in spaces:
            told.append(str(path))
            netns.remove(path)
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        place = line.split()[4]
        if _has(place, tag):
            told.append(f"mount {place}")
            subprocess.run(["umount", "--lazy", place], check=False, stderr=subprocess.DEVNULL)
    return told


def _remove_directory(path: Path) -> None:
    """Unless something is mounted in it still, which would lose its content."""
    if f" {path}/" not in Path("/proc/self/mountinfo").read_text():
        shutil.rmtree(path, ignore_errors=True)


def _remove_groups(path: Path) -> None:
    """Processes in them have been killed, and are out of them in a moment."""
    until = time.monotonic() + _PATIENCE_S
    for directory, _, _ in os.walk(path, topdown=False):
        while time.monotonic() < until:
            try:
                os.rmdir(directory)
                break
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.01)


if __name__ == "__main__":
    # The reaper: waits for the end of the run, by its pidfd.
    select.select([int(sys.argv[2])], [], [])
    sweep_dead(sys.argv[1])
