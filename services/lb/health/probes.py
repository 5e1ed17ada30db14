"""One question to a backend: "" if it is well, else one sentence on why not. What keeps this process from asking says nothing
about the backend: NotAsked.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.pipeline.abi import IPAddress
from services.lb.model import GrpcProbe, HealthCheck, HttpProbe, TcpProbe

HEAD_MAX: Final = 4096
"""Bytes of an HTTP answer that are looked at: its first line."""


_OWN: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class NotAsked(Exception):
    """There was no way to ask: this process or its machine lacks descriptors or memory."""


async def ask(check: HealthCheck, address: IPAddress, port: int) -> str:
    """Within the check's timeout. NotAsked."""
    try:
        async with asyncio.timeout(check.timeout_s):
            match check.probe:
                case HttpProbe() as http:
                    return await _http(http, str(address), port)
                case GrpcProbe(service):
                    return await _grpc(service, address, port, check.timeout_s)
                case TcpProbe():
                    return await _tcp(str(address), port)
    except TimeoutError:
        return f"no answer within {check.timeout_s:g} s"
    except OSError as error:
        if error.errno in _OWN:
            raise NotAsked(os.strerror(error.errno)) from None
        return f"cannot be reached: {os.strerror(error.errno) if error.errno else error}"


async def _tcp(address: str, port: int) -> str:
    _, writer = await asyncio.open_connection(address, port)
    _close(writer)
    return ""


async def _http(probe: HttpProbe, address: str, port: int) -> str:
    reader, writer = await asyncio.open_connection(address, port, limit=HEAD_MAX)
    try:
        host = probe.host or (f"[{address}]:{port}" if ":" in address else f"{address}:{port}")
        writer.write(
            f"GET {probe.path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: fibril\r\nConnection: close\r\n\r\n".encode()
        )
        await writer.drain()
        try:
            line = await reader.readuntil(b"\r\n")
        except asyncio.IncompleteReadError:
            return "closes the connection without an answer"
        except asyncio.LimitOverrunError:
            return "does not speak HTTP"
    finally:
        _close(writer)
    words = line.split(maxsplit=2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        return "does not speak HTTP"
    status = int(words[1])
    if any(first <= status <= last for first, last in probe.statuses):
        return ""
    return f"answers {status}"


async def _grpc(service: str, address: IPAddress, port: int, timeout_s: float) -> str:
    target = f"ipv6:[{address}]:{port}" if address.version == 6 else f"ipv4:{address}:{port}"
    # Each asks anew: a connection kept would hide that no new ones are taken.
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_s
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return f"knows no service {service!r}"
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return "has no grpc.health.v1.Health"
            return f"gRPC {error.code().name}: {(error.details() or '')[:120]}"
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return ""
    return f"says {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"


def _close(writer: asyncio.StreamWriter) -> None:
    """At once: whether the backend says goodbye is of no interest."""
    with contextlib.suppress(OSError):
        writer.transport.abort()
