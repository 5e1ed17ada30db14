"""The supervisor with real child processes that do nothing: restart, adoption, order of the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.ctl import procs, supervisor

# A supervisor over two sleepers, or over one shell with the program given.
PROGRAM = """
import asyncio, sys
from pathlib import Path
from services.common.instance import Instance
from services.ctl.child import ChildSpec
from services.ctl.supervisor import Supervisor, lock
run = Path(sys.argv[1])
instance = Instance("test", run_root=run, state_root=run)
if lock(instance) is None:
    sys.exit(3)
sleeper = ("sleep", "1000.125")
specs = [ChildSpec("first", sleeper), ChildSpec("second", ("sleep", "1000.25"))]
if sys.argv[2:]:
    specs = [ChildSpec("first", ("sh", "-c", sys.argv[2]))]
asyncio.run(Supervisor(instance, specs, ["first"], {}).run())
"""


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"waited {seconds} s for {what}")


class Node:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.run_dir = root / "test"
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, *args: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, procs.MARK: procs.mark(self.run_dir, "supervisor")}
        made = subprocess.Popen([sys.executable, "-c", PROGRAM, str(self.root), *args], env=env)
        self.running.append(made)
        return made

    def state(self) -> dict[str, Any]:
        try:
            told: dict[str, Any] = json.loads((self.run_dir / "supervisor.json").read_text())
        except FileNotFoundError:
            return {"pid": 0, "children": []}
        return told

    def pids(self, supervisor_pid: int | None = None) -> dict[str, int]:
        """Running children by name, once all run (and the named supervisor tells)."""
        state = self.state()
        found = {c["name"]: c["pid"] for c in state["children"] if c["state"] == "running"}
        told_by = supervisor_pid in (None, state["pid"])
        return found if told_by and state["children"] and len(found) == len(state["children"]) else {}

    def close(self) -> None:
        for process in procs.find(self.run_dir):
            with process:
                process.signal(signal.SIGKILL)
                process.wait(30)
        for popen in self.running:
            popen.wait()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    try:
        yield made
    finally:
        made.close()


def test_a_child_that_is_killed_is_started_again(node: Node) -> None:
    node.start()
    before = wait_for(node.pids, "both children")
    os.kill(before["first"], signal.SIGKILL)
    after = wait_for(lambda: (p := node.pids()) and p["first"] != before["first"] and p, "a new first child")
    assert after["second"] == before["second"]
    first = node.state()["children"][0]
    assert (first["restarts"], first["last_exit"]) == (1, "killed by SIGKILL")


def test_a_new_supervisor_adopts_what_a_killed_one_left(node: Node) -> None:
    old = node.start()
    before = wait_for(node.pids, "both children")
    old.kill()
    old.wait()
    new = node.start()
    assert wait_for(lambda: node.pids(new.pid), "adoption") == before
    assert [c["adopted"] for c in node.state()["children"]] == [True, True]
    # An adopted child is watched like any other.
    os.kill(before["second"], signal.SIGKILL)
    wait_for(lambda: (p := node.pids()) and p["second"] != before["second"], "a new second child")


def test_adoption_needs_no_file(node: Node) -> None:
    old = node.start()
    before = wait_for(node.pids, "both children")
    old.kill()
    old.wait()
    (node.run_dir / "supervisor.json").unlink()
    new = node.start()
    assert wait_for(lambda: node.pids(new.pid), "adoption") == before


def test_a_leftover_with_another_command_line_is_ended_not_kept_beside(node: Node) -> None:
    old = node.start("exec sleep 1000.5")
    before = wait_for(node.pids, "the child")
    old.kill()
    old.wait()
    new = node.start()
    after = wait_for(lambda: node.pids(new.pid), "new children")
    assert before["first"] not in after.values()
    alive = procs.find(node.run_dir)
    for process in alive:
        process.close()
    assert {p.pid for p in alive} == {new.pid, *after.values()}


def test_the_first_signal_ends_everything(node: Node) -> None:
    running = node.start()
    wait_for(node.pids, "both children")
    running.terminate()
    assert running.wait(30) == 0
    assert procs.find(node.run_dir) == []
    assert not (node.run_dir / "supervisor.json").exists()


def test_the_second_signal_leaves_a_stubborn_child(node: Node) -> None:
    running = node.start("trap '' TERM; while :; do sleep 0.05; done")
    pid = wait_for(node.pids, "the child")["first"]
    # The trap is set a moment after the shell has started.
    wait_for(lambda: int(_status(pid, "SigIgn"), 16) >> (signal.SIGTERM - 1) & 1, "the trap")
    running.terminate()
    wait_for(lambda: _status(running.pid, "State")[0] == "S", "the supervisor to wait")
    deadline = time.monotonic() + 30
    while running.poll() is None and time.monotonic() < deadline:
        running.terminate()
        time.sleep(0.05)
    assert running.wait(1) == 1
    assert procs.name_of(pid, node.run_dir) == "first"


def test_an_instance_has_one_supervisor(node: Node) -> None:
    node.start()
    wait_for(node.pids, "both children")
    assert node.start().wait(30) == 3


def test_a_child_that_cannot_be_started_is_waited_for_longer_each_time(node: Node) -> None:
    node.start("exit 7")
    state = wait_for(
        lambda: (c := node.state()["children"]) and c[0]["restarts"] >= 3 and c[0], "three attempts"
    )
    assert state["last_exit"] == "exit code 7"


def test_a_full_disk_stops_neither_the_supervisor_nor_its_children(node: Node) -> None:
    running = node.start()
    wait_for(node.pids, "the children")
    state = node.run_dir / "supervisor.json"
    # Where it writes before it puts that in place: no space left on device.
    state.with_suffix(".tmp").symlink_to("/dev/full")
    os.kill(node.pids()["first"], signal.SIGKILL)
    before = node.pids()["first"]
    wait_for(lambda: [p for p in procs.find(node.run_dir) if p.name == "first" and p.pid != before], "the child again")
    assert running.poll() is None
    # A log may be what fills it.
    full = node.run_dir / "log" / "second.log"
    os.truncate(full, supervisor.LOG_LIMIT + 1)
    full.with_suffix(".log.1").symlink_to("/dev/full")
    wait_for(lambda: full.stat().st_size == 0, "the log to be cut")
    state.with_suffix(".tmp").unlink()
    wait_for(lambda: node.pids().get("first", before) != before, "what it tells")


def test_a_directory_that_cannot_be_made_is_waited_for(node: Node) -> None:
    running = node.start("exec sleep 1000")
    pid = wait_for(node.pids, "the child")["first"]
    log = node.run_dir / "log"
    log.rename(node.run_dir / "moved")
    log.write_text("")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: "cannot be started" in node.state()["children"][0]["last_exit"], "the reason")
    assert running.poll() is None
    log.unlink()
    wait_for(node.pids, "the child again")


def test_a_full_log_is_cut_and_its_end_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOG_LIMIT", 2 << 20)
    log = tmp_path / "x.log"
    log.write_bytes(b"a" * (2 << 20) + b"the end")
    supervisor.trim(log)
    assert log.stat().st_size == 0
    kept = (tmp_path / "x.log.1").read_bytes()
    assert len(kept) == 1 << 20
    assert kept.endswith(b"the end")
    supervisor.trim(tmp_path / "absent.log")


def _status(pid: int, field: str) -> str:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(line.split()[1] for line in text.splitlines() if line.startswith(f"{field}:"))
