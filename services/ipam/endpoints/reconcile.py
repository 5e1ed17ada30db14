"""Keeps the kernel and the records of endpoints in agreement.

What changes is heard of through rtnetlink and costs work for that endpoint only; once a minute everything
is compared, by a fixed number of dumps. What has no dump (programs on interfaces) is looked at a few
endpoints at a time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from services.common import errors
from services.common.kernel.events import Event, Events
from services.common.reconcile import Reconciler
from services.ipam.endpoints import observe
from services.ipam.endpoints.addresses import BookAddresses
from services.ipam.endpoints.manager import EndpointManager
from services.ipam.endpoints.model import EndpointRecord, State
from services.ipam.endpoints.node import NodeNet, NodeSetup
from services.ipam.endpoints.ops import PodOps

log = logging.getLogger(__name__)

CHUNK: Final = 16
"""Endpoints whose programs are looked at in one visit of the netlink thread (some 0.3 ms each)."""
NODE_RESYNC_S: Final = 10.0
"""Between comparisons of the node's own parts, on which every pod depends: few, so cheap to look at often."""
_SETTLE_S: Final = 0.02
_SETTLED: Final = frozenset({State.READY, State.DEGRADED})


class ByIfindex(Protocol):
    """Where an endpoint is found by the index of its host side."""

    def by_ifindex(self, ifindex: int) -> EndpointRecord | None: ...


class EndpointReconcile:
    """Ops of the reconciler over endpoints; keys are their numbers."""

    def __init__(self, manager: EndpointManager, kernel: PodOps) -> None:
        self._manager = manager
        self._kernel = kernel
        self._seen: observe.Observed | None = None

    async def actual(self) -> Mapping[int, observe.Observed]:
        self._seen = seen = await self._kernel.observe()
        return dict.fromkeys(seen.ids, seen)

    async def same(self, desired: EndpointRecord, actual: Any) -> bool:
        # A record is replaced by each change, so this one may be newer than what was observed; being made or
        # removed it is its own task's business.
        if desired.state is State.CREATING:
            return True
        if desired.state is not State.READY:
            return False
        found = list(observe.differences(desired, actual))
        if found:
            log.warning(
                "endpoint differs from its record, repairing",
                extra={"endpoint": desired.id, "differences": "; ".join(found)},
            )
        return not found

    async def update(self, key: int, desired: EndpointRecord) -> None:
        await self._manager.repair(key)

    async def delete(self, key: int) -> None:
        # Between a number's being taken and its record there is a moment without a record.
        if self._seen is not None and not self._manager.in_use(key):
            log.warning("leftovers of an unknown endpoint are removed", extra={"endpoint": key})
            await self._kernel.remove_orphan(key, self._seen)


class NodeReconcile:
    """Ops of the reconciler over the node's own set-up, one object; applying compares by itself."""

    KEY: Final = "node"

    def __init__(self, node: NodeSetup, addresses: BookAddresses, changed: Callable[[], None]) -> None:
        self._node = node
        self._addresses = addresses
        self._changed = changed

    def desired(self) -> Mapping[str, NodeNet]:
        return {self.KEY: self._addresses.node_net()}

    async def actual(self) -> Mapping[str, Any]:
        return {}

    async def same(self, desired: NodeNet, actual: Any) -> bool:
        return False

    async def update(self, key: str, desired: NodeNet) -> None:
        # With an address that was removed by hand the kernel removed every route that names it as source.
        if await self._node.apply(desired):
            self._changed()

    async def delete(self, key: str) -> None:
        pass


