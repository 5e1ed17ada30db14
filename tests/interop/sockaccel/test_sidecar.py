"""An application behind an Envoy that calls another behind an Envoy, on one node: every connection on the way is shortened.

    client ─(redirected)▶ Envoy ─▶ Envoy ─▶ application
    └────── pod p1 ───────────┘   └────── pod p2 ─────┘
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lab import sidecar
from tests.e2e.modes.modelab import ModeLab, lab, wait_for

NODE = "c1n1"
PORT = 8080
ECHO = f"""
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60  # so its sockets do not wait in recv()
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass

ThreadingHTTPServer(("127.0.0.1", {PORT}), Echo).serve_forever()
"""
CLIENT = """
import http.client, json, random, sys, threading, time
host, port = sys.argv[1], int(sys.argv[2])
kept = {}

def ask(name, body, close=False):
    # The status, and whether the body came back as it was sent.
    if name not in kept:
        kept[name] = http.client.HTTPConnection(host, port, timeout=10)
    try:
        kept[name].request("POST", "/", body, {"connection": "close"} if close else {})
        answer = kept[name].getresponse()
        found = answer.read()
    except BaseException:
        kept.pop(name).close()
        raise
    if close:
        kept.pop(name).close()
    return [answer.status, found == body]

def rounds(name, size, count, close=False):
    for number in range(count):
        assert ask(name, random.Random(number).randbytes(size), close) == [200, True], (name, size, number)
    return count

tally, stop = {"good": 0, "bad": []}, threading.Event()
def load(name):
    while not stop.is_set():
        try:
            got = ask(name, b"x" * 700)
        except Exception as error:
            got = [repr(error), False]
        if got == [200, True]:
            tally["good"] += 1
        else:
            tally["bad"].append([time.time(), got[0]])
            time.sleep(0.02)
def begin(names):
    for name in names:
        threading.Thread(target=load, args=(name,), daemon=True).start()

print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    try:
        answer = {"value": eval(line)}
    except Exception as error:
        answer = {"error": repr(error)}
    print(json.dumps(answer), flush=True)
"""
REDIRECT = (
    f"table ip mesh {{ chain out {{ type nat hook output priority -100; "
    f"meta skuid != {sidecar.UID} tcp dport {PORT} redirect to :{sidecar.OUTBOUND}; }}; }}"
)


class Client:
    """Asks from its pod."""

    def __init__(self, running: subprocess.Popen[str]) -> None:
        self._running = running
        assert self._read() == "ready"

    def __call__(self, expression: str) -> Any:
        assert self._running.stdin is not None
        self._running.stdin.write(expression + "\n")
        self._running.stdin.flush()
        answer = self._read()
        assert "error" not in answer, answer
        return answer["value"]

    def _read(self) -> Any:
        assert self._running.stdout is not None
        return json.loads(self._running.stdout.readline())


class Mesh:
    """Two pods with their sidecars."""

    def __init__(self, made: ModeLab, stack: contextlib.ExitStack) -> None:
        self.lab, self._stack = made, stack
        self.address = made.pod(NODE, "p2")["ipv4"]
        self._run("p2", sys.executable, "-c", ECHO)
        self.inbound()
        self._run("p1", *sidecar.command(sidecar.OUTBOUND, self.address, sidecar.INBOUND))
        made.pod_exec(NODE, "p1", "nft", REDIRECT)
        for pod, port in (("p2", PORT), ("p2", sidecar.INBOUND), ("p1", sidecar.OUTBOUND)):
            wait_for(lambda p=pod, n=port: self.listens(p, n), f"port {port} of {pod}")

    def inbound(self) -> None:
        """The called one's sidecar, again after it was killed."""
        self.called = self._run("p2", *sidecar.command(sidecar.INBOUND, "127.0.0.1", PORT))

    def listens(self, pod: str, port: int) -> bool:
        return bool(self.lab.pod_exec(NODE, pod, "ss", "-Hltn", f"sport = :{port}").strip())

    def client(self, port: int = PORT, address: str = "") -> Client:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        words = ("-u", "-c", CLIENT, address or self.address, str(port))
        return Client(self._run("p1", sys.executable, *words, **pipes))

    def pairs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.lab.json(NODE, "sockaccel", "pairs")
        return found

    def _run(self, pod: str, *words: str, **options: Any) -> subprocess.Popen[str]:
        argv = ("fibril", "pod", "exec", pod, "--", *words)
        return self._stack.enter_context(self.lab.started(NODE, *argv, **options))


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with (
        lab("--nodes", "1", "--pods", "2", "--services", "ipam,identity,policy,sockaccel") as made,
        contextlib.ExitStack() as stack,
    ):
        words = ("sockaccel", "class", "set", "sidecars", "--scope", "pods", "--port", str(sidecar.INBOUND))
        made.command("-i", f"{made.name}-{NODE}", *words)
        yield Mesh(made, stack)


