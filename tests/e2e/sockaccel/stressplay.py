"""Conversations of two processes, each drawn from a number that both know: what is said, in which pieces, how it is read,
how it ends.

Run inside processes of the rig (its text is executed there). Every stream is a stretch of one random block that begins
elsewhere for each connection and direction, so that a byte that is lost, doubled or out of place is seen where it is read.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import select
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

PERIOD = 1_048_573  # a prime, so that no size that occurs divides it
LARGEST = 200_000
PATIENCE_S = 20.0
HELLO = struct.Struct("!QI")
_SOUND = hashlib.shake_128(b"sockaccel").digest(PERIOD)
BLOCK = memoryview(_SOUND + _SOUND[: LARGEST + 4096])
SPLICES = False
"""Whether half of this process's ends splice now and then."""
SPOKE = ("talk", "calls", "burst", "both", "bulk", "behind")
ENDS = ("close", "half", "crossed", "reset", "abandoned")


class Broken(Exception):
    """Something arrived that was not sent, or did not arrive."""


@dataclass
class Plan:
    """What a number stands for. Side 0 is the client."""

    seed: int
    kind: str
    steps: list[tuple[int, int]]
    """Who speaks, how many bytes."""
    end: str
    ender: int
    tail: list[int]
    """What is said last, by whom the end says."""
    starts: tuple[int, int]


def plan_of(seed: int) -> Plan:
    rand = random.Random(seed)
    kind = rand.choices(SPOKE, (6, 3, 3, 2, 1, 2))[0]
    steps: list[tuple[int, int]] = []

    def size(most: int) -> int:
        return max(1, int(most ** rand.random()))

    def turns(count: int, most: int) -> None:
        for number in range(count):
            steps.append((number % 2, size(most)))

    if kind == "talk":
        turns(rand.randrange(10, 150), 2000)
    elif kind == "calls":
        turns(rand.randrange(10, 60), rand.choice((20_000, LARGEST)))
    elif kind == "burst":
        turns(14, 200)
        for number in range(rand.randrange(4, 20)):
            steps.extend((number % 2, size(6000)) for _ in range(rand.randrange(1, 20)))
    elif kind == "both":
        turns(rand.randrange(20), 500)
        for side in (0, 1):
            steps.extend((side, size(8000)) for _ in range(rand.randrange(5, 120)))
    elif kind == "bulk":
        turns(rand.choice((0, 20)), 500)
        steps.extend((rand.randrange(2), rand.randrange(50_000, LARGEST)) for _ in range(rand.randrange(1, 8)))
        turns(rand.choice((0, 20)), 500)
    else:
        turns(20, 500)
        # Both speak and neither reads, as much as fits into any buffer.
        for _ in range(rand.randrange(4, 20)):
            steps.extend((side, rand.randrange(100, 1500)) for side in (0, 1))
    end = rand.choices(ENDS, (4, 3, 3, 2, 1))[0]
    tail = [size(5000) for _ in range(rand.randrange(1, 5))]
    return Plan(seed, kind, steps, end, rand.randrange(2), tail, (rand.randrange(PERIOD), rand.randrange(PERIOD)))


@dataclass
class Tally:
    """What a process has done."""

    connections: int = 0
    sent: int = 0
    read: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    spurious: int = 0
    """recv() that should have waited and gave EAGAIN."""
    errors: list[str] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)


TALLY = Tally()


