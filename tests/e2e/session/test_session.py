"""A run of tests that is killed leaves nothing, and what another made is left alone; see tests/session.py."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.kernel import cgroup, netns
from tests import session

# One of each, made as the kits do; then it says what, and waits to be killed.
RUN = """
import os, subprocess, sys, tempfile
from pathlib import Path
from services.common.instance import Instance
from services.common.kernel import bpf, cgroup, features, netns
from services.common.kernel.maps import BpfMap
from tests import session

if sys.argv[1:]:
    session.LOCKS = Path(sys.argv[1])
tag = session.begin()
space = Path("/run/netns", session.name())
netns.add(space)
features.ensure_bpffs()
instance = Instance.from_env(f"t-killed-{session.name()}")
instance.pin_dir.mkdir(parents=True)
instance.run_dir.mkdir(parents=True)
with BpfMap.create("array", __import__("ctypes").c_uint32, __import__("ctypes").c_uint32, 1, 0, "t") as made:
    bpf.pin(made.fd, str(instance.pin_dir / "t"))
group = cgroup.create(f"fibril-test-{session.name()}/inner")
device = session.name()
subprocess.run(["ip", "link", "add", device, "type", "veth", "peer", "name", f"{device}x"], check=True)
directory = tempfile.mkdtemp()
def start(*words, **options):
    return subprocess.Popen([*words, "sleep", "1000"], start_new_session=True, stdout=subprocess.DEVNULL, **options)
marked = start()
inside = start("nsenter", f"--net={space}", env={})
grouped = start(env={})
cgroup.move(group, grouped.pid)
# Whose parent has ended before.
orphan = int(subprocess.check_output(["sh", "-c", "sleep 1000 >/dev/null & echo $!"]))
print(tag, *(f"/proc/{pid}" for pid in (marked.pid, inside.pid, grouped.pid, orphan)), space, instance.pin_dir,
      instance.run_dir, group, f"/sys/class/net/{device}", directory, os.path.dirname(directory), flush=True)
if sys.stdin.read():
    session.end()
"""


@contextlib.contextmanager
def run(*locks: Path) -> Iterator[tuple[subprocess.Popen[str], str, list[Path]]]:
    """Another run: its process, tag, and what it has made. locks: where it holds its lock."""
    # No child of a process with our own tag in its environment: it is to outlive nothing of ours, nor be told from it.
    env = {key: text for key, text in os.environ.items() if key not in (session.MARK, "TMPDIR")}
    with subprocess.Popen(
        [sys.executable, "-c", RUN, *locks],
        env=env,
        cwd=session.ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            tag, *made = process.stdout.readline().split()
            assert all(Path(path).exists() for path in made), made
            yield process, tag, [Path(path) for path in made]
        finally:
            process.kill()


def reaper_of(tag: str) -> int:
    words = f"tests.session\0{tag}\0"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if words in path.read_text():
                return int(path.parent.name)
    raise AssertionError(f"{tag} has no reaper")


def left(tag: str, made: list[Path]) -> list[Path]:
    lock = session.LOCKS / f"{tag}.pid"
    return [
        path for path in (*made, lock) if path.exists() and not (Path("/proc") == path.parent and dead(path))
    ]


def left_in_the_end(tag: str, made: list[Path]) -> list[Path]:
    until = time.monotonic() + 30
    while left(tag, made) and time.monotonic() < until:
        time.sleep(0.02)
    return left(tag, made)


def dead(process: Path) -> bool:
    """Gone, or only not reaped by its parent."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def ours() -> Iterator[list[Path]]:
    """Things of the run that goes on."""
    space, group = Path("/run/netns", session.name()), cgroup.create(f"fibril-test-{session.name()}")
    netns.add(space)
    with subprocess.Popen(["nsenter", f"--net={space}", "sleep", "1000"]) as process:
        yield [space, group, Path(f"/proc/{process.pid}"), session.LOCKS / f"{session.begin()}.pid"]
        process.kill()
    netns.remove(space)
    group.rmdir()


def test_what_a_killed_run_has_made_goes_with_it(ours: list[Path]) -> None:
    with run() as (process, tag, made):
        process.send_signal(signal.SIGKILL)
        assert left_in_the_end(tag, made) == []
    assert all(path.exists() and not dead(path) for path in ours[2:3]) and all(path.exists() for path in ours)


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place of locks that no run of others looks at: any that begins meanwhile would be the next one. Nor do reapers."""
    monkeypatch.setattr(session, "LOCKS", tmp_path / "locks")
    yield session.LOCKS
    session.sweep_dead()


def test_the_next_run_cleans_up_where_the_reaper_was_killed_too(ours: list[Path], apart: Path) -> None:
    with run(apart) as (process, tag, made), run(apart) as (_, other, living):
        os.kill(reaper_of(tag), signal.SIGKILL)
        process.kill()
        process.wait()
        assert len(left(tag, made)) == len(made) + 1, "nobody was to sweep yet"
        told = session.sweep_dead()
        assert left(tag, made) == []
        assert {path.name for path in made if path.parts[1] == "run"} <= {
            Path(line.split()[-1]).name for line in told
        }
        assert left(other, living) == [*living, session.LOCKS / f"{other}.pid"]
    assert all(path.exists() for path in ours)


@pytest.mark.parametrize("says", ["so", ""])
def test_a_run_that_ends_leaves_nothing_whether_or_not_it_says_so(ours: list[Path], says: str) -> None:
    with run() as (process, tag, made):
        process.communicate(says, timeout=30)
        assert (left(tag, made) if says else left_in_the_end(tag, made)) == []
    assert all(path.exists() for path in ours)
