"""A route netlink socket that sends requests by the batch.

Requests are encoded by pyroute2's message classes; socket, batching and reading are here, because
pyroute2's own sockets bring an event loop each (8 ms to open one in another namespace, where a plain
socket takes 0.1) and send message by message. Answers are read by a walker that takes only the attributes
asked for.

`import pyroute2` alone runs 300 modules of all its features (80 ms, 13 MB); the message classes need 37 of
them (13 ms, 2 MB), so these are imported under a bare package object that is gone afterwards.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import importlib
import importlib.util
import os
import socket
import struct
import sys
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from services.common import errors
from services.common.kernel.netns import NetNs

NEWLINK, DELLINK, GETLINK, SETLINK = 16, 17, 18, 19
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
NEWNEIGH, DELNEIGH, GETNEIGH = 28, 29, 30
NEWRULE, DELRULE, GETRULE = 32, 33, 34
NEWQDISC, DELQDISC, GETQDISC = 36, 37, 38
NEWTFILTER, DELTFILTER, GETTFILTER = 44, 45, 46

REQUEST, MULTI, ACK, ECHO, DUMP_INTR = 1, 2, 4, 8, 16
REPLACE, EXCL, CREATE, DUMP = 0x100, 0x200, 0x400, 0x300

_NLMSG_ERROR, _NLMSG_DONE, _NLMSG_OVERRUN = 2, 3, 4
_SOL_NETLINK, _CAP_ACK, _EXT_ACK, _GET_STRICT_CHK = 270, 10, 11, 12
_SIOCGIFINDEX: Final = 0x8933
_CODECS: Final = {
    NEWLINK: "ifinfmsg.ifinfmsg",
    NEWADDR: "ifaddrmsg.ifaddrmsg",
    NEWROUTE: "rtmsg.rtmsg",
    NEWNEIGH: "ndmsg.ndmsg",
    NEWRULE: "fibmsg.fibmsg",
    NEWQDISC: "tcmsg.tcmsg",
    NEWTFILTER: "tcmsg.tcmsg",
}
# Sizes of the fixed part each family of messages starts with.
FIXED: Final = {
    NEWLINK: 16,
    NEWADDR: 8,
    NEWROUTE: 12,
    NEWNEIGH: 12,
    NEWRULE: 12,
    NEWQDISC: 20,
    NEWTFILTER: 20,
}


_importing = threading.Lock()


@functools.cache
def _codec(kind: int) -> Any:
    """pyroute2's class for a message type (see the module's docstring for the odd import)."""
    # Services in one process have a netlink thread each.
    with _importing:
        return _import(kind)


def _import(kind: int) -> Any:
    module, _, name = _CODECS[kind & ~3].partition(".")
    real = sys.modules.get("pyroute2")
    if real is None:
        spec = importlib.util.find_spec("pyroute2")
        if spec is None or spec.submodule_search_locations is None:
            raise errors.FailedPrecondition(
                "the Python package pyroute2 is missing", fix="run `make install`"
            )
        bare = types.ModuleType("pyroute2")
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules["pyroute2"] = bare
    try:
        return getattr(importlib.import_module(f"pyroute2.netlink.rtnl.{module}"), name)
    finally:
        if real is None:
            del sys.modules["pyroute2"]


def preload() -> None:
    """Import the message classes (30 ms) now rather than in the first request."""
    for kind in _CODECS:
        _codec(kind)


@dataclass(frozen=True)
class Message:
    """One request: fixed fields and attributes as pyroute2 names them, and words for error messages."""

    kind: int
    fields: Mapping[str, Any]
    attrs: Sequence[tuple[str, Any]]
    flags: int = 0
    what: str = ""
    tolerate: frozenset[int] = frozenset()
    """Errors that mean there was nothing to do, e.g. ESRCH for a deletion."""

    def encode(self, sequence: int, flags: int) -> bytes:
        message = _codec(self.kind)()
        for name, value in self.fields.items():
            message[name] = value
        message["attrs"] = list(self.attrs)
        header = message["header"]
        header["type"], header["flags"], header["sequence_number"] = self.kind, self.flags | flags, sequence
        message.encode()
        data = bytes(message.data)
        return data + b"\0" * (-len(data) % 4)


@dataclass(frozen=True)
class Answer:
    """A message from the kernel: type, fixed part, attributes (undecoded)."""

    kind: int
    fixed: bytes
    attrs: dict[int, bytes]


def attributes(data: bytes) -> dict[int, bytes]:
    """Attributes by number (nested flag removed); of a repeated one the last."""
    found, at = {}, 0
    while at + 4 <= len(data):
        length, number = struct.unpack_from("HH", data, at)
        if length < 4:
            break
        found[number & 0x3FFF] = data[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


def parse(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(type, flags, sequence, payload) of each message in a datagram."""
    at = 0
    while at + 16 <= len(data):
        length, kind, flags, sequence, _ = struct.unpack_from("IHHII", data, at)
        if length < 16:
            break
        yield kind, flags, sequence, data[at + 16 : at + length]
        at += (length + 3) & ~3


def answer(kind: int, payload: bytes) -> Answer:
    size = FIXED.get(kind & ~3, 0)
    return Answer(kind, payload[:size], attributes(payload[size:]))


