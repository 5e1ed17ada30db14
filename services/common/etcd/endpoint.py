"""One etcd server address and the gRPC channel to it.

aetcd brings etcd's protocol (messages and stubs), which is all that is used of it. Its own client connects to
one host without TLS, never times out by default, cuts prefixes that end in 0xff wrongly, and loses every
watch for good when its stream breaks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import grpc
from aetcd import rpc

from services.common.errors import FailedPrecondition, InvalidArgument

_OPTIONS = (
    # gRPC's defaults wait 20 s for a connection and up to 120 s between two attempts.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Finds a server that is gone without a word while a watch is open. etcd closes connections that ping more
    # often than every 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A listing or a watch's catching up may exceed gRPC's 4 MiB; etcd itself bounds requests (1.5 MiB).
    ("grpc.max_receive_message_length", -1),
    # etcd is part of the node's infrastructure, never behind the HTTP proxy of whoever started us.
    ("grpc.enable_http_proxy", 0),
    # Otherwise two clients share connections, and the back-off, through a pool of the process.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True)
class EtcdTls:
    """PEM files for https endpoints. Without `ca` the system's roots are trusted; `cert` and `key` go
    together.

    Files are read when a connection is built, so a renewed certificate is taken up after the old one stopped
    working.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise InvalidArgument(
                "a client certificate needs its key, and a key its certificate",
                field="cert" if self.cert is None else "key",
            )

    def stamp(self) -> tuple[tuple[int, int], ...]:
        """Changes when a file is replaced."""
        return tuple(_stat(path) for path in (self.ca, self.cert, self.key) if path is not None)

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises FailedPrecondition when a file cannot be read."""
        ca, cert, key = (None if path is None else _read(path) for path in (self.ca, self.cert, self.key))
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_ino, found.st_mtime_ns)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FailedPrecondition(
            f"cannot read {path}, a TLS file for etcd: {error.strerror}",
            fix="check the path and its permissions",
        ) from error


@dataclass(frozen=True)
class Address:
    """Where a server listens. `target` is what gRPC takes."""

    url: str
    target: str
    secure: bool

    @classmethod
    def parse(cls, url: str) -> Address:
        """From http://host:port, https://host:port, unix:/path, or host:port (plain).

        Raises InvalidArgument for anything else.
        """
        for scheme in ("unix://", "unix:"):
            if url.startswith(scheme):
                path = url.removeprefix(scheme)
                if not path.startswith("/"):
                    raise InvalidArgument(
                        f"etcd endpoint {url!r}: the socket path must be absolute", field="etcd"
                    )
                return cls(url, f"unix:{path}", False)
        scheme, found, rest = url.partition("://")
        if not found:
            scheme, rest = "http", url
        host, colon, port = rest.rstrip("/").rpartition(":")
        well = scheme in ("http", "https") and host and colon and port.isdigit() and 0 < int(port) < 65536
        if not well or "/" in host or (":" in host and not host.startswith("[")):
            raise InvalidArgument(
                f"etcd endpoint {url!r} is not understood",
                field="etcd",
                fix="write https://host:port, http://host:port or unix:/path; IPv6 addresses in brackets",
            )
        return cls(url, f"dns:///{host}:{port}", scheme == "https")


class Endpoint:
    """A lazily made channel to one server, and the stubs on it."""

    def __init__(self, address: Address, tls: EtcdTls) -> None:
        self.address = address
        self._tls = tls
        self._stamp: tuple[tuple[int, int], ...] = ()
        self._channel: grpc.aio.Channel | None = None

    async def ready(self, deadline: float, patient: bool) -> bool:
        """Whether a connection stands, waiting for it until `deadline` (time.monotonic()); unless `patient`,
        only for the attempt under way.
        """
        pause = 0.001
        while True:
            # Anew each time: another call may have closed the channel and opened the next.
            # Polled: a cancelled wait_for_state_change stays behind in the channel until that changes.
            state = self._open().get_state(try_to_connect=True)
            if state is grpc.ChannelConnectivity.READY:
                return True
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                if self.address.secure and self._stamp != self._tls.stamp():
                    await self.close()
                elif not patient:
                    return False
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 1.5, 0.02)

    async def why(self) -> str:
        """Why there is no connection. gRPC tells only who makes a call: one without effect is made."""
        try:
            self._open()
            await self.kv.Range(rpc.RangeRequest(key=b"\0", count_only=True), timeout=0.05)
        except FailedPrecondition as error:
            return str(error)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return error.details() or "unavailable"
        return "no answer"

    async def close(self) -> None:
        """Close the channel; calls and streams on it end. The next use opens another."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def _open(self) -> grpc.aio.Channel:
        if self._channel is None:
            if self.address.secure:
                self._stamp = self._tls.stamp()
                self._channel = grpc.aio.secure_channel(
                    self.address.target, self._tls.credentials(), options=_OPTIONS
                )
            else:
                self._channel = grpc.aio.insecure_channel(self.address.target, options=_OPTIONS)
            self.kv = rpc.KVStub(self._channel)
            self.lease = rpc.LeaseStub(self._channel)
            self.watch = rpc.WatchStub(self._channel)
        return self._channel


def endpoints(urls: Iterable[str], tls: EtcdTls | None) -> list[Endpoint]:
    """Raises InvalidArgument when there is none or one is malformed."""
    found = [Endpoint(Address.parse(url), tls or EtcdTls()) for url in urls]
    if not found:
        raise InvalidArgument("no etcd endpoint is given", field="etcd")
    return found