class End:
    """One end of a conversation: its own habits, by the same number."""

    def __init__(self, sock: socket.socket, plan: Plan, side: int) -> None:
        self.sock, self.plan, self.side = sock, plan, side
        self.sent = self.read = self.spurious = 0
        self.check = 0
        self.rand = random.Random(plan.seed * 2 + side)
        self.writer = random.Random(plan.seed * 2 + side + 1)
        self.lazy = self.rand.random() < 0.1
        self.splices = self.rand.random() < 0.5 and SPLICES
        self.waits = self.rand.random() < 0.5 and not self.splices
        if self.rand.random() < 0.3:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.rand.random() < 0.05:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        if self.waits:
            sock.settimeout(None)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("qq", int(PATIENCE_S), 0))
        else:
            sock.setblocking(False)
        self.pipe: tuple[int, int] | None = os.pipe() if self.splices else None

    def close(self) -> None:
        self.sock.close()
        for each in self.pipe or ():
            os.close(each)

    # ---- writing
    def write(self, size: int) -> None:
        at = (self.plan.starts[self.side] + self.sent) % PERIOD
        rest = BLOCK[at : at + size]
        while rest:
            cut = len(rest) if self.writer.random() < 0.6 else self.writer.randrange(1, len(rest) + 1)
            style = self.writer.random()
            try:
                if style < 0.7:
                    done = self.sock.send(rest[:cut])
                elif style < 0.8:
                    done = self.sock.sendmsg([rest[: cut // 2], rest[cut // 2 : cut]])
                elif style < 0.9:
                    done = os.writev(self.sock.fileno(), [rest[: cut // 3], b"", rest[cut // 3 : cut]])
                else:
                    done = self.sock.send(rest[:cut], socket.MSG_MORE if cut < len(rest) else 0)
            except BlockingIOError:
                self._wait(select.POLLOUT, "to write")
                continue
            rest = rest[done:]
            self.sent += done
            if self.writer.random() < 0.02:
                time.sleep(0.001)

    # ---- reading
    def take(self, size: int) -> None:
        """Read as much, and see that it is right."""
        while size:
            got = self._read(size)
            if not got:
                raise Broken(f"the end, {size} bytes too early")
            self._see(got)
            size -= len(got)

    def _see(self, got: bytes | bytearray) -> None:
        at = (self.plan.starts[1 - self.side] + self.read) % PERIOD
        if BLOCK[at : at + len(got)] != got:
            place = next(i for i, byte in enumerate(got) if byte != BLOCK[at + i])
            found = _SOUND.find(bytes(got[place : place + 16]))
            moved = (found - (at + place)) % PERIOD if found >= 0 else None
            raise Broken(f"wrong at {self.read + place}, for {len(got) - place} bytes: from {moved} bytes further on")
        self.read += len(got)
        self.check = zlib.crc32(got, self.check)

    def _read(self, most: int) -> bytes | bytearray:
        want = most if self.rand.random() < 0.5 else self.rand.randrange(1, most + 1)
        want = min(want, 1 << 17)
        if self.lazy and self.rand.random() < 0.2:
            time.sleep(self.rand.random() * 0.02)
        style = self.rand.random()
        began = time.monotonic()
        while True:
            try:
                if self.pipe:
                    return self._splice(want, style)
                if style < 0.6:
                    return self.sock.recv(want)
                if style < 0.7:
                    seen = self.sock.recv(want, socket.MSG_PEEK)
                    got = self._whole(len(seen))
                    if got != seen:
                        raise Broken(f"peeked at {self.read} what was not read")
                    return got
                if style < 0.8:
                    parts = [bytearray(want // 2), bytearray(want - want // 2)]
                    size = self.sock.recvmsg_into(parts)[0]
                    return b"".join(parts)[:size]
                if style < 0.9:
                    parts = [bytearray(want // 3), bytearray(want - want // 3)]
                    size = os.readv(self.sock.fileno(), parts)
                    return b"".join(parts)[:size]
                if style < 0.93 and self.waits and self.plan.kind == "burst":
                    return self.sock.recv(want, socket.MSG_WAITALL)
                if style < 0.95 and fcntl.ioctl(self.sock, 0x541B, b"\0" * 4) == b"\xff" * 4:
                    raise Broken("less than nothing waits")
                self._wait(select.POLLIN, "to read")
                return self.sock.recv(want, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if time.monotonic() - began > PATIENCE_S - 1:
                    raise Broken(f"nothing to read at {self.read}") from None
                if self.waits:
                    self.spurious += 1
                else:
                    self._wait(select.POLLIN, "to read")

    def _whole(self, size: int) -> bytes:
        """What was peeked is there, in whatever pieces."""
        got = b""
        while len(got) < size:
            with contextlib.suppress(BlockingIOError):
                more = self.sock.recv(size - len(got))
                if not more:
                    raise Broken("the end, before what was peeked")
                got += more
        return got

    def _splice(self, want: int, style: float) -> bytes:
        assert self.pipe is not None
        there, here = self.pipe
        if style < 0.4 and self.plan.seed % 2:
            return self.sock.recv(want)
        self._wait(select.POLLIN, "to splice")
        try:
            size = os.splice(self.sock.fileno(), here, min(want, 65536), flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            # What was handed over cannot be spliced.
            return self.sock.recv(want)
        return os.read(there, size) if size else b""

    def _wait(self, what: int, why: str) -> None:
        poll = select.poll()
        poll.register(self.sock, what)
        if not poll.poll(PATIENCE_S * 1000):
            raise Broken(f"nobody wakes it {why}, {self.sent} sent, {self.read} read")

    def ended(self, prefix: int = 0, reset: bool = False) -> None:
        """The end comes next; with `reset`, after any part of what was said last, and as an error or not."""
        try:
            while got := self._read(1 << 16):
                if len(got) > prefix:
                    raise Broken(f"{len(got)} bytes more than were sent")
                self._see(got)
                prefix -= len(got)
        except (ConnectionResetError, BrokenPipeError):
            if not reset:
                raise
            return
        if prefix and not reset:
            raise Broken(f"the end, {prefix} bytes too early")


def play(sock: socket.socket, plan: Plan, side: int) -> None:
    """One side of a plan."""
    end = End(sock, plan, side)
    try:
        _converse(end, plan, side)
        _leave(end, plan, side)
    finally:
        with TALLY.lock:
            TALLY.sent += end.sent
            TALLY.read += end.read
            TALLY.spurious += end.spurious
        end.close()


def _converse(end: End, plan: Plan, side: int) -> None:
    if plan.kind == "both":
        wrong: list[BaseException] = []

        def speak() -> None:
            try:
                for who, size in plan.steps:
                    if who == side:
                        end.write(size)
            except BaseException as error:
                wrong.append(error)

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        end.take(sum(size for who, size in plan.steps if who != side))
        thread.join(PATIENCE_S)
        if wrong or thread.is_alive():
            raise wrong[0] if wrong else Broken("still writing")
        return
    unread = 0
    for who, size in plan.steps:
        if who == side:
            end.write(size)
        elif plan.kind == "behind" and size >= 100 and len(plan.steps) > 20:
            unread += size
            # Turns are read one by one to begin with.
            if end.read + unread < 4000:
                end.take(unread)
                unread = 0
        else:
            end.take(size)
    end.take(unread)


def _leave(end: End, plan: Plan, side: int) -> None:
    """`ender` closes, and what the tail is for depends on how."""
    first, tail = side == plan.ender, sum(plan.tail)
    if plan.end in ("reset", "abandoned"):
        # A reset may overtake whatever is not read yet: only what is said last may be lost.
        if first:
            end.take(1)
        else:
            end.write(1)
    if plan.end == "close":
        if first:
            end.sock.shutdown(socket.SHUT_WR)
            end.ended()
        else:
            end.ended()
    elif plan.end == "half":
        # It says that it is done, and is told something still.
        if first:
            end.sock.shutdown(socket.SHUT_WR)
            time.sleep(end.rand.random() * 0.03)
            end.ended(tail)
        else:
            end.ended()
            for size in plan.tail:
                end.write(size)
    elif plan.end == "crossed":
        # It speaks and goes; the other is done as well, and reads last.
        if first:
            for size in plan.tail:
                end.write(size)
        else:
            time.sleep(end.rand.random() * 0.03)
            with contextlib.suppress(OSError):
                end.sock.shutdown(socket.SHUT_WR)
            time.sleep(end.rand.random() * 0.01)
            end.ended(tail)
    elif plan.end == "reset":
        if first:
            for size in plan.tail:
                end.write(size)
            end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            time.sleep(end.rand.random() * 0.01)
            end.ended(tail, reset=True)
    elif first:
        # The other speaks into the void.
        time.sleep(end.rand.random() * 0.005)
    else:
        try:
            for size in plan.tail:
                end.write(size)
                time.sleep(0.001)
            end.ended(reset=True)
        except (ConnectionResetError, BrokenPipeError):
            pass


def tell_of(error: BaseException, plan: Plan, side: int) -> None:
    with TALLY.lock:
        if len(TALLY.errors) < 10:
            TALLY.errors.append(f"{'server' if side else 'client'} {plan.seed} {plan.kind}/{plan.end}/{plan.ender}: {error!r}")
        else:
            TALLY.errors.append("")


def _served(sock: socket.socket) -> None:
    hello = b""
    sock.settimeout(PATIENCE_S)
    try:
        while len(hello) < HELLO.size:
            more = sock.recv(HELLO.size - len(hello))
            if not more:
                return
            hello += more
        seed, check = HELLO.unpack(hello)
        assert zlib.crc32(hello[:8]) == check, "not the number that was sent"
    except (OSError, AssertionError) as error:
        tell_of(error, plan_of(0), 1)
        return
    plan = plan_of(seed)
    try:
        play(sock, plan, 1)
    except Exception as error:
        tell_of(error, plan, 1)
        sock.close()


def listen(family: int, host: str) -> int:
    """Serve there; the port."""
    listener = socket.create_server((host, 0), family=family, backlog=1024)

    def accept() -> None:
        while True:
            threading.Thread(target=_served, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


STOP = threading.Event()
CLIENTS: list[threading.Thread] = []


def _client(places: list[tuple[int, str, int]], seeds: random.Random) -> None:
    while not STOP.is_set():
        plan = plan_of(seeds.getrandbits(62))
        family, host, port = seeds.choice(places)
        try:
            with socket.socket(family) as sock:
                sock.settimeout(PATIENCE_S)
                sock.connect((host, port))
                hello = struct.pack("!Q", plan.seed)
                sock.sendall(hello + struct.pack("!I", zlib.crc32(hello)))
                play(sock, plan, 0)
        except Exception as error:
            tell_of(error, plan, 0)
        with TALLY.lock:
            TALLY.connections += 1
            TALLY.kinds[plan.kind] += 1
            TALLY.kinds[plan.end] += 1


def splice_once() -> None:
    """As the first that this process ever does at a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as one:
        other, _ = listener.accept()
        there, here = os.pipe()
        one.sendall(b".")
        os.splice(other.fileno(), here, 1)
        other.close()
        os.close(there)
        os.close(here)


def begin(places: list[tuple[int, str, int]], count: int, seed: int) -> None:
    """As many clients, each with one conversation after the other."""
    STOP.clear()
    for number in range(count):
        CLIENTS.append(threading.Thread(target=_client, args=(places, random.Random(seed + number)), daemon=True))
        CLIENTS[-1].start()


def finish() -> int:
    """Have them end what they are at; how many hang."""
    STOP.set()
    until = time.monotonic() + 2 * PATIENCE_S
    for thread in CLIENTS:
        thread.join(max(0.0, until - time.monotonic()))
    hanging = sum(thread.is_alive() for thread in CLIENTS)
    CLIENTS.clear()
    return hanging


def tally() -> dict[str, Any]:
    with TALLY.lock:
        return {
            "connections": TALLY.connections, "sent": TALLY.sent, "read": TALLY.read, "kinds": dict(TALLY.kinds),
            "spurious": TALLY.spurious, "errors": [each for each in TALLY.errors if each], "failed": len(TALLY.errors),
            "threads": threading.active_count(),
        }  # fmt: skip
