"""The manager against a kernel and an address book that can fail, block and be looked at: what is left
after each step.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable
from typing import Any

import pytest
from endpointworld import World, rows, started, until

from services.common import errors
from services.ipam.endpoints.manager import EndpointManager
from services.ipam.endpoints.model import EndpointSpec, Heirs, State

SPEC = EndpointSpec("c", netns="/n/a")


async def test_create_and_delete_leave_nothing(
    manager: EndpointManager, world: World, db: sqlite3.Connection
) -> None:
    made = await manager.create(SPEC)
    assert (made.state, made.ipv4, made.mtu, made.host_ifindex) == (State.READY, "10.0.0.1", 1500, 101)
    assert rows(db) == [(1, "READY")] and world.links == {"fb1": 1}
    assert await manager.create(SPEC) == made
    assert world.calls.count("wire") == 1
    assert await manager.delete("c") == 1
    assert (rows(db), world.links, world.held, manager.in_use(1)) == ([], {}, {}, False)
    assert await manager.delete("c") == 0


@pytest.mark.parametrize("step", ["place", "lease", "wire"])
async def test_a_step_that_fails_is_undone(
    manager: EndpointManager, world: World, db: sqlite3.Connection, step: str
) -> None:
    world.fail[step] = errors.ResourceExhausted("full")
    with pytest.raises(errors.ResourceExhausted):
        await manager.create(SPEC)
    assert (rows(db), world.links, world.held, manager.list(), manager.in_use(1)) == ([], {}, {}, [], False)
    world.fail.clear()
    assert (await manager.create(SPEC)).state is State.READY


async def test_a_bug_is_undone_too(manager: EndpointManager, world: World, db: sqlite3.Connection) -> None:
    world.fail["wire"] = RuntimeError("bug")
    with pytest.raises(RuntimeError):
        await manager.create(SPEC)
    assert (rows(db), world.held) == ([], {})


async def test_what_cannot_be_undone_now_is_later(
    manager: EndpointManager, world: World, db: sqlite3.Connection
) -> None:
    world.fail.update(wire=errors.Internal("no"), unwire=errors.Unavailable("busy"))
    with pytest.raises(errors.Internal):
        await manager.create(SPEC)
    left = manager.get("c")
    assert left is not None and left.state is State.DELETING and "busy" in left.message
    assert rows(db) == [(1, "DELETING")]
    world.fail.clear()
    await manager.repair(left.id)
    assert (rows(db), world.held, manager.list()) == ([], {}, [])


async def test_a_full_map_is_told_before_anything_is_made(manager: EndpointManager, world: World) -> None:
    await manager.create(SPEC)
    world.full = 1
    with pytest.raises(errors.ResourceExhausted, match="1 endpoints"):
        await manager.create(EndpointSpec("d", netns="/n/b"))
    assert world.calls[-1] == "place" and len(world.held) == 1


async def test_creations_of_one_key_wait_for_each_other(manager: EndpointManager, world: World) -> None:
    made = await asyncio.gather(*(manager.create(SPEC) for _ in range(5)))
    assert {record.id for record in made} == {1}
    assert world.calls.count("wire") == 1


async def test_one_that_is_there_already_has_its_policy_too(
    manager: EndpointManager, world: World, db: sqlite3.Connection
) -> None:
    """Made by a process that ended while it waited for that."""
    await manager.create(SPEC)
    again = await started(db, world)
    world.fail["admitted"] = errors.Unavailable("no policy yet")
    with pytest.raises(errors.Unavailable):
        await again.create(SPEC)
    assert rows(db) == [(1, "READY")]
    world.fail.clear()
    assert (await again.create(SPEC)).id == 1


@pytest.mark.parametrize(("step", "state"), [("wire", "CREATING"), ("admitted", "READY")])
async def test_a_creation_nobody_waits_for_is_undone(
    manager: EndpointManager, world: World, db: sqlite3.Connection, step: str, state: str
) -> None:
    world.gate[step] = asyncio.Event()
    caller = asyncio.create_task(manager.create(SPEC))
    await until(lambda: step in world.calls)
    assert rows(db) == [(1, state)]
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    world.gate[step].set()
    await manager.stop()
    assert (rows(db), world.links, world.held) == ([], {}, {})


async def test_a_deletion_nobody_waits_for_is_completed(
    manager: EndpointManager, world: World, db: sqlite3.Connection
) -> None:
    await manager.create(SPEC)
    world.gate["unwire"] = asyncio.Event()
    caller = asyncio.create_task(manager.delete("c"))
    await until(lambda: "unwire" in world.calls)
    caller.cancel()
    world.gate["unwire"].set()
    await manager.stop()
    assert (rows(db), world.links, world.held) == ([], {}, {})


async def test_deleting_all_of_a_container_waits_for_what_is_being_made(
    manager: EndpointManager, world: World
) -> None:
    await manager.create(EndpointSpec("c", "net1", netns="/n/a"))
    world.gate["place"] = asyncio.Event()
    making = asyncio.create_task(manager.create(SPEC))
    await until(lambda: world.calls[-1] == "place")
    deleting = asyncio.create_task(manager.delete("c"))
    await asyncio.sleep(0)
    world.gate["place"].set()
    await making
    assert await deleting == 2
    assert world.links == {}


@pytest.mark.parametrize("step", ["lease", "wire", "unwire", "release"])
async def test_a_death_at_a_step_is_cleaned_up_by_the_next_start(
    manager: EndpointManager, world: World, db: sqlite3.Connection, step: str
) -> None:
    other = await manager.create(EndpointSpec("d", netns="/n/b"))
    world.gate[step] = asyncio.Event()
    if step in ("unwire", "release"):
        gate = world.gate.pop(step)
        await manager.create(SPEC)
        world.gate[step] = gate
        work: Awaitable[Any] = manager.delete("c")
    else:
        work = manager.create(SPEC)
    world.calls.clear()
    caller = asyncio.ensure_future(work)
    await until(lambda: step in world.calls)
    world.links.setdefault("fb2", 1)  # as if the kernel had already done its part
    if step == "lease":
        world.held["endpoint/c/eth0"] = "10.0.0.2"
        del world.links["fb2"]
    # The process is gone: its task never goes on. What is left is the database, the kernel and the book.
    world.gate.clear()
    again = await started(db, world)
    assert again.list() == [other]
    assert world.links == {"fb1": 2}
    assert world.held == {other.owner: "10.0.0.1"}
    caller.cancel()


async def test_a_start_adopts_what_was_ready(
    manager: EndpointManager, world: World, db: sqlite3.Connection
) -> None:
    made = await manager.create(SPEC)
    world.calls.clear()
    again = await started(db, world)
    assert again.list() == [made] and again.in_use(1)
    assert world.calls == []
    assert (await again.create(EndpointSpec("d", netns="/n/b"))).id == 2


async def test_an_unreadable_record_does_not_stop_the_start(
    manager: EndpointManager, world: World, db: sqlite3.Connection
) -> None:
    made = await manager.create(SPEC)
    with db:
        db.execute("INSERT INTO endpoints VALUES (9, 'x', 'eth0', X'00', 'READY')")
    again = await started(db, world)
    assert again.list() == [made]
    assert rows(db) == [(1, "READY")]


async def test_another_namespace_for_a_live_endpoint_is_refused(manager: EndpointManager) -> None:
    await manager.create(SPEC)
    with pytest.raises(errors.AlreadyExists) as refused:
        await manager.create(EndpointSpec("c", netns="/n/b"))
    assert refused.value.field == "netns"


async def test_a_namespace_replaced_under_its_path_replaces_the_endpoint(
    manager: EndpointManager, world: World
) -> None:
    old = await manager.create(SPEC)
    world.namespaces["/n/a"] = 77
    new = await manager.create(SPEC)
    assert (new.netns_cookie, len(manager.list())) == (77, 1)
    assert new.id != old.id


async def test_repair_deletes_an_endpoint_whose_namespace_is_gone(
    manager: EndpointManager, world: World, db: sqlite3.Connection
) -> None:
    made = await manager.create(SPEC)
    del world.namespaces["/n/a"]
    await manager.repair(made.id)
    assert (rows(db), world.links, world.held) == ([], {}, {})


async def test_a_failed_repair_shows_and_a_later_one_clears_it(
    manager: EndpointManager, world: World
) -> None:
    made = await manager.create(SPEC)
    world.fail["repair"] = errors.Unavailable("the kernel is busy")
    with pytest.raises(errors.Unavailable):
        await manager.repair(made.id)
    shown = manager.get("c")
    assert shown is not None and (shown.state, shown.message) == (State.DEGRADED, "the kernel is busy")
    world.fail.clear()
    # Asked for again, a degraded endpoint is repaired before it is given out.
    again = await manager.create(SPEC)
    assert (again.state, again.message, again.host_ifindex) == (State.READY, "", 500)


async def test_the_next_endpoint_of_a_namespace_inherits_its_map_entries(
    manager: EndpointManager, world: World
) -> None:
    first = await manager.create(SPEC)
    second = await manager.create(EndpointSpec("c", "net1", netns="/n/a"))
    assert manager.by_cookie(1) == first
    await manager.delete("c", "eth0")
    assert world.heirs[-1] == Heirs(second.id, second.id)
    assert manager.by_cookie(1) == second
    await manager.delete("c")
    assert world.heirs[-1] == Heirs(0, 0)


async def test_watchers_hear_of_every_state(manager: EndpointManager) -> None:
    heard: list[tuple[str, str]] = []

    async def listen() -> None:
        async for change in manager.watch():
            heard.append((change.kind, change.item.state.name if change.item else ""))

    listener = asyncio.create_task(listen())
    await until(lambda: bool(heard))
    await manager.create(SPEC)
    await manager.delete("c")
    await until(lambda: len(heard) == 5)
    listener.cancel()
    assert heard == [
        ("synced", ""), ("put", "CREATING"), ("put", "READY"), ("put", "DELETING"), ("delete", "DELETING"),
    ]  # fmt: skip
