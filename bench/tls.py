"""What it costs to look into TLS: HTTPS between two pods, with a target that is about both against none.

    https_rps    requests a second, 16 connections: wrk and a Python server, each with a CPU, both with OpenSSL as a library
    https_cpu    microseconds of CPU a request takes wrk
    tls_calls    SSL_write and SSL_read of 60 bytes, in memory, a second: nothing but calls, the worst there is
    tls_beside   the same of a process in no chosen pod, that has the library mapped as well

Both ways take turns in every round. The service's part that looks is here, in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from bench.common import Bench, cpus, order, paired, quick
from fibril.tls.v1 import tls_pb2 as pb
from services.common.instance import Instance
from services.common.kernel import features
from services.sockaccel.plan import Pod
from services.sockaccel.tls import model
from services.sockaccel.tls.looker import Looker
from tests.e2e.lb.sockrig import cookie_of, forget
from tests.e2e.sockaccel.accelrig import B4, two_spaces
from tests.e2e.sockaccel.test_tls_seen import certificate

SECONDS: Final = quick(1, 3)
ROUNDS: Final = quick(3, 9)
SERVER: Final = """
import socket, ssl, sys, threading
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1])
listener = socket.create_server((sys.argv[2], 8443), backlog=128)
def serve(made):
    try:
        with context.wrap_socket(made, server_side=True) as made:
            while made.recv(4096):
                made.sendall(b"HTTP/1.1 200 OK\\r\\ncontent-length: 5\\r\\n\\r\\nhello")
    except OSError:
        pass
print(flush=True)
while True:
    threading.Thread(target=serve, args=[listener.accept()[0]], daemon=True).start()
"""
CALLS: Final = """
import ssl, sys, time
server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl._create_unverified_context()
server.load_cert_chain(sys.argv[1])
here, there = ssl.MemoryBIO(), ssl.MemoryBIO()
ends = client.wrap_bio(here, there), server.wrap_bio(there, here, server_side=True)
for _ in range(3):
    for end in ends:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            pass
print(flush=True)
text = b"GET /path HTTP/1.1\\r\\nhost: somewhere\\r\\nx-kind: measured\\r\\n\\r\\n"
for line in sys.stdin:
    began = time.process_time()
    for _ in range(10_000):
        ends[0].write(text)
        ends[1].read(4096)
    print(10_000 / (time.process_time() - began), flush=True)
"""


class Child:
    """A Python program in a pod, on a CPU."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, space: Path, cpu: int, *words: str) -> Child:
        argv = ["nsenter", f"--net={space}", "taskset", "-c", str(cpu), sys.executable, "-c", *words]
        pipe = asyncio.subprocess.PIPE
        made = cls(await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe))
        await made.line()
        return made

    async def ask(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        return float(await self.line())

    async def line(self) -> str:
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode()

    async def end(self) -> None:
        self._process.kill()
        await self._process.wait()


async def drive(space: Path, cpu: int) -> tuple[float, float]:
    """Requests a second, and microseconds of CPU for each."""
    words = ["nsenter", f"--net={space}", "taskset", "-c", str(cpu), "wrk", "-t1", "-c16", f"-d{SECONDS}s", f"https://{B4}:8443/"]
    before = os.times()
    running = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    out, _ = await running.communicate()
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    rate, count = re.search(rb"Requests/sec:\s+([\d.]+)", out), re.search(rb"(\d+) requests in", out)
    assert rate and count, out
    return float(rate[1]), used * 1e6 / int(count[1])


@contextlib.asynccontextmanager
async def looking(spaces: tuple[Path, Path], targets: list[model.Target]) -> AsyncIterator[Looker]:
    """What looks into the pods of these namespaces."""
    instance = Instance.from_env(f"b-tls-{os.getpid()}-{secrets.token_hex(2)}")
    pods = [
        Pod(number, name, cookie_of(space), {}, 0, frozenset(), str(space))
        for number, (name, space) in enumerate(zip(("client", "server"), spaces, strict=True))
    ]
    looker = Looker(instance, lambda: targets, lambda: pods)
    listening = asyncio.create_task(looker.listen())
    try:
        yield looker
    finally:
        listening.cancel()
        await looker.stop()
        forget(instance)


async def measure(bench: Bench, scratch: Path) -> None:
    """All figures."""
    pem, (first, second) = str(certificate(scratch / "pod.pem")), (cpus() * 2)[:2]
    wanted = model.declared(pb.Target(name="t", pods=["client", "server"]), "target")
    targets: list[model.Target] = []
    found: dict[str, dict[str, list[float]]] = {}
    with two_spaces() as spaces, two_spaces() as others:
        children = [
            await Child.start(spaces[1], second, SERVER, pem, B4),
            await Child.start(spaces[0], first, CALLS, pem),
            await Child.start(others[0], first, CALLS, pem),
        ]
        async with looking(spaces, targets) as looker:
            for number in range(ROUNDS):
                for way in order(["seen", "unseen"], number):
                    targets[:] = [wanted] if way == "seen" else []
                    await looker.agree()
                    values = [*await drive(spaces[0], first), await children[1].ask(), await children[2].ask()]
                    for metric, value in zip(("https_rps", "https_cpu", "tls_calls", "tls_beside"), values, strict=True):
                        found.setdefault(metric, {}).setdefault(way, []).append(value)
        for child in children:
            await child.end()
    for metric, ways in found.items():
        value, baseline = paired(ways["seen"], ways["unseen"])
        bench.emit(metric, "us" if metric == "https_cpu" else "1/s", value, "unseen", baseline)


def main() -> None:
    """Print the figures."""
    features.ensure_bpffs()
    with Bench("tls") as bench, tempfile.TemporaryDirectory() as scratch:
        asyncio.run(measure(bench, Path(scratch)))


if __name__ == "__main__":
    main()
