"""Pid files: one holder at a time, dead holders forgotten, reused numbers told apart."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from services.common import pidfile
from services.common.errors import FailedPrecondition
from services.common.pidfile import Pidfile, ProcessRef

HOLD = (
    "import sys, time; from pathlib import Path; from services.common.pidfile import Pidfile\n"
    "with Pidfile(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


def hold(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_holder_is_refused_by_pid(tmp_path: Path) -> None:
    path = tmp_path / "ipam.pid"
    with hold(path) as process:
        ref = pidfile.read(path)
        assert ref is not None and ref.pid == process.pid and ref.alive()
        with pytest.raises(FailedPrecondition, match=f"process {process.pid}"), Pidfile(path):
            pass
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0
    assert not path.exists()


def test_a_killed_holder_leaves_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "ipam.pid"
    with hold(path) as process:
        ref = pidfile.read(path)
        assert ref is not None
        watch = ref.open()
        assert watch is not None
        process.kill()
        assert select.select([watch], [], [], 10)[0]
        os.close(watch)
    assert path.exists()
    assert pidfile.read(path) is None
    assert ref.open() is None
    with Pidfile(path):
        mine = pidfile.read(path)
        assert mine is not None and mine.pid == os.getpid()


def test_a_reused_number_is_another_process() -> None:
    me = ProcessRef.of(os.getpid())
    assert me is not None and me.alive()
    other = ProcessRef(me.pid, me.start_time + 1)
    assert not other.alive()
    assert other.open() is None


def test_a_zombie_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert ProcessRef.of(process.pid) is None
    process.wait()


@pytest.mark.parametrize("content", ["", "12", "a b", "1 2 3"])
def test_a_damaged_file_names_nobody(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.pid"
    path.write_text(content)
    assert pidfile.read(path) is None
    assert pidfile.read(tmp_path / "absent.pid") is None
