"""A kernel and an address book in memory, for the endpoint manager."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence

from services.common import errors
from services.ipam.endpoints.manager import EndpointManager
from services.ipam.endpoints.model import EndpointRecord, EndpointSpec, Heirs, Lease, Place
from services.ipam.endpoints.store import Store


class World:
    """A kernel and an address book in memory. `fail` names a call that raises; `gate` one that waits."""

    def __init__(self) -> None:
        self.namespaces = {"/n/a": 1, "/n/b": 2}
        self.links: dict[str, int] = {}
        self.held: dict[str, str] = {}
        self.fail: dict[str, Exception] = {}
        self.gate: dict[str, asyncio.Event] = {}
        self.calls: list[str] = []
        self.heirs: list[Heirs] = []
        self.full = 65_535
        self.identities: dict[int, int] = {}

    async def step(self, name: str) -> None:
        self.calls.append(name)
        if name in self.gate:
            await self.gate[name].wait()
        if name in self.fail:
            raise self.fail[name]

    def unavailable(self) -> errors.FibrilError | None:
        return None

    def capacity(self) -> int:
        return self.full

    def mtu(self) -> int:
        return 1500

    async def place(self, spec: EndpointSpec) -> Place:
        await self.step("place")
        if spec.netns not in self.namespaces:
            raise errors.FailedPrecondition(f"network namespace {spec.netns} is gone", field="netns")
        return Place(self.namespaces[spec.netns], 5)

    async def wire(self, record: EndpointRecord) -> int:
        await self.step("wire")
        self.links[record.host_ifname] = record.netns_cookie
        self.identities[record.id] = record.identity
        return 100 + record.id

    async def unwire(self, record: EndpointRecord, heirs: Heirs) -> None:
        await self.step("unwire")
        self.heirs.append(heirs)
        self.links.pop(record.host_ifname, None)

    async def repair(self, record: EndpointRecord) -> int:
        await self.step("repair")
        if self.namespaces.get(record.netns) != record.netns_cookie:
            raise errors.NotFound("gone")
        self.links[record.host_ifname] = record.netns_cookie
        self.identities[record.id] = record.identity
        return 500

    async def admitted(self, record: EndpointRecord) -> None:
        """There are no policies here, unless a test says so."""
        if "admitted" in {*self.gate, *self.fail}:
            await self.step("admitted")

    async def identify(self, records: Sequence[EndpointRecord]) -> None:
        await self.step("identify")
        self.identities.update({record.id: record.identity for record in records})

    async def check(self, record: EndpointRecord) -> list[str]:
        return []

    async def lease(self, record: EndpointRecord) -> Lease:
        await self.step("lease")
        self.held[record.owner] = f"10.0.0.{record.id}"
        return Lease(self.held[record.owner], "10.0.0.254")

    async def release(self, owner: str) -> None:
        await self.step("release")
        self.held.pop(owner, None)

    async def sweep(self, live: set[str]) -> None:
        self.held = {owner: address for owner, address in self.held.items() if owner in live}


async def started(db: sqlite3.Connection, world: World) -> EndpointManager:
    manager = EndpointManager(Store(db), world, world, lambda number: f"fb{number}")
    await manager.start()
    return manager


def rows(db: sqlite3.Connection) -> list[tuple[int, str]]:
    return db.execute("SELECT id, state FROM endpoints").fetchall()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)
