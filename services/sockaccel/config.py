"""Configuration of the sockaccel process; every option has a default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from services.common.errors import InvalidArgument
from services.common.etcd.config import EtcdConfig
from services.common.host import HostConfig
from services.common.network import NetworkConfig

_LIMITS: Final = {"bulk_bytes": (4096, 1 << 24), "proofs": (2, 1000)}


@dataclass(frozen=True)
class SockAccelSection:
    """Section `sockaccel`."""

    cgroup: str = field(
        default="",
        metadata={"help": "control group whose processes are considered, below the cgroup2 mount; empty: all"},
    )
    proxy_ports: tuple[int, ...] = field(
        default=(15001, 15006, 15008, 4140, 4143),
        metadata={"help": "ports that proxies beside applications listen on (Istio's and Linkerd's)"},
    )
    proxy_uids: tuple[int, ...] = field(
        default=(1337, 2102), metadata={"help": "users that such proxies run as (Istio's and Linkerd's)"}
    )
    bulk_bytes: int = field(
        default=65_536,
        metadata={"help": "bytes without a word of the other end, or left unread, above which a connection stays on TCP"},
    )
    proofs: int = field(default=4, metadata={"help": "changes of speaker on TCP before a connection is shortened"})
    beat_s: float = field(
        default=30.0,
        metadata={"help": "seconds after which a shortened connection sends over TCP once, for conntracks on its way"},
    )

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            if not least <= getattr(self, name) <= most:
                raise InvalidArgument(f"{getattr(self, name)} is outside {least}..{most}", field=name)
        if not 1 <= self.beat_s <= 3600:
            raise InvalidArgument(f"{self.beat_s:g} is outside 1..3600", field="beat_s")
        for at, port in enumerate(self.proxy_ports):
            if not 1 <= port <= 65535:
                raise InvalidArgument(f"{port} is no port", field=f"proxy_ports[{at}]")
        for at, uid in enumerate(self.proxy_uids):
            if not 0 <= uid < 1 << 32:
                raise InvalidArgument(f"{uid} is no user id", field=f"proxy_uids[{at}]")
        if self.cgroup.startswith("/") or ".." in self.cgroup.split("/"):
            raise InvalidArgument(
                f"{self.cgroup!r} is not below the cgroup2 mount", field="cgroup", fix="give it without leading slash"
            )


@dataclass(frozen=True)
class SockAccelConfig:
    """All sections of the sockaccel process; etcd and the network are those of the node, and not needed here."""

    host: HostConfig = field(default_factory=HostConfig)
    etcd: EtcdConfig = field(default_factory=EtcdConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    sockaccel: SockAccelSection = field(default_factory=SockAccelSection)
