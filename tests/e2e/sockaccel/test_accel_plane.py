"""The service's side of the kernel, without the service: what is attached when."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from accelrig import Rig
from test_shorten import pair_up

from services.sockaccel import abi, hooks, install, plane
from services.sockaccel.config import SockAccelSection
from services.sockaccel.plane import Plane


@contextlib.asynccontextmanager
async def running(rig: Rig) -> AsyncIterator[Plane]:
    """On the rig's control group and tables."""
    made = Plane(
        rig.instance, SockAccelSection(cgroup=rig.group.name), lambda: rig.wanted, lambda pair, offset: None
    )
    await made.start()
    tasks = [asyncio.create_task(made.run()), asyncio.create_task(made.listen())]
    try:
        yield made
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await made.stop()


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("did not happen in time")


def attached(rig: Rig) -> bool:
    """Whether the programs behind recv() and send() are."""
    found = set(hooks.missing(rig.instance, rig.group.name)) & set(install.CALLS)
    assert found in (set(), set(install.CALLS))
    return not found


async def test_calls_are_watched_only_while_there_are_pairs(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plane, "ALONE_S", 0.4)
    process = rig.process()
    async with running(rig):
        await until(lambda: not attached(rig))
        assert not rig.tables.config().flags & abi.ConfigFlag.CALLS
        # What makes pairs stays.
        assert not hooks.missing(rig.instance, rig.group.name, calls=False)
        pair_up(process)
        await until(lambda: attached(rig) and rig.tables.config().flags & abi.ConfigFlag.CALLS)
        process.do("talk(20)")
        (pair,) = rig.pairs()
        assert pair.ends[0].sends and pair.ends[1].sends
        # Longer than the time after which they go, if there is no pair.
        await asyncio.sleep(1)
        before = rig.pairs()[0].ends[0].sends
        process.do("talk(20)")
        assert attached(rig) and rig.pairs()[0].ends[0].sends == before + 20
        process.do("c.close(); d.close()")
        await until(lambda: not attached(rig))


async def test_nothing_is_shortened_unwatched(rig: Rig) -> None:
    process = rig.process()
    pair_up(process)
    rig.write(calls=False)
    process.do("talk(30)")
    assert rig.pairs()[0].ends[0].sends == 0
    rig.write(calls=True)
    process.do("talk(30)")
    assert rig.pairs()[0].ends[0].sends > 20
    # And what was, goes back to TCP.
    rig.write(calls=False)
    before = rig.pairs()[0].ends[0].sends
    process.do("talk(30)")
    assert rig.pairs()[0].ends[0].sends == before
