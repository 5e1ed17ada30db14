"""The ipam service put together. The only file that knows every object."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Sequence

from fibril.endpoint.v1 import endpoint_pb2_grpc
from fibril.ipam.v1 import ipam_pb2_grpc
from fibril.monitor.v1 import monitor_pb2_grpc
from services.common.etcd.client import EtcdClient
from services.common.instance import Instance
from services.common.kernel.events import Events
from services.common.kernel.netlink import Netlink
from services.common.service import ComponentStatus, HostContext
from services.ipam.cni.server import CniServer
from services.ipam.config import IpamConfig
from services.ipam.datapath import Datapath
from services.ipam.db import open_db
from services.ipam.endpoints import reconcile
from services.ipam.endpoints.addresses import BookAddresses
from services.ipam.endpoints.api import EndpointApi
from services.ipam.endpoints.manager import EndpointManager
from services.ipam.endpoints.node import NodeSetup
from services.ipam.endpoints.ops import PodOps
from services.ipam.endpoints.store import Store
from services.ipam.monitor import Monitor, MonitorApi
from services.ipam.pools.api import IpamApi
from services.ipam.pools.book import AddressBook
from services.ipam.pools.holdings import Holdings
from services.ipam.pools.store import PoolStore

log = logging.getLogger(__name__)


class IpamService:
    """Addresses, pod interfaces, monitoring and the CNI socket of one node."""

    name = "ipam"

    def __init__(self, instance: Instance, cfg: IpamConfig) -> None:
        """Opens the node's database and connects to nothing. FailedPrecondition if the database is not
        usable.
        """
        self._instance = instance
        self._cfg = cfg
        self._db: sqlite3.Connection = open_db(instance.state_dir / "ipam.db")
        self._etcd = EtcdClient(cfg.etcd.endpoints, tls=cfg.etcd.tls(), timeout_s=cfg.etcd.timeout_s)
        self._book = AddressBook(
            Holdings(self._db),
            self._etcd,
            PoolStore(self._etcd, cfg.etcd.cluster),
            cfg.etcd.node_name(instance),
            cfg.pools.first(),
        )
        self._netlink = Netlink()
        self._node = NodeSetup(
            instance, self._netlink, cfg.network, cfg.endpoints.masquerade, cfg.endpoints.mtu
        )
        self._kernel = PodOps(instance, self._netlink, self._node)
        self._addresses = BookAddresses(self._book, self._node, self._gateways_in_use)
        self._manager = EndpointManager(Store(self._db), self._addresses, self._kernel, instance.host_ifname)
        self._monitor = Monitor(instance, cfg.monitor, self._pod_name)
        self._datapath = Datapath(instance, self._kernel.open, self._kernel.disable)
        self._endpoints_loop = reconcile.endpoint_reconciler(
            self._manager, self._kernel, cfg.endpoints.resync_s
        )
        self._node_loop = reconcile.node_reconciler(
            self._node, self._addresses, cfg.endpoints.resync_s, self._endpoints_loop.wake
        )
        self._reload = asyncio.Event()
        self._events: Events | None = None
        self._cni: CniServer | None = None

    async def start(self, ctx: HostContext) -> None:
        """Adopt what there is. What the host lacks for pods does not keep addresses from being served."""
        await self._book.start()
        for task in self._book.tasks():
            ctx.tasks.adopt(task)
        self._book.on_blocks(lambda: self._node_loop.wake(reconcile.NodeReconcile.KEY))
        # Before anything is compared, so that no change falls between.
        self._events = Events()
        await self._datapath.install()
        await self._manager.start()
        self._monitor.start()
        events = reconcile.KernelEvents(
            self._manager, self._endpoints_loop.wake, self._node_loop.wake, self._instance.node_ifname
        )
        ctx.tasks.spawn("endpoints.events", events.follow(self._events))
        ctx.tasks.spawn("endpoints.reconcile", self._endpoints_loop.run())
        ctx.tasks.spawn("endpoints.node", self._node_loop.run())
        ctx.tasks.spawn(
            "endpoints.programs",
            reconcile.look_around(self._manager, self._kernel, self._reload, self._cfg.endpoints.resync_s),
        )
        ctx.tasks.spawn("datapath", self._datapath.keep_trying(self._installed_late))
        ctx.rpc.add(ipam_pb2_grpc.add_IpamServiceServicer_to_server, IpamApi(self._book))
        ctx.rpc.add(endpoint_pb2_grpc.add_EndpointServiceServicer_to_server, EndpointApi(self._manager))
        ctx.rpc.add(
            monitor_pb2_grpc.add_MonitorServiceServicer_to_server, MonitorApi(self._instance, self._monitor)
        )
        if self._cfg.cni.enabled:
            self._cni = CniServer(
                self._manager, self._instance.cni_socket, self._unavailable, self._cfg.cni.timeout_s
            )
            await self._cni.start()

    async def stop(self) -> None:
        """Let what is under way end; the data path and all that is recorded stay."""
        if self._cni is not None:
            await self._cni.stop()
        await self._manager.stop()
        await self._monitor.stop()
        await self._book.stop()
        if self._events is not None:
            self._events.close()
        await self._kernel.close()
        await self._netlink.close()
        await self._etcd.close()
        self._db.close()

    def status(self) -> Sequence[ComponentStatus]:
        problem = self._etcd.error or self._book.problem
        records = self._manager.list()
        parts = [
            ComponentStatus(
                "etcd",
                "degraded" if problem else "ok",
                f"{problem}; addresses come from this node's blocks only" if problem else "in step",
            ),
            ComponentStatus(
                "endpoints",
                "ok",
                f"{len(records)} endpoints",
                used=len(records),
                capacity=self._kernel.capacity(),
            ),
            self._endpoints_loop.health(),
            self._node_loop.health(),
            *self._datapath.status(),
        ]
        for pool in self._book.pools():
            for usage in self._book.usage(pool, None):
                parts.append(
                    ComponentStatus(
                        f"pool.{pool.name}.{usage.family.name.lower()}",
                        "ok",
                        f"{usage.node_allocated} addresses in use, {usage.node_free} free on this node",
                        used=usage.node_allocated,
                        capacity=usage.node_allocated + usage.node_free,
                    )
                )
        return parts

    def _installed_late(self) -> None:
        self._monitor.start()
        self._reload.set()
        self._endpoints_loop.wake()
        self._node_loop.wake()

    def _unavailable(self) -> str:
        reason = self._kernel.unavailable()
        return str(reason) if reason is not None else ""

    def _pod_name(self, number: int) -> str:
        record = self._manager.by_id(number)
        return (record.pod or record.container_id) if record is not None else ""

    def _gateways_in_use(self) -> set[str]:
        records = self._manager.by_number().values()
        return {gateway for record in records for gateway in (record.ipv4_gateway, record.ipv6_gateway)}