class KernelEvents:
    """Wakes what a change in the kernel concerns.

    Events of a link are judged a moment later, by the last of them: the first ones of a link just made show
    it down.
    """

    def __init__(
        self,
        manager: EndpointManager,
        wake: Callable[..., None],
        wake_node: Callable[[], None],
        node_ifname: str,
    ) -> None:
        self._manager = manager
        self._wake = wake
        self._wake_node = wake_node
        self._node_ifname = node_ifname
        self._latest: dict[int, Event] = {}

    async def follow(self, events: Events) -> None:
        """Endless. The subscription must be older than the first comparison."""
        async for event in events:
            if event.kind == "lost":
                self._wake()
                self._wake_node()
            elif event.link is not None:
                if not self._latest:
                    asyncio.get_running_loop().call_later(_SETTLE_S, self._judge)
                self._latest[event.link.ifindex] = event
            elif (number := concerned(event, self._manager)) != 0:
                self._wake(number)

    def _judge(self) -> None:
        latest, self._latest = self._latest, {}
        for event in latest.values():
            if event.kind == "link-gone" and event.link is not None and event.link.name == self._node_ifname:
                self._wake_node()
            if (number := concerned(event, self._manager)) != 0:
                self._wake(number)


def concerned(event: Event, records: ByIfindex) -> int:
    """The endpoint an event makes look different from its record, 0 if none. Our own changes do not."""
    if event.link is not None:
        record = records.by_ifindex(event.link.ifindex)
        if record is None or record.state not in _SETTLED:
            return 0
        if event.kind == "link-gone":
            return record.id
        link = event.link
        fits = (
            link.up
            and link.mtu == record.mtu
            and link.mac == record.host_mac
            and link.name == record.host_ifname
        )
        return 0 if fits else record.id
    if event.qdisc is not None and observe.shaping_flag(event.qdisc):
        record = records.by_ifindex(event.qdisc.ifindex)
        return record.id if record is not None and record.state in _SETTLED else 0
    return 0


async def look_around(manager: EndpointManager, kernel: PodOps, again: asyncio.Event, every_s: float) -> None:
    """Look at what no dump shows: programs on interfaces, and the pods' own side. Endless.

    Programs of all endpoints at the start and when `again` is set (they were loaded anew), a chunk at a
    time; then both of one chunk each `every_s`.
    """
    while True:
        position = 0
        while chunk := _after(manager, position):
            position = chunk[-1].id
            await _refresh(kernel, chunk)
        again.clear()
        position = 0
        while not await _set_within(again, every_s):
            chunk = _after(manager, position) or _after(manager, 0)
            position = chunk[-1].id if chunk else 0
            await _refresh(kernel, chunk)
            for number in await kernel.lacking(chunk):
                log.warning("pod lacks what it was given, repairing", extra={"endpoint": number})
                try:
                    await manager.repair(number)
                except errors.FibrilError as error:
                    log.warning("repair failed", extra={"endpoint": number, "cause": str(error)})


def _after(manager: EndpointManager, position: int) -> list[EndpointRecord]:
    numbers = sorted(
        number
        for number, record in manager.by_number().items()
        if number > position and record.state in _SETTLED
    )
    return [manager.by_number()[number] for number in numbers[:CHUNK]]


async def _refresh(kernel: PodOps, chunk: list[EndpointRecord]) -> None:
    try:
        changed = await kernel.refresh_programs(chunk)
    except errors.FibrilError as error:
        log.warning("programs could not be attached", extra={"first": chunk[0].id, "cause": str(error)})
        return
    if changed:
        log.info("programs attached anew", extra={"endpoints": len(changed), "first": changed[0]})


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


def endpoint_reconciler(
    manager: EndpointManager, kernel: PodOps, resync_s: float
) -> Reconciler[int, EndpointRecord]:
    return Reconciler("endpoints", manager.by_number, EndpointReconcile(manager, kernel), resync_s=resync_s)


def node_reconciler(
    node: NodeSetup, addresses: BookAddresses, resync_s: float, changed: Callable[[], None]
) -> Reconciler[str, NodeNet]:
    """`changed` is called when something of the node had to be made."""
    ops = NodeReconcile(node, addresses, changed)
    return Reconciler("node-parts", ops.desired, ops, resync_s=min(resync_s, NODE_RESYNC_S))
