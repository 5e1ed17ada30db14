"""The follower between ipam's real endpoint service, over its socket, and an allocator and a publisher in memory."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fibril.endpoint.v1 import endpoint_pb2_grpc
from fibril.endpoint.v1.endpoint_pb2 import WatchEndpointsRequest
from fibril.endpoint.v1.endpoint_pb2_grpc import EndpointServiceStub
from services.common import errors
from services.common.kernel.netlink import IPAddress
from services.common.rpc.follow import Follower
from services.common.rpc.server import RpcConfig, RpcServer
from services.common.telemetry import Telemetry
from services.identity.endpoints import follow
from services.identity.endpoints.follow import EndpointFollower
from services.identity.ipcache.publisher import Published
from services.identity.workload.endpoints import EndpointView
from services.ipam.endpoints.api import EndpointApi, to_proto
from services.ipam.endpoints.manager import EndpointManager
from services.ipam.endpoints.model import EndpointRecord, EndpointSpec, Lease
from tests.unit.endpoints.endpointworld import World, started


@dataclass(frozen=True)
class Identity:
    number: int
    labels: Mapping[str, str]


class Allocator:
    """A number for each label set, from 100 on; 5 for none. `fail` is raised by what needs etcd."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[tuple[str, str], ...], int] = {}
        self.held: dict[str, Identity] = {}
        self.fail: Exception | None = None
        self.delay = 0.0
        self.at_once = self.most = 0
        self.moved: list[Callable[[str, Any], None]] = []

    async def allocate(self, labels: Mapping[str, str], holder: str) -> Any:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await asyncio.sleep(self.delay)
            if self.fail is not None:
                raise self.fail
        finally:
            self.at_once -= 1
        key = tuple(sorted(labels.items()))
        number = self.numbers.setdefault(key, 100 + len(self.numbers)) if key else 5
        self.held[holder] = Identity(number, labels)
        return self.held[holder]

    async def release(self, holder: str) -> int:
        identity = self.held.pop(holder, None)
        return identity.number if identity else 0

    def holders(self, prefix: str = "") -> dict[str, Any]:
        return {holder: identity for holder, identity in self.held.items() if holder.startswith(prefix)}

    def on_moved(self, callback: Callable[[str, Any], None]) -> None:
        self.moved.append(callback)


class Publisher:
    """`there` is what etcd has, `log` every change of it with its time; nothing is written while `fail` is set."""

    def __init__(self) -> None:
        self.there: dict[IPAddress, Published] = {}
        self.wanted: dict[IPAddress, Published] = {}
        self.log: list[tuple[float, str, int, int]] = []
        self.fail: Exception | None = None

    def _set(self, address: IPAddress, value: Published | None) -> None:
        before = self.there.pop(address, None)
        if value is not None:
            self.there[address] = value
        if before is None or value is None or not before.tells(value):
            new = value or Published(0)
            self.log.append((time.monotonic(), str(address), new.identity, new.previous))

    def want(self, records: Mapping[IPAddress, Published]) -> None:
        self.wanted = dict(records)
        self.write()

    def write(self) -> None:
        if self.fail is None:
            for address in self.there.keys() | self.wanted.keys():
                self._set(address, self.wanted.get(address))

    async def put(self, address: IPAddress, identity: int, previous: int = 0, pod: str = "") -> None:
        self.wanted[address] = Published(identity, previous, pod)
        self.write()
        if self.fail is not None:
            raise self.fail

    async def remove(self, address: IPAddress) -> None:
        self.wanted.pop(address, None)
        self.write()

    def identities(self) -> dict[str, int]:
        return {str(address): value.identity for address, value in self.there.items()}


