"""What a service is, as the lb service keeps it. Pure values; services/lb/convert.py makes them from messages."""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from services.common.pipeline.abi import IPAddress
from services.lb.abi import BackendState

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

TCP: Final = 6
UDP: Final = 17
SCTP: Final = 132

ANY_V4: Final = ipaddress.IPv4Address(0)
ANY_V6: Final = ipaddress.IPv6Address(0)
"""Addresses of node ports: every one of the node's."""


class FrontendType(enum.IntEnum):
    """Numbers as in fibril.lb.v1.FrontendType; so in all that follow."""

    CLUSTER_IP = 1
    NODE_PORT = 2
    EXTERNAL_IP = 3
    LOAD_BALANCER = 4
    HOST_PORT = 5


class Algorithm(enum.IntEnum):
    RANDOM = 1
    MAGLEV = 2


class TrafficPolicy(enum.IntEnum):
    CLUSTER = 1
    LOCAL = 2


class Topology(enum.IntEnum):
    ANY = 1
    SAME_ZONE = 2
    SAME_NODE = 3


class Forwarding(enum.IntEnum):
    """DEFAULT: the node's own."""

    DEFAULT = 0
    SNAT = 1
    DSR = 2
    HYBRID = 3


class NoBackend(enum.IntEnum):
    REJECT = 1
    DROP = 2


@dataclass(frozen=True, slots=True)
class Frontend:
    """One address family each: a node port for both is two."""

    type: FrontendType
    address: IPAddress
    proto: int
    port: int
    port_last: int
    """Last of the range; equal to `port` for a single one."""
    node: str = ""
    """HOST_PORT: whose."""
    at: int = field(default=0, compare=False)
    """Which of the declaration's frontends it comes from."""

    @property
    def outside(self) -> bool:
        """Whether clients outside the cluster come here."""
        return self.type is not FrontendType.CLUSTER_IP


class BackendKey(NamedTuple):
    """A backend within its service."""

    address: IPAddress
    port: int


@dataclass(frozen=True, slots=True)
class Backend:
    key: BackendKey
    weight: int = 1
    zone: str = ""
    node: str = ""
    cluster: str = ""
    state: BackendState = BackendState.ACTIVE
    """As declared; never FREE."""
    origin: str = ""
    """Who declares it."""


@dataclass(frozen=True, slots=True)
class TcpProbe:
    pass


@dataclass(frozen=True, slots=True)
class HttpProbe:
    path: str = "/"
    host: str = ""
    statuses: tuple[tuple[int, int], ...] = ((200, 399),)
    """Ranges, both ends included."""


@dataclass(frozen=True, slots=True)
class GrpcProbe:
    service: str = ""


@dataclass(frozen=True, slots=True)
class HealthCheck:
    probe: TcpProbe | HttpProbe | GrpcProbe
    port: int = 0
    """0: the backend's."""
    interval_s: float = 10.0
    timeout_s: float = 1.0
    unhealthy_after: int = 3
    healthy_after: int = 2


@dataclass(frozen=True, slots=True)
class Spec:
    """A service but for its backends. Defaults are resolved: nothing is "unspecified" here but forwarding and a Maglev
    size of 0, which follows the number of backends.
    """

    name: str
    frontends: tuple[Frontend, ...]
    algorithm: Algorithm = Algorithm.RANDOM
    maglev_size: int = 0
    affinity_s: int = 0
    internal: TrafficPolicy = TrafficPolicy.CLUSTER
    external: TrafficPolicy = TrafficPolicy.CLUSTER
    topology: Topology = Topology.ANY
    sources: tuple[IPNetwork, ...] = ()
    forwarding: Forwarding = Forwarding.DEFAULT
    no_backend: NoBackend = NoBackend.REJECT
    health_check: HealthCheck | None = None
    health_check_node_port: int = 0
    annotations: Mapping[str, str] = field(default_factory=dict)


Backends = dict[BackendKey, Backend]
