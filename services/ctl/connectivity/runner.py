"""Runs a plan: a child process for each namespace that asks, several at a time, none for longer than it may take."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import FibrilError
from services.common.kernel.netns import NetNs
from services.ctl.connectivity.model import HERE, PORT, Probe

ENGINE = Path(__file__).with_name("engine.py")
WINDOW = 64  # probes of one place under way


@dataclass(frozen=True)
class Pace:
    """How long and how much at once. wait_s: for one answer, of each try. parallel: places that ask at the same
    time."""

    wait_s: float = 1.0
    tries: int = 3
    parallel: int = 8

    def longest_s(self, probes: int) -> float:
        """After which a place has asked everything or hangs: every window of probes unanswered, transfers begun and
        stuck."""
        return 10 + math.ceil(probes / WINDOW) * self.wait_s * self.tries * 2


def run(probes: Sequence[Probe], pace: Pace, told: Callable[[int], None] = lambda _: None) -> None:
    """Ask, and fill in the results. `told` gets the number of probes done so far."""
    places: dict[str, list[Probe]] = defaultdict(list)
    for probe in probes:
        places[probe.source.netns].append(probe)
    done = 0
    with ThreadPoolExecutor(pace.parallel) as pool:
        running = {pool.submit(_ask, netns, group, pace): group for netns, group in places.items()}
        for future in as_completed(running):
            future.result()
            done += len(running[future])
            told(done)


def _ask(netns: str, probes: Sequence[Probe], pace: Pace) -> None:
    job = {
        "port": PORT,
        "wait_s": pace.wait_s,
        "tries": pace.tries,
        "window": WINDOW,
        "probes": [[n, p.kind, p.target.address, p.size] for n, p in enumerate(probes)],
    }
    try:
        child = _start(netns)
    except (FibrilError, OSError) as error:
        for probe in probes:
            probe.detail = f"cannot ask from there: {error}"
        return
    with child:
        try:
            out, err = child.communicate(json.dumps(job), timeout=pace.longest_s(len(probes)))
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            err = "took too long"
    for line in out.splitlines():
        with contextlib.suppress(ValueError):  # the last line of a process that was killed
            _fill(json.loads(line), probes)
    if child.returncode:
        last = (err.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        for probe in probes:
            if not probe.ok and probe.detail == Probe.detail:
                probe.detail = f"was not asked: {last}"


def _fill(answer: dict[str, object], probes: Sequence[Probe]) -> None:
    probe = probes[int(str(answer["number"]))]
    probe.ok = bool(answer["ok"])
    probe.ms = float(str(answer["ms"]))
    probe.detail = str(answer["detail"])
    probe.passed = int(str(answer["size"])) if probe.ok else 0


def _start(netns: str) -> subprocess.Popen[str]:
    """The engine, in a namespace: a child is born where the thread that starts it is."""
    argv = [sys.executable, "-I", "-S", str(ENGINE)]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    if netns == HERE:
        return start()
    with NetNs.open(netns) as space, space.entered():
        return start()
