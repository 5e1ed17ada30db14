"""Calls that reach a socket by another door: io_uring, several messages at once, memory mapped over what arrived."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct
from typing import Any

from calltools import beside, case, exactly, got, libc, pattern, pause, tell

_SETUP, _ENTER = 425, 426  # the same on all machines
_GETEVENTS, _SINGLE_MMAP = 1, 1
SPLICE, WRITE, READ, SEND, RECV = 30, 23, 22, 26, 27
ZEROCOPY_RECEIVE = 35
libc.syscall.restype = ctypes.c_long


class Ring:
    """One request at a time. OSError if the machine forbids it."""

    def __init__(self) -> None:
        params = bytearray(120)
        buffer = (ctypes.c_char * len(params)).from_buffer(params)
        self._fd = libc.syscall(_SETUP, 4, buffer)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "io_uring")
        entries, completions, _, _, _, features = struct.unpack_from("6I", params)
        assert features & _SINGLE_MMAP
        self._sq = struct.unpack_from("7I", params, 40)
        self._cq = struct.unpack_from("7I", params, 80)
        size = max(self._sq[6] + 4 * entries, self._cq[5] + 16 * completions)
        flags, rights = mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ | mmap.PROT_WRITE
        self._rings = mmap.mmap(self._fd, size, flags, rights, offset=0)
        self._requests = mmap.mmap(self._fd, 64 * entries, flags, rights, offset=0x10000000)

    def ask(self, code: int, s: socket.socket, data: bytearray, flags: int = 0) -> int:
        """What the call gives, or the negative error; waits for it."""
        at = (ctypes.c_char * len(data)).from_buffer(data)
        sqe = struct.pack("=BBHiQQIIQ", code, 0, 0, s.fileno(), 0, ctypes.addressof(at), len(data), flags, 7)
        self._requests[: len(sqe)] = sqe
        self._requests[len(sqe) : 64] = bytes(64 - len(sqe))
        tail = self._word(self._sq[1])
        mask = self._word(self._sq[2])
        struct.pack_into("I", self._rings, self._sq[6] + 4 * (tail & mask), 0)
        struct.pack_into("I", self._rings, self._sq[1], tail + 1)
        head = self._word(self._cq[0])
        if libc.syscall(_ENTER, self._fd, 1, 1, _GETEVENTS, None, 0) < 0:
            raise OSError(ctypes.get_errno(), "io_uring_enter")
        place = self._cq[5] + 16 * (head & self._word(self._cq[2]))
        _, result, _ = struct.unpack_from("=QiI", self._rings, place)
        struct.pack_into("I", self._rings, self._cq[0], head + 1)
        return int(result)

    def _word(self, at: int) -> int:
        return int(struct.unpack_from("I", self._rings, at)[0])

    def close(self) -> None:
        self._requests.close()
        self._rings.close()
        os.close(self._fd)


def with_ring(work: Any) -> Any:
    try:
        ring = Ring()
    except OSError:
        return "no io_uring"
    try:
        return work(ring)
    finally:
        ring.close()


def taken(ring: Ring, code: int, s: socket.socket, size: int, flags: int = 0) -> Any:
    into = bytearray(size)
    done = ring.ask(code, s, into, flags)
    return into[:done].decode("latin-1") if done >= 0 else errno.errorcode[-done]


def _ring_reads(code: int, w: socket.socket, r: socket.socket) -> Any:
    def work(ring: Ring) -> Any:
        w.sendall(b"abcdef")
        found = [taken(ring, code, r, 2), got(r, 2), taken(ring, code, r, 9)]
        with beside(lambda: taken(ring, code, r, 9)) as waited:
            w.sendall(b"ghi")
        r.sendall(b".")
        exactly(w, 1)
        w.sendall(b"jkl")
        return [*found, waited, taken(ring, code, r, 9)]

    return with_ring(work)


@case
def ring_recv(w: socket.socket, r: socket.socket) -> Any:
    return _ring_reads(RECV, w, r)


@case
def ring_read(w: socket.socket, r: socket.socket) -> Any:
    return _ring_reads(READ, w, r)


@case
def ring_recv_of_all(w: socket.socket, r: socket.socket) -> Any:
    def work(ring: Ring) -> Any:
        with beside(lambda: taken(ring, RECV, r, 6, socket.MSG_WAITALL)) as found:
            w.sendall(b"abc")
            pause()
            w.sendall(b"def")
        return found

    return with_ring(work)


@case
def ring_send_and_write(w: socket.socket, r: socket.socket) -> Any:
    def work(ring: Ring) -> Any:
        sent = []
        for code, data in ((SEND, b"abc"), (WRITE, b"def")):
            sent.append(ring.ask(code, w, bytearray(data)))
            w.sendall(b"-")
        return [sent, exactly(r, 8).decode()]

    return with_ring(work)


class _Message(ctypes.Structure):
    """struct mmsghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p), ("namelen", ctypes.c_uint), ("iov", ctypes.c_void_p), ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p), ("controllen", ctypes.c_size_t), ("flags", ctypes.c_size_t), ("length", ctypes.c_uint),
    )  # fmt: skip


