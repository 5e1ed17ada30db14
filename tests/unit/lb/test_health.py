"""Health checks against real servers on the loopback."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from services.lb.abi import BackendState
from services.lb.health import probes
from services.lb.health.hysteresis import Hysteresis
from services.lb.health.monitor import Health
from services.lb.health.node_ports import HealthCheckPorts
from services.lb.model import (
    TCP,
    Backend,
    BackendKey,
    Frontend,
    FrontendType,
    GrpcProbe,
    HealthCheck,
    HttpProbe,
    Spec,
    TcpProbe,
)
from tests import session

# Where nobody takes a port that a server has left.
LO = ip_address(session.loopback())


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(answer: bytes, hold: bool = False) -> AsyncIterator[int]:
    """A server that says this to whoever has asked; its port."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        if hold:
            await asyncio.sleep(60)
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(handle, str(LO), 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 5), st.integers(1, 5))
def test_minds_change_after_so_many_answers_in_a_row(answers: list[bool], down: int, up: int) -> None:
    opinion = Hysteresis(down, up)
    well = True
    for count in range(1, len(answers) + 1):
        changed = opinion.heard(answers[count - 1])
        tail = answers[:count]
        need = down if well else up
        expected = len(tail) >= need and all(each is not well for each in tail[-need:])
        assert changed == expected
        well = well is not expected
        assert opinion.well == well


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", ""),
        (b"HTTP/1.0 302 Found\r\n\r\n", ""),
        (b"HTTP/1.1 503 No\r\n\r\n", "answers 503"),
        (b"SSH-2.0-x\r\n", "does not speak HTTP"),
        (b"", "closes the connection without an answer"),
        (b"x" * 10_000, "does not speak HTTP"),
        (b"HTTP/1.1 abc\r\n", "does not speak HTTP"),
    ],
)
async def test_http(answer: bytes, why: str) -> None:
    async with serving(answer) as port:
        assert await probes.ask(HealthCheck(HttpProbe()), LO, port) == why


async def test_statuses_are_what_is_asked_for() -> None:
    check = HealthCheck(HttpProbe("/x", "a.example", ((204, 204),)))
    async with serving(b"HTTP/1.1 200 OK\r\n\r\n") as port:
        assert await probes.ask(check, LO, port) == "answers 200"


async def test_tcp_and_silence() -> None:
    async with serving(b"") as port:
        assert await probes.ask(HealthCheck(TcpProbe()), LO, port) == ""
    assert "refused" in await probes.ask(HealthCheck(TcpProbe()), LO, port)
    async with serving(b"", hold=True) as port:
        assert await probes.ask(HealthCheck(HttpProbe(), timeout_s=0.1), LO, port) == "no answer within 0.1 s"


async def test_grpc() -> None:
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port(f"{LO}:0")
    await server.start()
    try:
        await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        await servicer.set("down", health_pb2.HealthCheckResponse.NOT_SERVING)
        assert await probes.ask(HealthCheck(GrpcProbe()), LO, port) == ""
        assert await probes.ask(HealthCheck(GrpcProbe("down")), LO, port) == "says NOT_SERVING"
        assert "knows no service" in await probes.ask(HealthCheck(GrpcProbe("x")), LO, port)
    finally:
        await server.stop(None)
    assert "UNAVAILABLE" in await probes.ask(HealthCheck(GrpcProbe(), timeout_s=5.0), LO, port)


class Declared:
    def __init__(self) -> None:
        self.specs: dict[str, Spec] = {}
        self.backends: dict[str, dict[BackendKey, Backend]] = {}
        self.callback: Callable[[str, frozenset[BackendKey] | None], None] = lambda name, keys: None

    def on_change(self, callback: Callable[[str, frozenset[BackendKey] | None], None]) -> None:
        self.callback = callback

    def put(self, name: str, check: HealthCheck | None, *backends: Backend) -> None:
        front = Frontend(FrontendType.CLUSTER_IP, ip_address("10.96.0.1"), TCP, 80, 80)
        self.specs[name] = Spec(name, (front,), health_check=check)
        self.backends[name] = {backend.key: backend for backend in backends}
        self.callback(name, None)


