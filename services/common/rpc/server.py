"""A gRPC server on one address: a unix socket, or TCP with mutual TLS. Health and reflection are part of it.

A unix socket is bound in a private directory and renamed into place once the server answers: nobody sees it
with wrong permissions, and a stale one of a dead process is replaced in one step. A live one is refused.
"""

from __future__ import annotations

import errno
import grp
import logging
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.rpc.client import MAX_MESSAGE_BYTES, TlsFiles
from services.common.rpc.handlers import Layers
from services.common.telemetry import Telemetry

log = logging.getLogger(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(frozen=True)
class RpcConfig:
    """Limits of every gRPC server of the process, and its TCP address if it has one."""

    max_message_bytes: int = field(
        default=MAX_MESSAGE_BYTES, metadata={"help": "largest request or answer, bytes"}
    )
    max_deadline_s: float = field(
        default=60.0, metadata={"help": "longest a unary RPC may take, seconds, whatever the client asks for"}
    )
    max_concurrent_rpcs: int = field(
        default=1024, metadata={"help": "RPCs in progress, watches included; more get RESOURCE_EXHAUSTED"}
    )
    keepalive_s: float = field(
        default=30.0,
        metadata={"help": "seconds of silence after which a client is pinged; gone after as many more"},
    )
    socket_group: str = field(
        default="fibril",
        metadata={"help": "group that may use the unix sockets besides root; ignored when absent"},
    )
    tcp: str = field(
        default="",
        metadata={
            "help": "address:port to serve on by mutual TLS, ipam's: identity has the next port; empty: unix sockets only"
        },
    )
    tls_ca: str = field(
        default="", metadata={"help": "PEM file: authority that client certificates must come from"}
    )
    tls_cert: str = field(
        default="", metadata={"help": "PEM file: this server's certificate chain; reread on change"}
    )
    tls_key: str = field(default="", metadata={"help": "PEM file: this server's private key"})

    def __post_init__(self) -> None:
        if not 4096 <= self.max_message_bytes <= 256 << 20:
            raise InvalidArgument(
                f"{self.max_message_bytes} is outside 4096..{256 << 20} bytes", field="max_message_bytes"
            )
        if not 0.1 <= self.max_deadline_s <= 3600:
            raise InvalidArgument(f"{self.max_deadline_s:g} is outside 0.1..3600", field="max_deadline_s")
        if not 1 <= self.max_concurrent_rpcs <= 1_000_000:
            raise InvalidArgument(
                f"{self.max_concurrent_rpcs} is outside 1..1000000", field="max_concurrent_rpcs"
            )
        if not 1 <= self.keepalive_s <= 7200:
            raise InvalidArgument(f"{self.keepalive_s:g} is outside 1..7200", field="keepalive_s")
        if self.tcp:
            for name in ("tls_ca", "tls_cert", "tls_key"):
                if not getattr(self, name):
                    raise InvalidArgument(
                        f"{name} is empty but tcp is set",
                        field=name,
                        fix="there is no TCP without mutual TLS",
                    )

    @property
    def tls(self) -> TlsFiles:
        """The server's TLS files; meaningful only with `tcp`."""
        return TlsFiles(Path(self.tls_ca), Path(self.tls_cert), Path(self.tls_key))


class RpcServer:
    """Serves what was added to it on `address`: a Path is a unix socket, a string TCP."""

    def __init__(self, address: Path | str, cfg: RpcConfig, telemetry: Telemetry) -> None:
        self._address = address
        self._cfg = cfg
        self._layers = Layers(
            check_roles=isinstance(address, str), max_deadline_s=cfg.max_deadline_s, telemetry=telemetry
        )
        self._health = HealthServicer()
        self._services: list[str] = []
        self._started = False
        self._inode = 0
        self.port = 0
        keepalive_ms = int(cfg.keepalive_s * 1000)
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", cfg.max_message_bytes),
                ("grpc.max_send_message_length", cfg.max_message_bytes),
                ("grpc.keepalive_time_ms", keepalive_ms),
                ("grpc.keepalive_timeout_ms", keepalive_ms),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                # Without this two processes could share one TCP port and each get half of the connections.
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=cfg.max_concurrent_rpcs,
        )

    @property
    def services(self) -> list[str]:
        """Full names of the gRPC services added, health and reflection included once started."""
        return list(self._services)

    def add(self, adder: Callable[[Any, Any], None], servicer: object) -> None:
        """Register `servicer` with its generated `add_…_to_server`; before `start`."""
        if self._started:
            raise RuntimeError("servicers are added before the server starts")
        adder(servicer, self)

    # The two methods by which generated code talks to a server.
    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Nothing: the same handlers arrive by name in `add_registered_method_handlers`."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Wrap and register a service's handlers."""
        if service in self._services:
            raise RuntimeError(f"gRPC service {service} is already there")
        wrapped = {
            name: self._layers.wrap(f"/{service}/{name}", handler) for name, handler in handlers.items()
        }
        self._server.add_registered_method_handlers(service, wrapped)
        self._services.append(service)

    async def start(self) -> None:
        """Listen and answer. Raises FailedPrecondition when the address is taken, by whom if known."""
        from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
        from grpc_reflection.v1alpha._async import ReflectionServicer

        for name in ("", *self._services):
            await self._health.set(name, _SERVING)
        self.add(health_pb2_grpc.add_HealthServicer_to_server, self._health)
        names = [*self._services, reflection.SERVICE_NAME]
        self.add(reflection_pb2_grpc.add_ServerReflectionServicer_to_server, ReflectionServicer(names))
        self._started = True
        if isinstance(self._address, Path):
            await self._start_unix(self._address)
        else:
            await self._start_tcp(self._address)

    async def drain(self, grace_s: float) -> None:
        """Say NOT_SERVING, end streams, accept nothing new and wait `grace_s` seconds for unary RPCs in
        progress, then cancel them. Safe to call twice and before `start`.
        """
        await self._health.enter_graceful_shutdown()
        self._layers.end_streams()
        await self._server.stop(grace_s)
        if isinstance(self._address, Path) and self._inode:
            try:
                # Not ours any more when a successor has already renamed its own over it.
                if self._address.stat().st_ino == self._inode:
                    self._address.unlink()
            except FileNotFoundError:
                pass
            self._inode = 0

    async def _start_unix(self, path: Path) -> None:
        refuse_live(path)
        private = path.parent / f".{path.stem}"
        private.mkdir(mode=0o700, exist_ok=True)
        bound = private / "s"
        self._bind(lambda: self._server.add_insecure_port(f"unix:{bound}"), str(path))
        await self._server.start()
        _own(bound, self._cfg.socket_group)
        self._inode = bound.stat().st_ino
        bound.rename(path)
        private.rmdir()

    async def _start_tcp(self, address: str) -> None:
        credentials = _server_credentials(self._cfg.tls)
        self.port = self._bind(lambda: self._server.add_secure_port(address, credentials), address)
        await self._server.start()

    @staticmethod
    def _bind(bind: Callable[[], int], address: str) -> int:
        try:
            return bind()
        except RuntimeError as error:
            raise FailedPrecondition(
                f"cannot listen on {address}",
                fix="see the log above for gRPC's reason; another process may be there",
            ) from error


