"""Runs one service or several in this process: configuration done, until a signal or a failure ends it.

Order: pid files, telemetry, run directory; then for each service start() and its gRPC server; READY to
systemd. The first SIGTERM or SIGINT drains: health says NOT_SERVING, streams end, RPCs in progress get
`grace_s` seconds, services stop in reverse order. The second exits at once. The kernel's side (programs,
maps, links) is not touched by a stop.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import re
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from fibril.status.v1 import status_pb2_grpc
from services.common import log as logs
from services.common import telemetry
from services.common.errors import FailedPrecondition, FibrilError, InvalidArgument
from services.common.instance import Instance
from services.common.log import LogConfig
from services.common.pidfile import Pidfile
from services.common.rpc.server import RpcConfig, RpcServer, group_id
from services.common.service import ComponentStatus, HostContext, Registrar, Service
from services.common.status import StatusServicer
from services.common.supervise import Tasks
from services.common.telemetry import TelemetryConfig
from services.common.version import version

__all__ = ["ComponentStatus", "HostConfig", "HostContext", "Registrar", "Service", "run"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostConfig:
    """What every Fibril process has in common."""

    grace_s: float = field(
        default=5.0,
        metadata={"help": "seconds that RPCs in progress, and each service's stop, get on shutdown"},
    )
    rpc: RpcConfig = field(default_factory=RpcConfig)
    log: LogConfig = field(default_factory=LogConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.grace_s <= 300:
            raise InvalidArgument(f"{self.grace_s:g} is outside 0..300", field="grace_s")

    def of_process(self, number: int) -> HostConfig:
        """The same for the node's process of this number, from 0 on: all read one file, so each listens on ports that
        much higher.
        """
        rpc = replace(self.rpc, tcp=_port_after(self.rpc.tcp, number))
        prometheus = _port_after(self.telemetry.prometheus, number)
        return replace(self, rpc=rpc, telemetry=replace(self.telemetry, prometheus=prometheus))


def _port_after(address: str, number: int) -> str:
    host, _, port = address.rpartition(":")
    # 0: any that is free. What is malformed is told by who listens.
    return f"{host}:{int(port) + number}" if port.isdecimal() and int(port) else address


def run(services: Sequence[Service], cfg: HostConfig, instance: Instance) -> int:
    """Host `services` until the end. Returns the exit code: 0 after a drain, 1 after a logged failure."""
    names = "+".join(service.name for service in services)
    logs.setup(names, cfg.log)
    try:
        with ExitStack() as stack:
            prepare_run_dir(instance, cfg.rpc.socket_group)
            for service in services:
                stack.enter_context(Pidfile(instance.pidfile(service.name)))
            made = telemetry.setup(names, cfg.telemetry, instance.name)
            stack.callback(made.close)
            return asyncio.run(_Host(services, cfg, instance, made).main())
    except FibrilError as error:
        log.error("cannot start: %s", error)
        return 1


def prepare_run_dir(instance: Instance, group: str = "fibril") -> None:
    """Make the run directory, mode 0750, for root and `group` if that exists. Raises FailedPrecondition."""
    try:
        instance.run_root.mkdir(mode=0o755, parents=True, exist_ok=True)
        instance.run_dir.mkdir(mode=0o750, exist_ok=True)
        gid = group_id(group)
        if gid is not None and os.geteuid() == 0:
            os.chown(instance.run_dir, -1, gid)
    except OSError as error:
        raise FailedPrecondition(
            f"run directory {instance.run_dir} cannot be made: {error.strerror}",
            fix="run as root, or set FIBRIL_RUN_ROOT to a directory of yours",
        ) from error


class _Registrar:
    """Adds a servicer to every server of the process that shall have it."""

    def __init__(self, servers: Sequence[RpcServer]) -> None:
        self._servers = servers

    def add(self, adder: Callable[[Any, Any], None], servicer: object) -> None:
        for server in self._servers:
            server.add(adder, servicer)


class _Host:
    def __init__(
        self, services: Sequence[Service], cfg: HostConfig, instance: Instance, made: telemetry.Telemetry
    ) -> None:
        self._services = services
        self._cfg = cfg
        self._instance = instance
        self._telemetry = made
        self._status = StatusServicer(instance, services)
        self._tasks = Tasks()
        self._servers: list[RpcServer] = []
        self._started: list[Service] = []
        self._stop = asyncio.Event()

    async def main(self) -> int:
        self._watch_signals()
        starting = asyncio.create_task(self._start(), name="start")
        ended = [
            asyncio.create_task(self._stop.wait(), name="signal"),
            asyncio.create_task(self._tasks.wait_failed(), name="failure"),
        ]
        code = 0
        try:
            await asyncio.wait([starting, *ended], return_when=asyncio.FIRST_COMPLETED)
            if starting.done() and starting.exception() is None:
                await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
            elif not starting.done():
                starting.cancel()
                await asyncio.wait([starting])
            elif (error := starting.exception()) is not None:
                _log_failure("cannot start", error)
                code = 1
            if self._tasks.cause is not None:
                _log_failure(f"task {self._tasks.source} failed", self._tasks.cause)
                code = 1
        finally:
            for task in ended:
                task.cancel()
            await self._shutdown()
        return code

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)

    def _signalled(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            log.warning("second signal, exiting at once", extra={"signal": number.name})
            # Not sys.exit: whatever hangs in the drain must not hold this up. The kernel drops pid file
            # locks.
            os._exit(128 + number)
        log.info(
            "draining; a second signal exits at once",
            extra={"signal": number.name, "grace_s": self._cfg.grace_s},
        )
        self._stop.set()

    async def _start(self) -> None:
        shared = RpcServer(self._cfg.rpc.tcp, self._cfg.rpc, self._telemetry) if self._cfg.rpc.tcp else None
        for service in self._services:
            own = RpcServer(self._instance.socket(service.name), self._cfg.rpc, self._telemetry)
            own.add(status_pb2_grpc.add_StatusServiceServicer_to_server, self._status)
            registrar = _Registrar([own, shared] if shared else [own])
            self._started.append(service)
            await service.start(HostContext(self._instance, self._tasks, self._telemetry, registrar))
            self._servers.append(own)
            await own.start()
        if shared is not None:
            shared.add(status_pb2_grpc.add_StatusServiceServicer_to_server, self._status)
            self._servers.append(shared)
            await shared.start()
        self._status.set_ready()
        # What start-up allocated stays: taking it out of the collector's sight makes every later collection
        # cheaper and keeps its pages clean.
        gc.collect()
        gc.freeze()
        notify(f"READY=1\nSTATUS=serving {', '.join(service.name for service in self._services)}")
        log.info(
            "ready",
            extra={
                "services": "+".join(s.name for s in self._services),
                "instance": self._instance.name,
                "version": version(),
            },
        )

    async def _shutdown(self) -> None:
        notify("STOPPING=1")
        grace = self._cfg.grace_s
        await asyncio.gather(*(server.drain(grace) for server in self._servers))
        for service in reversed(self._started):
            try:
                async with asyncio.timeout(max(grace, 1.0)):
                    await service.stop()
            except TimeoutError:
                log.error("service did not stop in time", extra={"service": service.name, "grace_s": grace})
            except Exception as error:
                log.error("service failed to stop", extra={"service": service.name}, exc_info=error)
        await self._tasks.close()
        log.info("stopped")


def _log_failure(what: str, error: BaseException) -> None:
    """A sentence for an expected failure, a traceback for a bug."""
    if isinstance(error, FibrilError):
        log.error("%s: %s", what, error)
    else:
        log.error("%s: %s", what, error or type(error).__name__, exc_info=error)


def notify(state: str) -> None:
    """Tell systemd (Type=notify), or whoever set NOTIFY_SOCKET. Nothing without it; a failure is not worth a
    start.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not re.match(r"[/@].", path):
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
            to.connect(address)
            to.send(state.encode())
    except OSError as error:
        log.warning("systemd could not be notified", extra={"error": error.strerror})
