"""What the next process makes of what is in the kernel, and of what the one before has left half done."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest

from services.common import errors
from services.common.instance import Instance
from services.lb import abi
from services.lb.health.monitor import Health
from services.lb.kernel.writer import Plane
from services.lb.model import TCP, Algorithm, FrontendType, HealthCheck, TcpProbe
from tests.datapath.planekit import HASHED, HERE, Declared, Reader, backend, begin, front, web


async def test_a_restart_adopts_everything_and_writes_nothing(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    node = front("0.0.0.0:30080", FrontendType.NODE_PORT)
    declared.put(
        web(front("10.96.0.1:80"), node, algorithm=Algorithm.MAGLEV, sources=(ip_network("10.0.0.0/8"),)),
        *(backend(f"10.0.0.{i}") for i in range(1, 6)),
    )
    declared.put(web(front("10.96.0.2:8000", last=8999), front("[fd00::5]:80"), name="range"), backend("10.0.1.1"),
                 backend("fd00::9"))  # fmt: skip
    declared.put(web(front("10.96.0.3:80"), name="gone"), backend("10.0.2.1"))
    await plane.settled()
    kernel = Reader(plane)
    before = (kernel.fronts(), kernel.served("10.96.0.1", 80), kernel.served("0.0.0.0", 30080, outside=True))
    kernel.close()
    ids = {name: dict(held.backends) for name, held in plane.program.held.items()} if plane.program else {}
    await plane.stop()
    later = Declared()
    later.specs, later.backends = dict(declared.specs), dict(declared.backends)
    del later.specs["gone"], later.backends["gone"]
    plane, gone = await begin(clean, later)
    assert plane.program is not None and plane.tables is not None
    kernel = Reader(plane)
    # Not all is known yet: what nobody wants stays.
    assert (kernel.fronts(), kernel.served("10.96.0.1", 80)) == before[:2]
    assert kernel.served("0.0.0.0", 30080, outside=True) == before[2]
    assert plane.program.writes == 0 and plane.tables.fronts.writes == 0 and plane.tables.ranges.writes == 0
    assert {n: dict(held.backends) for n, held in plane.program.held.items()} == {
        name: known for name, known in ids.items() if name[0] != "gone"
    }
    later.synced.set()
    await asyncio.sleep(0.05)
    await plane.settled()
    assert ("10.96.0.3", 80, TCP) not in kernel.fronts()
    assert [str(each.address) for each in gone] == ["10.0.2.1"]
    assert kernel.served("10.96.0.1", 80) == before[1]
    kernel.close()
    await plane.stop()


async def test_a_restart_gives_the_unwell_nothing(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    sick, well = backend("10.0.0.1"), backend("10.0.0.2")
    plane, _ = await begin(clean, declared, {("web", sick.key): "no answer"})
    spec = web(health_check=HealthCheck(TcpProbe()))
    declared.put(spec, sick, well)
    await plane.settled()
    assert plane.quarantined("web", sick.key) and not plane.quarantined("web", well.key)
    await plane.stop()
    later = Declared()
    health = Health(later, lambda name, key: plane.quarantined(name, key))
    plane = Plane(clean, later, health.verdict, lambda: HERE, cluster="c1")
    plane.set_addresses(HASHED)
    await plane.start()
    await plane.use_maps()
    assert plane.quarantined("web", sick.key) and not plane.quarantined("web", backend("10.0.0.3").key)
    later.synced.set()
    later.put(spec, sick, well)
    await plane.settled()
    kernel = Reader(plane)
    assert kernel.served("10.96.0.1", 80) == ["10.0.0.2:80"]
    assert plane.program is not None and plane.program.writes == 0
    kernel.close()
    await plane.stop()


async def test_what_a_full_table_took_of_a_service_goes_with_it(clean: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    tables = plane.tables
    assert tables is not None
    ports = front("10.96.0.1:1", last=65535)  # sixteen elements
    prefixes = tuple(ip_network(f"10.{n}.0.0/16") for n in range(20))
    room = 5
    for known in (tables.ranges, tables.sources):

        def some(keys: bytes, values: bytes, real: Any = known.table.update_packed, table: Any = known.table) -> Any:
            size = table.info.key_size
            done, failure = real(keys[: room * size], values[: room * table.info.value_size])
            return done, failure or (errors.ResourceExhausted("full") if len(keys) > room * size else None)

        with monkeypatch.context() as full:
            full.setattr(known.table, "update_packed", some)
            declared.put(web(front("10.96.0.1:80"), ports, sources=prefixes), backend("10.0.0.1"))
            await plane.settled()
            assert plane.service_state("web").problem == "full"
            assert len(known.held) == room
            # Another try that fails is as harmless.
            plane.mark("web")
            await plane.settled()
        declared.put(web(front("10.96.0.2:80"), sources=prefixes[-1:]), backend("10.0.0.1"))
        await plane.settled()
        kernel = Reader(plane)
        assert plane.service_state("web").programmed and kernel.fronts().keys() == {("10.96.0.2", 80, TCP)}
        assert len(list(known.table.keys())) == len(known.held) == (1 if known is tables.sources else 0)
        assert not kernel.hint("10.96.0.1") and kernel.hint("10.96.0.2") == abi.Hint.VIP
        declared.drop("web")
        await plane.settled()
        assert not kernel.fronts() and not tables.sources.held and not kernel.hint("10.96.0.2")
        kernel.close()
    await plane.stop()


async def test_what_is_not_understood_after_a_restart_is_served_as_it_was(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    declared.put(web(front("10.96.0.1:80"), front("[fd00:96::1]:80")), backend("10.0.0.1"), backend("fd00::9"))
    declared.put(web(front("10.96.0.2:80"), name="other"), backend("10.0.0.2"))
    await plane.settled()
    await plane.stop()
    # Another version has written it anew.
    later = Declared()
    later.unread = frozenset({"web"})
    later.synced.set()
    plane, gone = await begin(clean, later)
    kernel = Reader(plane)
    assert kernel.served("10.96.0.1", 80) == ["10.0.0.1:80"] and kernel.served("fd00:96::1", 80) == ["fd00::9:80"]
    assert kernel.hint("10.96.0.1") & abi.Hint.VIP and kernel.hint("10.0.0.1") & abi.Hint.BACKEND
    assert ("10.96.0.2", 80, TCP) not in kernel.fronts() and len(gone) == 1
    assert await plane.compare() == 0
    # It is declared so that it is understood, and is what it was.
    ids = dict(plane.program.held["web", 4].backends)  # type: ignore[union-attr]
    later.unread = frozenset()
    later.put(web(front("10.96.0.1:80")), backend("10.0.0.1"))
    await plane.settled()
    assert plane.program.held["web", 4].backends == ids  # type: ignore[union-attr]
    assert kernel.fronts().keys() == {("10.96.0.1", 80, TCP)} and len(gone) == 2
    later.drop("web")
    await plane.settled()
    assert not kernel.fronts() and len(gone) == 3
    kernel.close()
    await plane.stop()


async def test_what_cannot_be_written_after_a_restart_is_served_as_it_was(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    spec = web(front("10.96.0.1:80"), front("10.96.0.2:1000", last=1003), front("[::]:30080", FrontendType.NODE_PORT))
    first = (backend("10.0.0.1"), backend("fd00::9"))
    declared.put(spec, *first)
    await plane.settled()
    await plane.stop()
    later = Declared()
    plane, _ = await begin(clean, later)
    assert plane.program is not None
    plane.program._backend_indexes._limit = 8
    later.synced.set()
    later.put(spec, *first, *(backend(f"10.1.0.{i}") for i in range(1, 20)), *(backend(f"fd00:1::{i}") for i in range(1, 20)))
    await plane.settled()
    assert "in use" in plane.service_state("web").problem
    kernel = Reader(plane)
    assert {("10.96.0.1", 80, TCP), ("::", 30080, TCP)} <= kernel.fronts().keys()
    assert kernel.served("10.96.0.1", 80) == ["10.0.0.1:80"] and kernel.served("::", 30080) == ["fd00::9:80"]
    assert kernel.hint("10.96.0.1") & abi.Hint.VIP and kernel.hint("::") & abi.Hint.VIP
    assert kernel.hint("10.96.0.2") & (abi.Hint.VIP | abi.Hint.RANGE) == abi.Hint.VIP | abi.Hint.RANGE
    later.drop("web")
    await plane.settled()
    assert not any(kernel.hint(address) & (abi.Hint.VIP | abi.Hint.RANGE) for address in ("10.96.0.1", "10.96.0.2", "::"))
    kernel.close()
    await plane.stop()


async def test_sources_of_a_service_that_was_cut_off_are_not_admitted_by_the_next(
    clean: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    tables = plane.tables
    assert tables is not None
    known = tables.sources
    size = known.table.info.key_size
    real = known.table.update_packed

    def some(keys: bytes, values: bytes) -> Any:
        return real(keys[:size], values[: known.table.info.value_size])[0], errors.ResourceExhausted("full")

    theirs = (ip_network("10.0.0.0/8"), ip_network("11.0.0.0/8"))
    with monkeypatch.context() as full:
        full.setattr(known.table, "update_packed", some)
        declared.put(web(front("192.0.2.1:80", FrontendType.EXTERNAL_IP), sources=theirs), backend("10.0.0.1"))
        await plane.settled()
        assert plane.service_state("web").problem == "full" and len(known.held) == 1
        index = plane.program.held["web", 4].index  # type: ignore[union-attr]
    await plane.stop()
    # It is no longer declared when the next process begins; another has its line.
    later = Declared()
    later.synced.set()
    plane, _ = await begin(clean, later)
    assert plane.tables is not None and plane.program is not None
    mine = ip_network("172.16.0.0/12")
    later.put(
        web(front("192.0.2.2:80", FrontendType.EXTERNAL_IP), name="other", sources=(mine,)), backend("10.0.0.2")
    )
    await plane.settled()
    assert plane.program.held["other", 4].index == index
    there = set(map(bytes, plane.tables.sources.table.keys()))
    assert there == {bytes(abi.SourceKey.of(index, mine))}
    await plane.stop()


async def test_sources_are_admitted_before_they_count(clean: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    spec = web(front("192.0.2.1:80", FrontendType.EXTERNAL_IP))
    declared.put(spec, backend("10.0.0.1"))
    await plane.settled()
    held, tables = plane.held("web", 4), plane.tables
    assert held is not None and tables is not None
    seen = []
    real = tables.sources.put_many

    def put(pairs: Any) -> None:
        seen.append(tables.services.at(held.index, abi.Service).flags & abi.ServiceFlag.SOURCES)
        real(pairs)

    monkeypatch.setattr(tables.sources, "put_many", put)
    declared.put(replace(spec, sources=(ip_network("10.0.0.0/8"),)), backend("10.0.0.1"))
    await plane.settled()
    assert seen == [0] and tables.services.at(held.index, abi.Service).flags & abi.ServiceFlag.SOURCES
    await plane.stop()
