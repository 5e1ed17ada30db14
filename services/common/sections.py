"""Which sections of a node's configuration belong to which service.

One file serves all processes of a node: each reads its own sections and leaves alone those of others. Kept here,
and not asked of the services, so that none has to import another; a test compares it with their dataclasses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

SHARED: Final = ("host", "etcd", "network")
SECTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "ipam": (*SHARED, "pools", "endpoints", "cni", "monitor"),
    "identity": (*SHARED, "identities"),
    "lb": (*SHARED, "lb"),
    "policy": (*SHARED, "policy"),
    "sockaccel": (*SHARED, "sockaccel"),
}


def others(service: str) -> frozenset[str]:
    """Sections that only other services read."""
    found = {section for sections in SECTIONS.values() for section in sections}
    return frozenset(found - set(SECTIONS[service]))
