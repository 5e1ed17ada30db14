"""Gives each pod of this node the identity of its labels: from ipam's endpoints to allocator, ipcache and back.

    endpoint appears, labels change     allocate ─▶ publish ip/<address> ─▶ tell ipam, which writes endpoint maps
    endpoint goes                       withdraw ip/<address>, release after a while

Which of these steps is still to be made is found out anew each time, so any of them may fail, be repeated or be cut
off by a restart. While one fails the pod keeps the identity it has: reserved:init, or that of its former labels.
Who must learn of an identity before packets carry it is told first: an identity that changes is published a moment
before programs are told, together with the former one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Final, Protocol

import grpc

from fibril.endpoint.v1 import endpoint_pb2 as pb
from fibril.endpoint.v1.endpoint_pb2_grpc import EndpointServiceStub
from fibril.types.v1 import types_pb2
from services.common import errors
from services.common.kernel.netlink import IPAddress
from services.common.rpc.client import channel
from services.common.rpc.follow import begun
from services.common.rpc.status import from_rpc_error
from services.common.service import ComponentStatus
from services.identity.endpoints.tell import Teller
from services.identity.endpoints.work import Work
from services.identity.identities.model import Identity, Scope, scope_of
from services.identity.ipcache.publisher import Published
from services.identity.numbers import Reserved

log = logging.getLogger(__name__)

PREFIX: Final = "endpoint/"
"""Of endpoints among the holders of identities."""
AHEAD_S: Final = 0.3
"""So much earlier is a changed identity published than used."""
LINGER_S: Final = 2.0
"""An identity is held this much longer than its endpoint exists: often the next pod has the same labels."""
RECONNECT_S: Final = 0.2
PUBLISH_S: Final = 5.0


class Allocator(Protocol):
    """What is needed of identities.allocator."""

    async def allocate(self, labels: Mapping[str, str], holder: str) -> Identity: ...

    async def release(self, holder: str) -> int: ...

    def holders(self, prefix: str = "") -> dict[str, Identity]: ...

    def on_moved(self, callback: Callable[[str, Identity], None]) -> None: ...


class Addresses(Protocol):
    """What is needed of ipcache.publisher."""

    def want(self, records: Mapping[IPAddress, Published]) -> None: ...

    async def put(self, address: IPAddress, identity: int, previous: int = 0, pod: str = "") -> None: ...

    async def remove(self, address: IPAddress) -> None: ...


class View(Protocol):
    """Who wants to see every endpoint, besides; see workload.endpoints.EndpointView."""

    def restart(self) -> None: ...

    def put(self, endpoint: pb.Endpoint) -> None: ...

    def delete(self, number: int) -> None: ...

    def synced(self) -> None: ...


@dataclass(frozen=True)
class Pod:
    """An endpoint as ipam tells it. identity: what programs have been told."""

    id: int
    container_id: str
    name: str
    labels: Mapping[str, str]
    addresses: tuple[IPAddress, ...]
    identity: int

    @classmethod
    def of(cls, endpoint: pb.Endpoint) -> Pod:
        return cls(
            endpoint.id,
            endpoint.container_id,
            endpoint.pod,
            # A pod cannot make itself the host, or a CIDR, by a label.
            {key: text for key, text in endpoint.labels.items() if scope_of({key: text}) is Scope.CLUSTER},
            tuple(ip_address(text) for text in (endpoint.ipv4, endpoint.ipv6) if text),
            endpoint.identity or Reserved.INIT,
        )


def holder_of(endpoint: pb.Endpoint) -> str:
    return f"{PREFIX}{endpoint.container_id}/{endpoint.ifname}"


class EndpointFollower:
    """One a node; used from one event loop. Endpoints go by their holder's name."""

    def __init__(self, socket: Path, allocator: Allocator, publisher: Addresses, view: View) -> None:
        """socket: ipam's. The allocator and the publisher must be usable when `run` begins."""
        self._socket = socket
        self._allocator = allocator
        self._publisher = publisher
        self._view = view
        self._pods: dict[str, Pod] = {}
        self._owners: dict[IPAddress, str] = {}
        self._new: set[str] = set()
        """Those that nobody but this node can have heard of yet."""
        self._published: dict[str, tuple[int, float]] = {}
        """What etcd was told that a pod's identity is going to be, and when."""
        self._work: Work[str] = Work(self._settle)
        self._teller: Teller | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._synced = False
        self._adopted = False
        self._problem = ""
        allocator.on_moved(self._moved)

    # ---- life ---------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Endless: follow ipam's endpoints, whenever there is an ipam."""
        trouble = ""
        while True:
            if self._socket.exists():
                try:
                    await self._follow()
                except errors.FibrilError as error:
                    self._problem = str(error)
                    if self._synced or self._problem != trouble:
                        log.info("endpoints are not followed for now", extra={"cause": self._problem})
                    trouble = self._problem
            self._synced = False
            await asyncio.sleep(RECONNECT_S)

    async def stop(self) -> None:
        """Begin nothing more. What pods have they keep."""
        await self._work.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def status(self) -> ComponentStatus:
        """How many pods have no identity, or not the one of their labels, and why."""
        failed = self._work.failed
        if not self._synced:
            if not self._socket.exists() and not self._pods:
                return ComponentStatus("endpoints", "ok", "no ipam service runs on this node")
            why = self._problem or "not connected yet"
            return ComponentStatus("endpoints", "degraded", f"ipam does not tell of endpoints: {why}")
        if failed:
            holder, why = next(iter(failed.items()))
            text = (
                f"{len(failed)} of {len(self._pods)} endpoints keep the identity they have and are tried again: "
                f"{holder}: {why}"
            )
            return ComponentStatus("endpoints", "degraded", text)
        return ComponentStatus(
            "endpoints", "ok", f"{len(self._pods)} endpoints have the identity of their labels"
        )

    # ---- what ipam tells ------------------------------------------------------------------------------------
    async def _follow(self) -> None:
        """One stream, from the snapshot it begins with until it ends; raises then. It is not resumed: a stream
        seldom ends but with ipam itself, and then nothing but a snapshot will do.
        """
        async with channel(f"unix:{self._socket}") as to_ipam:
            stub = EndpointServiceStub(to_ipam)
            self._teller = Teller(stub)
            seen: set[str] = set()
            self._view.restart()
            try:
                async for change in begun(stub.WatchEndpoints(pb.WatchEndpointsRequest())):
                    if change.kind == types_pb2.WATCH_KIND_SYNCED:
                        self._view.synced()
                        self._complete(seen)
                    elif change.kind == types_pb2.WATCH_KIND_DELETE:
                        self._view.delete(change.endpoint.id)
                        self._gone(holder_of(change.endpoint))
                    else:
                        self._view.put(change.endpoint)
                        seen.add(holder_of(change.endpoint))
                        self._there(change.endpoint)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from None
            finally:
                self._teller = None
        raise errors.Unavailable("ipam ended the stream")

    def _there(self, endpoint: pb.Endpoint) -> None:
        holder, pod = holder_of(endpoint), Pod.of(endpoint)
        before = self._pods.get(holder)
        # One that is being removed keeps what it has until it is gone.
        if pod == before or endpoint.state == pb.ENDPOINT_STATE_DELETING:
            return
        if before is None and self._synced:
            self._new.add(holder)
        self._pods[holder] = pod
        for address in pod.addresses:
            self._owners[address] = holder
        if before is not None:
            self._disown(holder, set(before.addresses) - set(pod.addresses))
        self._work.wake(holder)

    def _gone(self, holder: str) -> None:
        pod = self._pods.pop(holder, None)
        self._new.discard(holder)
        self._published.pop(holder, None)
        if pod is not None:
            self._disown(holder, pod.addresses)
        self._work.wake(holder, LINGER_S)

    def _disown(self, holder: str, addresses: Iterable[IPAddress]) -> None:
        for address in addresses:
            if self._owners.get(address) == holder:
                del self._owners[address]
                self._spawn(self._withdraw(address))

    async def _withdraw(self, address: IPAddress) -> None:
        if address not in self._owners:
            await self._publisher.remove(address)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _complete(self, seen: set[str]) -> None:
        """All endpoints there are have been told: what is left over from earlier can go."""
        held = self._allocator.holders(PREFIX)
        if not self._adopted:
            # As it is, before anything is changed: so a restart of this process changes nothing.
            self._adopted = True
            self._publisher.want(
                {
                    address: Published(pod.identity, 0, pod.name)
                    for holder, pod in self._pods.items()
                    if pod.identity != Reserved.INIT or holder in held
                    for address in pod.addresses
                }
            )
        for holder in (self._pods.keys() | held.keys()) - seen:
            self._gone(holder)
        self._synced, self._problem = True, ""
        self._work.retry()

    def _moved(self, holder: str, identity: Identity) -> None:
        if holder in self._pods:
            self._work.wake(holder)

    # ---- one endpoint ---------------------------------------------------------------------------------------
    async def _settle(self, holder: str) -> None:
        """Make the next step for an endpoint, or none. Whatever replaces a pod wakes its holder again."""
        pod = self._pods.get(holder)
        if pod is None:
            await self._allocator.release(holder)
            return
        identity = await self._allocator.allocate(pod.labels, holder)
        if self._pods.get(holder) is not pod:
            return
        if holder in self._new:
            # No other node can expect anything else of it, and it waits.
            await self._tell(holder, pod, identity.number)
            self._new.discard(holder)
        elif identity.number != pod.identity:
            await self._change(holder, pod, identity.number)
            return
        for address in pod.addresses:
            self._spawn(self._announce(holder, address, pod, identity.number))

    async def _announce(self, holder: str, address: IPAddress, pod: Pod, number: int) -> None:
        """Publish an identity in use; the publisher sees to it by itself, also later."""
        if self._owners.get(address) != holder:
            return
        previous = pod.identity if pod.identity != number else 0
        with contextlib.suppress(errors.FibrilError):
            await self._publisher.put(address, number, previous, pod.name)

    async def _change(self, holder: str, pod: Pod, number: int) -> None:
        """Publish another identity than the one in use, and a moment later use it."""
        puts = [self._publisher.put(address, number, pod.identity, pod.name) for address in pod.addresses]
        try:
            async with asyncio.timeout(PUBLISH_S):
                await asyncio.gather(*puts)
        except TimeoutError:
            raise errors.Unavailable(f"not published within {PUBLISH_S:g} s", fix="check etcd") from None
        if self._pods.get(holder) is not pod:
            return
        known, since = self._published.get(holder, (0, 0.0))
        if known != number:
            since = time.monotonic()
            self._published[holder] = number, since
        left = since + AHEAD_S - time.monotonic()
        if left > 0:
            self._work.wake(holder, left)
        else:
            await self._tell(holder, pod, number)

    async def _tell(self, holder: str, pod: Pod, number: int) -> None:
        if number == pod.identity:
            return
        if self._teller is None:
            raise errors.Unavailable("ipam is away")
        await self._teller.tell(pod.id, pod.container_id, number)
        if self._pods.get(holder) is pod:
            # The same word comes with ipam's next message, too, and is no news then.
            self._pods[holder] = replace(pod, identity=number)