def typed_error(number: int, what: str, detail: str = "") -> errors.FibrilError:
    """The error class for a netlink errno; `detail` is the kernel's own sentence, if it sent one."""
    kind, fix = {
        errno.EPERM: (errors.PermissionDenied, "run as root with CAP_NET_ADMIN"),
        errno.EACCES: (errors.PermissionDenied, "run as root with CAP_NET_ADMIN"),
        errno.EEXIST: (errors.AlreadyExists, ""),
        errno.EADDRINUSE: (errors.AlreadyExists, ""),
        errno.ENODEV: (errors.NotFound, ""),
        errno.ENOENT: (errors.NotFound, ""),
        errno.ESRCH: (errors.NotFound, ""),
        errno.ENOBUFS: (errors.ResourceExhausted, ""),
        errno.ENOMEM: (errors.ResourceExhausted, ""),
        errno.ENOSPC: (errors.ResourceExhausted, ""),
        errno.EBUSY: (errors.Unavailable, "try again"),
        errno.EOPNOTSUPP: (errors.FailedPrecondition, "this kernel lacks the feature"),
    }.get(number, (errors.FailedPrecondition, ""))
    return kind(f"{what}: {os.strerror(number)}" + (f" ({detail})" if detail else ""), fix=fix)


class RtnlSocket:
    """Requests and dumps in one namespace. Blocking, for one thread."""

    def __init__(self, netns: NetNs | None = None) -> None:
        """In `netns`, else in the calling thread's namespace. PermissionDenied if it may not be entered."""
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        if netns is None:
            self._sock = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        else:
            self._sock = netns.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        for option in (_CAP_ACK, _EXT_ACK, _GET_STRICT_CHK):
            self._sock.setsockopt(_SOL_NETLINK, option, 1)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        # The kernel answers at once; this only turns a bug into an error instead of a stuck thread.
        self._sock.settimeout(10)
        self._sequence = 0

    @property
    def raw(self) -> socket.socket:
        return self._sock

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ifindex(self, name: str) -> int:
        """The index of an interface in this socket's namespace, 0 if there is none of this name."""
        request = struct.pack("16si20x", name.encode(), 0)
        try:
            return int(struct.unpack_from("16xi", fcntl.ioctl(self._sock, _SIOCGIFINDEX, request))[0])
        except OSError as error:
            if error.errno == errno.ENODEV:
                return 0
            raise

    def apply(self, messages: Sequence[Message]) -> None:
        """Send all in one write and check every acknowledgement; raises the first failure as a typed error.

        The kernel works through them in order and does not stop at a failure.
        """
        for number, detail, message in self._transact(messages):
            raise typed_error(number, message.what, detail)

    def try_apply(self, messages: Sequence[Message]) -> list[errors.FibrilError]:
        """As apply, but returns the failures."""
        return [
            typed_error(number, message.what, detail) for number, detail, message in self._transact(messages)
        ]

    def _transact(self, messages: Sequence[Message]) -> list[tuple[int, str, Message]]:
        first, out = self._sequence + 1, []
        for message in messages:
            self._sequence += 1
            out.append(message.encode(self._sequence, REQUEST | ACK))
        if not out:
            return []
        self._sock.send(b"".join(out))
        waiting, failures = len(out), []
        while waiting:
            for kind, _, sequence, payload in parse(self._receive()):
                if kind != _NLMSG_ERROR or not first <= sequence <= self._sequence:
                    continue
                waiting -= 1
                number = -struct.unpack_from("i", payload)[0]
                message = messages[sequence - first]
                if number and number not in message.tolerate:
                    failures.append((number, _sentence(payload), message))
        return failures

    def dump(self, message: Message) -> list[Answer]:
        """All objects the kernel has for a GET request.

        Starts over if they changed meanwhile (at most 10 times).
        """
        for _ in range(10):
            found, consistent = self._dump(message)
            if consistent:
                return found
        raise errors.Unavailable(
            f"{message.what}: the kernel's table kept changing while it was read", fix="try again"
        )

    def _dump(self, message: Message) -> tuple[list[Answer], bool]:
        self._sequence += 1
        # A GET request has the codec of its NEW twin.
        self._sock.send(message.encode(self._sequence, REQUEST | DUMP))
        found: list[Answer] = []
        consistent = True
        while True:
            for kind, flags, sequence, payload in parse(self._receive()):
                if sequence != self._sequence:
                    continue
                consistent = consistent and not flags & DUMP_INTR
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    number = -struct.unpack_from("i", payload)[0] if len(payload) >= 4 else 0
                    if number:
                        raise typed_error(number, message.what)
                    return found, consistent
                found.append(answer(kind, payload))

    def get(self, message: Message) -> Answer:
        """The one object a GET request names. Typed error if the kernel refuses, NotFound if there is
        none.
        """
        self._sequence += 1
        self._sock.send(message.encode(self._sequence, REQUEST))
        while True:
            for kind, _, sequence, payload in parse(self._receive()):
                if sequence != self._sequence:
                    continue
                if kind == _NLMSG_ERROR:
                    raise typed_error(-struct.unpack_from("i", payload)[0], message.what, _sentence(payload))
                return answer(kind, payload)

    def _receive(self) -> bytes:
        try:
            return self._sock.recv(1 << 18)
        except TimeoutError:
            raise errors.Unavailable("the kernel did not answer a netlink request within 10 s") from None


def _sentence(payload: bytes) -> str:
    """The kernel's extended acknowledgement text of an NLMSG_ERROR payload."""
    return attributes(payload[20:]).get(1, b"").rstrip(b"\0").decode(errors="replace")
