"""The identity service put together. The only file that knows every object.

Each part adopts what an earlier process left and takes nothing away before it knows all there is, so parts may start
in any order that satisfies their needs and nothing flaps on a restart. None of them needs etcd to start.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from fibril.identity.v1 import identity_pb2_grpc
from fibril.ipcache.v1 import ipcache_pb2_grpc
from fibril.node.v1 import node_pb2_grpc
from fibril.workload.v1 import workload_pb2_grpc
from services.common.etcd.client import EtcdClient
from services.common.instance import Instance
from services.common.kernel.netlink import Netlink
from services.common.service import ComponentStatus, HostContext
from services.common.underlay import Underlay
from services.identity.config import IdentityConfig
from services.identity.db import open_db
from services.identity.endpoints.follow import EndpointFollower
from services.identity.identities.allocator import Allocator
from services.identity.identities.api import IdentityApi
from services.identity.ipcache.api import IpcacheApi
from services.identity.ipcache.ipcache import Ipcache
from services.identity.ipcache.publisher import Publisher
from services.identity.lease import NodeLease
from services.identity.network.network import Network
from services.identity.nodes.api import NodeApi
from services.identity.nodes.directory import Directory
from services.identity.nodes.health import Health
from services.identity.nodes.index import NodeIndex
from services.identity.nodes.registry import Registry
from services.identity.workload.api import WorkloadApi
from services.identity.workload.endpoints import EndpointView
from services.identity.workload.trace import Tracer

_Part = Underlay | Directory | Ipcache | Network | Registry | Health | Publisher | Allocator


class IdentityService:
    """Identities, the ipcache, nodes and the ways between them, and workloads, of one node."""

    name = "identity"

    def __init__(self, instance: Instance, cfg: IdentityConfig) -> None:
        """Opens the node's database and connects to nothing. FailedPrecondition if the database is not
        usable.
        """
        self._cfg = cfg
        self._db: sqlite3.Connection = open_db(instance.state_dir / "identity.db")
        self._etcd = etcd = EtcdClient(cfg.etcd.endpoints, tls=cfg.etcd.tls(), timeout_s=cfg.etcd.timeout_s)
        cluster, node = cfg.etcd.cluster, cfg.etcd.node_name(instance)
        self._netlink = Netlink()
        self._lease = NodeLease(etcd, self._db, cfg.identities.lease_s, cfg.owner(instance))
        index = NodeIndex(self._db)
        self._underlay = Underlay(cfg.network, instance, self._netlink)
        self._directory = Directory(etcd, cluster, node, index)
        self._registry = Registry(
            etcd, cluster, node, instance, cfg.network, self._underlay, self._lease, self._directory
        )
        self._health = Health(etcd, cluster, node, cfg.network.probe_port, self._lease, self._directory)
        self._network = Network(instance, self._netlink, cfg.network, self._underlay, self._directory)
        self._ipcache = Ipcache(
            etcd, cluster, node, index, self._directory, instance, self._db, self._netlink
        )
        self._publisher = Publisher(etcd, cluster, node, self._lease, self._ipcache)
        self._network.on_programs(self._ipcache.use_maps)
        self._allocator = Allocator(
            etcd, cluster, cfg.etcd.cluster_id, node, self._lease, self._db, cfg.identities
        )
        self._endpoints = EndpointView()
        self._follower = EndpointFollower(
            instance.socket("ipam"), self._allocator, self._publisher, self._endpoints
        )
        self._tracer = Tracer(instance, self._endpoints)
        self._node_api = NodeApi(etcd, cluster, node, self._directory, self._health, self._network.mode_of)
        self._ipcache_api = IpcacheApi(
            self._ipcache, node, lambda name: str(self._network.tunnel_to(name) or "")
        )

    async def start(self, ctx: HostContext) -> None:
        """Adopt what there is; what the host or etcd lacks now is tried again in the background."""
        await self._underlay.start()
        await self._directory.start()
        await self._ipcache.start()
        await self._network.start()
        await self._registry.start()
        await self._health.start()
        await self._publisher.start()
        await self._allocator.start()
        for part in self._parts():
            for task in part.tasks():
                ctx.tasks.adopt(task)
        ctx.tasks.spawn("lease", self._lease.run())
        ctx.tasks.spawn("endpoints", self._follower.run())
        ctx.rpc.add(identity_pb2_grpc.add_IdentityServiceServicer_to_server, IdentityApi(self._allocator))
        ctx.rpc.add(ipcache_pb2_grpc.add_IpcacheServiceServicer_to_server, self._ipcache_api)
        ctx.rpc.add(node_pb2_grpc.add_NodeServiceServicer_to_server, self._node_api)
        ctx.rpc.add(
            workload_pb2_grpc.add_WorkloadServiceServicer_to_server,
            WorkloadApi(self._endpoints, self._tracer),
        )

    async def stop(self) -> None:
        """Let what is under way end; the data path, the lease and all that is recorded stay."""
        self._tracer.stop()
        await self._follower.stop()
        for part in reversed(self._parts()):
            await part.stop()
        await self._netlink.close()
        await self._etcd.close()
        self._db.close()

    def _parts(self) -> tuple[_Part, ...]:
        """In the order of their start."""
        return (
            self._underlay,
            self._directory,
            self._ipcache,
            self._network,
            self._registry,
            self._health,
            self._publisher,
            self._allocator,
        )

    def status(self) -> Sequence[ComponentStatus]:
        away = self._etcd.error
        return [
            _part("etcd", f"{away}; what is known goes on" if away else "", "in step"),
            _part("lease", self._lease.problem, "the others see this node"),
            self._allocator.status(),
            self._follower.status(),
            _part("nodes", self._nodes_problem(), f"{len(self._directory.nodes())} nodes"),
            _part("addresses", self._publisher.problem, "the others know this node's pods"),
            *self._ipcache.status(),
            *self._network.status(),
            *self._tracer.status(),
        ]

    def _nodes_problem(self) -> str:
        if not self._directory.synced.is_set():
            return "waiting for nodes from etcd"
        return self._directory.problem or self._registry.problem or self._health.problem


def _part(name: str, problem: str, well: str) -> ComponentStatus:
    return ComponentStatus(name, "degraded" if problem else "ok", problem or well)
