"""What the data path should decide about a frame of a pod, in plain Python and without haste: the tests' oracle."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from services.common.pipeline import abi
from services.common.pipeline.reasons import Reason

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

EXTENSIONS = {0, 43, 44, 51, 60, 135}
WITH_PORTS = {17: 8, 132: 8, 136: 8}


class Drop(Exception):
    """The packet ends here."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.name)
        self.reason = reason


@dataclass
class Parsed:
    source: Address
    destination: Address
    proto: int
    sport: int = 0
    dport: int = 0
    icmp: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Decision:
    """`data` is the frame as it goes on; `parsed` is None where the IP header was not understood."""

    verdict: abi.Verdict
    reason: Reason
    data: bytes
    parsed: Parsed | None


def decide(frame: bytes, pod: abi.Endpoint, pods: Mapping[Address, abi.Endpoint]) -> Decision:
    """For a frame of `pod`, not a super-packet, with no services in the slots."""
    parsed: Parsed | None = None
    try:
        dest, source, ethertype = frame[:6], frame[6:12], int.from_bytes(frame[12:14], "big")
        if source != bytes(pod.pod_mac):
            raise Drop(Reason.SPOOFED_MAC)
        if ethertype in (0x8100, 0x88A8):
            raise Drop(Reason.VLAN)
        if ethertype == 0x800:
            parsed = parse_v4(frame)
        elif ethertype == 0x86DD:
            parsed = parse_v6(frame)
        else:
            raise Drop(Reason.ETHERTYPE)
        transport(frame, parsed)
        if isinstance(parsed.destination, ipaddress.IPv6Address) and parsed.proto == 58 and parsed.icmp[0] in (135, 136):
            raise Drop(Reason.NEIGHBOUR)
        if dest != bytes(pod.host_mac):
            raise Drop(Reason.BROADCAST if dest == b"\xff" * 6 else
                       Reason.MULTICAST if dest[0] & 1 else Reason.WRONG_MAC)
        if parsed.source not in (pod.ipv4, pod.ipv6):
            raise Drop(Reason.SPOOFED_IPV4 if parsed.source.version == 4 else Reason.SPOOFED_IPV6)
        return route(frame, parsed, pods)
    except Drop as drop:
        return Decision(abi.Verdict.DROPPED, drop.reason, frame, parsed)


def parse_v4(frame: bytes) -> Parsed:
    if frame[14] >> 4 != 4 or frame[14] & 15 < 5:
        raise Drop(Reason.MALFORMED)
    parsed = Parsed(ipaddress.IPv4Address(frame[26:30]), ipaddress.IPv4Address(frame[30:34]), frame[23])
    return parsed


def parse_v6(frame: bytes) -> Parsed:
    if frame[14] >> 4 != 6:
        raise Drop(Reason.MALFORMED)
    parsed = Parsed(ipaddress.IPv6Address(frame[22:38]), ipaddress.IPv6Address(frame[38:54]), frame[20])
    if any(isinstance(a, ipaddress.IPv6Address) and a.ipv4_mapped for a in (parsed.source, parsed.destination)):
        raise Drop(Reason.MARTIAN)
    return parsed


def transport(frame: bytes, parsed: Parsed) -> None:
    """Find the transport header and read what it has."""
    if parsed.source.version == 4:
        offset = 14 + (frame[14] & 15) * 4
        if int.from_bytes(frame[20:22], "big") & 0x1FFF:
            return
    else:
        offset = 54
        for _ in range(7):
            if parsed.proto not in EXTENSIONS:
                break
            header = frame[offset:offset + 4]
            if len(header) < 4:
                raise Drop(Reason.TRUNCATED)
            kind, parsed.proto = parsed.proto, header[0]
            offset += 8 if kind == 44 else (header[1] + 2) * 4 if kind == 51 else (header[1] + 1) * 8
            if kind == 44 and int.from_bytes(header[2:4], "big") >> 3:
                return
        else:
            raise Drop(Reason.EXT_HEADERS)
    rest = frame[offset:]
    if parsed.proto == 6:
        if len(rest) < 14:
            raise Drop(Reason.TRUNCATED)
        if rest[12] >> 4 < 5:
            raise Drop(Reason.MALFORMED)
    if parsed.proto in WITH_PORTS and len(rest) < 8:
        raise Drop(Reason.TRUNCATED)
    if parsed.proto in (1, 58):
        if len(rest) < 4:
            raise Drop(Reason.TRUNCATED)
        parsed.icmp = rest[0], rest[1]
    if parsed.proto == 6 or parsed.proto in WITH_PORTS:
        parsed.sport, parsed.dport = int.from_bytes(rest[:2], "big"), int.from_bytes(rest[2:4], "big")


def route(frame: bytes, parsed: Parsed, pods: Mapping[Address, abi.Endpoint]) -> Decision:
    to = pods.get(parsed.destination)
    if to is None:
        check_destination(parsed.destination)
        return Decision(abi.Verdict.TO_STACK, Reason.NONE, frame, parsed)
    hops = frame[22] if parsed.source.version == 4 else frame[21]
    if hops <= 1 or len(frame) - 14 > to.mtu:
        return Decision(abi.Verdict.TO_STACK, Reason.NONE, frame, parsed)
    data = bytearray(frame)
    data[:12] = bytes(to.pod_mac) + bytes(to.host_mac)
    if parsed.source.version == 4:
        data[22] -= 1
        # One's complement: what the header summed up to, right or wrong, it sums up to afterwards. Of the two zeros it is the
        # one that a computation anew would give, for no header sums up to zero.
        check = int.from_bytes(frame[24:26], "big") + 0x0100
        data[24:26] = (check + (check >= 0xFFFF) & 0xFFFF).to_bytes(2, "big")
    else:
        data[21] -= 1
    return Decision(abi.Verdict.DELIVERED, Reason.NONE, bytes(data), parsed)


def check_destination(address: Address) -> None:
    if address == ipaddress.IPv4Address("255.255.255.255"):
        raise Drop(Reason.BROADCAST)
    if address.is_multicast:
        raise Drop(Reason.MULTICAST)
    if address.version == 6 and address in ipaddress.IPv6Network("fe80::/10"):
        raise Drop(Reason.LINK_LOCAL)
    martians = ("0.0.0.0/8", "127.0.0.0/8", "240.0.0.0/4") if address.version == 4 else ("::/64",)
    if any(address in ipaddress.ip_network(net) for net in martians):
        raise Drop(Reason.MARTIAN)
