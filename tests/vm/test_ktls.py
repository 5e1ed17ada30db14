"""TLS that the kernel does, on a kernel that has it (`make test-vm`): two pods, A and B, joined by a veth (accelrig).

    A: client ── TLS by its kernel ──▶ B: server, port 8443

Whether a socket of a map may turn TLS on depends on the kernel (CVE-2026-93824): where it may not, nothing is seen, and that is
said.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.common.instance import Instance
from services.common.kernel import bpf
from services.sockaccel import ulp
from services.sockaccel.tls import ktls
from tests.e2e.lb.sockrig import Process, cookie_of, forget, make_instance
from tests.e2e.sockaccel.accelrig import B4, two_spaces
from tests.e2e.sockaccel.test_tls_seen import FILTER, certificate

PORT, OTHER = 8443, 8444
SIDES = """
import hashlib, os, ssl, struct
CRYPTO = struct.pack("HH8s16s4s8s", 0x0304, 51, bytes(8), bytes(range(16)), bytes(4), bytes(8))
BULK = bytes(range(256)) * 4096

def key(made, way):
    if not made.getsockopt(6, 31, 16).startswith(b"tls"):
        made.setsockopt(6, 31, b"tls")
    made.setsockopt(282, way, CRYPTO)

def digest(made, size):
    seen = hashlib.sha256()
    while size:
        data = made.recv(min(size, 65536))
        assert data, size
        seen.update(data)
        size -= len(data)
    return seen.hexdigest()
"""


class Ends:
    """A process in each pod, with one connection between them at a time."""

    def __init__(self, stack: contextlib.ExitStack, spaces: tuple[Path, Path]) -> None:
        self.client, self.server = (stack.enter_context(Process(None, space)) for space in spaces)
        for end in (self.client, self.server):
            end.do(SIDES)

    def connect(self, port: int = PORT) -> None:
        self.server.do(f"l = socket.create_server(({B4!r}, {port}))")
        self.client.do(f"c = socket.create_connection(({B4!r}, {port}), 20)")
        self.server.do("c = l.accept()[0]; c.settimeout(20); l.close()")

    def turn_on(self) -> None:
        """TLS, both ways, without a library. OSError: the kernel refuses."""
        for end, first, second in ((self.client, 1, 2), (self.server, 2, 1)):
            end.do(f"key(c, {first}); key(c, {second})")

    def ask(self, path: str) -> None:
        request, answer = f"GET {path} HTTP/1.1\r\nhost: b\r\ncookie: hidden\r\n\r\n", "HTTP/1.1 204 Nothing\r\n\r\n"
        self.client.do(f"c.sendall({request.encode()!r})")
        assert self.server.give(f"c.recv({len(request)}, socket.MSG_WAITALL).decode()") == request
        self.server.do(f"c.sendall({answer.encode()!r})")
        assert self.client.give(f"c.recv({len(answer)}, socket.MSG_WAITALL).decode()") == answer

    def bulk(self) -> None:
        """A megabyte, in pieces of all sizes, byte by byte as it was sent."""
        self.server.send("", "digest(c, len(BULK))")
        self.client.do("at = 0\nwhile at < len(BULK): at += c.send(BULK[at : at + 1 + at * 7 % 50000])")
        assert self.server.receive() == self.client.give("hashlib.sha256(BULK).hexdigest()")


class Looking:
    """tests.vm.looker, running."""

    def __init__(self, instance: Instance, spaces: tuple[Path, Path]) -> None:
        pods = {name: (str(space), cookie_of(space)) for name, space in zip("ab", spaces, strict=True)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.vm.looker", instance.name, json.dumps(pods)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def seen(self, path: str, count: int) -> list[dict[str, Any]]:
        """Messages with that path, once there are so many, and a moment later."""
        end = time.monotonic() + 20
        while True:
            found = [each for each in self.tell()["messages"] if path in each.get("path", "")]
            if len(found) >= count or time.monotonic() > end:
                time.sleep(0.5)
                return [each for each in self.tell()["messages"] if path in each.get("path", "")]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


TARGET = {"name": "t", "pods": ["a", "b"], "kernel_ports": [PORT]}


@pytest.fixture(scope="module")
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


@pytest.fixture(scope="module")
def spaces(stack: contextlib.ExitStack) -> tuple[Path, Path]:
    return stack.enter_context(two_spaces())


@pytest.fixture(scope="module")
def ends(stack: contextlib.ExitStack, spaces: tuple[Path, Path]) -> Ends:
    return Ends(stack, spaces)


@pytest.fixture(scope="module")
def instance(stack: contextlib.ExitStack) -> Instance:
    made = make_instance()
    stack.callback(forget, made)
    return made


@pytest.fixture(scope="module")
def looking(stack: contextlib.ExitStack, instance: Instance, spaces: tuple[Path, Path]) -> Looking:
    made = Looking(instance, spaces)
    stack.callback(made.close)
    return made


def programs() -> list[str]:
    """Names of all programs in the kernel that are of the kernel's TLS."""
    found, number = [], 0
    while True:
        try:
            number = struct.unpack_from("II", bpf.call(bpf.PROG_NEXT_ID, struct.pack("III", number, 0, 0))[1])[1]
        except FileNotFoundError:
            return [name for name in found if name in ("fib_tls_ops", "fib_tls_msg")]
        with contextlib.suppress(FileNotFoundError):
            fd = bpf.prog_fd_by_id(number)
            found.append(bpf.prog_info(fd).name)
            os.close(fd)


