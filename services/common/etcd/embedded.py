"""An etcd of our own: one server process for one node, or for the nodes of a lab; or one of several members.

Alone it listens on unix sockets only, below the run directory: there is no port to find, none for another user of
the machine to connect to, and nodes in other network namespaces reach it all the same. etcd 3.4 takes the
name of a socket as host:port and makes it in its working directory; hence the odd file name and `cwd`.

The process is not tied to its parent: started in a session of its own, it runs on when the parent dies, and
the next parent adopts it. Proof that it runs is a locked pid file (see services.common.pidfile). The lock is
taken before the process exists and inherited by it, and the process writes its own number before it becomes
etcd; so there is no moment at which a killed parent leaves a server that the next one does not find.

A supervisor with its own way to hold processes uses `prepare`, `argv`, `env`, `cwd`, `check` and `explain`
alone; `start`, `wait` and `stop` are for everybody else. A supervised server is not found by `start`, so use
one way or the other. This module does not import gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import FailedPrecondition, Unavailable
from services.common.pidfile import ProcessRef
from services.common.pidfile import read as read_pidfile

CLIENT_PORT, PEER_PORT = 2379, 2380  # of each of several members
_CLIENT, _PEER = "client:0", "peer:0"
_POLL_S = 0.005
# Of the log, when the server does not start.
_TAIL = 64 << 10
# How etcd complains of what it finds in its data directory.
_DAMAGE = ("corrupt", "crc mismatch", "checksum", "invalid database")
# What the new process does before it becomes etcd: write "<pid> <start time>", the latter field 22 of its
# stat (the name in field 2 is "(sh)" and holds no blank).
_BECOME = (
    "read -r _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ started _ </proc/$$/stat; "
    'echo "$$ $started" >"$0"; exec "$@"'
)


@dataclass(frozen=True)
class Member:
    """One of several servers, each at the same ports of its own address. They talk in the clear, so the network
    between them must be one to trust."""

    address: str
    all: tuple[str, ...]

    def options(self) -> Mapping[str, str]:
        """What etcd needs to be told of it."""
        client, peer = client_url(self.address), _peer_url(self.address)
        return {
            "name": self.address,
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": ",".join(f"{address}={_peer_url(address)}" for address in self.all),
            # A lost leader is replaced within a second (defaults: two).
            "heartbeat-interval": "50",
            "election-timeout": "500",
        }


def client_url(address: str) -> str:
    """Where clients reach a member."""
    return f"http://{_host(address)}:{CLIENT_PORT}"


def _peer_url(address: str) -> str:
    return f"http://{_host(address)}:{PEER_PORT}"


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _alone() -> Mapping[str, str]:
    """For the only member."""
    client, peer = f"unix://{_CLIENT}", f"unix://{_PEER}"
    return {
        "name": "node",
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"node={peer}",
        # It has nobody to hear from: the shortest sensible wait for an election it cannot lose. Leads 40 ms
        # after the first start and at most 200 ms after a later one (defaults: 2 s), for 1 % of a CPU when
        # idle (defaults: 0.6 %).
        "heartbeat-interval": "20",
        "election-timeout": "100",
    }


class EmbeddedEtcd:
    """One etcd server with its data in `data_dir` and its sockets, pid file and log in `run_dir`.

    Both are made with mode 0700 when missing; `run_dir` must be its own (`<instance run dir>/etcd`). A server
    started again on the same `data_dir` continues with what it held.
    """

    def __init__(
        self,
        data_dir: Path,
        run_dir: Path,
        *,
        binary: str = "etcd",
        quota_bytes: int = 2 << 30,
        member: Member | None = None,
    ) -> None:
        """binary: path, or name to look for in PATH. quota_bytes: above it etcd refuses changes. member: be one
        of several; by default the only one, on unix sockets."""
        self.data_dir = data_dir.absolute()
        self.run_dir = run_dir.absolute()
        self._binary = binary
        self._quota_bytes = quota_bytes
        self._member = member
        self._child: subprocess.Popen[bytes] | None = None

    # What a supervisor needs

    @property
    def endpoint(self) -> str:
        """The URL for EtcdClient."""
        return f"unix:{self.run_dir}/{_CLIENT}" if self._member is None else client_url(self._member.address)

    @property
    def pidfile(self) -> Path:
        """Locked while a server started by `start` runs."""
        return self.run_dir / "etcd.pid"

    @property
    def log_file(self) -> Path:
        """What a server started by `start` writes, JSON lines."""
        return self.run_dir / "etcd.log"

    @property
    def cwd(self) -> Path:
        """The working directory the server must be started in: its sockets appear there."""
        return self.run_dir

    @property
    def argv(self) -> tuple[str, ...]:
        """The command line; always the same for the same server.

        Raises FailedPrecondition when there is no etcd on this machine.
        """
        binary = shutil.which(self._binary)
        if binary is None:
            raise FailedPrecondition(
                f"there is no {self._binary} on this machine",
                fix="install it (apt-get install etcd-server), or use an existing cluster (--etcd URL,URL)",
            )
        options = {
            "data-dir": str(self.data_dir),
            **(_alone() if self._member is None else self._member.options()),
            "initial-election-tick-advance": "true",
            "quota-backend-bytes": str(self._quota_bytes),
            "auto-compaction-mode": "periodic",
            "auto-compaction-retention": "1h",
            # Raft's log in memory; the default of 100,000 entries is meant for followers that lag.
            "snapshot-count": "10000",
            "logger": "zap",
            "log-outputs": "stderr",
            "log-level": "warn",
        }
        return (binary, *(f"--{name}={value}" for name, value in options.items()))

    @property
    def env(self) -> Mapping[str, str]:
        """Variables to add to the environment.

        The token goes into the cluster's id when the data directory is made. With it clients see that an etcd
        made anew is not the one they knew, though everything else about it is equal.
        """
        if self._member is not None:
            return {}  # members must agree on it
        return {"ETCD_INITIAL_CLUSTER_TOKEN": secrets.token_hex(8)}

    def prepare(self) -> None:
        """Make the directories and remove stale sockets. To be called only while no server runs.

        Raises FailedPrecondition when that is not possible.
        """
        try:
            for directory in (self.data_dir, self.run_dir):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in (_CLIENT, _PEER):
                (self.run_dir / name).unlink(missing_ok=True)
        except OSError as error:
            raise FailedPrecondition(
                f"cannot prepare {error.filename} for etcd: {error.strerror}",
                fix="check the permissions and that nothing else is there",
            ) from error

    async def check(self, timeout_s: float = 2.0) -> str:
        """What is wrong with the server, one sentence; "" when it leads and can write."""
        reader: asyncio.StreamReader
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await self._connect()
                try:
                    writer.write(b"GET /health HTTP/1.0\r\nHost: etcd\r\n\r\n")
                    answer = await reader.read()
                finally:
                    writer.close()
        except TimeoutError:
            return f"etcd does not answer within {timeout_s:g} s"
        except OSError as error:
            return f"etcd does not listen on {self.endpoint}: {error.strerror}"
        head, _, body = answer.partition(b"\r\n\r\n")
        if b" 200 " in head.partition(b"\r\n")[0]:
            return ""
        said = body.decode(errors="replace").strip()
        return f"etcd has no leader yet, or an alarm because its data is full: {said or 'no answer'}"

    def explain(self, log_file: Path | None = None) -> FailedPrecondition:
        """Why the server ended, from what it wrote last (to `log_file`, its own when None)."""
        log_file = log_file or self.log_file
        cause = _last_words(log_file)
        if any(sign in cause.lower() for sign in _DAMAGE):
            return FailedPrecondition(
                f"the data of etcd in {self.data_dir} is damaged: {cause}",
                fix="put a backup there, or remove the directory: pools and blocks must then be made anew",
            )
        return FailedPrecondition(
            f"etcd with its data in {self.data_dir} ended: {cause or 'it left no message'}",
            fix=f"its log is {log_file}",
        )

    # For those without a supervisor

    @property
    def process(self) -> ProcessRef | None:
        """The running server, whoever started it; None when there is none."""
        return read_pidfile(self.pidfile)

    async def start(self, timeout_s: float = 10.0) -> bool:
        """Start the server, or adopt the one that runs, and wait until it is healthy; whether it was adopted.

        Raises FailedPrecondition when it ends at once (damaged data, no etcd installed), Unavailable when it
        is not healthy within `timeout_s` seconds; it runs on then.
        """
        deadline = time.monotonic() + timeout_s
        child = self._spawn()
        while True:
            if child is not None and child.poll() is not None:
                raise self.explain()
            # Another's lock with no living process in the file: one about to end, or not quite begun.
            if child is None and self.process is None:
                child = self._spawn()
            trouble = await self.check(max(0.05, deadline - time.monotonic()))
            if not trouble:
                return child is None
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"etcd with its data in {self.data_dir} is not healthy after {timeout_s:g} s: {trouble}",
                    fix=f"its log is {self.log_file}",
                )
            await asyncio.sleep(_POLL_S)

    async def wait(self) -> None:
        """Until the server has ended, however; at once when there is none."""
        while self._runs():
            ref = self.process
            fd = None if ref is None else ref.open()
            if fd is None:
                # Killed, its main thread shows as a zombie while others still hold the lock.
                await asyncio.sleep(_POLL_S)
                continue
            ended = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.add_reader(fd, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(fd)
                os.close(fd)
        if self._child is not None:
            self._child.poll()

    async def stop(self, grace_s: float = 5.0) -> None:
        """End the server, by force when it has not ended after `grace_s` seconds, and remove its sockets and
        pid file. The data stays. Nothing happens when there is none.
        """
        for number, limit_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
            ref = self.process
            fd = None if ref is None else ref.open()
            if fd is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, number)
                os.close(fd)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wait(), limit_s)
                break
        with self._lock() as held:
            if held is not None:
                for path in (self.run_dir / _CLIENT, self.run_dir / _PEER, self.pidfile):
                    path.unlink(missing_ok=True)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._member is not None:
            return await asyncio.open_connection(self._member.address, CLIENT_PORT)
        return await asyncio.open_unix_connection(self.run_dir / _CLIENT)

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        """Start the server; None when one runs."""
        argv = self.argv
        with self._lock() as held:
            if held is None:
                return None
            self.prepare()
            # Variables would override nothing but what is not in argv; all the same none of another etcd's.
            env = {name: value for name, value in os.environ.items() if not name.startswith("ETCD")}
            with self.log_file.open("wb") as output:
                self._child = subprocess.Popen(
                    ("/bin/sh", "-c", _BECOME, str(self.pidfile), *argv),
                    cwd=self.cwd,
                    env={**env, **self.env},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    pass_fds=(held,),
                )
        return self._child

    def _runs(self) -> bool:
        """Whether somebody holds the pid file."""
        if not self.pidfile.exists():
            return False
        with self._lock() as held:
            return held is None

    @contextlib.contextmanager
    def _lock(self) -> Iterator[int | None]:
        """The pid file, locked; None when another holds it. Closed on the way out: a child keeps the lock."""
        self.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            fd = os.open(self.pidfile, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield None
                    return
                # The one who held it before may have removed the file after it was opened here.
                if self.pidfile.exists() and os.path.samestat(os.fstat(fd), self.pidfile.stat()):
                    yield fd
                    return
            finally:
                os.close(fd)


def _last_words(log_file: Path) -> str:
    """The last complaint in a log of etcd: a fatal line, else how a Go panic begins, else what it says of its
    flags.
    """
    try:
        with log_file.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    fatal = [line for line in lines if '"level":"fatal"' in line or '"level":"panic"' in line]
    panics = [line for line in lines if line.startswith(("panic:", "fatal error:"))]
    plain = [line for line in lines if line.strip() and not line.startswith("{") and " I | " not in line]
    said = (fatal[-1:] or panics[-1:] or plain[:1] or [""])[0]
    try:
        record = json.loads(said)
    except ValueError:
        return said[:300]
    # etcd 3.4 calls every failure of its start this, whether or not it has anything to discover.
    message = str(record.get("msg", "")).removeprefix("discovery failed")
    return ": ".join(filter(None, (message, str(record.get("error", "")))))[:300]
