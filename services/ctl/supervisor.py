"""The supervisor of a node: `python -m services.ctl.supervisor --instance NAME`, started by `fibril up`.

It starts the embedded etcd (unless `--etcd` names a cluster) and one process a service, and starts each
again when it dies, waiting longer each time. It never touches the data path: neither its own death nor a
child's changes what the kernel does.

Killed, its children run on. The next supervisor finds them by the marker in their environment (see
procs.py) and watches them through pidfds as if it had started them. One supervisor an instance: a lock
file decides.

First SIGTERM or SIGINT: children are ended in the reverse order of their start, then it exits. Second: it
exits at once and leaves them running. What it knows is written to `<run dir>/supervisor.json` for `fibril
status`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from services.common.instance import Instance
from services.ctl import procs
from services.ctl.child import Child, ChildSpec
from services.ctl.children import Options, specs

log = logging.getLogger("fibril.supervisor")

LOCK = "supervisor.lock"
HAS_ONE = 3  # exit code of a supervisor that finds another
RETRY_S = 2.0  # what could not be written is tried again
LOG_LIMIT = 16 << 20  # bytes of one log file; it is cut back to nothing then, its end kept as .1


class Supervisor:
    """All children of one instance, in order of start."""

    def __init__(
        self,
        instance: Instance,
        specs: Sequence[ChildSpec],
        services: Sequence[str],
        options: Mapping[str, object],
    ) -> None:
        self.run_dir = instance.run_dir
        self._changed = asyncio.Event()
        me = os.getpid()
        now = procs.stat(me)
        self._told = {
            "pid": me,
            "start_ticks": now.start_ticks if now else 0,
            "services": list(services),
            "options": dict(options),
        }
        self._children = [Child(spec, self.run_dir, self._changed) for spec in specs]
        self._state_file = state_file(instance)
        self._ended = False

    async def run(self) -> None:
        """Until the first signal has been worked off."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            if stop.is_set():
                log.warning("second signal: leaving the children as they are")
                os._exit(1)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        await self._take_over()
        tasks = [asyncio.create_task(child.run(), name=child.spec.name) for child in self._children]
        keeper = asyncio.create_task(self._keep_state())
        try:
            waiter = asyncio.create_task(stop.wait())
            done, _ = await asyncio.wait((waiter, keeper, *tasks), return_when=asyncio.FIRST_COMPLETED)
            for task in done - {waiter}:
                task.result()  # a bug in here ends the supervisor with its traceback; children run on
            for child, task in reversed(list(zip(self._children, tasks, strict=True))):
                child.stop()
                await task
        finally:
            self._ended = True
            self._changed.set()
            await asyncio.wait((keeper,))
            self._state_file.unlink(missing_ok=True)

    async def _take_over(self) -> None:
        """Give each child the process an earlier supervisor left for it (our marker, the same command
        line), and end whatever else it left: a loader half-way, a service of other options."""
        strays = []
        found = procs.find(self.run_dir)
        for process in (p for p in found if p.name == "supervisor"):
            # Any other is about to find that we have the lock.
            if _lock_lost(process.pid, self.run_dir):
                log.warning("killing supervisor %d, whose lock file was removed", process.pid)
                process.signal(signal.SIGKILL)  # so that it leaves its children to us
                await asyncio.to_thread(process.wait, 5.0)
            process.close()
        for process in (p for p in found if p.name != "supervisor"):
            child = next((c for c in self._children if c.spec.matches(process)), None)
            if child is not None and not child.state.adopted and child.reachable:
                child.adopt(process)
            else:
                strays.append(process)
        kept = {c.state.pid for c in self._children}
        for process in strays:
            now = procs.stat(process.pid)
            # What an adopted service has started itself is its own business.
            if now is not None and now.parent not in kept:
                log.warning("ending %s, pid %d, left by an earlier supervisor", process.name, process.pid)
                await asyncio.to_thread(procs.end, [process], 2.0)
            process.close()

    async def _keep_state(self) -> None:
        """Write supervisor.json on every change; keep logs from growing for ever."""
        told = ""
        while not self._ended:
            self._changed.clear()
            problem = ""
            # Logs first: they may be what a disk is full of, which is no reason to leave the children alone.
            steps: list[Callable[[], None]] = [partial(trim, child.log_file) for child in self._children]
            for step in [*steps, self._tell]:
                try:
                    step()
                except OSError as error:
                    problem = str(error)
            if problem and problem != told:
                log.warning("cannot tell of the children for now: %s", problem)
            told = problem
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), RETRY_S if problem else 60)

    def _tell(self) -> None:
        write_atomically(
            self._state_file,
            json.dumps({**self._told, "children": [asdict(child.state) for child in self._children]}),
        )


def state_file(instance: Instance) -> Path:
    """Where the supervisor tells what it knows."""
    return instance.run_dir / "supervisor.json"


def make_run_dir(instance: Instance) -> None:
    """The run directory with its logs, closed to everybody but root and the group a service gives it to."""
    instance.run_root.mkdir(mode=0o755, parents=True, exist_ok=True)
    for path in (instance.run_dir, instance.run_dir / "log"):
        path.mkdir(mode=0o750, exist_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader sees the old text or the new, never half of it."""
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def trim(path: Path) -> None:
    """Empty a log that has grown past LOG_LIMIT, keeping its last MiB beside it. Writers append, so none
    is disturbed."""
    try:
        if path.stat().st_size <= LOG_LIMIT:
            return
        with path.open("rb+") as file:
            file.seek(-(1 << 20), os.SEEK_END)
            # What there is no room for is lost; a log that stays would keep the disk full.
            with contextlib.suppress(OSError):
                path.with_suffix(".log.1").write_bytes(file.read())
            file.truncate(0)
    except FileNotFoundError:
        return


def lock(instance: Instance) -> int | None:
    """The lock that makes a supervisor the only one of its instance; None when another holds it.

    The kernel drops it with the process that holds the descriptor; children do not inherit it."""
    make_run_dir(instance)
    fd = os.open(instance.run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _lock_lost(pid: int, run_dir: Path) -> bool:
    """Whether a process holds a lock file of the instance that has been removed since."""
    try:
        held = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
    except OSError:
        return False  # it has ended meanwhile
    return f"{run_dir / LOCK} (deleted)" in held


def main(argv: Sequence[str] | None = None) -> int:
    """Run the supervisor; HAS_ONE when the instance has one already."""
    parser = argparse.ArgumentParser(
        prog="python -m services.ctl.supervisor", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--instance", default="node", help="instance name")
    parser.add_argument("--options", default="{}", help="what `fibril up` was told, as JSON")
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    instance = Instance.from_env(args.instance)
    options = Options(**json.loads(args.options))
    held = lock(instance)
    if held is None:
        log.error("instance %r has a supervisor already", instance.name)
        return HAS_ONE
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    asyncio.run(Supervisor(instance, specs(instance, options), options.services, asdict(options)).run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