def _messages(parts: list[bytearray]) -> tuple[Any, Any]:
    held = [(ctypes.c_char * len(part)).from_buffer(part) for part in parts]
    vectors = (ctypes.c_size_t * (2 * len(parts)))()
    messages = (_Message * len(parts))()
    for at, part in enumerate(parts):
        vectors[2 * at : 2 * at + 2] = [ctypes.addressof(held[at]), len(part)]
        messages[at].iov, messages[at].iovlen = ctypes.addressof(vectors) + 16 * at, 1
    return messages, (held, vectors)


@case
def several_messages_at_once(w: socket.socket, r: socket.socket) -> Any:
    """sendmmsg() and recvmmsg(), which waits for one and takes what else there is (MSG_WAITFORONE)."""
    messages, kept = _messages([bytearray(b"ab"), bytearray(b"cdef"), bytearray(b"g")])
    found = [libc.sendmmsg(w.fileno(), messages, 3, 0), [each.length for each in messages]]
    pause()
    parts = [bytearray(3), bytearray(3), bytearray(9), bytearray(9)]
    messages, more = _messages(parts)
    count = libc.recvmmsg(r.fileno(), messages, 4, 0x10000, None)
    return [*found, count, [parts[at][: messages[at].length].decode() for at in range(count)], bool(kept and more)]


@case
def read_that_must_not_wait(w: socket.socket, r: socket.socket) -> Any:
    """preadv2() with RWF_NOWAIT: no call of those that are known."""
    into = [bytearray(9)]
    empty = tell(lambda: os.preadv(r.fileno(), into, -1, os.RWF_NOWAIT))
    w.sendall(b"abc")
    pause()
    size = tell(lambda: os.preadv(r.fileno(), into, -1, os.RWF_NOWAIT))
    return [empty, size, into[0][:3].decode(), got(r, 9, socket.MSG_DONTWAIT)]


@case
def mapped_where_it_arrived(w: socket.socket, r: socket.socket) -> Any:
    """TCP_ZEROCOPY_RECEIVE: too little to be mapped, so that it is to be read; what it says of how much is left out."""
    w.sendall(pattern(3000))
    pause()
    request = ctypes.create_string_buffer(64)
    try:
        memory = mmap.mmap(r.fileno(), 4096, mmap.MAP_SHARED, mmap.PROT_READ)
    except OSError:
        return "cannot be mapped"
    memory.close()
    length = ctypes.c_uint(16)
    tell(lambda: libc.getsockopt(r.fileno(), socket.IPPROTO_TCP, ZEROCOPY_RECEIVE, request, ctypes.byref(length)))
    return exactly(r, 3000) == pattern(3000)


@case
def busy_polling(w: socket.socket, r: socket.socket) -> Any:
    tell(lambda: r.setsockopt(socket.SOL_SOCKET, 46, 50))  # SO_BUSY_POLL
    with beside(lambda: r.recv(9)) as found:
        w.sendall(b"abc")
    return found
