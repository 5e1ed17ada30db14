"""Flows as the kernel writes them, and names for their numbers."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

from services.common.instance import Instance
from services.common.pipeline.abi import FibAddr
from services.policy import abi
from services.policy.flows.part import FlowsPart


class Names:
    """Identity n has the labels app=<n % 3> and id=<n>, endpoint n is the pod shop/p<n>, rules from 16 are of shop/api."""

    def labels(self, identity: int) -> Mapping[str, str]:
        return {"app": str(identity % 3), "id": str(identity)} if identity else {}

    def pod(self, endpoint: int) -> str:
        return f"shop/p{endpoint}" if endpoint != 9 else ""

    def rule(self, number: int) -> tuple[str, str]:
        return ("Policy shop/api", f"rule{number}") if number >= abi.RULE_FIRST else ("", "")


def part(size: int) -> FlowsPart:
    """With names for all numbers."""
    known = asyncio.Event()
    known.set()
    return FlowsPart(Instance.from_env("t-flows"), size, "n1", Names(), known, lambda stat: 10 + stat)


def raw(
    src: str = "10.0.0.1", dst: str = "10.0.0.2", sport: int = 40000, dport: int = 80, **more: Any
) -> bytes:
    """A struct pol_event; a TCP connection that was allowed just now unless more says otherwise."""
    values = {
        "time": time.monotonic_ns(),
        "proto": 6,
        "type": 1,
        "verdict": 1,
        "family": 2,
        "tcp_flags": 2,
        **more,
    }
    event = abi.Event(
        src=FibAddr.of(ip_address(src)),
        dst=FibAddr.of(ip_address(dst)),
        sport=socket.htons(sport),
        dport=socket.htons(dport),
        **values,
    )
    return bytes(event)
