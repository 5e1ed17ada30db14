"""A lab with private directories, driven by the command as a user would."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab import build
from lab.topology import Lab, Node
from services.common.instance import Instance
from services.ctl import procs
from tests import session

NETWORK = ("--services", "ipam,identity")
"""For labs about the ways between nodes: what balances and what refuses takes seconds to compile."""
FIBRIL = (sys.executable, "-m", "services.ctl.main")
ROOT = Path(__file__).parents[3]


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 20.0, pause: float = 0.05) -> Any:
    """Poll until the condition gives something true, and give that."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(pause)
    raise AssertionError(f"waited {seconds} s for {what}")


class ModeLab:
    """One lab; `up` makes it."""

    def __init__(self, root: Path, *shape: str, **env: str) -> None:
        self.name = session.name()
        self.root = root
        self.shape = shape
        self.env = {
            **os.environ,
            **env,
            "FIBRIL_RUN_ROOT": str(root / "run"),
            "FIBRIL_STATE_ROOT": str(root / "state"),
        }

    @property
    def lab(self) -> Lab:
        """As it was described when it was built."""
        return Lab.load((self.root / "run" / f"lab-{self.name}.json").read_text())

    def node(self, name: str) -> Node:
        """A node by its name."""
        found = self.lab.node_at(name)
        assert found is not None
        return found

    def instance(self, node: str) -> Instance:
        """A node's instance."""
        return Instance.from_env(f"{self.name}-{node}", self.env)

    def command(
        self, *argv: str, code: int | None = 0, timeout: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run `fibril …` and check its exit code (None: any)."""
        done = subprocess.run(
            [*FIBRIL, *argv],
            env=self.env,
            text=True,
            capture_output=True,
            cwd=ROOT,
            timeout=timeout,
            check=False,
        )
        assert code in (None, done.returncode), (
            f"{argv}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
        )
        return done

    def up(self, *more: str) -> None:
        """Build it and start its nodes, or what of them is missing."""
        self.command("--timeout", "100", "lab", "up", "--name", self.name, *self.shape, *more)

    def json(self, node: str, *words: str) -> Any:
        """What `fibril -o json …` answers on a node."""
        return json.loads(self.command("-i", f"{self.name}-{node}", "-o", "json", *words).stdout)

    def exec(self, place: str, *argv: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a command in one of its namespaces."""
        return self.command("lab", "exec", "--name", self.name, place, "--", *argv, code=code)

    def pod_exec(self, node: str, pod: str, *argv: str, code: int | None = 0) -> str:
        """Run a command in a pod; what it prints."""
        return self.exec(node, "fibril", "pod", "exec", pod, "--", *argv, code=code).stdout

    @contextmanager
    def started(self, place: str, *argv: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
        """A program in one of its namespaces, ended when it is still there at the end."""
        words = [*FIBRIL, "lab", "exec", "--name", self.name, place, "--", *argv]
        running = subprocess.Popen(words, env=self.env, text=True, cwd=ROOT, **options)
        try:
            yield running
        finally:
            running.kill()
            running.wait()

    def pod(self, node: str, pod: str) -> dict[str, Any]:
        """A pod's endpoint."""
        found: dict[str, Any] = self.json(node, "endpoint", "get", pod)
        return found

    def test(self, *words: str, code: int | None = 0) -> dict[str, Any]:
        """`fibril connectivity test` from all nodes."""
        done = self.command("-o", "json", "connectivity", "test", "--lab", self.name, *words, code=None)
        answer: dict[str, Any] = json.loads(done.stdout) if done.stdout else {"failed": -1, "results": []}
        failed = [r for r in answer["results"] if not r["ok"]]
        assert code in (None, done.returncode), f"{failed[:20]}\n{done.stderr}\n{self.logs()}"
        return answer

    def processes(self, node: str, name: str = "") -> list[int]:
        """Numbers of a node's processes, or of those of a name."""
        found = procs.find(self.instance(node).run_dir)
        for process in found:
            process.close()
        return [p.pid for p in found if name in ("", p.name)]

    def kill(self, node: str, *names: str) -> None:
        """SIGKILL a node's processes of these names, in this order ("": all)."""
        for name in names:
            for pid in self.processes(node, name):
                os.kill(pid, signal.SIGKILL)

    def counters(self, node: str) -> dict[str, int]:
        """Packets by reason, all directions together."""
        counted: dict[str, int] = {}
        for c in self.json(node, "monitor", "--counters"):
            counted[c["reason"]] = counted.get(c["reason"], 0) + c["packets"]
        return counted

    def mac(self, place: str) -> str:
        """MAC of a place's eth0."""
        return str(
            json.loads(self.exec(place, "ip", "-j", "link", "show", "dev", "eth0").stdout)[0]["address"]
        )

    def logs(self) -> str:
        """The ends of the nodes' logs, for a failing test's message."""
        ends = []
        for log in sorted((self.root / "run").glob("*/log/*.log")):
            if log.stem != "etcd":
                ends.append(f"\n--- {log.parts[-3]} {log.name}\n{log.read_text(errors='replace')[-1500:]}")
        return "".join(ends)


@contextmanager
def lab(*shape: str, **env: str) -> Iterator[ModeLab]:
    """A lab of that shape (words of `fibril lab up`), up, and gone afterwards."""
    root = Path(tempfile.mkdtemp(prefix="fibril-"))  # short, for the sake of unix sockets' path limit
    made = ModeLab(root, *shape, **env)
    try:
        made.up()
        yield made
    finally:
        made.command("lab", "down", "--name", made.name, code=None)
        build.remove(made.name)
        shutil.rmtree(root, ignore_errors=True)
