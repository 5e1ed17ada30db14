"""Labels and identities of endpoints that exist."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sqlite3

import pytest
from endpointworld import World, started, until

from services.common import errors
from services.ipam.endpoints import manager as managing
from services.ipam.endpoints.manager import EndpointManager
from services.ipam.endpoints.model import EndpointRecord, EndpointSpec, State

SPEC = EndpointSpec("c", netns="/n/a", labels={"app": "web"})


async def test_an_identity_is_recorded_and_told(
    manager: EndpointManager, world: World, db: sqlite3.Connection
) -> None:
    made = await manager.create(SPEC)
    assert (made.identity, world.identities) == (5, {1: 5})
    assert await manager.set_identities([(1, "c", 77), (2, "x", 78), (1, "c", 79)]) == [2]
    assert world.identities == {1: 79}
    # A number that is another container's by now is not touched.
    assert await manager.set_identities([(1, "other", 80)]) == [1]
    again = await started(db, world)
    (record,) = again.list()
    assert (record.identity, record.state) == (79, State.READY)


async def test_many_identities_go_in_chunks(
    manager: EndpointManager, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(managing, "IDENTIFY_CHUNK", 2)
    for number in range(5):
        await manager.create(EndpointSpec(f"c{number}", netns="/n/a"))
    await manager.set_identities((n + 1, f"c{n}", 100 + n) for n in range(5))
    assert world.identities == {n + 1: 100 + n for n in range(5)}
    assert world.calls.count("identify") == 3


async def test_an_identity_set_while_an_endpoint_is_made_or_repaired_is_kept(
    manager: EndpointManager, world: World
) -> None:
    for step, identity in (("wire", 77), ("repair", 78)):
        world.gate[step] = gate = asyncio.Event()
        work = asyncio.create_task(manager.create(SPEC) if step == "wire" else manager.repair(1))
        await until(lambda step=step: step in world.calls)
        assert await manager.set_identities([(1, "c", identity)]) == []
        # The kernel side was begun with the former identity, and is finished with it.
        world.gate.clear()
        gate.set()
        await work
        (record,) = manager.list()
        assert (record.identity, record.state, world.identities) == (identity, State.READY, {1: identity})


async def test_a_failed_telling_is_repeated_by_the_next_call(manager: EndpointManager, world: World) -> None:
    await manager.create(SPEC)
    world.fail["identify"] = errors.Internal("no")
    with pytest.raises(errors.Internal):
        await manager.set_identities([(1, "c", 77)])
    world.fail.clear()
    await manager.set_identities([(1, "c", 77)])
    assert world.identities == {1: 77}


async def test_an_endpoint_that_goes_has_no_identity_to_set(manager: EndpointManager, world: World) -> None:
    await manager.create(SPEC)
    world.fail["unwire"] = errors.Unavailable("busy")
    with pytest.raises(errors.Unavailable):
        await manager.delete("c")
    assert await manager.set_identities([(1, "c", 77)]) == [1]
    with pytest.raises(errors.NotFound):
        await manager.relabel("c", "", {})


async def test_new_labels_are_told_and_keep_the_identity(
    manager: EndpointManager, world: World, db: sqlite3.Connection
) -> None:
    await manager.create(SPEC)
    await manager.set_identities([(1, "c", 77)])
    changes = manager.watch()
    assert [(await anext(changes)).kind for _ in range(2)] == ["put", "synced"]
    for labels in ({"app": "db", "tier": "x"}, {}):
        record = await manager.relabel("c", "eth0", labels)
        assert (record.labels, record.identity) == (labels, 77)
        told = (await anext(changes)).item
        assert told == record
        assert (await started(db, world)).list() == [record]
    await changes.aclose()
    # What was asked for at first is still the same endpoint.
    assert await manager.create(SPEC) == record
    with pytest.raises(errors.InvalidArgument) as refused:
        await manager.relabel("c", "", {"": "x"})
    assert refused.value.field == "labels"
    with pytest.raises(errors.NotFound):
        await manager.relabel("nobody", "", {})


async def test_a_record_of_the_version_without_identities_has_init(manager: EndpointManager) -> None:
    made = await manager.create(SPEC)
    data = json.loads(dataclasses.replace(made, identity=77).encode())
    del data["identity"]
    assert EndpointRecord.decode(json.dumps(data).encode()) == dataclasses.replace(made, identity=5)
