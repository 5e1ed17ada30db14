"""Real etcd servers for tests: below one temporary directory, on unix sockets or loopback ports, gone with the
test however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from aetcd import rpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from services.common.errors import FibrilError
from services.common.etcd.client import EtcdClient, EtcdTls
from services.common.etcd.embedded import EmbeddedEtcd
from services.common.etcd.watch import Event, watch_prefix
from tests import session

WAIT_S = 20.0
# A connection to elsewhere cannot take a member's port there while the member is away.
LOOPBACK = session.loopback()


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A directory whose inhabitants, processes included, do not outlive the test. Its path is short, since
    sockets are made in it.
    """
    root = Path(tempfile.mkdtemp(prefix="etcd-"))
    try:
        yield root
    finally:
        while pids := [
            pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _works_below(pid, root)
        ]:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        shutil.rmtree(root, ignore_errors=True)


def _works_below(pid: int, root: Path) -> bool:
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd")).is_relative_to(root)
    except OSError:
        return False


async def until(condition: Callable[[], Any | Awaitable[Any]], what: str) -> Any:
    """Wait for a condition and give what it gave; an error of Fibril counts as not yet."""
    last: object = None
    try:
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    found = condition()
                    last = await found if isinstance(found, Awaitable) else found
                except FibrilError as error:
                    last = error
                else:
                    if last:
                        return last
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{what} did not happen within {WAIT_S:g} s: {last!r}") from None


async def kill(etcd: EmbeddedEtcd) -> None:
    """As power failures do."""
    assert etcd.process is not None
    os.kill(etcd.process.pid, signal.SIGKILL)
    await etcd.wait()


def stop(pid: int) -> None:
    """Stop a process; the last of its threads has stopped at the end, as a signal reaches each by itself."""
    os.kill(pid, signal.SIGSTOP)
    for _ in range(1000):
        # A thread that ends meanwhile has no state to be read.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if all(
                stat.read_text().rpartition(")")[2].split()[0] == "T"
                for stat in Path(f"/proc/{pid}/task").glob("*/stat")
            ):
                return
        time.sleep(0.005)
    raise AssertionError(f"{pid} does not stop")


@contextlib.contextmanager
def hanging(etcd: EmbeddedEtcd) -> Iterator[None]:
    """It accepts connections and says nothing."""
    assert etcd.process is not None
    stop(etcd.process.pid)
    try:
        yield
    finally:
        os.kill(etcd.process.pid, signal.SIGCONT)


async def compact(etcd: EmbeddedEtcd, revision: int, url: str = "") -> None:
    """Drop all history before a revision. url: where it is found just now, if elsewhere."""
    async with grpc.aio.insecure_channel(url or etcd.endpoint) as channel:
        await rpc.KVStub(channel).Compact(rpc.CompactionRequest(revision=revision, physical=True), timeout=5)


class Watcher:
    """Collects what a watch tells."""

    def __init__(self, client: EtcdClient, prefix: str) -> None:
        self.events: list[Event] = []
        self._task = asyncio.create_task(self._collect(client, prefix))

    async def _collect(self, client: EtcdClient, prefix: str) -> None:
        async with contextlib.aclosing(watch_prefix(client, prefix)) as events:
            async for event in events:
                self.events.append(event)

    async def told(self, *wanted: Event, since: int = 0) -> None:
        """Wait until exactly these were told after the first `since` ones."""
        await until(
            lambda: len(self.events) >= since + len(wanted), f"{wanted} instead of {self.events[since:]}"
        )
        assert self.events[since:] == list(wanted)

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


@contextlib.asynccontextmanager
async def watching(client: EtcdClient, prefix: str) -> AsyncIterator[Watcher]:
    watcher = Watcher(client, prefix)
    try:
        yield watcher
    finally:
        await watcher.close()


class Authority:
    """Signs certificates for loopback servers and for clients."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority {directory.name}")])
        self.ca = self._write("ca", self._name, self._key, ca=True)[0]

    def issue(self, name: str) -> EtcdTls:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        cert, key_file = self._write(name, subject, key, ca=False)
        return EtcdTls(self.ca, cert, key_file)

    def _write(
        self, name: str, subject: x509.Name, key: ec.EllipticCurvePrivateKey, ca: bool
    ) -> tuple[Path, Path]:
        now = datetime.datetime.now(datetime.UTC)
        signed = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(LOOPBACK))]),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        cert, key_file = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        cert.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return cert, key_file


class Cluster:
    """Three members on loopback ports, with TLS and client certificates towards clients.

    client --https--> member 0 ---+
           --https--> member 1 ---+-- http, raft
           --https--> member 2 ---+
    """

    def __init__(self, root: Path, authority: Authority) -> None:
        self._root = root
        self._tls = authority.issue("server")
        self.urls = [f"https://{LOOPBACK}:{port}" for port in (2379, 2479, 2579)]
        self._peers = [f"http://{LOOPBACK}:{port}" for port in (2380, 2480, 2580)]
        self._members: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, *members: int) -> None:
        """Start, or start again, these members (all when none is named)."""
        tls = self._tls
        for number in members or range(3):
            home = self._root / f"member{number}"
            home.mkdir(exist_ok=True)
            with (home / "log").open("ab") as output:
                self._members[number] = subprocess.Popen(
                    [
                        shutil.which("etcd") or "etcd",
                        f"--name=m{number}",
                        "--data-dir=data",
                        f"--listen-client-urls={self.urls[number]}",
                        f"--advertise-client-urls={self.urls[number]}",
                        f"--listen-peer-urls={self._peers[number]}",
                        f"--initial-advertise-peer-urls={self._peers[number]}",
                        "--initial-cluster=" + ",".join(f"m{i}={peer}" for i, peer in enumerate(self._peers)),
                        f"--initial-cluster-token={self._root.name}",
                        "--client-cert-auth",
                        f"--trusted-ca-file={tls.ca}",
                        f"--cert-file={tls.cert}",
                        f"--key-file={tls.key}",
                        "--heartbeat-interval=50",
                        "--election-timeout=500",
                    ],
                    cwd=home,
                    stdout=output,
                    stderr=output,
                )

    def kill(self, number: int) -> None:
        self._members[number].kill()
        self._members[number].wait()

    def signal(self, number: int, what: signal.Signals) -> None:
        self._members[number].send_signal(what)

    def stop(self) -> None:
        for member in self._members.values():
            member.kill()
            member.wait()
