"""HTTPS of real programs in pods of a lab: what is seen of it, and of whom nothing is."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from services.sockaccel.tls import ktls
from tests.e2e.modes.modelab import ModeLab, lab, wait_for

NODE = "c1n1"
SERVER = """
import ssl, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(404 if "missing" in self.path else 200)
        for name, value in (("x-kind", "shown"), ("set-cookie", "hidden"), ("content-length", "5")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"hello")
    def log_message(self, *_):
        pass

server = ThreadingHTTPServer(("0.0.0.0", 8443), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1])
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""
CLIENT = """
import http.client, json, ssl, sys
context = ssl._create_unverified_context()
kept = http.client.HTTPSConnection(sys.argv[1], 8443, context=context, timeout=10)
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    kept.request("GET", json.loads(line), headers={"cookie": "hidden", "x-kind": "asked"})
    answer = kept.getresponse()
    answer.read()
    print(json.dumps(answer.status), flush=True)
"""

FILTER = """
import ctypes, struct
UNKNOWN = 335  # uretprobe, x86-64
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, UNKNOWN), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)]
code = b"".join(struct.pack("HBBI", *rule) for rule in rules)
held = ctypes.create_string_buffer(code)
filter = struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(held))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.c_char_p(filter), 0, 0) == 0
"""


GO = """
package main

import (
	"crypto/tls"
	"os"
	"time"
)

func main() {
	for {
		session, err := tls.Dial("tcp", os.Args[1], &tls.Config{InsecureSkipVerify: true})
		if err == nil {
			session.Write([]byte("GET /from-go HTTP/1.1\\r\\nhost: x\\r\\nconnection: close\\r\\n\\r\\n"))
			session.Read(make([]byte, 4096))
			session.Close()
		}
		time.Sleep(100 * time.Millisecond)
	}
}
"""


