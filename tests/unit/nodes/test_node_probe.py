"""Probes over real sockets on the loopback, and what a few of them in a row mean."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from ipaddress import ip_address

import pytest

from services.identity.nodes import probe
from services.identity.nodes.health import MISSES, _Path
from services.identity.nodes.probe import MAGIC, QUESTION, Prober
from tests import session

HERE4, HERE6 = ip_address("127.0.0.1"), ip_address("::1")


@pytest.fixture
async def prober() -> AsyncIterator[tuple[Prober, int]]:
    port = session.port()
    made = Prober(port)
    await made.open()
    yield made, port
    made.close()


@pytest.mark.parametrize("address", [HERE4, HERE6], ids=str)
async def test_a_probe_comes_back(prober: tuple[Prober, int], address: object) -> None:
    asker = Prober(session.port())
    await asker.open()
    try:
        assert not prober[0].problem
        seconds = await asker.ask(address, prober[1], 10.0)  # type: ignore[arg-type]
        assert seconds is not None and 0 < seconds < 10
        assert await asker.ask(address, session.port(), 0.1) is None  # type: ignore[arg-type]
    finally:
        asker.close()


async def test_only_questions_are_answered_and_none_by_more_than_was_asked(prober: tuple[Prober, int]) -> None:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.setblocking(False)
        stranger.connect(("127.0.0.1", prober[1]))
        question = MAGIC + QUESTION + bytes(16)
        for nonsense in (b"", b"x" * 25, question + b"x", question[:-1], MAGIC + b"\2" + bytes(16), MAGIC + b"\3" + bytes(16)):
            stranger.send(nonsense)
        stranger.send(question)
        answer = await asyncio.wait_for(loop.sock_recv(stranger, 2048), 10)
        assert len(answer) == len(question)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(loop.sock_recv(stranger, 2048), 0.1)


async def test_answers_are_limited(prober: tuple[Prober, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "RATE", 10)
    answers = 0
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.setblocking(False)
        stranger.connect(("127.0.0.1", prober[1]))
        for _ in range(100):
            stranger.send(MAGIC + QUESTION + bytes(16))
        while True:
            try:
                await asyncio.wait_for(loop.sock_recv(stranger, 2048), 0.05)
            except TimeoutError:
                break
            answers += 1
    assert 1 <= answers <= 20


async def test_a_taken_port_is_named_and_taken_later() -> None:
    port = session.port()
    made = Prober(port)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("0.0.0.0", port))
        await made.open()
        assert f"UDP port {port} cannot be opened for IPv4" in made.problem
        assert await made.ask(HERE6, port, 10.0) is not None
    await made.open()
    try:
        assert not made.problem
        assert await made.ask(HERE4, port, 10.0) is not None
    finally:
        made.close()


def test_some_silence_is_forgiven() -> None:
    path = _Path()
    for _ in range(MISSES - 1):
        path.heard(False)
    assert path.up
    path.heard(True)
    for _ in range(MISSES):
        path.heard(False)
    assert not path.up
    path.heard(True)
    assert path.up
