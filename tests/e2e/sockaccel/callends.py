"""How connections end, and what is read then."""

from __future__ import annotations

import socket
import struct
from typing import Any

from calltools import beside, case, got, libc, linger, pause, ready, rest, tell


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
    pause()
    return [end, rest(w)]


@case
def half_close_with_something_unread(w: socket.socket, r: socket.socket) -> Any:
    """The writer is gone; the reader says that it is done as well, and only then reads."""
    w.sendall(b"abc")
    w.close()
    pause()
    r.shutdown(socket.SHUT_WR)
    pause()
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
    pause()
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
    pause()
    return [*found, ready(w), got(w), tell(lambda: w.send(b"def")), tell(lambda: w.send(b"ghi"))]


@case
def close_with_something_unread(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"abc")
    pause()
    r.close()
    pause()
    return got(w)


@case
def end_while_data_wait(w: socket.socket, r: socket.socket) -> Any:
    for word in (b"abc", b"def"):
        w.sendall(word)
    w.close()
    pause()
    return [ready(r), got(r, 2), rest(r)]


@case
def reset(w: socket.socket, r: socket.socket) -> Any:
    linger(w, 0)
    w.close()
    pause()
    return [ready(r), got(r), got(r), tell(lambda: r.send(b"abc"))]


@case
def reset_while_data_wait(w: socket.socket, r: socket.socket) -> Any:
    w.sendall(b"abc")
    linger(w, 0)
    w.close()
    pause()
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
    pause()
    nowhere = struct.pack("H14x", socket.AF_UNSPEC)
    assert libc.connect(w.fileno(), nowhere, len(nowhere)) == 0
    target = listener.getsockname()
    w.connect(target if w.family == socket.AF_INET else (f"::ffff:{target[0]}", target[1]))
    other, _ = listener.accept()
    other.sendall(b"new")
    pause()
    found = [got(w)]
    for number in range(20):
        w.sendall(bytes([65 + number]))
        found.append(got(other))
        other.sendall(bytes([97 + number]))
        found.append(got(w))
    other.close()
    listener.close()
    return found
