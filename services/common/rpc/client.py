"""Channels to Fibril's services.

async with channel(f"unix:{instance.socket('ipam')}") as to_ipam:
    stub = IpamServiceStub(to_ipam)
    try:
        await stub.Allocate(request, timeout=5)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from services.common import telemetry
from services.common.errors import FailedPrecondition, InvalidArgument

MAX_MESSAGE_BYTES = 4 << 20


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of one end of a mutual TLS connection."""

    ca: Path
    cert: Path
    key: Path

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Contents of ca, cert, key. Raises FailedPrecondition naming the file that cannot be read."""
        return _read(self.ca), _read(self.cert), _read(self.key)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FailedPrecondition(
            f"TLS file {path} cannot be read: {error.strerror}", fix="create it"
        ) from error


def channel(
    target: str,
    *,
    tls: TlsFiles | None = None,
    server_name: str = "",
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> grpc.aio.Channel:
    """A channel to "unix:/path/to.sock" or, with `tls`, to "host:port". It connects on first use and again
    whenever the service comes back. `server_name`: the name to expect in the server's certificate when it is
    not the host.

    Raises InvalidArgument for a TCP target without `tls`: there is no plain text TCP.
    """
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # A local service is back within a second; gRPC's default back-off reaches two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
        # Connections of one process to one target would otherwise be shared, keepalive and back-off included.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    ]
    tracer = telemetry.current().tracer
    interceptors: list[Any] = []
    if tracer is not None:
        from services.common.rpc import observe

        interceptors = observe.client_interceptors(tracer)
    if target.startswith("unix:"):
        return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)
    if tls is None:
        raise InvalidArgument(
            f"{target} is a TCP address but no certificate was given",
            field="target",
            fix="give the files of a client certificate, or unix:/path",
        )
    ca, cert, key = tls.read()
    # A dead peer on TCP is noticed within 30 s; the server allows a ping every 10 s.
    options += [("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 10_000)]
    if server_name:
        options.append(("grpc.ssl_target_name_override", server_name))
    credentials = grpc.ssl_channel_credentials(ca, key, cert)
    return grpc.aio.secure_channel(target, credentials, options=options, interceptors=interceptors)