def certificate(path: Path) -> Path:
    """Its own issuer's, with its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pod")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return path


class Client:
    """Asks from its pod, with OpenSSL."""

    def __init__(self, running: subprocess.Popen[str]) -> None:
        self._running = running
        assert self._read() == "ready"

    def get(self, path: str) -> int:
        assert self._running.stdin is not None
        self._running.stdin.write(json.dumps(path) + "\n")
        self._running.stdin.flush()
        return int(self._read())

    def _read(self) -> Any:
        assert self._running.stdout is not None
        return json.loads(self._running.stdout.readline())


class Pods:
    """p1 asks p2, which serves HTTPS; p3 is nobody's target."""

    def __init__(self, made: ModeLab, stack: contextlib.ExitStack, pem: Path) -> None:
        self.lab, self.stack = made, stack
        self.address: str = made.pod(NODE, "p2")["ipv4"]
        self.run("p2", sys.executable, "-c", SERVER, str(pem))
        wait_for(lambda: made.pod_exec(NODE, "p2", "ss", "-Hltn", "sport = :8443").strip(), "the server")

    def run(self, pod: str, *words: str, **options: Any) -> subprocess.Popen[str]:
        return self.stack.enter_context(self.lab.started(NODE, "fibril", "pod", "exec", pod, "--", *words, **options))

    def client(self, pod: str, env: dict[str, str] | None = None) -> Client:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        words = [*("env", *(f"{name}={value}" for name, value in (env or {}).items())), sys.executable, "-u", "-c", CLIENT]
        return Client(self.run(pod, *words, self.address, **pipes))

    def fibril(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        return self.lab.command("-i", f"{self.lab.name}-{NODE}", *words, code=code)

    def probes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.lab.json(NODE, "tls", "probes")
        return found

    def probed(self, library: str) -> bool:
        return any(each["library"] == library and each["functions"] for each in self.probes())

    def messages(self, path: str = "", count: int = 0) -> list[dict[str, Any]]:
        """Those kept, once there are so many, and a moment later; of requests only those with this path in theirs."""

        def found() -> list[dict[str, Any]]:
            text = self.fibril("-o", "json", "tls", "watch", "--no-follow", "--last", "1000").stdout
            return [each for each in map(json.loads, text.splitlines()) if path in each["path"]]

        wait_for(lambda: len(found()) >= count, f"{count} messages")
        time.sleep(0.3)
        return found()


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    pem = certificate(tmp_path_factory.mktemp("tls") / "pod.pem")
    with lab("--nodes", "1", "--pods", "3", "--services", "ipam,sockaccel") as made, contextlib.ExitStack() as stack:
        yield Pods(made, stack, pem)


@pytest.fixture
def target(pods: Pods) -> Iterator[Pods]:
    pods.fibril("tls", "target", "set", "t", "--pod", "p1", "--label", "app=p2", "--header", "x-kind")
    try:
        yield pods
    finally:
        pods.fibril("tls", "target", "rm", "t")


def test_nothing_is_looked_into_unless_asked_for(pods: Pods) -> None:
    assert pods.probes() == [] and pods.lab.json(NODE, "tls", "target", "ls") == []
    assert pods.client("p1").get("/unasked") == 200
    assert pods.messages() == []


def test_lines_of_chosen_pods_are_seen_named_and_cut(target: Pods) -> None:
    client, other = target.client("p1"), target.client("p3")
    wait_for(lambda: target.probed("openssl") and len(target.probes()[0]["processes"]) >= 2, "probes in both processes")
    assert client.get("/first?secret=word") == 200
    assert other.get("/of-nobody") == 200
    assert client.get("/missing") == 404
    found = target.messages("/first", 2)
    assert {(each["pod"], each["received"], each["method"]) for each in found} == {("p1", False, "GET"), ("p2", True, "GET")}
    assert all(each["path"] == "/first?…" and each["headers"] == {"x-kind": "asked"} for each in found)

    def missing() -> list[tuple[str, bool]]:
        return sorted((each["pod"], each["received"]) for each in target.messages() if each["status"] == 404)

    wait_for(lambda: len(missing()) >= 2, "the last answer")
    assert missing() == [("p1", True), ("p2", False)]
    # Whose pod is no target's is seen only where it is: at the server.
    assert {each["pod"] for each in target.messages("/of-nobody", 1)} == {"p2"}
    assert "hidden" not in json.dumps(target.messages()) and "word" not in json.dumps(target.messages())


def test_a_library_is_seen_that_was_replaced_under_its_process(target: Pods, tmp_path: Path) -> None:
    loaded = next(line.split()[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/libssl" in line)
    mine = tmp_path / Path(loaded).name
    shutil.copy(loaded, mine)
    client = target.client("p1", {"LD_LIBRARY_PATH": str(tmp_path)})
    shutil.copy(loaded, tmp_path / "newer")
    (tmp_path / "newer").rename(mine)
    wait_for(lambda: [each for each in target.probes() if each["path"] == f"{mine} (deleted)" and each["functions"]], "a probe")
    assert client.get("/replaced") == 200

    def asked() -> bool:
        return ("p1", False) in {(each["pod"], each["received"]) for each in target.messages("/replaced")}

    wait_for(asked, "the request")


def test_what_pods_make_up_hurts_nobody(target: Pods, tmp_path: Path) -> None:
    program = tmp_path / "libssl.so.3"
    program.write_bytes(b"\x7fELF\x02\x01\x01" + b"\xff" * 4096)
    code = f"import mmap, time; f = open({str(program)!r}); m = mmap.mmap(f.fileno(), 0, prot=5, flags=2); time.sleep(60)"
    target.run("p1", sys.executable, "-c", code)
    seen = wait_for(lambda: [each for each in target.probes() if each["path"] == str(program)], "the file")
    assert "make no sense" in seen[0]["problem"] and not seen[0]["functions"]
    wait_for(lambda: target.probed("openssl"), "a probe")
    assert target.client("p1").get("/beside-it") == 200
    assert len(target.messages("/beside-it", 2)) == 2


def test_a_process_behind_a_strict_filter_goes_on(target: Pods) -> None:
    """Where a probed function returns, kernels from 6.11 on make a system call that filters of containers do not know."""
    code = f"""
{FILTER}
import http.client, ssl
made = http.client.HTTPSConnection({target.address!r}, 8443, context=ssl._create_unverified_context(), timeout=10)
made.request("GET", "/filtered")
print(made.getresponse().status)
"""
    wait_for(lambda: target.probed("openssl"), "a probe")
    assert target.lab.pod_exec(NODE, "p1", sys.executable, "-c", code).strip() == "200"
    found = {(each["pod"], each["received"]) for each in target.messages("/filtered", 2)}
    assert found == {("p1", False), ("p2", True)}


def test_messages_of_all_shapes(target: Pods) -> None:
    """As processes write them: split, several in one, too long, in another protocol, no protocol at all."""
    made = [
        [b"GET /split-in-the-path", b"-for-good HTTP/1.1\r\nhost: x\r\n\r\n"],
        [b"GET /split-behind-the-line HTTP/1.1\r\n", b"x-kind: late\r\nhost: x\r\n\r\n"],
        [b"GET /pipelined-1 HTTP/1.1\r\nhost: x\r\n\r\nGET /pipelined-2 HTTP/1.1\r\nhost: x\r\n\r\n"],
        [b"GET /" + b"long" * 400 + b" HTTP/1.1\r\nhost: x\r\n\r\n"],
        [b"GET " + bytes(range(1, 250)) + b"\r\n\r\n"],
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
        [b"GET /the-last HTTP/1.1\r\nhost: x\r\n\r\n"],
    ]
    wait_for(lambda: target.probed("openssl"), "a probe")
    code = f"""
import socket, ssl
context = ssl._create_unverified_context()
for parts in {made!r}:
    with context.wrap_socket(socket.create_connection(({target.address!r}, 8443), 10)) as made:
        for part in parts:
            made.sendall(part)
        made.settimeout(1)
        try:
            made.recv(100)
        except OSError:
            pass
"""
    target.lab.pod_exec(NODE, "p1", sys.executable, "-c", code)
    # They are told in order.
    assert len(target.messages("/the-last", 2)) == 2
    wrote = [each["path"] for each in target.messages() if each["pod"] == "p1" and not each["received"] and each["method"]]
    assert "/split-behind-the-line" in wrote and "/pipelined-1" in wrote
    assert not any(part in path for path in wrote for part in ("for-good", "pipelined-2", "longlong", "in-the-path"))
    late = next(each for each in target.messages("/split-behind-the-line") if each["pod"] == "p1")
    assert late["headers"] == {}


def test_gnutls_is_seen_as_well(target: Pods) -> None:
    if shutil.which("wget") is None:
        pytest.skip("there is no wget")
    load = "import ctypes, time; ctypes.CDLL('libgnutls.so.30'); time.sleep(60)"
    target.run("p1", sys.executable, "-c", load)
    wait_for(lambda: target.probed("gnutls"), "a probe in GnuTLS")
    words = ("wget", "-qO-", "--no-check-certificate", f"https://{target.address}:8443/gnu")
    assert target.lab.pod_exec(NODE, "p1", *words) == "hello"
    wait_for(lambda: [each for each in target.messages("/gnu") if each["pod"] == "p1"], "its request")
    mine = [each for each in target.messages("/gnu") if each["pod"] == "p1"]
    assert len(mine) == 1 and not mine[0]["received"] and mine[0]["comm"] == "wget"


def test_what_go_writes_is_seen(target: Pods, tmp_path: Path) -> None:
    if shutil.which("go") is None or "CI" in os.environ:
        pytest.skip("compiling Go's TLS takes half a minute, and a Go toolchain")
    (tmp_path / "client.go").write_text(GO)
    env = {**os.environ, "CGO_ENABLED": "0", "GO111MODULE": "off", "GOCACHE": str(tmp_path / "cache")}
    program = tmp_path / "client"
    subprocess.run(["go", "build", "-o", program, tmp_path / "client.go"], check=True, env=env)
    target.run("p1", str(program), f"{target.address}:8443")
    wait_for(lambda: target.probed("go"), "a probe in the program")
    mine = wait_for(lambda: [each for each in target.messages("/from-go") if each["pod"] == "p1"], "a request")
    assert all(not each["received"] and each["comm"] == "client" for each in mine)
    assert "what it reads is not seen" in next(each["problem"] for each in target.probes() if each["library"] == "go")


def test_a_program_that_hides_its_tls_is_named(target: Pods) -> None:
    etcd = shutil.which("etcd")
    assert etcd
    target.run("p1", etcd, "--data-dir", str(target.lab.root / "etcd-of-pod"), stderr=subprocess.DEVNULL)
    seen = wait_for(lambda: [each for each in target.probes() if each["path"] == os.path.realpath(etcd)], "etcd")
    assert "Go program without symbols" in seen[0]["problem"] and not seen[0]["functions"]


def test_a_kernel_without_tls_is_named_and_libraries_are_seen_all_the_same(pods: Pods) -> None:
    if ktls.available():
        pytest.skip("this kernel has it: see tests/vm")
    pods.fibril("tls", "target", "set", "t", "--pod", "p1", "--kernel-port", "8443")
    try:
        assert [each["problem"] for each in pods.probes() if each["library"] == "kernel"] == [ktls.ABSENT]
        parts = json.loads(pods.fibril("-o", "json", "status", code=None).stdout)["parts"]
        assert [ktls.ABSENT in each["message"] for each in parts if each["name"] == "tls.kernel"] == [True]
        client = pods.client("p1")
        wait_for(lambda: pods.probed("openssl"), "a probe")
        assert client.get("/without-the-kernel") == 200
        assert len(pods.messages("/without-the-kernel", 1)) == 1
    finally:
        pods.fibril("tls", "target", "rm", "t")


def test_probes_go_with_the_last_target_and_come_back_with_the_service(pods: Pods) -> None:
    client = pods.client("p1")
    pods.fibril("tls", "target", "set", "t", "--pod", "p1")
    try:
        wait_for(lambda: pods.probed("openssl"), "a probe")
        pods.lab.kill(NODE, "sockaccel")
        wait_for(lambda: pods.fibril("tls", "probes", code=None).returncode == 0, "the service", 60)
        wait_for(lambda: pods.probed("openssl"), "a probe again", 60)
        assert client.get("/after-the-kill") == 200
        assert len(pods.messages("/after-the-kill", 1)) == 1
    finally:
        pods.fibril("tls", "target", "rm", "t")
    assert pods.probes() == []
    assert client.get("/after-the-target") == 200
    assert pods.messages("/after-the-target") == []


def test_what_is_wrong_is_named(pods: Pods) -> None:
    for words, said in (
        (["target", "set", "a b", "--pod", "p1"], "no name of a target"),
        (["target", "set", "a"], "a target names pods"),
        (["target", "set", "a", "--pod", "p1", "--header", "Cookie"], "may hold credentials"),
        (["target", "set", "a", "--label", "x"], "KEY=VALUE"),
        (["target", "rm", "nobody"], "no target"),
    ):
        done = pods.fibril("tls", *words, code=None)
        assert done.returncode != 0 and said in done.stderr, (words, done.stderr)
    assert pods.lab.json(NODE, "tls", "target", "ls") == []
