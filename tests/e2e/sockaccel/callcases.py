"""Calls of sockets, one function each, on a connection whose ends are both here: `w` writes, `r` reads, both blocking.

Run inside a process of the rig (its text is executed there), once on plain TCP and once shortened. What a function returns is
what the calls returned; whatever depends on time, or is TCP's free choice, is left out of it.
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
PATIENCE_S = 4.0
PAUSE_S = 0.05
BAD = 8  # no address of anything
FIONREAD, SIOCOUTQ = 0x541B, 0x5411
SO_ZEROCOPY, MSG_ZEROCOPY, SO_PEEK_OFF, TCP_INQ, TCP_ULP = 60, 0x4000000, 42, 36, 31
libc = ctypes.CDLL(None, use_errno=True)


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


@contextlib.contextmanager
def beside(work: Callable[[], Any]) -> Iterator[list[Any]]:
    """What `work` gives, done meanwhile: in the list, once left."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(tell(work)), daemon=True)
    thread.start()
    time.sleep(PAUSE_S)
    yield found
    thread.join(PATIENCE_S / 2)
    if not found:
        found.append("hangs")


def pattern(size: int, seed: int = 1) -> bytes:
    return hashlib.shake_128(bytes([seed])).digest(size)


# ---- reading -------------------------------------------------------------------------------------------------------
@case
def peek(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"0123456789")
    return [got(r, 4, socket.MSG_PEEK), got(r, 99, socket.MSG_PEEK), got(r, 3), got(r, 99, socket.MSG_PEEK), got(r)]


@case
def peek_sees_all_that_was_sent(w: socket.socket, r: socket.socket) -> Any:
    for word in (b"ab", b"cd", b"ef"):
        w.sendall(word)
    time.sleep(PAUSE_S)
    return [got(r, 99, socket.MSG_PEEK), got(r, 5, socket.MSG_PEEK), got(r, 5), got(r)]


@case
def peek_of_nothing(w: socket.socket, r: socket.socket) -> Any:
    return got(r, 9, socket.MSG_PEEK | socket.MSG_DONTWAIT)


@case
def peek_waits(w: socket.socket, r: socket.socket) -> Any:
    with beside(lambda: r.recv(9, socket.MSG_PEEK)) as found:
        w.sendall(b"abc")
    return [found, got(r)]


@case
def peek_off(w: socket.socket, r: socket.socket) -> Any:
    if tell(lambda: r.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 2)) == "EOPNOTSUPP":
        return "no such option"
    w.sendall(b"abcdef")
    return [got(r, 2, socket.MSG_PEEK), got(r, 9, socket.MSG_PEEK), got(r)]


@case
def waitall_of_what_is_there(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"0123456789")
    return [got(r, 10, socket.MSG_WAITALL), got(r, 1, socket.MSG_DONTWAIT)]


@case
def waitall_in_parts(w: socket.socket, r: socket.socket) -> Any:
    with beside(lambda: r.recv(9, socket.MSG_WAITALL)) as found:
        for word in (b"abc", b"def", b"ghi"):
            w.sendall(word)
            time.sleep(PAUSE_S)
    return found


@case
def waitall_a_second_time(w: socket.socket, r: socket.socket) -> Any:
    """The first has told that it is used."""
    w.sendall(b"abc")
    first = got(r, 3, socket.MSG_WAITALL)
    r.sendall(b".")
    exactly(w, 1)
    return [first, waitall_in_parts(w, r)]


@case
def trunc(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"0123456789")
    into = bytearray(4)
    size = r.recv_into(into, 4, socket.MSG_TRUNC)
    w.sendall(b"abc")
    return [size, into.decode(), exactly(r, 9).decode()]


@case
def dontwait(w: socket.socket, r: socket.socket) -> Any:
    empty = got(r, 9, socket.MSG_DONTWAIT)
    w.sendall(b"abc")
    return [empty, got(r, 2, socket.MSG_DONTWAIT), got(r, 9, socket.MSG_DONTWAIT), got(r, 9, socket.MSG_DONTWAIT)]


@case
def nonblocking(w: socket.socket, r: socket.socket) -> Any:
    r.setblocking(False)
    empty = got(r)
    w.sendall(b"abc")
    return [empty, ready(r), got(r), got(r), ready(r, seconds=0)]