class Told(World):
    """Notes when programs were told of an identity."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces = {f"/n/{n}": n + 1 for n in range(500)}
        self.told: list[tuple[float, int, int]] = []
        self.batches: list[int] = []

    async def lease(self, record: EndpointRecord) -> Lease:
        return Lease(f"10.0.{record.id // 250}.{record.id % 250}", "10.0.0.254")

    async def admitted(self, record: Any) -> None:
        """There are no policies here."""

    async def identify(self, records: Any) -> None:
        await super().identify(records)
        self.batches.append(len(records))
        self.told += [(time.monotonic(), record.id, record.identity) for record in records]


class Rig:
    """One node's ipam and follower, either of which may be away."""

    def __init__(self, root: Path) -> None:
        self.socket = root / "ipam.sock"
        self.servicer: Callable[[EndpointManager], EndpointApi] = EndpointApi
        self.world = Told()
        self.db = sqlite3.connect(":memory:")
        self.db.execute(
            "CREATE TABLE endpoints (id INTEGER PRIMARY KEY, container_id TEXT, ifname TEXT, record BLOB, state TEXT)"
        )
        self.allocator = Allocator()
        self.publisher = Publisher()
        self.view = EndpointView()
        self.manager: EndpointManager
        self.follower: EndpointFollower

    @asynccontextmanager
    async def ipam(self) -> AsyncIterator[None]:
        self.manager = await started(self.db, self.world)
        server = RpcServer(self.socket, RpcConfig(), Telemetry())
        server.add(endpoint_pb2_grpc.add_EndpointServiceServicer_to_server, self.servicer(self.manager))
        await server.start()
        try:
            yield
        finally:
            await server.drain(0.1)

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        self.follower = EndpointFollower(self.socket, self.allocator, self.publisher, self.view)
        task = asyncio.create_task(self.follower.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self.follower.stop()

    async def pod(self, number: int, **labels: str) -> EndpointRecord:
        return await self.manager.create(EndpointSpec(f"c{number}", netns=f"/n/{number}", labels=labels))

    def settled(self) -> bool:
        """Whether everything is as it should be: records, programs, etcd, holders."""
        records = self.manager.list()
        want = {r.id: self.allocator.numbers.get(tuple(sorted(r.labels.items())), 5) for r in records}
        return (
            {r.id: r.identity for r in records} == want
            and {r.id: self.world.identities[r.id] for r in records} == want
            and self.publisher.identities() == {r.ipv4: want[r.id] for r in records}
            and self.allocator.held.keys() == {r.owner for r in records}
            and {r.id: self.view.by_id(r.id) for r in records} == {r.id: to_proto(r) for r in records}
            and self.follower.status().state == "ok"
        )


async def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "LINGER_S", 0.05)
    monkeypatch.setattr(follow, "RECONNECT_S", 0.01)
    monkeypatch.setattr(follow, "AHEAD_S", 0.1)


@pytest.fixture
def rig(run_dir: Path) -> Rig:
    return Rig(run_dir)


async def test_pods_get_the_identity_of_their_labels_and_give_it_back(rig: Rig) -> None:
    async with rig.ipam(), rig.following():
        made = [await rig.pod(n, app="web" if n < 2 else "db") for n in range(3)]
        await rig.pod(3)
        await until(rig.settled)
        assert [rig.manager.by_id(r.id).identity for r in made] == [100, 100, 101]
        for number in range(4):
            await rig.manager.delete(f"c{number}")
        await until(rig.settled)
        assert (rig.allocator.held, rig.publisher.there) == ({}, {})


async def test_a_changed_identity_is_published_before_it_is_used(rig: Rig) -> None:
    async with rig.ipam(), rig.following():
        await until(lambda: rig.follower.status().state == "ok")
        made = await rig.pod(0, app="web")
        await until(rig.settled)
        # Nobody knew of the pod: nothing to wait for.
        assert rig.publisher.log[-1][2:] == (100, 5)
        await rig.manager.relabel("c0", "eth0", {"app": "db"})
        await until(rig.settled)
        published, told = rig.publisher.log[-1], rig.world.told[-1]
        assert (published[2:], told[1:]) == ((101, 100), (made.id, 101))
        assert told[0] - published[0] >= 0.1
        # Back at once: what is told last is what counts.
        await rig.manager.relabel("c0", "eth0", {"app": "web"})
        await rig.manager.relabel("c0", "eth0", {})
        await until(rig.settled)
        assert rig.publisher.identities() == {made.ipv4: 5}


async def test_a_restart_of_the_follower_changes_nothing(rig: Rig) -> None:
    async with rig.ipam():
        async with rig.following():
            for number in range(5):
                await rig.pod(number, app=str(number % 2))
            await rig.pod(9)
            await until(rig.settled)
        published, told = len(rig.publisher.log), len(rig.world.told)
        async with rig.following():
            await until(rig.settled)
            await asyncio.sleep(0.1)
        assert (len(rig.publisher.log), len(rig.world.told)) == (published, told)
        # What happened meanwhile is caught up with.
        await rig.manager.delete("c0")
        await rig.manager.relabel("c1", "eth0", {"app": "new"})
        await rig.pod(7, app="late")
        async with rig.following():
            await until(rig.settled)


async def test_holders_of_endpoints_gone_meanwhile_are_released_only_when_all_are_known(rig: Rig) -> None:
    rig.allocator.held["endpoint/gone/eth0"] = Identity(77, {})
    rig.allocator.held["job-1"] = other = Identity(78, {})
    rig.publisher.there[ip_address("10.0.0.99")] = Published(77)
    async with rig.following():
        await asyncio.sleep(0.15)
        assert len(rig.allocator.held) == 2 and rig.publisher.there
        async with rig.ipam():
            await until(lambda: rig.allocator.held == {"job-1": other} and not rig.publisher.there)


async def test_ipam_may_come_later_and_go(rig: Rig) -> None:
    async with rig.following():
        assert "no ipam" in rig.follower.status().message
        for round in range(3):
            async with rig.ipam():
                await rig.pod(round, app="web")
                await rig.pod(10 + round, app=str(round))
                if round:
                    await rig.manager.delete(f"c{round - 1}")
                await until(rig.settled)
            await until(lambda: rig.follower.status().state == "degraded")
            assert len(rig.publisher.there) == round + 2


