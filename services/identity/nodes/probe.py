"""The probe itself: a UDP datagram that comes back.

    "fibrilp1"  1 byte: question 1, answer 2  16 bytes nonce

An answer is as long as its question and goes back where that came from, at most RATE a second, so nobody gains by asking in
another's name.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any, Final

from services.common.kernel.netlink import IPAddress

log = logging.getLogger(__name__)

MAGIC: Final = b"fibrilp1"
QUESTION, ANSWER = b"\1", b"\2"
LENGTH: Final = len(MAGIC) + 1 + 16
RATE: Final = 1000
"""Answers a second at most; a node is asked by a few others every few seconds."""


class _Port(asyncio.DatagramProtocol):
    """One socket: answers questions, hands answers on."""

    def __init__(self, answered: Callable[[bytes], None]) -> None:
        self._answered = answered
        self._left = float(RATE)
        self._at = time.monotonic()
        self.transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        if len(data) != LENGTH or not data.startswith(MAGIC):
            return
        kind, nonce = data[8:9], data[9:]
        if kind == ANSWER:
            self._answered(nonce)
        elif kind == QUESTION and self._may_answer() and self.transport is not None:
            self.transport.sendto(MAGIC + ANSWER + nonce, addr)

    def _may_answer(self) -> bool:
        now = time.monotonic()
        self._left = min(RATE, self._left + (now - self._at) * RATE)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Prober:
    """Answers probes on a port of this node, and sends probes from it. Used from one event loop."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._ports: dict[int, _Port] = {}
        self._waiting: dict[bytes, asyncio.Future[float]] = {}
        self.problem = "the probe port is not open yet"

    async def open(self) -> None:
        """Open what is not open; for both families as far as the host has them. Raises nothing: see `problem`."""
        loop = asyncio.get_running_loop()
        problems = []
        for version in (4, 6):
            present = self._ports.get(version)
            if present is not None and present.transport is not None and not present.transport.is_closing():
                continue
            try:
                raw = self._bound(version)
                if raw is not None:
                    _, port = await loop.create_datagram_endpoint(lambda: _Port(self._answered), sock=raw)
                    self._ports[version] = port
            except OSError as error:
                problems.append(f"UDP port {self._port} cannot be opened for IPv{version}: {error.strerror}")
        self.problem = "; ".join(problems)

    def _bound(self, version: int) -> socket.socket | None:
        """A socket on the port; None if the host lacks the family."""
        family, address = (socket.AF_INET, "0.0.0.0") if version == 4 else (socket.AF_INET6, "::")
        try:
            raw = socket.socket(family, socket.SOCK_DGRAM)
        except OSError as error:
            if error.errno == errno.EAFNOSUPPORT:
                return None
            raise
        try:
            raw.setblocking(False)
            if version == 6:
                raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            raw.bind((address, self._port))
        except OSError:
            raw.close()
            raise
        return raw

    def close(self) -> None:
        for port in self._ports.values():
            if port.transport is not None:
                port.transport.close()
        self._ports.clear()

    async def ask(self, address: IPAddress, port: int, timeout_s: float) -> float | None:
        """Seconds until the answer; None without one."""
        sender = self._ports.get(address.version)
        if sender is None or sender.transport is None:
            return None
        nonce = secrets.token_bytes(16)
        answer: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting[nonce] = answer
        asked = time.monotonic()
        try:
            sender.transport.sendto(MAGIC + QUESTION + nonce, (str(address), port))
            return await asyncio.wait_for(answer, timeout_s) - asked
        except (TimeoutError, OSError):
            return None
        finally:
            del self._waiting[nonce]

    def _answered(self, nonce: bytes) -> None:
        waiting = self._waiting.get(nonce)
        if waiting is not None and not waiting.done():
            waiting.set_result(time.monotonic())