@case
def nothing_is_read_into_nothing(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"abc")
    return [got(r, 0), got(r)]


@case
def byte_by_byte(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"abc")
    w.sendall(b"def")
    return [got(r, 1) for _ in range(6)] + [got(r, 1, socket.MSG_DONTWAIT)]


@case
def large_in_odd_pieces(w: socket.socket, r: socket.socket) -> Any:
    whole = pattern(60_001)
    w.sendall(whole)
    return [exactly(r, len(whole), 777) == whole, got(r, 1, socket.MSG_DONTWAIT)]


@case
def iovecs(w: socket.socket, r: socket.socket) -> Any:
    sent = w.sendmsg([b"abc", b"", b"defg", b"h"])
    into = [bytearray(2), bytearray(0), bytearray(5), bytearray(9)]
    size, ancillary, flags, _ = r.recvmsg_into(into, 128)
    return [sent, size, ancillary, flags, b"".join(into)[:size].decode()]


@case
def many_iovecs(w: socket.socket, r: socket.socket) -> Any:
    parts = [bytes([number & 255]) * (number % 7) for number in range(1000)]
    sent = w.sendmsg(parts)
    return [sent, exactly(r, sent) == b"".join(parts)]


@case
def readv_and_writev(w: socket.socket, r: socket.socket) -> Any:
    sent = os.writev(w.fileno(), [b"abc", b"def"])
    into = [bytearray(4), bytearray(9)]
    return [sent, os.readv(r.fileno(), into), into[0].decode(), into[1][:2].decode()]


@case
def read_and_write(w: socket.socket, r: socket.socket) -> Any:
    return [os.write(w.fileno(), b"abc"), tell(lambda: os.read(r.fileno(), 99))]


@case
def address_of_a_stream(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"abc")
    data, peer = r.recvfrom(9)
    return [data.decode(), peer]


@case
def bad_address_to_read_into(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"abc")
    failed = libc.recv(r.fileno(), ctypes.c_void_p(BAD), 3, 0)
    return [failed, errno.errorcode[ctypes.get_errno()], got(r)]


@case
def fionread(w: socket.socket, r: socket.socket) -> Any:
    empty = waiting(r)
    w.sendall(b"abcdef")
    time.sleep(PAUSE_S)
    return [empty, waiting(r), got(r, 2), waiting(r), got(r), waiting(r)]


@case
def siocoutq(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"abc")
    time.sleep(PAUSE_S)
    return [waiting(w, SIOCOUTQ), got(r)]


@case
def inq(w: socket.socket, r: socket.socket) -> Any:
    """How much is left, told with each read."""
    r.setsockopt(socket.IPPROTO_TCP, TCP_INQ, 1)
    w.sendall(b"abcdef")
    _, ancillary, _, _ = r.recvmsg(2, 128)
    return [[kind, struct.unpack("i", data)[0]] for _, kind, data in ancillary]


@case
def timestamps(w: socket.socket, r: socket.socket) -> Any:
    r.setsockopt(socket.SOL_SOCKET, 35, 1)  # SO_TIMESTAMPNS
    time.sleep(2 * PAUSE_S)  # until the kernel takes them
    w.sendall(b"abc")
    _, ancillary, _, _ = r.recvmsg(9, 128)
    return len(ancillary)


@case
def lowat_and_poll(w: socket.socket, r: socket.socket) -> Any:
    r.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 6)
    w.sendall(b"abc")
    before = ready(r, seconds=PAUSE_S)
    w.sendall(b"def")
    return [before, ready(r), got(r)]


@case
def lowat_and_recv(w: socket.socket, r: socket.socket) -> Any:
    r.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 6)
    with beside(lambda: r.recv(99)) as found:
        w.sendall(b"abc")
        time.sleep(PAUSE_S)
        w.sendall(b"def")
    return found


@case
def lowat_after_a_turn(w: socket.socket, r: socket.socket) -> Any:
    """Where a turn begins it is noticed."""
    r.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 6)
    r.sendall(b".")
    exactly(w, 1)
    return lowat_and_poll(w, r)


@case
def lowat_within_a_turn(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b".")
    exactly(r, 1)
    return lowat_and_poll(w, r)


