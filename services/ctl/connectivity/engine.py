"""One process that asks many addresses at once from the network namespace it was started in.

Standard library only and no package around it: it is started as a script, once for every namespace.

Standard input is one JSON object: {"port", "wait_s", "tries", "window", "probes": [[number, kind, address, size], …]}.
Standard output is one JSON object a probe: {"number", "ok", "ms", "detail", "size"}. `ok` means that the address
answered: an echo reply, a connection accepted or refused, a datagram sent back or refused.

kind  what is sent
icmp  an echo request
large an echo request that may not be fragmented, `size` bytes long with its IP header, but no more than the route
      takes (0: as much as that). Where the network says that less fits, so much is sent; `size` tells what went through
tcp   a connection to `port`; if a responder (responder.py) is there, TRANSFER bytes go to it and back
udp   a datagram to `port`
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

ECHO, REPLY = {4: 8, 6: 128}, {4: 0, 6: 129}
IP_HEADER = {4: 20, 6: 40}
SMALL = 84  # bytes of an ordinary echo request with an IPv4 header, as ping's
# linux/in.h, linux/in6.h, asm-generic/socket.h: Python does not name them all.
IP_RECVERR, IP_MTU_DISCOVER, IP_MTU = 11, 10, 14
IPV6_RECVERR, IPV6_MTU_DISCOVER, IPV6_MTU, IPV6_DONTFRAG = 25, 23, 24, 62
PMTUDISC_DO = 2
SO_TIMESTAMPNS = 35
GREETING = b"fibril connectivity test\n"  # what a responder sends back before it takes more
TRANSFER = 256 << 10
CHUNK = 64 << 10


class Probe:
    """One question to one address, on a socket of its own that is connected to it."""

    def __init__(self, number: int, address: str, job: dict[str, Any]) -> None:
        self.number = number
        self.address = address
        self.version = 6 if ":" in address else 4
        self.port: int = job["port"]
        self.wait_s: float = job["wait_s"]
        self.tries: int = job["tries"]
        self.size = 0
        self.deadline = 0.0
        self.result: tuple[bool, float, str] | None = None
        self.sock: socket.socket | None = None
        self.events = selectors.EVENT_READ
        self._sent = 0
        self._sent_ns = 0

    # For each kind

    def open(self) -> socket.socket:
        """A connected socket. OSError when there is no way to the address."""
        raise NotImplementedError

    def send(self) -> None:
        """Ask, or ask again."""
        raise NotImplementedError

    def ready(self) -> None:
        """Something has come, or can be sent. What is raised is how the network answered."""
        raise NotImplementedError

    def refused(self, error: OSError) -> None:
        """The network answered with an error."""
        self.fail(_text(error))

    # The course of all

    def start(self) -> None:
        """Begin."""
        try:
            self.sock = self.open()
            self.again()
        except OSError as error:
            self.refused(error)

    def again(self) -> None:
        """Ask for the first time, or once more."""
        self._sent += 1
        self.deadline = time.monotonic() + self.wait_s
        self._sent_ns = time.time_ns()
        self.send()

    def late(self) -> None:
        """Nothing has come in time."""
        if self._sent >= self.tries:
            self.fail(f"no answer within {self.wait_s * self.tries:g} s")
            return
        try:
            self.again()
        except OSError as error:
            self.refused(error)

    def handle(self) -> None:
        """The socket is ready."""
        try:
            self.ready()
        except BlockingIOError:
            return
        except OSError as error:
            self.refused(error)

    def done(self, detail: str = "", at_ns: int = 0) -> None:
        """It has answered."""
        took = ((at_ns or time.time_ns()) - self._sent_ns) / 1e6
        self.result = (True, max(0.0, took), detail)

    def fail(self, detail: str) -> None:
        """It has not."""
        self.result = (False, 0.0, detail)

    def close(self) -> None:
        """Let go of the socket."""
        if self.sock is not None:
            self.sock.close()

    def record(self) -> dict[str, Any]:
        """For standard output."""
        ok, ms, detail = self.result or (False, 0.0, "was not asked")
        return {"number": self.number, "ok": ok, "ms": round(ms, 3), "detail": detail, "size": self.size}

    def _socket(self, kind: int, protocol: int = 0) -> socket.socket:
        sock = socket.socket(socket.AF_INET if self.version == 4 else socket.AF_INET6, kind, protocol)
        sock.setblocking(False)
        # Without it an ICMP error such as "host unreachable" is not told.
        if self.version == 4:
            sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
        return sock


class Icmp(Probe):
    """An echo request."""

    ident = os.getpid() & 0xFFFF

    def open(self) -> socket.socket:
        protocol = socket.IPPROTO_ICMP if self.version == 4 else socket.IPPROTO_ICMPV6
        sock = self._socket(socket.SOCK_RAW, protocol)
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        sock.connect((self.address, 0))
        self.size = SMALL
        return sock

    def send(self) -> None:
        assert self.sock is not None
        body = struct.pack("!HHI", self.ident, self._sent, self.number)
        body += bytes(self.size - IP_HEADER[self.version] - 4 - len(body))
        # The kernel fills in the checksum of ICMPv6, not that of ICMP.
        head = struct.pack("!BBH", ECHO[self.version], 0, 0)
        checksum = _checksum(head + body) if self.version == 4 else 0
        self.sock.send(head[:2] + struct.pack("!H", checksum) + body)

    def ready(self) -> None:
        assert self.sock is not None
        packet, extra, _, _ = self.sock.recvmsg(65535, 64)
        if self.version == 4:
            packet = packet[(packet[0] & 15) * 4 :]  # raw IPv4 sockets give the IP header as well
        if len(packet) < 12:
            return
        kind, _, _, ident, _, number = struct.unpack_from("!BBHHHI", packet)
        if (kind, ident, number) == (REPLY[self.version], self.ident, self.number):
            self.done(at_ns=_arrival_ns(extra))

    def refused(self, error: OSError) -> None:
        fits = self._told() if error.errno == errno.EMSGSIZE else 0
        if fits >= self.size:
            return  # about a larger one to the same address: all its raw sockets are told
        if fits >= SMALL:
            self.size = fits
            self._sent -= 1
            self.late()
        else:
            super().refused(error)

    def _told(self) -> int:
        """How much fits, as the errors say that wait at the socket; without taking them it would stay ready."""
        assert self.sock is not None
        fits = 0
        try:
            while True:
                _, extra, _, _ = self.sock.recvmsg(1, 512, socket.MSG_ERRQUEUE)
                for level, kind, data in extra:
                    if (level, kind) in (
                        (socket.IPPROTO_IP, IP_RECVERR),
                        (socket.IPPROTO_IPV6, IPV6_RECVERR),
                    ):
                        # struct sock_extended_err: errno, origin, type, code, padding, info
                        number, info = struct.unpack_from("I4xI", data)
                        fits = info if number == errno.EMSGSIZE else fits
        except BlockingIOError:
            return fits


class Large(Icmp):
    """An echo request as large as fits."""

    def __init__(self, number: int, address: str, job: dict[str, Any], size: int) -> None:
        super().__init__(number, address, job)
        self._wanted = size

    def open(self) -> socket.socket:
        sock = super().open()
        if self.version == 4:
            sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DO)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_DO)
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_DONTFRAG, 1)
        fits = self._fits(sock)
        self.size = min(self._wanted or fits, fits)
        return sock

    def late(self) -> None:
        super().late()
        if self.result is not None and not self.result[0]:
            self.fail(f"{self.size} bytes: {self.result[2]}")

    def _fits(self, sock: socket.socket) -> int:
        """What the route takes, as far as the kernel knows; capped, since loopback takes more than a packet has."""
        if self.version == 4:
            return min(65535, sock.getsockopt(socket.IPPROTO_IP, IP_MTU))
        return min(65535, sock.getsockopt(socket.IPPROTO_IPV6, IPV6_MTU))


class Udp(Probe):
    """A datagram."""

    def open(self) -> socket.socket:
        sock = self._socket(socket.SOCK_DGRAM)
        sock.connect((self.address, self.port))
        return sock

    def send(self) -> None:
        assert self.sock is not None
        self.sock.send(GREETING)

    def ready(self) -> None:
        assert self.sock is not None
        self.sock.recv(CHUNK)
        self.done("answered")

    def refused(self, error: OSError) -> None:
        if error.errno == errno.ECONNREFUSED:
            self.done("refused")
        else:
            super().refused(error)


class Tcp(Probe):
    """A connection, and a transfer if there is a responder."""

    def __init__(self, number: int, address: str, job: dict[str, Any]) -> None:
        super().__init__(number, address, job)
        self.events = selectors.EVENT_WRITE
        self._accepted: tuple[bool, float, str] | None = None  # the result if nothing more can be asked
        self._greeting = b""
        self._greeted = False
        self._out = memoryview(GREETING)
        self._left_out = TRANSFER
        self._left_in = TRANSFER

    def open(self) -> socket.socket:
        sock = self._socket(socket.SOCK_STREAM)
        number = sock.connect_ex((self.address, self.port))
        if number not in (0, errno.EINPROGRESS):
            sock.close()
            raise OSError(number, os.strerror(number))
        return sock

    def send(self) -> None:
        """The kernel repeats what is lost."""

    def ready(self) -> None:
        assert self.sock is not None
        number = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))
        if self._accepted is None:
            self.done("accepted")
            self._accepted, self.result = self.result, None
            self._moves()
        self._write()
        self._read()

    def _moves(self) -> None:
        """What moves shows that the path works; only what stands still for long shows that it does not."""
        self._sent, self.deadline = 1, time.monotonic() + self.wait_s

    def _write(self) -> None:
        assert self.sock is not None
        if not self._out and self._greeted and self._left_out:
            self._out = memoryview(bytes(min(CHUNK, self._left_out)))
            self._left_out -= len(self._out)
        if self._out:
            try:
                self._out = self._out[self.sock.send(self._out) :]
            except BlockingIOError:
                pass
        more = bool(self._out) or (self._greeted and self._left_out > 0)
        self.events = selectors.EVENT_READ | (selectors.EVENT_WRITE if more else 0)

    def _read(self) -> None:
        assert self.sock is not None
        data = self.sock.recv(CHUNK)
        self._moves()
        if self._greeted:
            self._left_in -= len(data)
            if not data:
                self.fail(f"the connection ended {self._where()}")
            elif self._left_in <= 0 and self._accepted is not None:
                self.result = (*self._accepted[:2], f"{TRANSFER >> 10} KiB there and back")
            return
        self._greeting += data
        self._greeted = self._greeting == GREETING
        if self._greeted:
            self._write()
        elif not data or not GREETING.startswith(self._greeting):
            self.result = self._accepted  # somebody else listens there

    def _where(self) -> str:
        return f"after {TRANSFER - self._left_in >> 10} of {TRANSFER >> 10} KiB"

    def refused(self, error: OSError) -> None:
        if self._accepted is None and error.errno == errno.ECONNREFUSED:
            self.done("refused")
        elif self._accepted is not None and not self._greeted:
            self.result = self._accepted
        else:
            super().refused(error)

    def late(self) -> None:
        super().late()
        if self.result is None or self._accepted is None:
            return
        # A listener that says nothing is not ours.
        self.result = self._accepted if not self._greeted else (False, 0.0, f"stands still {self._where()}")


def _text(error: OSError) -> str:
    return os.strerror(error.errno).lower() if error.errno else str(error)


def _checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def _arrival_ns(extra: list[tuple[int, int, bytes]]) -> int:
    """When the kernel took the packet: with many awaited at once, when we get round to it says nothing about the
    network."""
    for level, kind, data in extra:
        if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS) and len(data) >= 16:
            seconds, nanos = struct.unpack_from("qq", data)
            return int(seconds * 10**9 + nanos)
    return 0


def make(job: dict[str, Any], number: int, kind: str, address: str, size: int) -> Probe:
    """The probe of a line of a job."""
    if kind == "large":
        return Large(number, address, job, size)
    return {"icmp": Icmp, "tcp": Tcp, "udp": Udp}[kind](number, address, job)


def run(job: dict[str, Any]) -> Iterator[Probe]:
    """Every probe of a job as it is finished, never more than `window` at once."""
    waiting = deque(make(job, *line) for line in job["probes"])
    active: set[Probe] = set()
    with selectors.DefaultSelector() as selector:
        while waiting or active:
            while waiting and len(active) < job["window"]:
                probe = waiting.popleft()
                probe.start()
                active.add(probe)
                if probe.result is None and probe.sock is not None:
                    selector.register(probe.sock, probe.events, probe)
            now = time.monotonic()
            for probe in [p for p in active if p.result is None and p.deadline <= now]:
                probe.late()
            for probe in [p for p in active if p.result is not None]:
                active.remove(probe)
                if probe.sock is not None and probe.sock in selector.get_map():
                    selector.unregister(probe.sock)
                probe.close()
                yield probe
            if not active:
                continue
            pause = min(p.deadline for p in active) - time.monotonic()
            for key, _ in selector.select(
                max(0.0, pause) if len(active) >= job["window"] or not waiting else 0
            ):
                probe = key.data
                probe.handle()
                if probe.result is None and probe.events != key.events:
                    selector.modify(key.fileobj, probe.events, probe)


def main() -> None:
    """Do the job on standard input."""
    job = json.load(sys.stdin)
    for probe in run(job):
        sys.stdout.write(json.dumps(probe.record()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
