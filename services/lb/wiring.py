"""The lb service put together. The only file that knows every object.

Each part adopts what an earlier process left and takes nothing away before it knows all there is. What the host lacks for one
part (XDP, hooks of control groups) is named in status; the others work without.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes as ct
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from fibril.lb.v1 import lb_pb2_grpc
from fibril.prefilter.v1 import prefilter_pb2_grpc
from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.hostaddrs import HostAddresses
from services.common.instance import Instance
from services.common.kernel.netlink import Netlink
from services.common.pipeline.abi import FibAddr, IPAddress, be32
from services.common.pipeline.datapath import Datapath, Parts
from services.common.service import ComponentStatus, HostContext
from services.common.underlay import Underlay
from services.lb import install
from services.lb.api import LbApi
from services.lb.config import LbConfig
from services.lb.health.monitor import Health
from services.lb.health.node_ports import HealthCheckPorts
from services.lb.kernel.writer import Plane
from services.lb.locality import Locality
from services.lb.outside import Outside
from services.lb.packets import Packets
from services.lb.pods import LocalAddresses
from services.lb.prefilter.api import PrefilterApi
from services.lb.prefilter.part import PrefilterPart
from services.lb.services import Services
from services.lb.sockets.sockets import Sockets
from services.lb.store import Store
from services.lb.trace import Tracer
from services.lb.xdp.nexthops import NextHops
from services.lb.xdp.xdp import Xdp

_SERVICES: Final = "services"
_PREFILTER: Final = "prefilter"
_LOOPBACKS: Final[frozenset[IPAddress]] = frozenset((ip_address("127.0.0.1"), ip_address("::1")))


class LbService:
    """Services under addresses of their own, on one node."""

    name = "lb"

    def __init__(self, instance: Instance, cfg: LbConfig) -> None:
        """Connects to nothing."""
        self._cfg = cfg
        self._etcd = etcd = EtcdClient(cfg.etcd.endpoints, tls=cfg.etcd.tls(), timeout_s=cfg.etcd.timeout_s)
        cluster, self._node = cfg.etcd.cluster, cfg.etcd.node_name(instance)
        self._netlink = Netlink()
        self._services = Services(etcd, cluster)
        self._store = Store(etcd, cluster, self._services)
        self._local = LocalAddresses(instance, self._moved)
        self._hostaddrs = HostAddresses(self._netlink, self._addresses_changed)
        self._underlay = Underlay(cfg.network, instance, self._netlink)
        self._health = Health(self._services, lambda name, key: self._plane.quarantined(name, key))
        self._plane = Plane(
            instance,
            self._services,
            self._health.verdict,
            lambda: Locality(self._node, cfg.lb.zone, cluster, self._local.all),
            cfg.lb.defaults(),
            cfg.lb.limits(),
            cluster,
        )
        self._tables = Datapath(
            instance,
            Parts("lb-tables", install.install_tables, install.tables_complete),
            self._plane.use_maps,
            self._lost,
        )
        self._health.on_change(self._plane.mark)
        self._health_ports = HealthCheckPorts(lambda: self._services.specs, self._plane.local_backends)
        self._outside = Outside(self._need_outside)
        self._sockets = Sockets(instance, self._plane.configure, cfg.lb.cgroup, cfg.lb.sockets)
        self._plane.on_removed(self._sockets.backends_removed)
        devices = cfg.lb.devices or ((cfg.network.device,) if cfg.network.device else ())
        self._packets = Packets(instance, self._netlink, devices)
        self._xdp = Xdp(instance, self._netlink, cfg.lb.xdp, devices, (_SERVICES, _PREFILTER))
        self._prefilter = PrefilterPart(instance, lambda: [hook.device for hook in self._xdp.attached()])
        self._prefilter.on_active(lambda active: self._xdp.need(_PREFILTER, active))
        self._next_hops = NextHops(
            self._netlink, self._plane, lambda: [hook.ifindex for hook in self._xdp.attached()]
        )
        self._xdp.on_change(self._next_hops.wake)
        self._tracer = Tracer(instance, self._plane, lambda: self._local.all, lambda: cfg.lb.sockets)

    async def start(self, ctx: HostContext) -> None:
        """Adopt what there is; what the host or etcd lacks now is tried again in the background."""
        await self._underlay.start()
        await self._hostaddrs.start()
        self._addresses_changed()
        self._local.look()
        self._configure()
        self._underlay.on_change(self._configure)
        self._plane.on_planned(self._planned)
        await self._plane.start()
        await self._tables.install()
        # Each is compiled by a process of its own, which takes seconds.
        await asyncio.gather(self._sockets.start(), self._packets.start())
        await self._xdp.start()
        await self._prefilter.start()
        await self._next_hops.start()
        await self._health.start()
        await self._health_ports.start()
        await self._services.start()
        for part in (
            self._underlay,
            self._services,
            self._plane,
            self._sockets,
            self._packets,
            self._xdp,
            self._prefilter,
            self._next_hops,
            self._health,
            self._health_ports,
        ):
            for task in part.tasks():
                ctx.tasks.adopt(task)
        ctx.tasks.spawn("lb.tables.install", self._tables.keep_trying(lambda: None))
        ctx.tasks.spawn("lb.known", self._when_known())
        ctx.tasks.spawn("lb.addresses", self._hostaddrs.run())
        ctx.tasks.spawn("lb.pods", self._local.run())
        ctx.rpc.add(prefilter_pb2_grpc.add_PrefilterServiceServicer_to_server, PrefilterApi(self._prefilter))
        ctx.rpc.add(
            lb_pb2_grpc.add_LbServiceServicer_to_server,
            LbApi(self._services, self._store, self._plane, self._health.verdict, self._tracer.trace),
        )

    async def stop(self) -> None:
        """Let what is under way end; the data path and all that is recorded stay."""
        await self._services.stop()
        await self._health_ports.stop()
        await self._health.stop()
        await self._next_hops.stop()
        await self._prefilter.stop()
        await self._xdp.stop()
        await self._packets.stop()
        await self._sockets.stop()
        await self._plane.stop()
        self._hostaddrs.close()
        await self._underlay.stop()
        await self._netlink.close()
        await self._etcd.close()

    def status(self) -> Sequence[ComponentStatus]:
        away = self._etcd.error
        services = self._services
        waiting = (
            "" if services.synced.is_set() else "waiting for services from etcd; what was served goes on"
        )
        return [
            _part("etcd", f"{away}; what is known goes on" if away else "", "in step"),
            _part("services", waiting or services.problem, f"{len(services.specs)} services"),
            *(replace(each, name=f"tables.{each.name}") for each in self._tables.status()),
            *self._plane.status(),
            *self._sockets.status(),
            *self._packets.status(),
            *self._xdp.status(),
            *self._prefilter.status(),
            *self._health.status(),
            *self._health_ports.status(),
        ]

    def _addresses_changed(self) -> None:
        addresses = self._hostaddrs.addresses
        self._local.set_host(addresses)
        self._plane.set_addresses(addresses | _LOOPBACKS)
        self._prefilter.protect(addresses | _addresses_of(self._etcd.urls))

    def _planned(self, name: str) -> None:
        """A service is in the kernel as it is now, or is gone."""
        self._services.tell(name)
        self._health_ports.changed(name)
        plans = self._plane.plans.get(name, {})
        self._outside.planned(name, any(front.outside for plan in plans.values() for front in plan.fronts))

    async def _when_known(self) -> None:
        """Only then is it certain that nobody outside is served."""
        await self._services.synced.wait()
        await self._plane.settled()
        # Of one that is not understood, or not written anew, an earlier process knew whom it serves.
        if not self._services.unread and not self._plane.problems:
            self._outside.complete()

    def _need_outside(self, wanted: bool) -> None:
        self._packets.need(wanted)
        self._xdp.need(_SERVICES, wanted)

    def _moved(self, changed: frozenset[IPAddress]) -> None:
        """Whatever has a backend at one of these may be local now, or no longer."""
        for name in list(self._services.specs):
            backends = self._services.backends.get(name, {})
            if any(key.address in changed for key, backend in backends.items() if not backend.node):
                self._plane.mark(name)

    def _configure(self) -> None:
        """What programs must know of this node."""
        facts = self._underlay.facts
        self._plane.configure(
            snat_v4=be32(facts.ipv4) if facts.ipv4 else 0,
            snat_v6=FibAddr.of(facts.ipv6) if facts.ipv6 else FibAddr(),
            snat_ports=(ct.c_uint32 * 2)(*self._cfg.lb.port_ranges()),
            uplink_ifindex=facts.ifindex,
            uplink_mtu=facts.mtu,
        )

    def _lost(self, reason: errors.FibrilError) -> None:
        """What is in the kernel goes on; `status` names the reason."""


def _addresses_of(urls: Sequence[str]) -> frozenset[IPAddress]:
    """Those that URLs name by number."""
    found = set()
    for url in urls:
        with contextlib.suppress(ValueError):
            found.add(ip_address(urlsplit(url).hostname or ""))
    return frozenset(found)


def _part(name: str, problem: str, well: str) -> ComponentStatus:
    return ComponentStatus(name, "degraded" if problem else "ok", problem or well)
