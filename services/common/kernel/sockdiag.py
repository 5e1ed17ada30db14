"""Find the kernel's sockets by whom they are connected to, and end them (NETLINK_SOCK_DIAG).

A socket is named by its cookie, which is never given again (the same as bpf_get_socket_cookie gives). Ending one is
SOCK_DESTROY: a TCP peer gets a reset, the process ECONNABORTED, also on a connected UDP socket. Structures follow
include/uapi/linux/inet_diag.h. Functions block.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Self

from services.common import errors
from services.common.kernel.netns import NetNs

Remote = tuple[IPv4Address | IPv6Address, int]
"""Address and port."""

_NETLINK_SOCK_DIAG: Final = 4
_BY_FAMILY, _DESTROY = 20, 21
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_ERROR, _DONE = 2, 3
_HEADER: Final = struct.Struct("=IHHII")
# inet_diag_req_v2 without its inet_diag_sockid, which is the next.
_REQ: Final = struct.Struct("=BBBxI")
_ID: Final = 48
_ANY_ID: Final = bytes(_ID)
# Where inet_diag_msg has its sockid, and that its cookie.
_MSG_ID, _COOKIE = 4, 40
_BYTECODE, _D_COND = 1, 8
_TIME_WAIT, _LISTEN, _NEW = 6, 10, 12
# All states of sockets that a process may still hold and that have a peer.
_STATES: Final = 0x1FFF & ~(1 << _TIME_WAIT | 1 << _LISTEN | 1 << _NEW | 1 << 0)
_HELD: Final = _STATES | 1 << _LISTEN
_RECEIVE: Final = 1 << 16
_BATCH: Final = 64


class SockDiag:
    """Sockets of one network namespace."""

    def __init__(self, netns: NetNs | None = None) -> None:
        """None: the calling thread's. Enters the namespace for a moment: on a thread that may."""
        kind = (socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
        try:
            self._socket = netns.socket(*kind) if netns is not None else socket.socket(*kind)
        except OSError as error:
            raise errors.FailedPrecondition(
                f"cannot look at sockets: {error.strerror}", fix="the kernel needs CONFIG_INET_DIAG"
            ) from None
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connected(self, proto: int, family: int, remote: Remote | None = None) -> Iterator[tuple[int, bytes]]:
        """(cookie, what `destroy` wants) of each socket of a family that has a peer, or that very one.

        Sockets of AF_INET6 also have IPv4 peers. FailedPrecondition if the kernel cannot tell.
        """
        attribute = b""
        if remote is not None:
            condition = _condition(*remote)
            attribute = struct.pack("=HH", 4 + len(condition), _BYTECODE) + condition
        yield from self._dump(proto, family, _STATES, attribute)

    def cookies(self, proto: int, family: int) -> set[int]:
        """Of all sockets of a family that have a port."""
        return {cookie for cookie, _ in self._dump(proto, family, _HELD)}

    def _dump(
        self, proto: int, family: int, states: int, attribute: bytes = b""
    ) -> Iterator[tuple[int, bytes]]:
        request = _REQ.pack(family, proto, 0, states) + _ANY_ID + attribute
        self._send([request], _BY_FAMILY, _REQUEST | _DUMP)
        while True:
            for kind, payload in self._receive():
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    number = -struct.unpack_from("=i", payload)[0]
                    raise errors.FailedPrecondition(
                        f"cannot list sockets of protocol {proto}: {os.strerror(number)}",
                        fix="the kernel needs CONFIG_INET_TCP_DIAG and CONFIG_INET_UDP_DIAG",
                    )
                ident = payload[_MSG_ID : _MSG_ID + _ID]
                yield struct.unpack_from("=Q", ident, _COOKIE)[0], ident

    def destroy(self, proto: int, family: int, sockets: Mapping[int, bytes]) -> dict[int, int]:
        """End sockets that `connected` has given, by cookie: what the kernel answered for each (0: ended, ENOENT: gone
        already).
        """
        answers: dict[int, int] = {}
        cookies = list(sockets)
        for at in range(0, len(cookies), _BATCH):
            chunk = cookies[at : at + _BATCH]
            requests = [_REQ.pack(family, proto, 0, _STATES) + sockets[cookie] for cookie in chunk]
            first = self._send(requests, _DESTROY, _REQUEST | _ACK)
            waiting = len(chunk)
            while waiting:
                for kind, payload in self._receive():
                    if kind == _ERROR:
                        number, _, _, _, sequence, _ = struct.unpack_from("=iIHHII", payload)
                        answers[chunk[sequence - first]] = -number
                        waiting -= 1
        return answers

    def _send(self, requests: Sequence[bytes], kind: int, flags: int) -> int:
        """Sequence number of the first."""
        first = self._sequence + 1
        self._sequence += len(requests)
        datagram = b"".join(
            _HEADER.pack(_HEADER.size + len(request), kind, flags, first + index, 0) + request
            for index, request in enumerate(requests)
        )
        self._socket.sendto(datagram, (0, 0))
        return first

    def _receive(self) -> Iterator[tuple[int, bytes]]:
        """(type, payload) of each message of a datagram."""
        try:
            data = self._socket.recv(_RECEIVE)
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                raise errors.Unavailable("answers about sockets were lost", fix="it is tried again") from None
            raise
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, _, _, _ = _HEADER.unpack_from(data, at)
            yield kind, data[at + _HEADER.size : at + length]
            at += (length + 3) & ~3


def _condition(address: IPv4Address | IPv6Address, port: int) -> bytes:
    """A filter: one instruction, "the peer is"; beyond its end is "no"."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    host = struct.pack("=BBxxi", family, address.max_prefixlen, port) + address.packed
    length = 4 + len(host)
    return struct.pack("=BBH", _D_COND, length, length + 4) + host
