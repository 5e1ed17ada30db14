"""The sockaccel service put together. The only file that knows every object."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Final

from fibril.endpoint.v1 import endpoint_pb2, endpoint_pb2_grpc
from fibril.sockaccel.v1 import sockaccel_pb2 as pb
from fibril.sockaccel.v1 import sockaccel_pb2_grpc
from fibril.tls.v1 import tls_pb2_grpc
from services.common import errors
from services.common.hostaddrs import HostAddresses
from services.common.instance import Instance
from services.common.kernel import cgroup
from services.common.kernel.netlink import Netlink
from services.common.kernel.netns import NetNs
from services.common.pipeline.events import clock_offset
from services.common.rpc.follow import Follower
from services.common.service import ComponentStatus, HostContext
from services.common.telemetry import Reading, metrics
from services.sockaccel import abi, pairs
from services.sockaccel.api import SockAccelApi
from services.sockaccel.config import SockAccelConfig
from services.sockaccel.plan import Host, Pod, plan
from services.sockaccel.plane import Plane
from services.sockaccel.store import Store
from services.sockaccel.tables import Wanted
from services.sockaccel.tls.api import TlsApi
from services.sockaccel.tls.looker import Looker

log = logging.getLogger(__name__)

ABSENT_S: Final = 2.0
"""Without the service that knows pods so long after the start, there are none."""
_TIDY_S: Final = 10.0
_TOLD_S: Final = 0.5


class SockAccelService:
    """Connections within this node, shortened."""

    name = "sockaccel"

    def __init__(self, instance: Instance, cfg: SockAccelConfig) -> None:
        """Connects to nothing."""
        self._instance, self._section = instance, cfg.sockaccel
        self._store = Store(instance.state_dir / "sockaccel.db")
        self._pods: dict[int, Pod] = {}
        self._off: set[int] = set()
        self._adopted = False
        self._host_netns = 0
        self._began = time.monotonic()
        self._netlink = Netlink()
        self._plane = Plane(instance, cfg.sockaccel, self._wanted, self._pair_ended)
        self._looker = Looker(instance, self._store.targets.values, self._pods.values)
        self._addresses = HostAddresses(self._netlink, self._plane.need)
        self._endpoints: Follower[int] = Follower(
            "endpoints",
            instance.run_dir / "ipam.sock",
            lambda to: endpoint_pb2_grpc.EndpointServiceStub(to).WatchEndpoints(endpoint_pb2.WatchEndpointsRequest()),
            "endpoint",
            lambda endpoint: int(endpoint.id),
            self._endpoint,
            self._endpoint_gone,
            self._plane.need,
        )
        self.amiss: dict[str, str] = {}
        self.watches: set[pairs.Watch] = set()

    async def start(self, ctx: HostContext) -> None:
        """Adopt what there is; what the host lacks now is tried again in the background."""
        with NetNs.current() as own:
            self._host_netns = own.cookie()
        await self._addresses.start()
        await self._plane.start()
        ctx.tasks.spawn("sockaccel.addresses", self._addresses.run())
        ctx.tasks.spawn("sockaccel.endpoints", self._endpoints.run())
        ctx.tasks.spawn("sockaccel.tables", self._plane.run())
        ctx.tasks.spawn("sockaccel.reports", self._plane.listen())
        ctx.tasks.spawn("sockaccel.release", self._plane.release())
        ctx.tasks.spawn("sockaccel.tidy", self._tidy())
        ctx.tasks.spawn("sockaccel.tls", self._looker.run())
        ctx.tasks.spawn("sockaccel.tls.messages", self._looker.listen())
        metrics().sum("fibril.sockaccel.sends", self._sends, description="send() calls of pairs by the way they took")
        metrics().sum("fibril.sockaccel.bytes", self._bytes, unit="By", description="bytes of pairs by the way they took")
        metrics().sum("fibril.sockaccel.pairs", self._counts, description="pairs made, shortened, ended by reason")
        ctx.rpc.add(
            sockaccel_pb2_grpc.add_SockAccelServiceServicer_to_server, SockAccelApi(self._store, self._plane, self)
        )
        ctx.rpc.add(tls_pb2_grpc.add_TlsServiceServicer_to_server, TlsApi(self._store, self._looker))

    async def stop(self) -> None:
        """The programs stay, and go on."""
        self._addresses.close()
        await self._looker.stop()
        await self._plane.stop()
        await self._netlink.close()
        self._store.close()

    # ---- what is wanted -------------------------------------------------------------------------------------
    def _wanted(self) -> Wanted | None:
        if not self._adopted:
            # What an earlier process switched off, before anything is written over it.
            self._off |= self._plane.tables.switched_off()
            self._adopted = True
        if not self._endpoints.ever and not (
            self._endpoints.absent and time.monotonic() - self._began > ABSENT_S
        ):
            return None
        wanted, self.amiss = plan(
            self._store.on,
            list(self._store.classes.values()),
            self._pods.values(),
            Host(self._host_netns, self._addresses.addresses),
            self._section,
            _group_id,
            frozenset(self._off),
        )
        return wanted

    def _endpoint(self, found: endpoint_pb2.Endpoint) -> None:
        if found.state in (endpoint_pb2.ENDPOINT_STATE_DELETING, endpoint_pb2.ENDPOINT_STATE_UNSPECIFIED):
            return
        addresses = frozenset(ip_address(text) for text in (found.ipv4, found.ipv6) if text)
        pod = Pod(
            found.id,
            found.pod or found.container_id,
            found.netns_cookie,
            dict(found.labels),
            found.identity,
            addresses,
            found.netns,
        )
        known = self._pods.get(found.id)
        self._pods[found.id] = pod
        self._plane.need()
        if known is not None and known.identity != pod.identity:
            # Programs are told of it a moment after the others.
            asyncio.get_running_loop().call_later(_TOLD_S, self._plane.need)

    def _endpoint_gone(self, number: int) -> None:
        self._pods.pop(number, None)
        self._plane.need()

    # ---- pairs ----------------------------------------------------------------------------------------------
    async def shown(self) -> list[pb.Pair]:
        """All pairs there are. Unavailable while the tables are not there."""
        found, offset = await asyncio.to_thread(self._plane.tables.all_pairs), clock_offset()
        return [self._message(pair, offset) for pair in found]

    def _message(self, pair: abi.Pair, offset_ns: int) -> pb.Pair:
        return pairs.message(pair, self._store.name_of(pair.class_), self._pod_name, offset_ns)

    def _pod_name(self, number: int) -> str:
        pod = self._pods.get(number)
        return pod.name if pod is not None else ""

    def _pair_ended(self, pair: abi.Pair, offset_ns: int) -> None:
        for watch in self.watches:
            watch.ended(self._message(pair, offset_ns))

    async def switch_pair(self, cookie: int, on: bool) -> None:
        """NotFound if there is no such pair."""
        if all(pair.id != cookie for pair in await self.shown()):
            raise errors.NotFound(f"there is no pair {cookie}", field="pair", fix="see: fibril sockaccel pairs")
        if on:
            self._off.discard(cookie)
        elif len(self._off) >= abi.OFF_MAX:
            raise errors.ResourceExhausted(
                f"{len(self._off)} pairs are switched off, the limit is {abi.OFF_MAX}",
                field="pair",
                fix="switch their class off",
            )
        else:
            self._off.add(cookie)

    async def pairs_of(self, bit: int) -> set[int]:
        """Pairs of the class with that bit. Unavailable while the tables are not there."""
        found = await asyncio.to_thread(self._plane.tables.all_pairs)
        return {int(pair.ends[0].cookie) for pair in found if pair.class_ == bit}

    def forget(self, cookies: set[int]) -> None:
        """Pairs that are never shortened again, whatever class has their bit next."""
        self._off |= cookies

    async def _tidy(self) -> None:
        """Forget pairs whose end nobody saw (their control group is no longer the one), and switches of pairs that are gone."""
        doubtful: set[int] = set()
        missing: set[int] = set()
        while True:
            await asyncio.sleep(_TIDY_S)
            off = set(self._off)
            try:
                there, doubtful = await asyncio.to_thread(self._plane.tables.tidy, doubtful)
            except (errors.FibrilError, OSError):
                continue
            # Others may have been switched off meanwhile, and a walk may have missed one once.
            missing, gone = off - there, (off - there) & missing
            if gone:
                self._off -= gone
                self._plane.need()

    # ---- status ---------------------------------------------------------------------------------------------
    def status(self) -> Sequence[ComponentStatus]:
        on = "" if self._store.on else "; switched off"
        problem = next((f"class {name}: {why}" for name, why in sorted(self.amiss.items())), "")
        classes = ComponentStatus(
            "classes", "degraded" if problem else "ok", problem or f"{len(self._store.classes)} declared{on}"
        )
        return [*self._plane.status(), classes, self._endpoints.status(), *self._looker.status()]

    def _stat(self, which: int) -> int:
        try:
            return self._plane.tables.stat(which)
        except errors.FibrilError:
            return 0

    def _sends(self) -> list[Reading]:
        return [(self._stat(abi.Stat.SENDS), {"way": "short"}), (self._stat(abi.Stat.TCP_SENDS), {"way": "tcp"})]

    def _bytes(self) -> list[Reading]:
        return [(self._stat(abi.Stat.BYTES), {"way": "short"}), (self._stat(abi.Stat.TCP_BYTES), {"way": "tcp"})]

    def _counts(self) -> list[Reading]:
        found: list[Reading] = [
            (self._stat(which), {"what": which.name.lower()})
            for which in (abi.Stat.PAIRS, abi.Stat.SHORTENED, abi.Stat.ALONE, abi.Stat.FULL, abi.Stat.TAKEN)
        ]
        ended = [reason for reason in abi.EndReason if reason is not abi.EndReason.NOT_ENDED]
        return found + [(self._stat(abi.Stat.ENDED + each), {"what": f"ended_{each.name.lower()}"}) for each in ended]


def _group_id(path: str) -> int:
    try:
        return cgroup.cgroup_id(cgroup.path_of(path))
    except errors.FibrilError:
        return 0
