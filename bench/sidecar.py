"""An application behind a sidecar that calls another behind a sidecar, on one node: with connections handed over, and by TCP.

    wrk ─▶ Envoy ─▶ (another pod) Envoy ─▶ application

    sidecar_rps_N, sidecar_p99_N    requests a second and microseconds, over N connections

Policy is enforced between the pods. Both ways are there all the time and take turns: Envoys that run as sidecars do, and Envoys
that no class is about. Each pod has a CPU (`_one`: all have the same one).
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.cnibase import Namespaces, fibril_network, netns_path
from bench.common import Bench, cpus, log, order, paired, quick
from bench.node import Node, node
from bench.pod import cni_pair
from bench.polpod import enforce
from lab import sidecar
from services.common.instance import Instance
from services.common.kernel import cgroup

SECONDS = quick(1, 3)
ROUNDS = quick(3, 9)
CONNECTIONS = (1, 16, 128)
APPLICATION = 8080
PLAIN_UID, PLAIN_OUT, PLAIN_IN = 1338, 16001, 16006
_UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6}


@dataclass(frozen=True)
class Place:
    """Where processes of a pod run."""

    space: Path
    group: Path
    cpu: int

    def argv(self, *words: str) -> list[str]:
        entered = ["nsenter", f"--net={self.space}", "taskset", "-c", str(self.cpu), *words]
        return ["sh", "-c", 'echo $$ > "$0"/cgroup.procs && exec "$@"', str(self.group), *entered]


@contextlib.contextmanager
def started(place: Place, *words: str) -> Iterator[None]:
    """A process of a pod, until the end."""
    running = subprocess.Popen(place.argv(*words), stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        running.kill()
        running.wait()


def listens(place: Place, port: int) -> None:
    """Return as soon as something listens there."""
    for _ in range(500):
        found = subprocess.run(place.argv("ss", "-Hltn", f"sport = :{port}"), capture_output=True, text=True, check=True)
        if found.stdout.strip():
            return
        time.sleep(0.02)
    raise TimeoutError(f"nothing listens on port {port}")


def drive(place: Place, port: int, connections: int) -> tuple[float, float]:
    """Requests a second, and the 99th percentile of a request's time (µs)."""
    words = ("wrk", "-t1", f"-c{connections}", f"-d{SECONDS}s", "--latency", f"http://127.0.0.1:{port}/")
    text = subprocess.run(place.argv(*words), capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(text)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    late = re.search(r"99%\s+([\d.]+)(us|ms|s)", text)
    assert rate and late, text
    return float(rate[1]), float(late[1]) * _UNITS[late[2]]


@contextlib.contextmanager
def mesh(fresh: Node, scratch: Path, application: Path, two: bool) -> Iterator[Callable[[bool, int], tuple[float, float]]]:
    """Two pods with their processes; gives what drives one way (whether handed over) over so many connections."""
    first, second = cpus()[0], cpus()[-1]
    with Namespaces() as spaces, fibril_network(fresh) as network, contextlib.ExitStack() as stack:
        pair = cni_pair(spaces, network)
        for name in (pair.client, pair.server):
            stack.callback(network.delete, name)
        places = []
        for name, cpu in ((pair.client, second), (pair.server, first if two else second)):
            group = cgroup.create(f"{Instance(fresh.name).cgroup}/{name}")
            stack.callback(group.rmdir)
            places.append(Place(netns_path(name), group, cpu))
        caller, called = places
        stack.enter_context(started(called, str(application), str(APPLICATION)))
        for out, into, uid in ((sidecar.OUTBOUND, sidecar.INBOUND, sidecar.UID), (PLAIN_OUT, PLAIN_IN, PLAIN_UID)):
            stack.enter_context(started(called, *sidecar.command(into, "127.0.0.1", APPLICATION, uid)))
            stack.enter_context(started(caller, *sidecar.command(out, pair.ipv4, into, uid)))
            listens(called, into)
            listens(caller, out)
        yield lambda short, connections: drive(caller, sidecar.OUTBOUND if short else PLAIN_OUT, connections)


def measure(bench: Bench, run: Callable[[bool, int], tuple[float, float]], suffix: str) -> None:
    """All figures of one placement."""
    for connections in CONNECTIONS:
        found: dict[str, list[tuple[float, float]]] = {"short": [], "tcp": []}
        for number in range(ROUNDS):
            for way in order(list(found), number):
                found[way].append(run(way == "short", connections))
        for at, metric, unit in ((0, "rps", "requests/s"), (1, "p99", "us")):
            value, baseline = paired([each[at] for each in found["short"]], [each[at] for each in found["tcp"]])
            bench.emit(f"sidecar_{metric}_{connections}{suffix}", unit, value, "tcp", baseline)


def main() -> None:
    """Print the figures."""
    with Bench("sidecar") as bench, tempfile.TemporaryDirectory() as scratch, node() as fresh:
        application = Path(scratch) / "application"
        subprocess.run(["gcc", "-O2", "-Wall", "-o", application, Path(__file__).with_suffix(".c")], check=True)
        fresh.fibril("up")
        enforce(fresh, Path(scratch))
        fresh.fibril("sockaccel", "class", "set", "sidecars", "--scope", "pods", "--port", str(sidecar.INBOUND))
        for two, suffix in ((True, ""), (False, "_one")):
            log(f"each pod has {'its own CPU' if two else 'the same CPU'}")
            with mesh(fresh, Path(scratch), application, two) as run:
                run(True, 1)
                fresh.fibril("sockaccel", "pairs")
                measure(bench, run, suffix)


if __name__ == "__main__":
    main()
