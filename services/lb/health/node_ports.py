"""Tells load balancers outside whether this node has backends of a service: HTTP on the service's health check port.

As kube-proxy answers: 200 while there is a local active backend, else 503, with a little JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Final

from services.common.service import ComponentStatus
from services.lb.model import Spec

log = logging.getLogger(__name__)

REQUEST_S: Final = 2.0
_AGAIN_S: Final = 5.0


class HealthCheckPorts:
    """Used from one event loop, in the node's network namespace."""

    def __init__(self, specs: Callable[[], Mapping[str, Spec]], local: Callable[[str], int]) -> None:
        """local: active backends of a service on this node."""
        self._specs, self._local = specs, local
        self._servers: dict[int, asyncio.Server] = {}
        self._names: dict[int, str] = {}
        self._ports: dict[str, int] = {}
        self._problems: dict[int, str] = {}
        self._dirty = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._run(), name="lb.health.ports")]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        for server in self._servers.values():
            server.close()
        self._servers.clear()

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Tasks that run until `stop`; the end of one is a failure."""
        return tuple(self._tasks)

    def changed(self, name: str) -> None:
        """A service has changed, come or gone."""
        spec = self._specs().get(name)
        wanted = spec.health_check_node_port if spec is not None else 0
        had = self._ports.pop(name, 0)
        if wanted:
            self._ports[name] = wanted
        if had != wanted or (wanted and self._names.get(wanted) != name):
            if had and self._names.get(had) == name:
                del self._names[had]
            if wanted:
                self._names[wanted] = name
            self._dirty.set()

    def status(self) -> list[ComponentStatus]:
        if self._problems:
            port, why = min(self._problems.items())
            return [
                ComponentStatus(
                    "health.ports", "degraded", f"cannot answer on port {port}: {why}; it is tried again"
                )
            ]
        return [
            ComponentStatus("health.ports", "ok", f"{len(self._servers)} ports answer load balancers outside")
        ]

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_AGAIN_S if self._problems else None):
                    await self._dirty.wait()
            self._dirty.clear()
            for port in self._servers.keys() - self._names.keys():
                self._servers.pop(port).close()
            self._problems = {}
            for port in self._names.keys() - self._servers.keys():
                try:
                    self._servers[port] = await asyncio.start_server(
                        partial(self._answer, port), None, port, reuse_address=True
                    )
                except OSError as error:
                    self._problems[port] = error.strerror or str(error)

    async def _answer(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(
            OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError
        ):
            async with asyncio.timeout(REQUEST_S):
                await reader.readuntil(b"\r\n\r\n")
            name = self._names.get(port, "")
            count = self._local(name) if name else 0
            namespace, _, rest = name.rpartition("/")
            body = json.dumps(
                {"service": {"namespace": namespace, "name": rest}, "localEndpoints": count}
            ).encode()
            status = "200 OK" if count else "503 Service Unavailable"
            writer.write(
                f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
                "Connection: close\r\nX-Content-Type-Options: nosniff\r\n\r\n".encode()
                + body
            )
            await writer.drain()
        writer.close()