async def test_verdicts_come_go_and_are_shared() -> None:
    declared, told = Declared(), []
    monitor = Health(declared)
    monitor.on_change(lambda name, keys: told.append((name, keys)))
    await monitor.start()
    check = HealthCheck(TcpProbe(), interval_s=0.1, timeout_s=5.0, unhealthy_after=2, healthy_after=2)
    async with serving(b"") as port:
        key = BackendKey(LO, port)
        declared.put("a", check, Backend(key))
        declared.put("b", check, Backend(key))
        assert "1 backends are asked" in monitor.status()[0].message
        await asyncio.sleep(0.3)
        assert monitor.verdict("a", key) == "" and not told
    await until(lambda: monitor.verdict("a", key))
    assert "refused" in monitor.verdict("b", key)
    assert sorted(name for name, _ in told) == ["a", "b"]
    # Taken out by a person: not asked, no verdict.
    declared.backends["a"][key] = replace(declared.backends["a"][key], state=BackendState.MAINTENANCE)
    declared.callback("a", frozenset({key}))
    assert monitor.verdict("a", key) == "" and monitor.verdict("b", key)
    server = await asyncio.start_server(lambda r, w: w.close(), str(LO), port)
    await until(lambda: not monitor.verdict("b", key))
    server.close()
    del declared.specs["b"]
    declared.callback("b", None)
    assert "no service" in monitor.status()[0].message
    await monitor.stop()


async def test_who_was_not_well_is_so_until_it_has_answered_often_enough() -> None:
    declared, told = Declared(), []
    async with serving(b"") as port:
        sick, fine = BackendKey(LO, port), BackendKey(LO, 9)
        monitor = Health(declared, lambda name, key: key == sick)
        monitor.on_change(lambda name, keys: told.append((name, keys)))
        check = HealthCheck(TcpProbe(), interval_s=0.3, timeout_s=5.0, unhealthy_after=100, healthy_after=2)
        declared.put("a", check, Backend(sick), Backend(fine))
        # Before it is even known that somebody is to be asked, and for services that have nobody asked.
        assert "before" in monitor.verdict("a", sick) and not monitor.verdict("a", fine)
        await monitor.start()
        assert "before" in monitor.verdict("a", sick) and not monitor.verdict("a", fine)
        await until(lambda: not monitor.verdict("a", sick))
        assert told == [("a", frozenset({sick}))] and not monitor.verdict("a", fine)
        declared.put("a", None, Backend(sick))
        assert not monitor.verdict("a", sick)
        await monitor.stop()


async def test_who_cannot_be_asked_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has no descriptors left: its backends are none the worse for it."""
    declared = Declared()
    key = BackendKey(LO, 1)
    check = HealthCheck(TcpProbe(), interval_s=0.02, timeout_s=0.5, unhealthy_after=1)
    declared.specs["a"] = Spec("a", (Frontend(FrontendType.CLUSTER_IP, LO, TCP, 80, 80),), health_check=check)
    declared.backends["a"] = {key: Backend(key)}
    tried = 0

    async def no_descriptors(*_: object, **__: object) -> None:
        nonlocal tried
        tried += 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as full:
        full.setattr(asyncio, "open_connection", no_descriptors)
        health = Health(declared)
        await health.start()
        await until(lambda: tried > 3)
        assert not health.verdict("a", key)
        assert health.status()[0].state == "degraded" and "Too many open files" in health.status()[0].message
    await until(lambda: health.verdict("a", key))
    assert health.status()[0].state == "ok"
    await health.stop()


async def test_a_thousand_backends() -> None:
    declared = Declared()
    monitor = Health(declared)
    await monitor.start()
    check = HealthCheck(TcpProbe(), interval_s=1.0, timeout_s=0.5, unhealthy_after=1)
    dead = [Backend(BackendKey(ip_address(0x7F000100 + i), 9)) for i in range(1000)]
    declared.put("many", check, *dead)
    await until(lambda: all(monitor.verdict("many", each.key) for each in dead), 30)
    await monitor.stop()


async def test_load_balancers_outside_are_told() -> None:
    declared, counts = Declared(), {"shop/web:http": 0}
    ports = HealthCheckPorts(lambda: declared.specs, lambda name: counts[name])
    await ports.start()
    port = session.port()
    declared.put("shop/web:http", None)
    declared.specs["shop/web:http"] = replace(declared.specs["shop/web:http"], health_check_node_port=port)
    ports.changed("shop/web:http")

    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return answer

    await until(lambda: "1 ports" in ports.status()[0].message)
    assert b" 503 " in (await ask()).split(b"\r\n")[0]
    counts["shop/web:http"] = 2
    answer = await ask()
    assert b" 200 " in answer.split(b"\r\n")[0] and b'"localEndpoints": 2' in answer
    del declared.specs["shop/web:http"]
    ports.changed("shop/web:http")
    await until(lambda: "0 ports" in ports.status()[0].message)
    await ports.stop()
