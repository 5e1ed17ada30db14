"""Configuration of the policy process; every option has a default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from services.common.errors import InvalidArgument
from services.common.etcd.config import EtcdConfig
from services.common.host import HostConfig
from services.common.network import NetworkConfig

_LIMITS: Final = {
    "connections": (1024, 1 << 24),
    "syn_s": (1, 3600),
    "close_s": (1, 3600),
    "tcp_s": (60, 864_000),
    "any_s": (1, 864_000),
    "flows": (16, 1 << 20),
}


@dataclass(frozen=True)
class PolicySection:
    """Section `policy`."""

    devices: tuple[str, ...] = field(
        default=(),
        metadata={"help": "interfaces the host's own traffic goes by; none: those of the default routes"},
    )
    audit: bool = field(
        default=False, metadata={"help": "report what policies deny on this node, and let it pass"}
    )
    allow_local_host: bool = field(
        default=True,
        metadata={"help": "let this node's own processes reach its pods whatever policies say (probes of kubelet)"},
    )
    report: bool = field(
        default=True, metadata={"help": "record connections that are allowed, too, not only refused ones"}
    )
    flows: int = field(default=8192, metadata={"help": "flows remembered for fibril flow"})
    connections: int = field(
        default=131_072, metadata={"help": "established connections remembered; beyond, those longest silent go first"}
    )
    syn_s: int = field(
        default=60, metadata={"help": "seconds of silence after which a TCP connection nobody answered is over"}
    )
    close_s: int = field(default=10, metadata={"help": "the same when both ends have closed, or one has reset"})
    tcp_s: int = field(default=21_600, metadata={"help": "the same for TCP otherwise"})
    any_s: int = field(default=120, metadata={"help": "the same for all other protocols"})

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            if not least <= getattr(self, name) <= most:
                raise InvalidArgument(f"{getattr(self, name)} is outside {least}..{most}", field=name)


@dataclass(frozen=True)
class PolicyConfig:
    """All sections of the policy process."""

    host: HostConfig = field(default_factory=HostConfig)
    etcd: EtcdConfig = field(default_factory=EtcdConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    policy: PolicySection = field(default_factory=PolicySection)
