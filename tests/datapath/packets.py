"""Packets of pod A in scapy, with the addresses they should have unless a test says otherwise."""

from __future__ import annotations

import ipaddress
from typing import Any

from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from services.common.pipeline import abi
from tests.datapath.harness import HOST_MAC, A


def mac(pod: abi.Endpoint) -> str:
    return bytes(pod.pod_mac).hex(":")


def ether(**fields: Any) -> Ether:
    """From pod A to its gateway."""
    return Ether(**{"src": mac(A), "dst": HOST_MAC, **fields})


def ip(to: abi.Endpoint | str, family: int = 4, source: abi.Endpoint | str = A, **fields: Any) -> IP | IPv6:
    """An IP header from pod A to a pod or address; `ttl` is the hop limit of either family."""
    if family == 4:
        return IP(src=_text(source, 4), dst=_text(to, 4), **fields)
    if "ttl" in fields:
        fields["hlim"] = fields.pop("ttl")
    return IPv6(src=_text(source, 6), dst=_text(to, 6), **fields)


def _text(who: abi.Endpoint | str, family: int) -> str:
    if isinstance(who, str):
        return str(ipaddress.ip_address(who))
    return str(who.ipv4 if family == 4 else who.ipv6)


def delivered(packet: Any, to: abi.Endpoint) -> bytes:
    """The frame as it should reach pod `to`: its MACs and one hop less."""
    after = Ether(bytes(packet))
    after.src, after.dst = HOST_MAC, mac(to)
    if IP in after:
        after[IP].ttl -= 1
        del after[IP].chksum
    else:
        after[IPv6].hlim -= 1
    return bytes(after)
