"""What several nodes know of services in one etcd, in one process."""

from __future__ import annotations

from typing import Any

from fibril.lb.v1 import lb_pb2 as pb
from services.common.etcd.client import EtcdClient
from services.lb import convert
from services.lb.model import BackendKey, Backends, Spec
from services.lb.services import Services
from services.lb.store import Store

CLUSTER = "test"
Declared = tuple[Spec, Backends]


class Node:
    """Follows, and changes. told: what its users were called back with."""

    def __init__(self, url: str) -> None:
        self.etcd = EtcdClient([url], timeout_s=3.0)
        self.services = Services(self.etcd, CLUSTER)
        self.store = Store(self.etcd, CLUSTER, self.services)
        self.told: list[tuple[str, frozenset[BackendKey] | None]] = []
        self.services.on_change(lambda name, which: self.told.append((name, which)))

    async def start(self) -> Node:
        await self.services.start()
        return self

    async def stop(self) -> None:
        await self.services.stop()
        await self.etcd.close()

    def all(self) -> dict[str, Declared]:
        """What it knows."""
        return {
            name: (spec, self.services.backends.get(name, {})) for name, spec in self.services.specs.items()
        }


def service(name: str, vip: str, port: int = 80, backends: int = 1, **more: Any) -> Declared:
    """One with a cluster IP, and backends 10.1.0.0 and on."""
    message = pb.Service(
        name=name,
        frontends=[pb.Frontend(address=vip, port=port)],
        backends=[pb.Backend(address=f"10.{1 + n // 65536}.{n // 256 % 256}.{n % 256}", port=8080) for n in range(backends)],
    )  # fmt: skip
    message.MergeFrom(pb.Service(**more))
    return convert.service(message)


def node_port(name: str, port: int, last: int = 0, node: str = "") -> Declared:
    kind = pb.FRONTEND_TYPE_HOST_PORT if node else pb.FRONTEND_TYPE_NODE_PORT
    front = pb.Frontend(type=kind, port=port, port_last=last, node=node)
    return convert.service(pb.Service(name=name, frontends=[front]))


def keys_of(declared: Declared) -> list[BackendKey]:
    return list(declared[1])
