"""Calls that write, calls that wait for either, options."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
import struct
import time
from typing import Any

from calltools import (
    BAD,
    MSG_ZEROCOPY,
    SO_ZEROCOPY,
    TCP_ULP,
    beside,
    bound,
    case,
    exactly,
    got,
    libc,
    pattern,
    pause,
    ready,
    tell,
)


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
def to_an_address(w: socket.socket, r: socket.socket) -> Any:
    """Of a connected socket, where it means nothing, or (MSG_FASTOPEN) that it is to be connected."""
    sent = [tell(lambda flags=flags: w.sendto(b"abc", flags, w.getpeername())) for flags in (0, 0x20000000)]  # type: ignore[misc]
    pause()
    return [sent, got(r)]


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
    pause()
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
    pause()
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
        pause()
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
    pause()
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
    """TLS in the kernel, if there is any: what comes behind it is not handed over, in either direction. Who may: test_ulp."""
    before = tell(lambda: w.getsockopt(socket.IPPROTO_TCP, TCP_ULP, 16))
    tell(lambda: w.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls"))
    w.sendall(b"abc")
    found = [before, got(r)]
    r.sendall(b"def")
    return [*found, got(w)]
