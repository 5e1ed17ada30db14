"""Who has written waits until the follower has come as far."""

from __future__ import annotations

import asyncio

from services.common.etcd.seen import Seen


async def test_one_waits_for_the_revision_and_no_longer() -> None:
    seen = Seen()
    later, sooner = (asyncio.create_task(seen.wait(revision)) for revision in (7, 5))
    await asyncio.sleep(0)
    seen.reach(4)
    await asyncio.sleep(0)
    assert not sooner.done()
    seen.reach(6)
    assert await sooner
    assert not later.done()
    seen.reach(9)
    seen.reach(2)
    assert await later and await seen.wait(9)


async def test_nobody_waits_for_ever() -> None:
    seen = Seen()
    assert not await seen.wait(1, 0.01)
    seen.reach(1)  # nobody is there any more
    gone = asyncio.create_task(seen.wait(2))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    seen.reach(2)
    assert await seen.wait(2)


async def test_another_etcd_begins_anew() -> None:
    seen = Seen()
    seen.reach(100)
    seen.restart()
    assert not await seen.wait(3, 0.01)
    seen.reach(3)
    assert await seen.wait(3)
