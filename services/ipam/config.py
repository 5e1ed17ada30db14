"""Configuration of the ipam process; every option has a default."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.common.errors import InvalidArgument
from services.common.etcd.config import EtcdConfig
from services.common.host import HostConfig
from services.common.network import NetworkConfig
from services.ipam.endpoints.model import MTU_MAX, MTU_MIN
from services.ipam.pools.config import PoolsConfig


@dataclass(frozen=True)
class EndpointsConfig:
    """Pod interfaces and what the node needs for them."""

    mtu: int = field(
        default=0, metadata={"help": "MTU of pods that ask for none, bytes; 0: what fits through the uplink"}
    )
    masquerade: bool = field(
        default=True, metadata={"help": "give what pods send to the world the node's address (nftables)"}
    )
    resync_s: float = field(
        default=60.0, metadata={"help": "seconds between comparisons of all endpoints with the kernel"}
    )

    def __post_init__(self) -> None:
        if self.mtu and not MTU_MIN <= self.mtu <= MTU_MAX:
            raise InvalidArgument(f"MTU {self.mtu} is outside {MTU_MIN}..{MTU_MAX}", field="mtu")
        if not 1 <= self.resync_s <= 86_400:
            raise InvalidArgument(f"{self.resync_s:g} is outside 1..86400", field="resync_s")


@dataclass(frozen=True)
class CniConfig:
    """The socket behind the CNI plugin."""

    enabled: bool = field(default=True, metadata={"help": "serve the CNI plugin on <run dir>/cni.sock"})
    timeout_s: float = field(
        default=30.0, metadata={"help": "seconds one CNI call may take, then it is undone"}
    )

    def __post_init__(self) -> None:
        if not 1 <= self.timeout_s <= 55:
            raise InvalidArgument(
                f"{self.timeout_s:g} is outside 1..55",
                field="timeout_s",
                fix="the plugin itself gives up after a minute",
            )


@dataclass(frozen=True)
class MonitorConfig:
    """What `fibril monitor` may cost."""

    sample_forwarded: int = field(
        default=1, metadata={"help": "report one in so many forwarded packets, while somebody asked for them"}
    )
    queue: int = field(
        default=4096, metadata={"help": "events kept for a slow watcher; what exceeds it is counted lost"}
    )

    def __post_init__(self) -> None:
        if not 1 <= self.sample_forwarded <= 1 << 20:
            raise InvalidArgument(
                f"{self.sample_forwarded} is outside 1..{1 << 20}", field="sample_forwarded"
            )
        if not 16 <= self.queue <= 1 << 20:
            raise InvalidArgument(f"{self.queue} is outside 16..{1 << 20}", field="queue")


@dataclass(frozen=True)
class IpamConfig:
    """All sections of the ipam process."""

    host: HostConfig = field(default_factory=HostConfig)
    etcd: EtcdConfig = field(default_factory=EtcdConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    pools: PoolsConfig = field(default_factory=PoolsConfig)
    endpoints: EndpointsConfig = field(default_factory=EndpointsConfig)
    cni: CniConfig = field(default_factory=CniConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
