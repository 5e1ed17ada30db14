"""Classes of connections, as values."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

PORTS_MAX: Final = 4096
"""Ports a class may name in all."""


class Scope(enum.IntEnum):
    """Where the two ends are; numbers as in fibril.sockaccel.v1.Scope."""

    POD = 1
    PODS = 2
    HOST_POD = 3
    HOST = 4


@dataclass(frozen=True)
class Class:
    """Which connections may be shortened: all conditions hold."""

    name: str
    enabled: bool
    scopes: frozenset[Scope]
    ports: tuple[tuple[int, int], ...] = ()
    """First and last; none: any."""
    client_labels: Mapping[str, str] = field(default_factory=dict)
    server_labels: Mapping[str, str] = field(default_factory=dict)
    cgroups: tuple[str, ...] = ()
    """Below the root of cgroup v2, without a slash at either end."""
    proxies_only: bool = False
    nonblocking_only: bool = False
    """Neither end waits in recv()."""


LOCAL_PROXIES: Final = Class("local-proxies", True, frozenset({Scope.POD}), proxies_only=True, nonblocking_only=True)
"""What a node begins with: an application and the proxy beside it. Nobody has asked for it: so only where calls are as ever."""
