"""What calls of sockets are tried with, inside a process of the rig: once on plain TCP, once shortened.

A case is a function of two ends that are both here: `w` writes, `r` reads, both blocking. It returns what its calls returned;
whatever depends on time, or is TCP's free choice, is left out of it.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

Case = Callable[[socket.socket, socket.socket], Any]
CASES: dict[str, Case] = {}
PATIENCE_S = 10.0
PAUSE_S = 0.05
BAD = 8  # no address of anything
FIONREAD, SIOCOUTQ = 0x541B, 0x5411
SO_ZEROCOPY, MSG_ZEROCOPY, SO_PEEK_OFF, TCP_INQ, TCP_ULP = 60, 0x4000000, 42, 36, 31
FUTEX = {"x86_64": "202", "aarch64": "98"}
libc = ctypes.CDLL(None, use_errno=True)
_meanwhile: set[threading.Thread] = set()


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def tell(work: Callable[[], Any]) -> Any:
    """What a call gives, or the name of its error."""
    try:
        found = work()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return found.decode("latin-1") if isinstance(found, bytes | bytearray) else found


def got(s: socket.socket, size: int = 1 << 16, flags: int = 0) -> Any:
    return tell(lambda: s.recv(size, flags))


def rest(s: socket.socket) -> Any:
    """All until the end, or an error."""
    whole = b""
    while True:
        try:
            more = s.recv(1 << 16)
        except OSError as error:
            return [whole.decode("latin-1"), errno.errorcode[error.errno or 0]]
        if not more:
            return [whole.decode("latin-1"), "end"]
        whole += more


def exactly(s: socket.socket, size: int, at_once: int = 1 << 16) -> bytes:
    whole = b""
    while len(whole) < size:
        more = s.recv(min(at_once, size - len(whole)))
        assert more, "closed too early"
        whole += more
    return whole


def ready(s: socket.socket, what: int = select.POLLIN | select.POLLRDHUP, seconds: float = 1.0) -> int:
    """Which of the events there are; 0 if none within the time."""
    poll = select.poll()
    poll.register(s, what)
    return next((found for _, found in poll.poll(seconds * 1000)), 0)


def bound(s: socket.socket, seconds: float, which: int = socket.SO_RCVTIMEO) -> None:
    s.setsockopt(socket.SOL_SOCKET, which, struct.pack("qq", int(seconds), int(seconds % 1 * 1e6)))


def linger(s: socket.socket, seconds: int) -> None:
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))


def waiting(s: socket.socket, request: int = FIONREAD) -> int:
    here = array.array("i", [0])
    fcntl.ioctl(s, request, here)
    return here[0]


def waits(thread: threading.Thread) -> bool:
    """Whether it has ended, or waits in a system call for something else than its turn in Python."""
    try:
        with open(f"/proc/self/task/{thread.native_id}/syscall") as file:
            return file.read().split()[0] not in ("running", FUTEX.get(os.uname().machine))
    except OSError:
        return True


def pause() -> None:
    """Until what is going on has come as far as it can: what is done beside is done, or waits."""
    time.sleep(PAUSE_S)
    until = time.monotonic() + PATIENCE_S / 4
    while not all(map(waits, _meanwhile)) and time.monotonic() < until:
        time.sleep(0.001)


def meanwhile(work: Callable[[], Any]) -> threading.Thread:
    """A thread at `work`, which `pause` knows of."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    _meanwhile.add(thread)
    return thread


def done(thread: threading.Thread) -> None:
    """It is, or has had time enough."""
    thread.join(PATIENCE_S / 2)
    _meanwhile.discard(thread)


@contextlib.contextmanager
def beside(work: Callable[[], Any]) -> Iterator[list[Any]]:
    """What `work` gives, done meanwhile: in the list, once left."""
    found: list[Any] = []
    thread = meanwhile(lambda: found.append(tell(work)))
    pause()
    yield found
    done(thread)
    if not found:
        found.append("hangs")


def turn(w: socket.socket, r: socket.socket) -> None:
    """One each, read by this thread: another that waits for the next is not known yet, and gets it by TCP."""
    for one, other in ((w, r), (r, w)):
        one.sendall(b".")
        exactly(other, 1)


def pattern(size: int, seed: int = 1) -> bytes:
    return hashlib.shake_128(bytes([seed])).digest(size)


def connected(family: int, of_server: int, to: str, at: str, turns: int = 12) -> tuple[socket.socket, socket.socket]:
    """Client and server, which have taken turns so often that they are shortened if anybody wants it."""
    listener = socket.socket(family if of_server < 0 else of_server)
    listener.bind((at, 0))
    listener.listen()
    c = socket.socket(family)
    c.connect((to, listener.getsockname()[1]))
    d, _ = listener.accept()
    listener.close()
    for s in (c, d):
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # nothing waits for TCP's timers
    for _ in range(turns):
        c.sendall(b"ping")
        exactly(d, 4)
        d.sendall(b"pong")
        exactly(c, 4)
    return c, d


def run(name: str, w: socket.socket, r: socket.socket) -> Any:
    """What a case gives; "hangs" if it does not come to an end."""
    signal.signal(signal.SIGUSR1, lambda *_: None)
    found: list[Any] = []

    def body() -> None:
        try:
            found.append(CASES[name](w, r))
        except Exception as error:
            found.append(repr(error))

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    if not found:
        return "hangs"
    for s in (w, r):
        s.close()
    return found[0]
