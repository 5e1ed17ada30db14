"""Answers in pods while a test runs: echoes connections and datagrams on the test's port.

With it a transfer can be made, and not only a connection that is refused. One thread serves sockets in any number
of namespaces; a port that is taken already (by another test's responder) is left alone.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
from collections.abc import Iterable
from itertools import product
from types import TracebackType

from services.common.errors import FibrilError
from services.common.kernel.netns import NetNs
from services.ctl.connectivity.engine import CHUNK

IP_PKTINFO, IPV6_RECVPKTINFO, IPV6_PKTINFO = 8, 49, 50  # linux/in.h, linux/in6.h

FAMILIES = (socket.AF_INET, socket.AF_INET6)
KINDS = (socket.SOCK_STREAM, socket.SOCK_DGRAM)


class Responder:
    """`with Responder(namespaces, port):` answers in all of them that can be entered."""

    def __init__(self, namespaces: Iterable[str], port: int) -> None:
        self._selector = selectors.DefaultSelector()
        self._unsent: dict[socket.socket, bytes] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True, name="responder")
        for path in namespaces:
            with contextlib.suppress(FibrilError), NetNs.open(path) as space:
                for family, kind in product(FAMILIES, KINDS):
                    sock = _listen(space, family, kind, port)
                    if sock is not None:
                        self._selector.register(sock, selectors.EVENT_READ, kind)

    def __enter__(self) -> Responder:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            self._forget(key.fileobj)
        self._selector.close()

    def _serve(self) -> None:
        while not self._done.is_set():
            for key, events in self._selector.select(0.05):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                try:
                    if key.data == socket.SOCK_DGRAM:
                        _send_back(sock)
                    elif key.data == socket.SOCK_STREAM:
                        connection, _ = sock.accept()
                        connection.setblocking(False)
                        self._selector.register(connection, selectors.EVENT_READ, None)
                    elif not self._echo(sock, events):
                        self._forget(sock)
                except BlockingIOError:
                    continue
                except OSError:
                    # The peer has gone; a listening socket goes on.
                    if key.data is None:
                        self._forget(sock)

    def _echo(self, sock: socket.socket, events: int) -> bool:
        """Pass on what came, never reading more than has been sent back; False at the end."""
        left = self._unsent.pop(sock, b"")
        if not left and events & selectors.EVENT_READ:
            left = sock.recv(CHUNK)
            if not left:
                return False
        try:
            left = left[sock.send(left) :]
        except BlockingIOError:
            pass
        if left:
            self._unsent[sock] = left
        self._selector.modify(sock, selectors.EVENT_WRITE if left else selectors.EVENT_READ, None)
        return True

    def _forget(self, sock: object) -> None:
        assert isinstance(sock, socket.socket)
        self._selector.unregister(sock)
        self._unsent.pop(sock, None)
        sock.close()


def _send_back(sock: socket.socket) -> None:
    """A datagram to where it came from, from the very address it was sent to: a node has several."""
    data, extra, _, source = sock.recvmsg(CHUNK, 256)
    answer: list[tuple[int, int, bytes]] = []
    for level, kind, info in extra:
        if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            _, _, asked = struct.unpack("i4s4s", info)
            answer = [(level, kind, struct.pack("i4s4s", 0, asked, bytes(4)))]
        elif (level, kind) == (socket.IPPROTO_IPV6, IPV6_PKTINFO):
            answer = [(level, kind, struct.pack("16si", info[:16], 0))]
    sock.sendmsg([data], answer, 0, source)


def _listen(
    space: NetNs, family: socket.AddressFamily, kind: socket.SocketKind, port: int
) -> socket.socket | None:
    """A socket on the port; None when that is not to be had."""
    try:
        sock = space.socket(family, kind)
    except OSError:
        return None
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(kind == socket.SOCK_STREAM))
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_DGRAM and family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
        elif kind == socket.SOCK_DGRAM:
            sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        sock.bind(("", port))
        if kind == socket.SOCK_STREAM:
            sock.listen(128)
    except OSError:
        sock.close()
        return None
    return sock
