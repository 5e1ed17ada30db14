"""Calls that read, with whatever else is going on."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from typing import Any

from calltools import (
    BAD,
    PAUSE_S,
    SIOCOUTQ,
    SO_PEEK_OFF,
    TCP_INQ,
    beside,
    bound,
    case,
    done,
    exactly,
    got,
    libc,
    meanwhile,
    pattern,
    pause,
    ready,
    tell,
    turn,
    waiting,
    waits,
)


@case
def peek(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"0123456789")
    return [got(r, 4, socket.MSG_PEEK), got(r, 99, socket.MSG_PEEK), got(r, 3), got(r, 99, socket.MSG_PEEK), got(r)]


@case
def peek_sees_all_that_was_sent(w: socket.socket, r: socket.socket) -> Any:
    for word in (b"ab", b"cd", b"ef"):
        w.sendall(word)
    pause()
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
    turn(w, r)
    reader, read = threading.current_thread(), []

    def speak() -> None:
        for word in (b"abc", b"def", b"ghi"):
            # Whoever reads has had the one before, and waits again.
            while not read and not waits(reader):
                time.sleep(0.001)
            time.sleep(PAUSE_S)
            w.sendall(word)

    speaker = meanwhile(speak)
    read.append(got(r, 9, socket.MSG_WAITALL))
    done(speaker)
    return read[0]


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
    pause()
    return [empty, waiting(r), got(r, 2), waiting(r), got(r), waiting(r)]


@case
def siocoutq(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"abc")
    pause()
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
        pause()
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
    return [nothing, took > 0.15, got(r)]


@case
def signal_while_reading(w: socket.socket, r: socket.socket) -> Any:
    """The system call is begun again, by the kernel (SA_RESTART) or by Python (EINTR)."""
    found: list[Any] = []
    thread = meanwhile(lambda: found.append(got(r)))
    pause()
    assert thread.ident is not None
    signal.pthread_kill(thread.ident, signal.SIGUSR1)
    pause()
    interrupted = list(found)
    w.sendall(b"abc")
    done(thread)
    return [interrupted, found, got(r, 9, socket.MSG_DONTWAIT)]


@case
def told_by_a_signal(w: socket.socket, r: socket.socket) -> Any:
    """O_ASYNC: the process gets one when there is something to read."""
    process = os.fork()
    if not process:
        with contextlib.suppress(BaseException):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
            fcntl.fcntl(r, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
            w.sendall(b"abc")
            told = signal.sigtimedwait([signal.SIGIO], 2)
            os._exit(0 if told and r.recv(9) == b"abc" else 1)
        os._exit(2)
    return os.waitpid(process, 0)[1]


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
def two_wait_for_one_word(w: socket.socket, r: socket.socket) -> Any:
    """Whoever comes too late waits for the next."""
    with beside(lambda: r.recv(9)) as one, beside(lambda: r.recv(9)) as other:
        w.sendall(b"abc")
        pause()
        early = sorted(one + other)
        w.sendall(b"def")
    return [early, sorted(one + other)]


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
def standard_input_of_a_program(w: socket.socket, r: socket.socket) -> Any:
    """As inetd hands it on."""
    with subprocess.Popen(["cat"], stdin=r.fileno(), stdout=r.fileno()):
        r.close()
        found = []
        for number in range(20):
            w.sendall(b"%02d" % number)
            found.append(exactly(w, 2).decode())
        w.shutdown(socket.SHUT_WR)
        return [found, got(w)]


@case
def duplicated(w: socket.socket, r: socket.socket) -> Any:
    other = r.dup()
    w.sendall(b"abcd")
    first = got(r, 2)
    r.close()
    w.sendall(b"ef")
    pause()
    found = [first, got(other)]
    other.close()
    return [*found, got(w)]