@case
def rcvtimeo(w: socket.socket, r: socket.socket) -> Any:
    bound(r, 0.2)
    began = time.monotonic()
    nothing = got(r)
    took = time.monotonic() - began
    w.sendall(b"abc")
    return [nothing, 0.15 < took < 1, got(r)]


@case
def signal_while_reading(w: socket.socket, r: socket.socket) -> Any:
    """The system call is begun again, by the kernel (SA_RESTART) or by Python (EINTR)."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(got(r)), daemon=True)
    thread.start()
    time.sleep(PAUSE_S)
    assert thread.ident is not None
    signal.pthread_kill(thread.ident, signal.SIGUSR1)
    time.sleep(PAUSE_S)
    interrupted = list(found)
    w.sendall(b"abc")
    thread.join(1)
    return [interrupted, found, got(r, 9, socket.MSG_DONTWAIT)]


@case
def room_to_write_while_reading(w: socket.socket, r: socket.socket) -> Any:
    """One thread reads, another writes until it must wait."""
    with beside(lambda: w.recv(9)) as found:
        with beside(lambda: w.sendall(bytes(8 << 20))) as done:
            exactly(r, 8 << 20)
        early = list(found)
        r.sendall(b"abc")
    return [early, found, done]


@case
def two_that_fork_read_in_turn(w: socket.socket, r: socket.socket) -> Any:
    there, here = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            for _ in range(3):
                os.write(here, r.recv(3))
                time.sleep(0)
        os._exit(0)
    found = []
    for word in (b"abc", b"def", b"ghi"):
        w.sendall(word)
        found.append(os.read(there, 9).decode())
    os.waitpid(child, 0)
    w.sendall(b"jkl")
    found.append(got(r))
    os.close(there)
    os.close(here)
    return found


@case
def passed_to_another(w: socket.socket, r: socket.socket) -> Any:
    """Through a unix socket, with something waiting; the first holder closes it."""
    here, there = socket.socketpair(socket.AF_UNIX)
    w.sendall(b"abc")
    socket.send_fds(here, [b"."], [r.fileno()])
    r.close()
    _, (number,), _, _ = socket.recv_fds(there, 9, 1)
    passed = socket.socket(fileno=number)
    first = got(passed)
    w.sendall(b"def")
    passed.sendall(b"ghi")
    found = [first, got(passed), got(w)]
    for each in (here, there, passed):
        each.close()
    return [*found, got(w)]


@case
def duplicated(w: socket.socket, r: socket.socket) -> Any:
    other = r.dup()
    w.sendall(b"abcd")
    first = got(r, 2)
    r.close()
    w.sendall(b"ef")
    time.sleep(PAUSE_S)
    found = [first, got(other)]
    other.close()
    return [*found, got(w)]


# ---- writing -------------------------------------------------------------------------------------------------------
@case
def zero_length(w: socket.socket, r: socket.socket) -> Any:
    sent = tell(lambda: w.send(b""))
    nothing = got(r, 9, socket.MSG_DONTWAIT), ready(r, seconds=0)
    w.sendall(b"abc")
    return [sent, nothing, got(r)]


@case
def bad_address_to_write_from(w: socket.socket, r: socket.socket) -> Any:
    ctypes.set_errno(0)
    failed = libc.send(w.fileno(), ctypes.c_void_p(BAD), 3, 0)
    why = errno.errorcode.get(ctypes.get_errno())
    w.sendall(b"abc")
    return [failed, why, got(r)]


@case
def sendfile(w: socket.socket, r: socket.socket) -> Any:
    file = os.memfd_create("words")
    whole = pattern(20_000)
    os.write(file, whole)
    sent = os.sendfile(w.fileno(), file, 7, 10_000)
    os.close(file)
    return [sent, exactly(r, sent) == whole[7 : 7 + sent]]


@case
def splice_into(w: socket.socket, r: socket.socket) -> Any:
    there, here = os.pipe()
    os.write(here, b"abcdef")
    sent = os.splice(there, w.fileno(), 99)
    os.close(there)
    os.close(here)
    return [sent, exactly(r, sent).decode()]


@case
def splice_out(w: socket.socket, r: socket.socket) -> Any:
    there, here = os.pipe()
    r.setblocking(False)
    w.sendall(b"abcdef")
    time.sleep(PAUSE_S)
    moved = tell(lambda: os.splice(r.fileno(), here, 99))
    found = [moved, got(r)]
    os.close(there)
    os.close(here)
    return found


@case
def zerocopy(w: socket.socket, r: socket.socket) -> Any:
    """The word that the memory may be used again, or none."""
    w.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
    whole = pattern(20_000)
    sent = tell(lambda: w.send(whole, MSG_ZEROCOPY))
    arrived = exactly(r, 20_000) == whole
    return [sent, arrived, bool(ready(w, 0) & select.POLLERR)]


@case
def zerocopy_a_second_time(w: socket.socket, r: socket.socket) -> Any:
    first = zerocopy(w, r)
    r.sendall(b".")
    exactly(w, 1)
    return [first[:2], zerocopy(w, r)]


@case
def out_of_band(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"ab")
    sent = w.send(b"!", socket.MSG_OOB)
    w.sendall(b"cd")
    time.sleep(PAUSE_S)
    urgent = ready(r, select.POLLPRI, 0), got(r, 1, socket.MSG_OOB)
    whole = ""
    while isinstance(more := got(r, 9, socket.MSG_DONTWAIT), str) and more != "EAGAIN":
        whole += more
    return [sent, urgent, whole]


@case
def out_of_band_a_second_time(w: socket.socket, r: socket.socket) -> Any:
    out_of_band(w, r)
    return out_of_band(w, r)


@case
def out_of_band_that_nobody_asks_for(w: socket.socket, r: socket.socket) -> Any:
    found = []
    for _ in range(2):
        w.sendall(b"ab")
        w.send(b"!", socket.MSG_OOB)
        w.sendall(b"cd")
        time.sleep(PAUSE_S)
        whole = ""
        while isinstance(more := got(r, 9, socket.MSG_DONTWAIT), str) and more != "EAGAIN":
            whole += more
        found.append(whole)
        r.sendall(b".")
        exactly(w, 1)
    return found


@case
def more_to_come(w: socket.socket, r: socket.socket) -> Any:
    w.send(b"abc", socket.MSG_MORE)
    w.send(b"def")
    return exactly(r, 6).decode()


@case
def cork(w: socket.socket, r: socket.socket) -> Any:
    w.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    for word in (b"abc", b"def"):
        w.sendall(word)
    w.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
    return exactly(r, 6).decode()


@case
def nodelay_and_quickack(w: socket.socket, r: socket.socket) -> Any:
    for option in (socket.TCP_NODELAY, socket.TCP_QUICKACK):
        for s in (w, r):
            s.setsockopt(socket.IPPROTO_TCP, option, 1)
    w.sendall(b"abc")
    return [got(r), w.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)]


@case
def keepalive(w: socket.socket, r: socket.socket) -> Any:
    for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 1)):
        w.setsockopt(socket.IPPROTO_TCP, option, value)
    w.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    time.sleep(1.2)
    w.sendall(b"abc")
    return [got(r), w.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)]


@case
def slow_reader(w: socket.socket, r: socket.socket) -> Any:
    """Who writes must wait, sooner or later; nothing of it is lost."""
    w.setblocking(False)
    whole = pattern(1000)
    sent = 0
    while isinstance(step := tell(lambda: w.send(whole)), int):
        sent += step
        if sent > 32 << 20 or step < 1000:
            break
    full = not ready(w, select.POLLOUT, 0)
    held = exactly(r, sent)
    at = (whole * (sent // 1000 + 1))[:sent]
    return [full, sent < 32 << 20, held == at, bool(ready(w, select.POLLOUT))]


@case
def sndtimeo(w: socket.socket, r: socket.socket) -> Any:
    bound(w, 0.2, socket.SO_SNDTIMEO)
    sent = 0
    while isinstance(step := tell(lambda: w.send(bytes(4096))), int):
        sent += step
    return [step, exactly(r, sent) == bytes(sent)]


@case
def small_buffers(w: socket.socket, r: socket.socket) -> Any:
    """Too small for what may be handed over unread; what comes by TCP behind it is sent again."""
    for s in (w, r):
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    whole = pattern(20_000)
    with beside(lambda: w.sendall(whole)) as done:
        arrived = exactly(r, len(whole))
    return [arrived == whole, done]


# ---- the end -------------------------------------------------------------------------------------------------------
@case
def half_close(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"abc")
    w.shutdown(socket.SHUT_WR)
    found = [rest(r), got(r)]
    r.sendall(b"def")
    r.sendall(b"ghi")
    r.close()
    return [*found, rest(w)]


@case
def answer_waits_after_half_close(w: socket.socket, r: socket.socket) -> Any:
    """The one that closed first reads last, when the connection is gone."""
    w.shutdown(socket.SHUT_WR)
    end = got(r)
    r.sendall(b"abc")
    r.sendall(b"def")
    r.close()
    time.sleep(PAUSE_S)
    return [end, rest(w)]


@case
def half_close_with_something_unread(w: socket.socket, r: socket.socket) -> Any:
    """The writer is gone; the reader says that it is done as well, and only then reads."""
    w.sendall(b"abc")
    w.close()
    time.sleep(PAUSE_S)
    r.shutdown(socket.SHUT_WR)
    time.sleep(PAUSE_S)
    return rest(r)


@case
def write_after_shutdown(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"abc")
    w.shutdown(socket.SHUT_WR)
    return [tell(lambda: w.send(b"def")), rest(r), ready(r), rest(r)]


@case
def write_after_shutdown_of_reading(w: socket.socket, r: socket.socket) -> Any:
    r.shutdown(socket.SHUT_RD)
    nothing = got(r)
    sent = tell(lambda: w.send(b"abc"))
    time.sleep(PAUSE_S)
    found = [nothing, sent, ready(r), got(r), got(r)]
    r.sendall(b"def")
    return [*found, got(w)]


@case
def read_ends_with_shutdown_beside(w: socket.socket, r: socket.socket) -> Any:
    with beside(lambda: r.recv(9)) as found:
        r.shutdown(socket.SHUT_RD)
    return found


@case
def read_ends_with_half_close(w: socket.socket, r: socket.socket) -> Any:
    with beside(lambda: r.recv(9)) as found:
        w.shutdown(socket.SHUT_WR)
    return found


@case
def read_ends_with_reset(w: socket.socket, r: socket.socket) -> Any:
    linger(w, 0)
    with beside(lambda: r.recv(9)) as found:
        w.close()
    return [found, got(r)]


@case
def close_with_nothing_unread(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"abc")
    found = [got(r)]
    r.close()
    time.sleep(PAUSE_S)
    return [*found, ready(w), got(w), tell(lambda: w.send(b"def")), tell(lambda: w.send(b"ghi"))]


@case
def close_with_something_unread(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"abc")
    time.sleep(PAUSE_S)
    r.close()
    time.sleep(PAUSE_S)
    return got(w)


@case
def end_while_data_wait(w: socket.socket, r: socket.socket) -> Any:
    for word in (b"abc", b"def"):
        w.sendall(word)
    w.close()
    time.sleep(PAUSE_S)
    return [ready(r), got(r, 2), rest(r)]


@case
def reset(w: socket.socket, r: socket.socket) -> Any:
    linger(w, 0)
    w.close()
    time.sleep(PAUSE_S)
    return [ready(r), got(r), got(r), tell(lambda: r.send(b"abc"))]


@case
def reset_while_data_wait(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"abc")
    linger(w, 0)
    w.close()
    time.sleep(PAUSE_S)
    return [rest(r), got(r)]


@case
def close_that_lingers(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"abc")
    linger(w, 1)
    w.close()
    return rest(r)


@case
def used_again_for_another(w: socket.socket, r: socket.socket) -> Any:
    """connect() to nowhere, then elsewhere: nothing of the old connection is left."""
    if w.family == socket.AF_INET6 and not w.getsockname()[0].startswith("::ffff:"):
        return "not of this family"
    listener = socket.create_server((w.getsockname()[0].removeprefix("::ffff:"), 0))
    r.sendall(b"old")
    time.sleep(PAUSE_S)
    nowhere = struct.pack("H14x", socket.AF_UNSPEC)
    assert libc.connect(w.fileno(), nowhere, len(nowhere)) == 0
    target = listener.getsockname()
    w.connect(target if w.family == socket.AF_INET else (f"::ffff:{target[0]}", target[1]))
    other, _ = listener.accept()
    other.sendall(b"new")
    time.sleep(PAUSE_S)
    found = [got(w)]
    for number in range(20):
        w.sendall(bytes([65 + number]))
        found.append(got(other))
        other.sendall(bytes([97 + number]))
        found.append(got(w))
    other.close()
    listener.close()
    return found


# ---- waiting -------------------------------------------------------------------------------------------------------
@case
def poll(w: socket.socket, r: socket.socket) -> Any:
    found = [ready(r, seconds=0), ready(w, select.POLLOUT, 0)]
    w.sendall(b"abc")
    found += [ready(r), ready(r, select.POLLOUT | select.POLLIN)]
    r.recv(9)
    found.append(ready(r, seconds=0))
    w.shutdown(socket.SHUT_WR)
    found += [ready(r), ready(w, select.POLLHUP, 0)]
    r.shutdown(socket.SHUT_WR)
    time.sleep(PAUSE_S)
    return [*found, ready(r), ready(w)]


@case
def epoll_level(w: socket.socket, r: socket.socket) -> Any:
    found = []
    with select.epoll() as epoll:
        epoll.register(r, select.EPOLLIN)
        found.append(len(epoll.poll(0)))
        w.sendall(b"abc")
        found += [len(epoll.poll(1)), len(epoll.poll(0)), got(r, 1), len(epoll.poll(0)), got(r), len(epoll.poll(0))]
    return found


@case
def epoll_edge(w: socket.socket, r: socket.socket) -> Any:
    found = []
    with select.epoll() as epoll:
        epoll.register(r, select.EPOLLIN | select.EPOLLET | select.EPOLLRDHUP)
        for word in (b"abc", b"def"):
            w.sendall(word)
            found += [epoll.poll(1)[0][1], len(epoll.poll(0)), got(r, 1), len(epoll.poll(0))]
        w.sendall(b"ghi")
        found += [len(epoll.poll(1)), got(r), len(epoll.poll(0))]
        w.close()
        found += [epoll.poll(1)[0][1], got(r)]
    return found


@case
def epoll_once(w: socket.socket, r: socket.socket) -> Any:
    with select.epoll() as epoll:
        epoll.register(r, select.EPOLLIN | select.EPOLLONESHOT)
        w.sendall(b"abc")
        found = [len(epoll.poll(1)), len(epoll.poll(0))]
        epoll.modify(r, select.EPOLLIN | select.EPOLLONESHOT)
        return [*found, len(epoll.poll(1)), got(r)]


@case
def waiting_in_epoll(w: socket.socket, r: socket.socket) -> Any:
    with select.epoll() as epoll:
        epoll.register(r, select.EPOLLIN)
        with beside(lambda: len(epoll.poll(2))) as found:
            w.sendall(b"abc")
        return [found, got(r)]


@case
def waiting_in_select(w: socket.socket, r: socket.socket) -> Any:
    with beside(lambda: len(select.select([r], [], [], 2)[0])) as found:
        w.sendall(b"abc")
    return [found, got(r)]


# ---- options -------------------------------------------------------------------------------------------------------
@case
def info(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"abc")
    raw = w.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    lost, retransmitted = (struct.unpack_from("I", raw, at)[0] for at in (32, 36))
    return [raw[0], raw[2], lost, retransmitted, got(r)]


@case
def names_and_errors(w: socket.socket, r: socket.socket) -> Any:
    same = w.getpeername()[:2] == r.getsockname()[:2], w.getsockname()[:2] == r.getpeername()[:2]
    return [same, w.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), r.type == socket.SOCK_STREAM]


@case
def protocol_on_top(w: socket.socket, r: socket.socket) -> Any:
    """TLS in the kernel, if there is any: what comes behind it is not handed over, in either direction."""
    before = tell(lambda: w.getsockopt(socket.IPPROTO_TCP, TCP_ULP, 16))
    made = tell(lambda: w.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls"))
    w.sendall(b"abc")
    found = [before, made, got(r)]
    r.sendall(b"def")
    return [*found, got(w)]


# ---- running them --------------------------------------------------------------------------------------------------
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
