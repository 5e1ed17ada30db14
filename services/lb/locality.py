"""Where this node is, as far as the choice of backends depends on it."""

from __future__ import annotations

from dataclasses import dataclass

from services.common.pipeline.abi import IPAddress
from services.lb.model import Backend


@dataclass(frozen=True)
class Locality:
    """node, zone, cluster: this node's names; an empty zone is like no other. addresses: this node's own."""

    node: str
    zone: str = ""
    cluster: str = ""
    addresses: frozenset[IPAddress] = frozenset()

    def is_local(self, backend: Backend) -> bool:
        """Whether it runs on this node."""
        return backend.node == self.node if backend.node else backend.key.address in self.addresses

    def same_zone(self, backend: Backend) -> bool:
        return self.same_cluster(backend) and bool(self.zone) and backend.zone == self.zone

    def same_cluster(self, backend: Backend) -> bool:
        return not backend.cluster or backend.cluster == self.cluster
