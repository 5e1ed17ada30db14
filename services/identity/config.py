"""Configuration of the identity process; every option has a default."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.common.etcd.config import EtcdConfig
from services.common.host import HostConfig
from services.common.instance import Instance
from services.common.network import NetworkConfig
from services.identity.identities.config import IdentitiesConfig


@dataclass(frozen=True)
class IdentityConfig:
    """All sections of the identity process."""

    host: HostConfig = field(default_factory=HostConfig)
    etcd: EtcdConfig = field(default_factory=EtcdConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    identities: IdentitiesConfig = field(default_factory=IdentitiesConfig)

    def owner(self, instance: Instance) -> str:
        """Whose lease the node's is."""
        return f"{self.etcd.cluster}/{self.etcd.node_name(instance)}"
