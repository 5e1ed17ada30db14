"""What the lb service writes into the kernel, read back from the kernel."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from dataclasses import replace
from ipaddress import ip_address

from services.common.instance import Instance
from services.lb import abi, maglev
from services.lb.model import (
    TCP,
    UDP,
    Algorithm,
    BackendKey,
    FrontendType,
    HealthCheck,
    TcpProbe,
    Topology,
    TrafficPolicy,
)  # fmt: skip
from tests.datapath.planekit import Declared, Reader, backend, begin, front, web


async def test_a_service_is_there_changes_and_goes(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    plane, gone = await begin(clean, declared)
    declared.put(web(), backend("10.0.0.1"), backend("10.0.0.2"))
    await plane.settled()
    kernel = Reader(plane)
    assert sorted(kernel.served("10.96.0.1", 80)) == ["10.0.0.1:80", "10.0.0.2:80"]
    assert kernel.hint("10.96.0.1") & abi.Hint.VIP and kernel.hint("10.0.0.1") & abi.Hint.BACKEND
    assert kernel.hint("192.168.0.1") & abi.Hint.NODE
    state = plane.service_state("web")
    assert (state.programmed, state.problem, state.inside) == (True, "", 2)
    declared.put(web(front("10.96.0.1:80"), front("10.96.0.1:443")), backend("10.0.0.2"), backend("10.0.0.3"))
    await plane.settled()
    assert sorted(kernel.served("10.96.0.1", 443)) == ["10.0.0.2:80", "10.0.0.3:80"]
    assert [(str(each.address), each.service) for each in gone] == [("10.0.0.1", "web")]
    declared.drop("web")
    await plane.settled()
    assert not kernel.fronts() and not kernel.hint("10.96.0.1") & abi.Hint.VIP
    assert {str(each.address) for each in gone} == {"10.0.0.1", "10.0.0.2", "10.0.0.3"}
    kernel.close()
    await plane.stop()


async def test_one_backend_of_many_is_a_few_stores(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    many = [backend(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}") for i in range(1, 10_001)]
    plane, _ = await begin(clean, declared)
    declared.put(web(), *many)
    await plane.settled()
    program, held = plane.program, plane.held("web", 4)
    assert program is not None and held is not None

    def writes() -> int:
        tables = plane.tables
        assert tables is not None
        return program.writes + held.inside.writes + tables.fronts.writes + tables.ranges.writes

    before = writes()
    declared.put(web(), *many[:-1], backend("10.77.0.1"))
    await plane.settled()
    # The old one's line, the new one's, and the slot.
    assert writes() - before <= 3
    before = writes()
    declared.put(web(), *many[1:-1], backend("10.77.0.1"))
    await plane.settled()
    assert writes() - before <= 3
    before = writes()
    declared.put(web(), *many[1:], backend("10.77.0.1"))
    await plane.settled()
    assert writes() - before <= 3
    kernel = Reader(plane)
    assert len(set(kernel.served("10.96.0.1", 80))) == 10_000
    kernel.close()
    await plane.stop()


async def test_policies_topology_and_health_decide_who_serves(clean: Instance) -> None:
    declared, verdicts = Declared(), {}
    declared.synced.set()
    plane, _ = await begin(clean, declared, verdicts)
    near, zone, far = (
        backend("10.0.0.1", node="n1", zone="z1"), backend("10.0.0.2", node="n2", zone="z1"),
        backend("10.0.0.3", node="n3", zone="z2"),
    )  # fmt: skip
    spec = web(
        front("10.96.0.1:80"), front("192.0.2.1:80", FrontendType.EXTERNAL_IP), topology=Topology.SAME_NODE,
        external=TrafficPolicy.LOCAL, health_check=HealthCheck(TcpProbe()),
    )  # fmt: skip
    declared.put(spec, near, zone, far)
    await plane.settled()
    kernel = Reader(plane)

    def inside() -> list[str]:
        return sorted(set(kernel.served("10.96.0.1", 80)))

    def outside() -> list[str]:
        return sorted(set(kernel.served("192.0.2.1", 80, outside=True)))

    assert (inside(), outside()) == (["10.0.0.1:80"], ["10.0.0.1:80"])
    verdicts["web", near.key] = "connection refused"
    plane.mark("web", frozenset({near.key}))
    await plane.settled()
    assert (inside(), outside()) == (["10.0.0.2:80"], [])
    assert plane.effective_state("web", near.key) is abi.BackendState.QUARANTINED
    declared.put(replace(spec, topology=Topology.ANY), near, zone, far)
    await plane.settled()
    assert inside() == ["10.0.0.2:80", "10.0.0.3:80"]
    # Whoever is leaving serves when nobody else does.
    leaving = replace(far, state=abi.BackendState.TERMINATING)
    declared.put(replace(spec, topology=Topology.ANY), near, leaving)
    await plane.settled()
    assert inside() == ["10.0.0.3:80"]
    kernel.close()
    await plane.stop()


async def test_a_frontend_moves_from_one_service_to_another(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    declared.put(web(name="b"), backend("10.0.0.1"))
    await plane.settled()
    declared.drop("b")
    declared.put(web(name="a"), backend("10.0.0.2"))
    await plane.settled()
    kernel = Reader(plane)
    assert kernel.served("10.96.0.1", 80) == ["10.0.0.2:80"]
    declared.put(web(name="b"), backend("10.0.0.1"))
    declared.drop("a")
    await plane.settled()
    assert kernel.served("10.96.0.1", 80) == ["10.0.0.1:80"]
    kernel.close()
    await plane.stop()


async def test_damage_is_mended(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    declared.put(web(), backend("10.0.0.1"), backend("10.0.0.2"))
    await plane.settled()
    await asyncio.sleep(0.05)
    held, tables = plane.held("web", 4), plane.tables
    assert held is not None and tables is not None
    assert await plane.compare() == 0
    tables.services.at(held.index, abi.Service).inside.count = 1
    tables.backends.at(
        held.backends[BackendKey(ip_address("10.0.0.1"), 80)] & abi.BACKEND_INDEX, abi.Backend
    ).port = 7
    tables.hints.mem[abi.hint_of(ip_address("10.96.0.1"))] = 0
    key = abi.FrontKey.of(ip_address("10.96.0.1"), 80, TCP)
    tables.fronts._inner.table.delete(key)
    assert await plane.compare() == 3
    kernel = Reader(plane)
    assert sorted(kernel.served("10.96.0.1", 80)) == ["10.0.0.1:80", "10.0.0.2:80"]
    assert kernel.hint("10.96.0.1") & abi.Hint.VIP
    assert await plane.compare() == 0
    kernel.close()
    await plane.stop()


async def test_any_sequence_of_changes_ends_as_declared(clean: Instance) -> None:
    """Against what is declared, after each of some hundred random changes, with two restarts between."""
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)
    rand = random.Random(seed)
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    for step in range(400):
        if step in (150, 300):
            await plane.stop()
            plane, _ = await begin(clean, declared)
        number = rand.randrange(12)
        name = f"s{number}"
        if name in declared.specs and rand.random() < 0.1:
            declared.drop(name)
        else:
            fronts = [
                front(f"10.96.0.{number}:{port}", proto=rand.choice((TCP, UDP)))
                for port in rand.sample(range(80, 90), 3)
            ]
            if rand.random() < 0.3:
                fronts.append(front(f"[fd00::{number}]:80"))
            spec = web(*fronts, name=name, algorithm=rand.choice(list(Algorithm)), maglev_size=251)
            hosts = rand.sample(range(30), rand.randrange(9))
            backends = [backend(f"10.0.{number}.{i}", weight=rand.choice((1, 1, 1, 3))) for i in hosts]
            backends += [backend(f"fd00:{number}::{i}") for i in range(rand.randrange(3))]
            declared.put(spec, *backends)
        if rand.random() < 0.6:
            await plane.settled()
    await plane.settled()
    kernel = Reader(plane)
    expected = {
        (str(each.address), each.port, each.proto): name
        for name, spec in declared.specs.items()
        for each in spec.frontends
    }
    there = kernel.fronts()
    assert there.keys() == expected.keys()
    for (address, port, proto), name in expected.items():
        mine = [
            b
            for b in declared.backends[name].values()
            if b.key.address.version == ip_address(address).version
        ]
        got = Counter(kernel.served(address, port, proto))
        assert set(got) == {f"{b.key.address}:{b.key.port}" for b in mine}
        if declared.specs[name].algorithm is Algorithm.RANDOM and mine:
            least = min(got.values())
            light = min(b.weight for b in mine)
            assert all(got[f"{b.key.address}:{b.key.port}"] * light == b.weight * least for b in mine)
        elif mine:
            assert got.total() == 251
    assert plane.program is not None
    assert plane.program.used[1] == sum(map(len, declared.backends.values())) - sum(
        1 for name, each in declared.backends.items() for key in each
        if key.address.version not in {f.address.version for f in declared.specs[name].frontends}
    )  # fmt: skip
    assert await plane.compare() == 0
    kernel.close()
    await plane.stop()


def test_maglev_is_fast_enough_for_its_default() -> None:
    """Not timed: counts what the size gives."""
    assert maglev.size_for(5) == 509 and maglev.size_for(160) == 16381 and maglev.size_for(100_000) == 131071
