"""Whether pods and host reach each other: ICMP echo requests from inside every namespace at once.

No `ping` is needed. A raw socket is opened inside a namespace and used from here; all answers are awaited
together, so a check takes as long as its slowest answer, whatever the number of pods.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from services.common.errors import FibrilError
from services.common.kernel.netns import NetNs

WAIT_S = 1.0
TRIES = 2
ALL_PAIRS_TO = 16  # more pods than this are checked in a ring, each with the next

ICMP_ECHO, ICMP_REPLY, ICMP6_ECHO, ICMP6_REPLY = 8, 0, 128, 129
SO_TIMESTAMPNS = 35  # asm-generic/socket.h; also the type of the message that carries the time


@dataclass(frozen=True)
class Place:
    """Somewhere to send from and to: a pod, or the host (`netns` is None). Addresses are "" where a
    family is missing."""

    name: str
    netns: str | None
    ipv4: str
    ipv6: str


@dataclass
class Probe:
    """One echo request. `result` is "ok" or says what went wrong; `ms` is the round-trip time, 0 without
    an answer."""

    source: Place
    target: Place
    address: str
    result: str = ""
    ms: float = 0.0
    _sent_ns: int = 0


def plan(places: Sequence[Place], targets: Sequence[Place] = ()) -> list[Probe]:
    """Who asks whom: every pod every other (a ring of them past ALL_PAIRS_TO) and the host, the host
    every pod; every pod every address of `targets`."""
    pods = [p for p in places if p.netns is not None]
    hosts = [p for p in places if p.netns is None]
    if len(pods) <= ALL_PAIRS_TO:
        pairs = [(a, b) for a in pods for b in pods if a is not b]
    else:
        pairs = [(pods[i - 1], pods[i]) for i in range(len(pods))]
    pairs += [pair for pod in pods for host in hosts for pair in ((pod, host), (host, pod))]
    pairs += [(pod, target) for pod in pods for target in targets]
    return [
        Probe(a, b, address)
        for a, b in pairs
        for own, address in ((a.ipv4, b.ipv4), (a.ipv6, b.ipv6))
        if own and address
    ]


def run(probes: Iterable[Probe]) -> None:
    """Send and fill in the results; blocks at most TRIES * WAIT_S seconds."""
    with _Sockets() as sockets:
        open_probes: dict[tuple[int, int], Probe] = {}
        sequence: dict[int, int] = {}
        ready = []
        for probe in probes:
            try:
                sock = sockets.get(probe.source, ip_address(probe.address).version)
            except (FibrilError, OSError) as error:
                probe.result = str(error)
                continue
            number = sequence[sock.fileno()] = sequence.get(sock.fileno(), 0) + 1
            open_probes[sock.fileno(), number] = probe
            ready.append((sock, number, probe))
        for _ in range(TRIES):
            for sock, number, probe in ready:
                if not probe.result:
                    _send(sock, number, probe)
            _collect(sockets, open_probes)
        for probe in open_probes.values():
            probe.result = probe.result or f"no answer within {WAIT_S:g} s"


def _send(sock: socket.socket, number: int, probe: Probe) -> None:
    six = sock.family == socket.AF_INET6
    body = struct.pack("!HH", IDENT, number & 0xFFFF) + PAYLOAD
    kind = ICMP6_ECHO if six else ICMP_ECHO
    # The kernel fills in the checksum of ICMPv6, not that of ICMP.
    checksum = 0 if six else _checksum(struct.pack("!BBH", kind, 0, 0) + body)
    probe._sent_ns = time.time_ns()
    try:
        sock.sendto(struct.pack("!BBH", kind, 0, checksum) + body, (probe.address, 0))
    except OSError as error:
        probe.result = f"cannot send: {error.strerror}"


def _collect(sockets: _Sockets, probes: dict[tuple[int, int], Probe]) -> None:
    """Take answers until all are there or the time is over."""
    poll = select.poll()
    for fd in sockets.by_fd:
        poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + WAIT_S
    while any(not p.result for p in probes.values()):
        left = deadline - time.monotonic()
        if left <= 0:
            return
        for fd, _ in poll.poll(left * 1000):
            sock = sockets.by_fd[fd]
            try:
                packet, extra, _, (source, *_rest) = sock.recvmsg(2048, 64)
            except OSError:
                continue  # an ICMP error that came for one of ours; the request stays without an answer
            probe = probes.get((fd, _sequence(sock, packet)))
            if probe is not None and not probe.result and ip_address(source) == ip_address(probe.address):
                probe.result, probe.ms = "ok", (_arrival_ns(extra) - probe._sent_ns) / 1e6


def _sequence(sock: socket.socket, packet: bytes) -> int:
    """Sequence number of an echo reply of ours, -1 for anything else."""
    if sock.family == socket.AF_INET:
        packet = packet[(packet[0] & 15) * 4 :]  # raw IPv4 sockets give the IP header as well
    if len(packet) < 8:
        return -1
    kind, _, _, ident, number = struct.unpack_from("!BBHHH", packet)
    reply = ICMP_REPLY if sock.family == socket.AF_INET else ICMP6_REPLY
    return int(number) if kind == reply and ident == IDENT else -1


def _arrival_ns(extra: Sequence[tuple[int, int, bytes]]) -> int:
    """When the kernel took the packet, Unix time in ns; now if it does not say. While many are awaited at once, the
    moment at which we get round to reading one says nothing about the network."""
    for level, kind, data in extra:
        if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS) and len(data) >= 16:
            seconds, nanos = struct.unpack_from("qq", data)
            return int(seconds * 10**9 + nanos)
    return time.time_ns()


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


IDENT = os.getpid() & 0xFFFF
PAYLOAD = b"fibril check".ljust(56, b".")


class _Sockets:
    """One raw socket a place and family, opened when first needed."""

    def __init__(self) -> None:
        self.by_fd: dict[int, socket.socket] = {}
        self._made: dict[tuple[Place, int], socket.socket] = {}

    def __enter__(self) -> _Sockets:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self.by_fd.values():
            sock.close()

    def get(self, place: Place, version: int) -> socket.socket:
        """Raises NotFound when the namespace is gone, PermissionError without CAP_NET_RAW."""
        made = self._made.get((place, version))
        if made is None:
            family, protocol = (
                (socket.AF_INET, socket.IPPROTO_ICMP)
                if version == 4
                else (socket.AF_INET6, socket.IPPROTO_ICMPV6)
            )
            if place.netns is None:
                made = socket.socket(family, socket.SOCK_RAW, protocol)
            else:
                with NetNs.open(place.netns) as space:
                    made = space.socket(family, socket.SOCK_RAW, protocol)
            made.setblocking(False)
            made.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
            self._made[place, version] = self.by_fd[made.fileno()] = made
        return made