def refuse_live(path: Path) -> None:
    """Raise FailedPrecondition naming the process that listens on `path`; a dead process's socket is no
    obstacle.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        failure = probe.connect_ex(os.fspath(path))
        if failure in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK):
            return
        # SO_PEERCRED of a connecting socket holds who called listen(). EAGAIN: alive, but its queue is full.
        peer = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12) if failure == 0 else b"\0" * 12
    pid = struct.unpack("3i", peer)[0]
    who = f"process {pid}" if pid else "another process"
    raise FailedPrecondition(
        f"{path} is in use by {who}", fix="stop it first, or choose another instance name"
    )


def _own(path: Path, group: str) -> None:
    """Mode 0660, and group `group` if there is one and we may."""
    path.chmod(0o660)
    gid = group_id(group)
    if gid is not None and gid != path.stat().st_gid:
        try:
            os.chown(path, -1, gid)
        except PermissionError:
            log.warning("socket stays without its group", extra={"socket": path, "group": group})


def group_id(group: str) -> int | None:
    """Numeric id of a group; None when the system has none of that name."""
    try:
        return grp.getgrnam(group).gr_gid if group else None
    except KeyError:
        return None


def _server_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    """Mutual TLS whose files are reread when they change, so that certificates rotate without a restart."""

    def configuration() -> Any:
        ca, cert, key = tls.read()
        return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca)

    def stamp() -> tuple[tuple[int, int], ...]:
        return tuple((s.st_mtime_ns, s.st_ino) for s in map(os.stat, (tls.ca, tls.cert, tls.key)))

    initial = configuration()
    seen = [stamp()]

    def reread() -> Any:
        # Called by gRPC for each handshake, on one of its threads; None keeps what it has.
        try:
            now = stamp()
            if now == seen[0]:
                return None
            fresh = configuration()
        except (OSError, FailedPrecondition):
            log.warning("new TLS files cannot be read, the old ones stay in use", exc_info=True)
            return None
        seen[0] = now
        return fresh

    return grpc.dynamic_ssl_server_credentials(initial, reread, require_client_authentication=True)