class Silent(EndpointApi):
    """Takes a first watch and says nothing."""

    first = True

    async def WatchEndpoints(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if self.first:
            self.first = False
            await asyncio.Event().wait()
        async for each in super().WatchEndpoints(request, context):
            yield each


async def test_a_stream_that_does_not_begin_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.rpc.follow.BEGIN_S", 0.3)
    rig.servicer = Silent
    async with rig.ipam(), rig.following():
        await rig.pod(0, app="web")
        await until(rig.settled)
    seen: list[int] = []
    rig.servicer = Silent
    async with rig.ipam():
        follower: Follower[int] = Follower(
            "endpoints",
            rig.socket,
            lambda to: EndpointServiceStub(to).WatchEndpoints(WatchEndpointsRequest()),
            "endpoint",
            lambda each: int(each.id),
            lambda each: seen.append(each.id),
            lambda _: None,
        )
        task = asyncio.create_task(follower.run())
        try:
            await until(lambda: "nothing is told within 0.3 s" in follower.status().message or follower.in_step)
            await until(lambda: follower.in_step)
            assert seen == [each.id for each in rig.manager.list()] and seen
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_what_fails_waits_and_is_told(rig: Rig) -> None:
    async with rig.ipam(), rig.following():
        await until(lambda: rig.follower.status().state == "ok")
        rig.allocator.fail = errors.Unavailable("etcd is away")
        made = await rig.pod(0, app="web")
        await rig.pod(1, app="db")
        await until(lambda: rig.follower.status().message.startswith("2 of 2 endpoints keep"))
        assert "etcd is away" in rig.follower.status().message
        assert rig.manager.by_id(made.id).identity == 5
        # One that goes while it waits leaves nothing.
        await rig.manager.delete("c1")
        rig.allocator.fail = None
        await until(rig.settled)
        rig.publisher.fail = errors.Unavailable("no lease")
        await rig.manager.relabel("c0", "eth0", {"app": "x"})
        await until(lambda: rig.follower.status().state == "degraded")
        await asyncio.sleep(0.15)
        # What others cannot know is not used.
        assert rig.manager.by_id(made.id).identity == 100
        rig.publisher.fail = None
        await until(rig.settled)


async def test_an_identity_that_had_to_move_is_followed(rig: Rig) -> None:
    async with rig.ipam(), rig.following():
        made = await rig.pod(0, app="web")
        await until(rig.settled)
        rig.allocator.numbers[("app", "web"),] = 555
        rig.allocator.moved[0](made.owner, Identity(555, {}))
        rig.allocator.moved[0]("endpoint/unknown/eth0", Identity(556, {}))
        await until(rig.settled)
        assert rig.publisher.log[-1][2:] == (555, 100)


async def test_a_storm_is_bounded_and_batched(rig: Rig) -> None:
    rig.allocator.delay = 0.001
    async with rig.ipam(), rig.following():
        await until(lambda: rig.follower.status().state == "ok")
        await asyncio.gather(*(rig.pod(n, app=str(n % 50)) for n in range(300)))
        await until(rig.settled)
        assert 1 < rig.allocator.most <= 100
        # Each once, or twice: while it was made and when it was ready.
        assert 300 <= sum(rig.world.batches) <= 600 and len(rig.world.batches) < 200
        await asyncio.gather(*(rig.manager.delete(f"c{n}") for n in range(300)))
        await until(rig.settled)


STEP = st.tuples(st.sampled_from(("put", "label", "delete", "ipam", "follower", "fail", "wait")), st.integers(0, 3),
                 st.sampled_from(("", "a", "b")))  # fmt: skip


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(st.lists(STEP, max_size=14))
async def test_whatever_happens_all_agree_in_the_end(
    run_dir: Path, steps: list[tuple[str, int, str]]
) -> None:
    rig = Rig(run_dir)
    ipam, follower = rig.ipam(), rig.following()
    await ipam.__aenter__()
    await follower.__aenter__()
    try:
        for what, number, label in steps:
            labels = {"app": label} if label else {}
            if what == "put":
                if rig.manager.get(f"c{number}") is None:
                    await rig.pod(number, **labels)
            elif what == "label":
                if rig.manager.get(f"c{number}") is not None:
                    await rig.manager.relabel(f"c{number}", "eth0", labels)
            elif what == "delete":
                await rig.manager.delete(f"c{number}")
            elif what == "ipam":
                await ipam.__aexit__(None, None, None)
                ipam = rig.ipam()
                await ipam.__aenter__()
            elif what == "follower":
                await follower.__aexit__(None, None, None)
                follower = rig.following()
                await follower.__aenter__()
            elif what == "fail":
                rig.allocator.fail = errors.Unavailable("etcd") if number % 2 else None
                rig.publisher.fail = errors.Unavailable("etcd") if number > 1 else None
            else:
                await asyncio.sleep(0.03 * number)
        rig.allocator.fail = rig.publisher.fail = None
        rig.publisher.write()
        # Longer than a stream is given to begin.
        await until(rig.settled, 40.0)
    finally:
        await follower.__aexit__(None, None, None)
        await ipam.__aexit__(None, None, None)
