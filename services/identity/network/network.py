"""Keeps this node's way to the others: who they are comes from etcd, how each is reached is decided, and the kernel
is made to agree: node map, routes, devices, programs.

    Directory (etcd) ─┐
    Underlay  ────────┼─▶ Plan ─▶ reconcilers: node entries, routes, devices ─▶ kernel
    kernel events ────┘

One changed node costs work for that node. Nothing is taken away until the directory is complete, so a restarted
process, or one that lost etcd, changes nothing that works.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final, Protocol

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import events as ev
from services.common.kernel.netlink import IPAddress, IPNetwork, Netlink
from services.common.network import Mode, NetworkConfig
from services.common.pipeline import abi
from services.common.pipeline.datapath import Datapath
from services.common.reconcile import Reconciler
from services.common.service import ComponentStatus
from services.common.underlay import Underlay
from services.identity.network import overlay, programs
from services.identity.network.devices import Devices, Wanted
from services.identity.network.nodemap import NodeMap
from services.identity.network.plan import Changed, Own, Plan
from services.identity.network.routes import RemoteRoute, RemoteRoutes
from services.identity.nodes.model import Node

log = logging.getLogger(__name__)

RESYNC_S: Final = 60.0
DEVICES_RESYNC_S: Final = 10.0
"""Between looks at the few devices and programs on which every packet between nodes depends."""
_SETTLE_S: Final = 0.02
_GROUPS: Final = (
    ev.GROUP_LINK, ev.GROUP_TC, ev.GROUP_IPV4_ADDRESS, ev.GROUP_IPV6_ADDRESS, ev.GROUP_IPV4_ROUTE, ev.GROUP_IPV6_ROUTE,
)  # fmt: skip
_MODES: Final = {
    abi.NodeMode.OVERLAY: Mode.OVERLAY, abi.NodeMode.ROUTED: Mode.ROUTED, abi.NodeMode.STACK: Mode.CLOUD,
}  # fmt: skip


class Nodes(Protocol):
    """The part of the node directory that is needed here (services.identity.nodes.directory)."""

    @property
    def synced(self) -> asyncio.Event: ...

    def nodes(self) -> Mapping[str, Node]: ...

    def get(self, name: str) -> Node | None: ...

    @property
    def local(self) -> Node | None: ...

    def on_change(self, callback: Callable[[str], None]) -> None: ...


class Network:
    """Used from one event loop, in the node's network namespace. The underlay must have been started."""

    def __init__(
        self, instance: Instance, netlink: Netlink, cfg: NetworkConfig, underlay: Underlay, nodes: Nodes
    ) -> None:
        self._instance = instance
        self._netlink = netlink
        self._underlay = underlay
        self._nodes = nodes
        self._programs = programs.Programs(instance)
        self._nodemap = NodeMap(instance, netlink)
        self._remote = RemoteRoutes(instance, netlink, self._foreign_changed)
        self._plan = Plan(cfg, self._remote.foreign.__contains__)
        self._devices = Devices(
            instance,
            netlink,
            cfg.overlay_port,
            self._programs,
            self._nodemap,
            self._wanted,
            self._own_changed,
        )
        self._datapath = Datapath(instance, programs.parts(), self._use, self._lost)
        self._entries_loop: Reconciler[int, bytes] = Reconciler(
            "nodes", lambda: self._plan.entries, self._nodemap, self._synced, RESYNC_S
        )
        self._routes_loop: Reconciler[IPNetwork, RemoteRoute] = Reconciler(
            "routes", lambda: self._plan.routes, self._remote, self._synced, RESYNC_S
        )
        self._devices_loop: Reconciler[str, Wanted] = Reconciler(
            "devices", self._devices.desired, self._devices, resync_s=DEVICES_RESYNC_S
        )
        self._users: list[Callable[[], Awaitable[None]]] = []
        self._events: ev.Events | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._settling = False

    def on_programs(self, use: Callable[[], Awaitable[None]]) -> None:
        """Have this called whenever programs and maps are pinned (again); what it raises counts as a failed
        installation. To be said before `start`.
        """
        self._users.append(use)

    async def start(self) -> None:
        """Adopt what there is. What the host lacks is in `status` and tried again."""
        # Before anything is compared, so that no change falls between.
        self._events = ev.Events(_GROUPS)
        self._underlay.on_change(self._own_changed)
        self._nodes.on_change(self._node_changed)
        await self._datapath.install()
        # All nodes may be known already: which devices they need has to be as well before any is looked at.
        self._own_changed()
        for name in tuple(self._nodes.nodes()):
            self._node_changed(name)
        # Devices before routes and entries, which name them.
        await self._devices_loop.work()
        self._own_changed()
        coros = {
            "network.events": self._follow(self._events),
            "network.nodes": self._entries_loop.run(),
            "network.routes": self._routes_loop.run(),
            "network.devices": self._devices_loop.run(),
            "network.begin": self._begin(),
        }
        self._tasks = [asyncio.create_task(coro, name=name) for name, coro in coros.items()]

    async def stop(self) -> None:
        """Everything in the kernel stays."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._events is not None:
            self._events.close()
            self._events = None
        await self._netlink.run(self._close)

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Tasks that run until `stop`; the end of one is a failure."""
        return tuple(self._tasks)

    def mode_of(self, name: str) -> tuple[Mode | None, int, str]:
        """How another node is reached: the mode (None: not at all), the largest packet a pod can send to its
        pods (0: not known), and what is wrong.
        """
        pair = self._plan.pairs.get(name)
        if pair is None:
            return None, 0, ""
        return _MODES.get(pair.mode), pair.mtu, self._plan.problem(name)

    def tunnel_to(self, name: str) -> IPAddress | None:
        """Where overlay packets to another node go; None when they do not."""
        pair, node = self._plan.pairs.get(name), self._nodes.get(name)
        if pair is None or node is None or pair.mode is not abi.NodeMode.OVERLAY:
            return None
        return node.address(pair.tunnel)

    def status(self) -> list[ComponentStatus]:
        return [
            self._underlay_status(),
            self._pairs_status(),
            *self._datapath.status(),
            self._entries_loop.health(),
            self._routes_loop.health(),
            self._devices_loop.health(),
        ]

    async def settled(self) -> None:
        """Wait until all that is to be done now is done."""
        for loop in (self._devices_loop, self._routes_loop, self._entries_loop):
            await loop.settled()

    # ---- what changes -----------------------------------------------------------------------------------
    def _node_changed(self, name: str) -> None:
        node = self._nodes.get(name)
        if node is None:
            self._wake(self._plan.drop(name))
            return
        self._wake(self._plan.put(node))
        if node.local:
            self._own_changed()

    def _own_changed(self) -> None:
        local = self._nodes.local
        blocks = local.blocks if local is not None else frozenset()
        own = Own(self._underlay.facts, self._devices.found, blocks)
        if own.facts != self._plan.own.facts:
            self._devices_loop.wake(Devices.KEY)
        self._wake(self._plan.set_own(own))

    def _foreign_changed(self, block: IPNetwork) -> None:
        self._wake(self._plan.again(self._plan.owner(block)))

    def _wake(self, changed: Changed) -> None:
        if changed.indexes:
            self._entries_loop.wake(*changed.indexes)
        if changed.blocks:
            self._routes_loop.wake(*changed.blocks)
        if changed.pairs:
            self._devices_loop.wake(Devices.KEY)

    async def _begin(self) -> None:
        """What is waited for once; endless, as all tasks are."""
        await asyncio.gather(self._datapath.keep_trying(self._installed_late), self._when_synced())
        await asyncio.Event().wait()

    async def _when_synced(self) -> None:
        await self._nodes.synced.wait()
        # Whether the overlay is needed at all is known only now; what nobody wants may go.
        self._devices_loop.wake(Devices.KEY)
        self._entries_loop.wake()
        self._routes_loop.wake()

    def _synced(self) -> bool:
        return self._nodes.synced.is_set()

    def _wanted(self) -> Wanted:
        needed = any(pair.mode is abi.NodeMode.OVERLAY for pair in self._plan.pairs.values())
        return Wanted(True if needed else False if self._synced() else None, self._underlay.facts)

    # ---- events of the kernel ---------------------------------------------------------------------------
    async def _follow(self, events: ev.Events) -> None:
        async for event in events:
            if event.kind == "lost":
                self._look_again()
                await self._look_at_routes(self._plan.routes)
            elif event.route is not None:
                await self._route_event(event.route.destination, self._remote.mine(event.route), event.kind)
            elif self._concerns(event) and not self._settling:
                # The first events of a link just made show it down.
                self._settling = True
                asyncio.get_running_loop().call_later(_SETTLE_S, self._look_again)

    def _concerns(self, event: ev.Event) -> bool:
        found = self._devices.found
        ours = {found.host, found.overlay, found.uplink}
        if event.link is not None:
            names = (self._instance.node_ifname, overlay.ifname(self._instance))
            return event.link.name in names or event.link.ifindex in ours
        if event.address is not None:
            return event.address.ifindex == found.host
        if event.qdisc is not None:
            return event.kind == "qdisc-gone" and event.qdisc.ifindex in ours
        return event.kind == "filter-gone" and event.ifindex in ours

    def _look_again(self) -> None:
        """IPv4 routes go without a word when their interface does; what could not be made may be possible now."""
        self._settling = False
        self._devices_loop.wake(Devices.KEY)
        failing = [key for key, state in self._routes_loop.status().items() if state.state == "failed"]
        self._routes_loop.wake(*failing)
        self._routes_loop.wake()

    async def _route_event(self, block: IPNetwork, mine: bool, kind: ev.Kind) -> None:
        if block not in self._plan.routes:
            return
        if not mine:
            await self._look_at_routes([block])
        elif kind == "route-gone":
            self._routes_loop.wake(block)

    async def _look_at_routes(self, blocks: Iterable[IPNetwork]) -> None:
        try:
            await self._remote.look(*blocks)
        except (errors.FibrilError, OSError) as error:
            log.warning("cannot read routes", extra={"cause": str(error)})

    # ---- programs and maps ------------------------------------------------------------------------------
    async def _use(self) -> None:
        await self._netlink.run(self._open)
        for use in self._users:
            await use()

    def _open(self) -> None:
        self._nodemap.open()
        self._programs.open()

    def _close(self) -> None:
        self._programs.close()
        self._nodemap.close()

    def _lost(self, reason: errors.FibrilError) -> None:
        """What is loaded and attached goes on; `status` names the reason."""

    def _installed_late(self) -> None:
        self._devices_loop.wake(Devices.KEY)
        self._entries_loop.wake()

    # ---- status -----------------------------------------------------------------------------------------
    def _underlay_status(self) -> ComponentStatus:
        facts = self._underlay.facts
        addresses = " and ".join(str(address) for address in (facts.ipv4, facts.ipv6) if address)
        if not facts.problem:
            text = f"{addresses} on {facts.device}, MTU {facts.mtu}"
            if not facts.ethernet:
                text += "; not Ethernet: what arrives for pods outside of the overlay is not checked for its sender"
            return ComponentStatus("underlay", "ok", text)
        alone = not self._plan.pairs
        text = f"{facts.problem}; {'no other node is known' if alone else 'other nodes need it'}"
        return ComponentStatus("underlay", "ok" if alone and not addresses else "degraded", text)

    def _pairs_status(self) -> ComponentStatus:
        pairs = self._plan.pairs
        counts: dict[str, int] = {}
        for pair in pairs.values():
            mode = _MODES.get(pair.mode)
            word = mode.value if mode is not None else "not reachable"
            counts[word] = counts.get(word, 0) + 1
        text = ", ".join(f"{count} {word}" for word, count in sorted(counts.items())) or "no other nodes"
        if self._remote.foreign:
            kept = sorted(map(str, self._remote.foreign))
            more = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
            text += f"; foreign route kept: {kept[0]}{more}"
        wrong = sorted(name for name in pairs if self._plan.problem(name))
        if not wrong:
            return ComponentStatus("network", "ok", text)
        more = f", and {len(wrong) - 1} more nodes" if len(wrong) > 1 else ""
        return ComponentStatus(
            "network", "degraded", f"{text}; {wrong[0]}: {self._plan.problem(wrong[0])}{more}"
        )
