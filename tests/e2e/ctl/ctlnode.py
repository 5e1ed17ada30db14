"""A Fibril node in a network namespace of its own, with private run and state directories, driven by the
command."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from services.common.instance import Instance
from services.common.kernel import netns
from services.ctl import procs
from tests import session

FIBRIL = (sys.executable, "-m", "services.ctl.main")
ROOT = Path(__file__).parents[3]


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 15.0) -> Any:
    """Poll until the condition gives something true, and give that."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s for {what}")


class Node:
    """One namespace and what `fibril` does in it."""

    def __init__(self, root: Path) -> None:
        self.name = session.name()
        self.root = root
        self.netns = Path(f"/run/netns/{self.name}")
        self.env = {
            **os.environ,
            "FIBRIL_RUN_ROOT": str(root / "run"),
            "FIBRIL_STATE_ROOT": str(root / "state"),
            "FIBRIL_INSTANCE": self.name,
        }
        self.instance = Instance.from_env(self.name, self.env)
        # Sockets of the machine, and of other tests' nodes, are none of this one's.
        self.env["FIBRIL_LB_CGROUP"] = self.env["FIBRIL_SOCKACCEL_CGROUP"] = self.instance.cgroup

    def start(self, *argv: str, **options: Any) -> subprocess.Popen[str]:
        """Start a program in the namespace; mounts stay as they are."""
        with netns.NetNs.open(self.netns) as space, space.entered():
            return subprocess.Popen(argv, env=self.env, text=True, cwd=ROOT, **options)

    def run(
        self, *argv: str, code: int | None = 0, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the namespace and check its exit code (None: any)."""
        started = self.start(*argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = started.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
            raise
        done = subprocess.CompletedProcess(argv, started.returncode, out, err)
        if code is not None:
            assert done.returncode == code, (
                f"{' '.join(argv)}: exit code {done.returncode}\n{out}\n{err}{self.logs()}"
            )
        return done

    def fibril(
        self, *words: str, code: int | None = 0, timeout: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run `fibril` on this node. A machine's first start compiles all programs, and other tests may do so beside."""
        patience = ("--timeout", "100") if "up" in words else ()
        return self.run(*FIBRIL, *patience, *words, code=code, timeout=timeout)

    def json(self, *words: str, code: int | None = 0) -> Any:
        """What `fibril -o json …` answers."""
        return json.loads(self.fibril("-o", "json", *words, code=code).stdout)

    def processes(self) -> dict[str, int]:
        """Processes of the instance: name -> pid. Of several with one name (a service and what it
        started), the first."""
        found: dict[str, int] = {}
        for process in procs.find(self.instance.run_dir):
            with process:
                found.setdefault(process.name, process.pid)
        return found

    def kill_all(self) -> None:
        """SIGKILL every process of the instance, the supervisor first so that it restarts none."""
        for wanted in ("supervisor", ""):
            for process in procs.find(self.instance.run_dir):
                with process:
                    if wanted in ("", process.name):
                        process.signal(signal.SIGKILL)
                        assert process.wait(5)

    def logs(self) -> str:
        """The ends of its logs, for a failing test's message."""
        ends = []
        for log in sorted((self.instance.run_dir / "log").glob("*.log")):
            ends.append(f"\n--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
        return "".join(ends)


@contextlib.contextmanager
def fresh_node() -> Iterator[Node]:
    """A namespace with loopback up, in which nothing has been started yet."""
    # Short, for the sake of unix sockets' path limit.
    root = Path(tempfile.mkdtemp(prefix="fibril-"))
    made = Node(root)
    netns.add(made.netns)
    try:
        made.run("ip", "link", "set", "lo", "up")
        yield made
    finally:
        made.fibril("down", code=None)
        made.kill_all()
        netns.remove(made.netns)
        shutil.rmtree(root, ignore_errors=True)
