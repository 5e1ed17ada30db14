"""Clients and servers of services on the nodes of a lab: programs of their own, since a socket is balanced by the control group
its process is in.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc

from fibril.lb.v1 import lb_pb2_grpc
from tests.e2e.modes.modelab import ModeLab

_SERVER = """
import contextlib, socket, sys, threading
name, port = sys.argv[1], int(sys.argv[2])
def serve(conn):
    with conn, contextlib.suppress(OSError):
        conn.sendall(name.encode() + b"\\n")
        while data := conn.recv(4096):
            conn.sendall(data)
server = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
print("ready", flush=True)
while True:
    threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
"""

# One command a line, in JSON; answers likewise.
_CLIENT = """
import json, socket, sys, threading, time
held, counts, stop = {}, {"ok": 0, "failures": []}, threading.Event()
def ask(address, port, seconds=10):
    with socket.create_connection((address, port), seconds) as conn:
        peer = conn.getpeername()[0]
        return [conn.makefile().readline().strip(), peer]
def hold(address, port):
    conn = socket.create_connection((address, port), 10)
    file = conn.makefile("rw")
    held[len(held)] = conn, file
    return [len(held) - 1, file.readline().strip()]
def echo(number):
    conn, file = held[number]
    conn.settimeout(10)
    file.write("x\\n")
    file.flush()
    return file.readline().strip()
def work(address, port):
    while not stop.is_set():
        try:
            name, _ = ask(address, port)
            if not name:
                raise OSError("closed")
            counts["ok"] += 1
        except OSError as error:
            counts["failures"].append(repr(error))
        time.sleep(0.005)
def stress(address, port):
    threading.Thread(target=work, args=(address, port), daemon=True).start()
def count():
    return counts
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    op, *args = json.loads(line)
    try:
        answer = globals()[op](*args)
    except OSError as error:
        answer = {"error": type(error).__name__}
    print(json.dumps(answer), flush=True)
"""


class Client:
    """In a pod, or among the host's processes of a node."""

    def __init__(self, running: subprocess.Popen[str]) -> None:
        self._running = running
        assert self._answer() == "ready"

    def __call__(self, op: str, *args: Any) -> Any:
        assert self._running.stdin is not None
        self._running.stdin.write(json.dumps([op, *args]) + "\n")
        self._running.stdin.flush()
        return self._answer()

    def names(self, address: str, times: int = 24, port: int = 80) -> set[str]:
        """Who answers."""
        return {str(self("ask", address, port)[0]) for _ in range(times)}

    def _answer(self) -> Any:
        assert self._running.stdout is not None
        return json.loads(self._running.stdout.readline())


@contextlib.contextmanager
def client(lab: ModeLab, node: str, pod: str = "") -> Iterator[Client]:
    """pod: "" for the host."""
    words = ["fibril", "pod", "exec", pod, "--"] if pod else []
    argv = [*words, sys.executable, "-u", "-c", _CLIENT]
    with lab.started(node, *argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        yield Client(running)


@contextlib.contextmanager
def server(lab: ModeLab, node: str, pod: str, name: str, port: int = 8080) -> Iterator[str]:
    """Tells its name and echoes; gives the pod's IPv4 address."""
    argv = ["fibril", "pod", "exec", pod, "--", sys.executable, "-u", "-c", _SERVER, name, str(port)]
    with lab.started(node, *argv, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        yield str(lab.pod(node, pod)["ipv4"])


@contextlib.contextmanager
def stub(lab: ModeLab, node: str) -> Iterator[lb_pb2_grpc.LbServiceStub]:
    """The lb service of a node."""
    # One that was killed is asked again soon, and not after gRPC's ever longer rests.
    options = [("grpc.max_reconnect_backoff_ms", 500)]
    with grpc.insecure_channel(f"unix:{lab.instance(node).socket('lb')}", options) as channel:
        yield lb_pb2_grpc.LbServiceStub(channel)
