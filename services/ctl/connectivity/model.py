"""What a connectivity test is about: places that ask, addresses that are asked, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

PORT = 4241  # TCP and UDP; nothing is expected there but the test's own responder
KINDS = ("icmp", "tcp", "udp", "large")
POD, NODE, WORLD = "pod", "node", "world"
HERE = ""  # namespace of a source that is in that of this process


@dataclass(frozen=True)
class Source:
    """Somewhere to ask from: a pod, or a node (its own network namespace).

    addresses: its own, which it is not asked about. families: of the addresses it can ask. mtu: of its interface,
    bytes; 0: not known.
    """

    name: str
    node: str
    netns: str
    addresses: frozenset[str]
    families: frozenset[int]
    is_pod: bool
    mtu: int = 0


@dataclass(frozen=True)
class Target:
    """An address to be asked. `node` is "" for the world. `mtu` is the pod's own when it is known; 0: not."""

    name: str
    node: str
    kind: str
    address: str
    mtu: int = 0

    @property
    def version(self) -> int:
        """4 or 6."""
        return ip_address(self.address).version


@dataclass
class Probe:
    """One question. `size` is what is sent (of "large": at most, 0: what the route takes); the answer's fields are
    filled in later."""

    source: Source
    target: Target
    kind: str
    size: int = 0
    ok: bool = False
    ms: float = 0.0
    detail: str = "was not asked"
    passed: int = 0

    def record(self) -> dict[str, Any]:
        """For JSON and tables."""
        return {
            "from": self.source.name,
            "to": self.target.name,
            "address": self.target.address,
            "kind": self.kind,
            "ok": self.ok,
            "rtt_ms": self.ms,
            "bytes": self.passed,
            "wanted_bytes": self.size,
            "result": self.detail,
        }


@dataclass
class Cluster:
    """What one cluster's nodes know together.

    mtu: (from node, to node) -> largest packet of a pod between them, bytes; missing: not known.
    """

    sources: list[Source] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    mtu: dict[tuple[str, str], int] = field(default_factory=dict)