def shortened(record: dict[str, Any]) -> int:
    return int(record["client"]["short_sends"]) + int(record["server"]["short_sends"])


def test_all_connections_on_the_way_are_shortened(mesh: Mesh) -> None:
    client = mesh.client()
    assert client("rounds('a', 100, 40)") == 40
    by_port = {record["server"]["port"]: record for record in mesh.pairs() if shortened(record) > 40}
    assert set(by_port) == {sidecar.OUTBOUND, sidecar.INBOUND, PORT}, mesh.pairs()
    for port, (name, redirected) in {
        sidecar.OUTBOUND: ("local-proxies", True),
        sidecar.INBOUND: ("sidecars", False),
        PORT: ("local-proxies", False),
    }.items():
        assert (by_port[port]["class_name"], by_port[port]["redirected"]) == (name, redirected)
    client("begin(['x', 'y'])")
    look = mesh.lab.json(NODE, "sockaccel", "top", "--count", "1", "--interval", "0.5")
    assert sum(each["rate"]["short_sends"] for each in look["pairs"]) > 50
    client("stop.set()")
    assert client("tally['bad']") == []


@pytest.mark.parametrize("size", [0, 1, 1000, 20_000, 65_537, 1 << 20])
def test_bodies_come_back_as_they_were_sent(mesh: Mesh, size: int) -> None:
    client = mesh.client()
    count = 40 if size < 65_536 else 6
    # Small ones before, so that the large ones find their connections shortened.
    client("rounds('a', 64, 20)")
    assert client(f"rounds('a', {size}, {count})") == count
    assert client(f"rounds('b', {size}, 5, True)") == 5
    client("rounds('a', 64, 20)")


def under_load(mesh: Mesh, do: Callable[[], None]) -> tuple[float, list[Any], int]:
    """What went wrong, and how much did not, while something is done; and when it was begun."""
    client = mesh.client()
    client("begin(['a', 'b', 'c', 'd'])")
    wait_for(lambda: client("tally['good']") > 100, "requests")
    began = time.time()
    do()
    before = client("tally['good']")
    wait_for(lambda: client("tally['good']") > before + 200, "requests afterwards")
    client("stop.set()")
    bad: list[Any] = client("tally['bad']")
    return began, bad, client("tally['good']")


def test_no_request_fails_when_the_service_is_killed(mesh: Mesh) -> None:
    def kill() -> None:
        for _ in range(2):
            mesh.lab.kill(NODE, "sockaccel")
            time.sleep(0.5)

    _, bad, good = under_load(mesh, kill)
    assert bad == [] and good > 300


def test_a_killed_sidecar_costs_only_what_it_had(mesh: Mesh) -> None:
    def kill() -> None:
        mesh.called.send_signal(signal.SIGKILL)
        mesh.called.wait()
        mesh.inbound()
        wait_for(lambda: mesh.listens("p2", sidecar.INBOUND), "the sidecar to be back")

    began, bad, _ = under_load(mesh, kill)
    done = time.time()
    # While there was none, Envoy says 503; an answer that had begun is cut off; nothing ever hangs.
    assert all(began <= at <= done for at, _ in bad)
    cut = [status for _, status in bad if status != 503]
    assert len(cut) <= 4 and all("IncompleteRead" in str(status) for status in cut)
    client = mesh.client()
    assert client("rounds('new', 100, 40)") == 40
    found = [record for record in mesh.pairs() if record["server"]["port"] == sidecar.INBOUND]
    assert any(shortened(record) > 40 for record in found)
