"""Background tasks: the first failure is noticed and kept, closing cancels the rest."""

from __future__ import annotations

import asyncio
import logging

import pytest

from services.common.supervise import Tasks


async def fail(error: Exception, after: asyncio.Event | None = None) -> None:
    if after:
        await after.wait()
    raise error


async def test_the_first_failure_is_the_cause() -> None:
    tasks = Tasks()
    gate = asyncio.Event()
    tasks.spawn("late", fail(ValueError("second"), gate))
    tasks.spawn("early", fail(ValueError("first")))
    await asyncio.wait_for(tasks.wait_failed(), 20)
    gate.set()
    await asyncio.sleep(0)
    await tasks.close()
    assert str(tasks.cause) == "first"
    assert tasks.source == "early"


async def test_a_task_that_returns_or_is_cancelled_is_no_failure() -> None:
    tasks = Tasks()
    done = tasks.spawn("done", asyncio.sleep(0))
    stopped = tasks.spawn("stopped", asyncio.sleep(3600))
    stopped.cancel()
    await asyncio.wait([done, stopped])
    assert tasks.cause is None


async def test_close_cancels_and_waits() -> None:
    tasks = Tasks()
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    tasks.spawn("work", work())
    await asyncio.sleep(0)
    await tasks.close()
    assert cleaned == [True]


async def test_close_names_a_task_that_does_not_stop(caplog: pytest.LogCaptureFixture) -> None:
    tasks = Tasks()
    release = asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                pass

    task = tasks.spawn("stubborn", stubborn())
    await asyncio.sleep(0)
    with caplog.at_level(logging.WARNING):
        await tasks.close(timeout_s=0.05)
    assert [record.__dict__["task"] for record in caplog.records] == ["stubborn"]
    release.set()
    await task


async def test_nothing_starts_after_close() -> None:
    tasks = Tasks()
    await tasks.close()
    task = tasks.spawn("late", asyncio.sleep(3600))
    await asyncio.wait([task], timeout=5)
    assert task.cancelled()


async def test_the_end_of_an_adopted_task_is_a_failure_but_its_cancellation_is_not() -> None:
    tasks, others = Tasks(), asyncio.get_running_loop()
    stopped = others.create_task(asyncio.sleep(3600))
    tasks.adopt(stopped)
    stopped.cancel()
    await asyncio.wait([stopped])
    await asyncio.sleep(0)
    assert tasks.cause is None
    kept = others.create_task(asyncio.sleep(3600))
    tasks.adopt(kept)
    tasks.adopt(others.create_task(asyncio.sleep(0), name="part"))
    await asyncio.wait_for(tasks.wait_failed(), 20)
    assert "task part ended" in str(tasks.cause)
    await tasks.close()
    # It ends with whoever began it.
    assert not kept.done()
    kept.cancel()


@pytest.mark.parametrize("adopted", [False, True])
async def test_a_task_that_nobody_cancelled_has_failed(adopted: bool) -> None:
    tasks = Tasks()

    async def stray() -> None:
        # As a call of gRPC's whose channel another one closes.
        call = asyncio.get_running_loop().create_future()
        call.cancel()
        await call

    if adopted:
        tasks.adopt(asyncio.create_task(stray(), name="stray"))
    else:
        tasks.spawn("stray", stray())
    await asyncio.wait_for(tasks.wait_failed(), 20)
    assert "task stray was cancelled by nobody" in str(tasks.cause)
    await tasks.close()


async def test_an_adopted_task_may_be_ended_by_its_owner() -> None:
    tasks = Tasks()
    owned = asyncio.create_task(asyncio.sleep(3600), name="owned")
    tasks.adopt(owned)
    await asyncio.sleep(0)
    owned.cancel()
    await asyncio.wait([owned])
    await asyncio.sleep(0.01)
    assert tasks.cause is None
    await tasks.close()
