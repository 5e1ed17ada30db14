"""The reconciler, one behaviour a test."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.reconcile.fakes import Setup


@pytest.fixture
def setup() -> Setup:
    return Setup()


async def test_a_first_comparison_adopts_what_is_right_and_mends_the_rest(setup: Setup) -> None:
    setup.world.objects = {"right": 1, "wrong": 1, "leftover": 1}
    setup.wanted = {"right": 1, "wrong": 2, "missing": 3}
    await setup.reconciler.work()
    assert setup.world.objects == setup.wanted
    assert sorted(setup.world.calls) == [("delete", "leftover"), ("update", "missing"), ("update", "wrong")]


async def test_deletes_go_before_updates(setup: Setup) -> None:
    setup.world.objects = {"leftover": 1}
    setup.wanted = {"new": 1}
    await setup.reconciler.work()
    assert setup.world.calls == [("delete", "leftover"), ("update", "new")]
    setup.want("newer", 1)
    setup.drop("new")
    await setup.reconciler.work()
    assert setup.world.calls[2:] == [("delete", "new"), ("update", "newer")]


@pytest.mark.parametrize("others", [10, 10_000])
async def test_a_change_costs_one_operation_whatever_else_there_is(setup: Setup, others: int) -> None:
    setup.wanted = {f"thing{i}": i for i in range(others)}
    setup.world.objects = dict(setup.wanted)
    await setup.reconciler.work()
    assert (setup.world.calls, setup.world.reads) == ([], 1)
    setup.want("one", 1)
    await setup.reconciler.work()
    assert (setup.world.calls, setup.world.reads) == ([("update", "one")], 1)


async def test_many_changes_of_one_object_are_merged_into_the_last(setup: Setup) -> None:
    await setup.reconciler.work()
    for value in range(5):
        setup.want("thing", value)
    await setup.reconciler.work()
    assert setup.world.calls == [("update", "thing")]
    assert setup.world.objects == {"thing": 4}


async def test_nothing_is_deleted_before_the_sources_are_in_sync(setup: Setup) -> None:
    setup.synced = False
    setup.world.objects = {"not mentioned yet": 1, "leftover": 1}
    setup.want("new", 1)
    setup.drop("leftover")
    assert await setup.reconciler.work() <= 1.0
    assert setup.world.calls == [("update", "new")]
    assert "in sync" in setup.reconciler.health().message

    setup.wanted["not mentioned yet"] = 1
    setup.synced = True
    await setup.reconciler.work()
    assert setup.world.calls[1:] == [("delete", "leftover")]
    assert setup.world.objects == setup.wanted
    assert setup.reconciler.health().state == "ok"


async def test_an_object_dropped_before_sync_is_deleted_after_it(setup: Setup) -> None:
    setup.want("thing", 1)
    await setup.reconciler.work()
    setup.synced = False
    setup.drop("thing")
    await setup.reconciler.work()
    assert setup.world.objects == {"thing": 1}
    setup.synced = True
    await setup.reconciler.work()
    assert setup.world.objects == {}


async def test_a_failing_object_is_tried_after_growing_delays_and_holds_up_nobody(setup: Setup) -> None:
    await setup.reconciler.work()
    setup.world.fail_next["bad"] = 6
    setup.want("bad", 1)
    setup.want("good", 1)
    delays = [await setup.reconciler.work()]
    assert setup.world.objects == {"good": 1}
    while "bad" not in setup.world.objects:
        setup.clock.now += delays[-1]
        delays.append(await setup.reconciler.work())
    # Doubling up to the greatest delay; then only the resync (60 s after the first comparison) is due.
    assert delays == [1, 2, 4, 8, 8, 8, 60 - 31]
    assert setup.world.calls.count(("update", "good")) == 1


async def test_a_change_cuts_the_delay_short(setup: Setup) -> None:
    await setup.reconciler.work()
    setup.world.fail_next["thing"] = 1
    setup.want("thing", 1)
    await setup.reconciler.work()
    assert setup.world.objects == {}
    setup.want("thing", 2)
    await setup.reconciler.work()
    assert setup.world.objects == {"thing": 2}
    assert setup.reconciler.status("thing")["thing"].state == "done"


async def test_a_changed_object_that_fails_again_waits_its_new_delay_only(setup: Setup) -> None:
    await setup.reconciler.work()
    setup.world.fail_next["thing"] = 3
    setup.want("thing", 1)
    assert await setup.reconciler.work() == 1.0
    setup.clock.now += 0.5
    setup.want("thing", 2)
    await setup.reconciler.work()
    setup.clock.now += 0.5  # when the first failure would have been due
    await setup.reconciler.work()
    assert setup.world.calls == [("update", "thing")] * 2


async def test_a_resync_mends_what_others_broke_and_respects_delays(setup: Setup) -> None:
    setup.wanted = {"a": 1, "b": 1}
    setup.world.fail_next["b"] = 99
    setup.backoff = (1000.0, 1000.0)
    setup.restart()
    await setup.reconciler.work()
    setup.world.objects = {"a": 7, "stranger": 1}
    setup.clock.now += 60
    await setup.reconciler.work()
    assert setup.world.objects == {"a": 1}
    assert setup.world.calls.count(("update", "b")) == 1


async def test_a_failure_that_had_its_effect_is_forgotten_by_the_next_comparison(setup: Setup) -> None:
    setup.backoff = (1000.0, 1000.0)
    setup.restart()
    await setup.reconciler.work()
    setup.world.fail_next["thing"] = 1
    setup.world.late.add("thing")
    setup.want("thing", 1)
    await setup.reconciler.work()
    assert setup.reconciler.health().state == "degraded"
    setup.reconciler.wake()
    await setup.reconciler.work()
    assert setup.reconciler.health().state == "ok"
    assert setup.world.calls == [("update", "thing")]


async def test_a_world_that_cannot_be_read_is_read_again_while_changes_go_on(setup: Setup) -> None:
    setup.world.fail_reads = 2
    setup.world.objects = {"leftover": 1}
    setup.want("thing", 1)
    assert await setup.reconciler.work() == 1.0
    assert setup.world.objects == {"leftover": 1, "thing": 1}
    assert "cannot be read" in setup.reconciler.health().message
    setup.clock.now += 1
    assert await setup.reconciler.work() == 2.0
    setup.clock.now += 2
    await setup.reconciler.work()
    assert setup.world.objects == {"thing": 1}
    assert setup.reconciler.health().state == "ok"


async def test_status_tells_of_every_object_and_health_is_one_line(setup: Setup) -> None:
    setup.wanted = {"fine": 1, "bad": 1}
    assert {s.state for s in setup.reconciler.status().values()} == {"pending"}
    setup.world.objects = {"stuck": 1}
    setup.world.fail_next.update({"bad": 2, "stuck": 2})
    await setup.reconciler.work()
    found = setup.reconciler.status()
    assert {key: status.state for key, status in found.items()} == {
        "fine": "done", "bad": "failed", "stuck": "failed",
    }  # fmt: skip
    assert (found["bad"].error, found["bad"].failures, found["bad"].retry_s) == ("bad resists", 1, 1.0)
    health = setup.reconciler.health()
    assert (health.name, health.state) == ("reconcile.things", "degraded")
    assert "2 of 2 things fail" in health.message and "resists" in health.message
    assert setup.reconciler.status("nobody") == {}


async def test_an_exception_that_is_a_bug_is_a_failure_of_that_object_only(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    async def update(key: str, desired: int) -> None:
        if key == "bad":
            raise KeyError("a bug")
        setup.world.objects[key] = desired

    setup.world.update = update  # type: ignore[method-assign]
    setup.wanted = {"bad": 1, "good": 1}
    await setup.reconciler.work()
    assert setup.world.objects == {"good": 1}
    assert any(record.exc_info for record in caplog.records), "a bug must leave its traceback"


async def test_the_same_failure_is_logged_once(setup: Setup, caplog: pytest.LogCaptureFixture) -> None:
    setup.world.fail_next["thing"] = 4
    setup.want("thing", 1)
    for _ in range(5):
        setup.clock.now += await setup.reconciler.work()
    assert setup.world.objects == {"thing": 1}
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == [
        "update of thing in things failed"
    ]


async def test_run_wakes_for_changes_and_settles() -> None:
    setup = Setup()
    setup.reconciler._clock = asyncio.get_running_loop().time
    setup.world.objects = {"leftover": 1}
    runner = asyncio.create_task(setup.reconciler.run())
    try:
        await asyncio.wait_for(setup.reconciler.settled(), 20)
        assert setup.world.objects == {}
        setup.want("thing", 1)
        await asyncio.wait_for(setup.reconciler.settled(), 20)
        assert setup.world.objects == {"thing": 1}
    finally:
        runner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await runner