def test_that_a_kernel_without_tls_is_named_and_nothing_is_attached(looking: Looking) -> None:
    assert not ktls.available(), "the module is loaded already"
    found = looking.tell(target=TARGET)
    assert found["probes"]["kernel"]["problem"] == ktls.ABSENT
    assert ulp.possible(), "it has modules"
    assert programs() == []


def test_what_the_kernel_encrypts_is_seen(looking: Looking, ends: Ends) -> None:
    subprocess.run(["modprobe", "tls"], check=True)
    problem = looking.tell()["probes"]["kernel"].get("problem", "")
    assert ulp.possible() is (problem != ktls.REFUSED)
    ends.connect()
    ends.turn_on()
    ends.ask("/kernel?secret=word")
    if problem:
        assert problem == ktls.REFUSED and programs() == []
        assert looking.seen("/kernel", 0) == []
    else:
        assert sorted(programs()) == ["fib_tls_msg", "fib_tls_ops"]
        (mine,) = looking.seen("/kernel", 1)
        assert (mine["pod"], mine["path"], mine["method"], mine["kernel"]) == ("a", "/kernel?…", "GET", True)
        assert mine["pid"] == ends.client.pid and "received" not in mine
        (answer,) = [each for each in looking.tell()["messages"] if each.get("status") == 204]
        assert answer["pod"] == "b" and answer["pid"] == ends.server.pid and answer["kernel"]
        assert looking.tell()["probes"]["kernel"]["sockets"] >= "2"
    assert "word" not in json.dumps(looking.tell()) and "hidden" not in json.dumps(looking.tell())
    ends.bulk()
    if problem:
        pytest.skip(f"nothing is seen: {problem}")


def test_connections_to_other_ports_are_left_alone(looking: Looking, ends: Ends) -> None:
    before = looking.tell()["probes"]["kernel"].get("sockets")
    ends.connect(OTHER)
    ends.turn_on()
    ends.ask("/other")
    assert looking.seen("/other", 0) == []
    assert looking.tell()["probes"]["kernel"].get("sockets") == before


def test_what_a_library_gives_to_the_kernel_is_seen_once(looking: Looking, ends: Ends, tmp_path: Path) -> None:
    pem = certificate(tmp_path / "b.pem")
    before = encrypting(ends)
    ends.server.do(f"context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain({str(pem)!r})")
    ends.client.do("context = ssl._create_unverified_context()")
    for end in (ends.client, ends.server):
        end.do("context.options |= 8")  # SSL_OP_ENABLE_KTLS
    ends.server.do(FILTER)  # A function that returns makes a system call that the process may not make.
    ends.connect()
    ends.server.send("c = context.wrap_socket(c, server_side=True)")
    ends.client.do("c = context.wrap_socket(c)")
    ends.server.receive()
    # Looked at or not, what OpenSSL wants of the kernel it gets.
    assert encrypting(ends) > before
    ends.server.send("", "c.recv(100).decode()")
    ends.client.do("c.sendall(b'GET /library HTTP/1.1\\r\\n\\r\\n')")
    assert ends.server.receive().startswith("GET /library")
    found = looking.seen("/library", 2)
    assert [(each["pod"], each.get("received", False), each.get("kernel", False)) for each in found] == [
        ("a", False, False),
        ("b", True, False),
    ]


def test_who_looks_may_be_killed_under_a_connection(looking: Looking, ends: Ends) -> None:
    ends.connect()
    ends.turn_on()
    ends.ask("/before-the-kill")
    ends.server.send("", "digest(c, 2000020)")
    ends.client.send("for _ in range(20): c.sendall(BULK[:100001])")
    looking.process.send_signal(signal.SIGKILL)
    looking.process.wait()
    ends.client.receive()
    assert ends.server.receive() == ends.client.give("hashlib.sha256(BULK[:100001] * 20).hexdigest()")
    end = time.monotonic() + 20
    while programs():
        assert time.monotonic() < end, programs()
        time.sleep(0.2)
    ends.ask("/after-the-kill")
    ends.bulk()


def encrypting(ends: Ends) -> int:
    """For how many sockets of the client's pod the kernel has encrypted so far."""
    counts = ends.client.give("open('/proc/net/tls_stat').read()")
    return next(int(line.split()[1]) for line in counts.splitlines() if line.startswith("TlsTxSw"))
