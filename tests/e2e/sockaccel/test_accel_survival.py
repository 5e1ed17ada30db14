"""What outlives its owner is found again: programs whose pins are gone, pairs whose end nobody saw."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelrig import Rig, until
from test_shorten import pair_up

from services.common.instance import Instance
from services.common.kernel import attach, cgroup
from services.sockaccel import abi, hooks, install, plane, teardown
from services.sockaccel.config import SockAccelSection
from services.sockaccel.tables import Wanted
from tests import session
from tests.e2e.lb.sockrig import forget, make_instance


@pytest.fixture
def fresh() -> Iterator[tuple[Instance, str]]:
    """Programs of its own, at work on a control group of its own."""
    if os.geteuid():
        pytest.skip("needs root")
    made, name = make_instance(), f"fibril-test-survival-{session.name()}"
    path = cgroup.path_of(name)
    try:
        asyncio.run(install.load(made))
        hooks.attach_all(made, name)
        yield made, name
    finally:
        for entry in attach.attached_cgroup(path, "cgroup_sock_ops") if path.exists() else ():
            attach.detach_cgroup(path, "cgroup_sock_ops", entry.name)
        forget(made)
        with contextlib.suppress(OSError):
            path.rmdir()


def at_work(name: str) -> list[int]:
    """Ids of the programs on the group."""
    return [entry.prog_id for entry in attach.attached_cgroup(cgroup.path_of(name), "cgroup_sock_ops")]


@pytest.mark.parametrize("lost", ["sa_socks", "sa_pairs", "sa_off", "every map of sockaccel"])
def test_programs_take_the_place_of_those_that_lost_their_pins(
    fresh: tuple[Instance, str], spaces: tuple[Path, Path], lost: str
) -> None:
    instance, name = fresh
    for each, path in abi.MAPS.items():
        if lost in (each, "every map of sockaccel"):
            (instance.pin_dir / path).unlink()
    assert not install.complete(instance)
    asyncio.run(install.load(instance))
    hooks.attach_all(instance, name)
    assert len(at_work(name)) == 1
    rig = Rig(instance, cgroup.path_of(name), spaces)
    try:
        process = rig.process()
        pair_up(process)
        process.do("talk(20)")
        assert rig.pairs()[0].ends[0].sends > 10 and not rig.stat(abi.Stat.TAKEN)
    finally:
        rig.close()


def test_pairs_whose_end_nobody_saw_are_found(
    fresh: tuple[Instance, str], spaces: tuple[Path, Path]
) -> None:
    """After a restart with another control group."""
    instance, name = fresh
    other = f"{name}-other"
    rig = Rig(instance, cgroup.path_of(name), spaces)
    try:
        process = rig.process()
        pair_up(process)
        process.do("talk(20); old = c, d")
        dead = rig.pairs()[0].ends[0].cookie
        hooks.attach_all(instance, other)
        process.do("talk(20); old[0].close()")
        assert rig.tables.tidy({dead}) == ({dead}, set()), "what is handed over to it could still be read"
        process.do("old[1].close(); del old")
        until(lambda: rig.tables.tidy(()) == ({dead}, {dead}))
        assert rig.tables.tidy({dead}) == (set(), set()) and not rig.pairs()
    finally:
        rig.close()
        hooks.attach_all(instance, name)
        cgroup.path_of(other).rmdir()


@pytest.mark.parametrize("lost", ["", "sa_socks", "sa_off", "every program"])
def test_teardown_finds_programs_whatever_pins_are_left(fresh: tuple[Instance, str], lost: str) -> None:
    instance, name = fresh
    if lost == "every program":
        for each in (install.OPS, install.MSG, *install.CALLS):
            install.program_path(instance, each).unlink()
    elif lost:
        (instance.pin_dir / abi.MAPS[lost]).unlink()
    told = asyncio.run(teardown.remove(instance))
    assert at_work(name) == [] and any(name in each for each in told)
    assert not [path for path in (instance.pin_dir / "link").rglob("*") if path.is_file()]
    assert asyncio.run(teardown.remove(instance)) == []


@pytest.mark.parametrize("late", [False, True])
def test_teardown_leaves_no_hole_in_a_stream(
    fresh: tuple[Instance, str], spaces: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Who reads in time has everything and goes on; who does not gets an error."""
    instance, name = fresh
    monkeypatch.setattr(teardown, "DRAIN_S", 0.5 if late else 10.0)
    rig = Rig(instance, cgroup.path_of(name), spaces)
    try:
        process = rig.process()
        pair_up(process)
        process.do("talk(20); idle = c, d")
        pair_up(process)
        process.do("talk(20); c.sendall(b'one'); c.sendall(b'two')")
        if not late:
            process.do("reader = threading.Timer(0.5, lambda: globals().update(got=take(d, 6))); reader.start()")
        told = asyncio.run(teardown.remove(instance))
        assert ("1 connections with something unread" in told) is late
        rig.tables.close()
        shutil.rmtree(instance.pin_dir)
        time.sleep(0.2)  # the kernel takes maps down a moment later
        if late:
            for each in "cd":
                with pytest.raises(OSError, match=r"abort|reset"):
                    process.do(f"while {each}.recv(3): pass")
        else:
            assert process.do("reader.join()", "got.decode()") == "onetwo"
            process.do("talk(5)")
        process.do("c, d = idle; talk(5)")
    finally:
        rig.close()


CLOSED = "talk(20); c.sendall(b'onetwo'); c.close()"


def test_teardown_waits_for_what_was_handed_over_by_an_end_that_is_closed(
    fresh: tuple[Instance, str], spaces: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer and the end of the stream, as servers give them: not the end alone."""
    instance, name = fresh
    monkeypatch.setattr(teardown, "DRAIN_S", 10.0)
    rig = Rig(instance, cgroup.path_of(name), spaces)
    try:
        process = rig.process()
        pair_up(process)
        process.do(CLOSED)
        until(lambda: all(pair.ended for pair in rig.pairs()))
        process.do("reader = threading.Timer(1, lambda: globals().update(got=take(d, 6))); reader.start()")
        asyncio.run(teardown.remove(instance))
        rig.tables.close()
        shutil.rmtree(instance.pin_dir)
        time.sleep(0.2)  # the kernel takes maps down a moment later
        assert process.do("reader.join()", "[got.decode(), d.recv(9).decode()]") == ["onetwo", ""]
    finally:
        rig.close()


def test_a_pair_is_forgotten_with_its_last_end(fresh: tuple[Instance, str], spaces: tuple[Path, Path]) -> None:
    instance, name = fresh
    rig = Rig(instance, cgroup.path_of(name), spaces)
    try:
        process = rig.process()
        pair_up(process)
        process.do(CLOSED)
        until(lambda: [pair.ended for pair in rig.pairs()] == [abi.EndReason.CLOSED])
        process.do("assert take(d, 6) == b'onetwo' and not d.recv(9); d.close()")
        until(lambda: not rig.pairs())
        # Both at once, with something unread at each.
        pair_up(process)
        process.do("talk(20); c.sendall(b'one'); d.sendall(b'two')")
        process.do("both = [threading.Thread(target=each.close) for each in (c, d)]; [each.start() for each in both]")
        until(lambda: not rig.pairs())
    finally:
        rig.close()


async def test_a_service_that_loses_all_its_pins_begins_anew(
    fresh: tuple[Instance, str], spaces: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    instance, name = fresh
    monkeypatch.setattr(plane, "RESYNC_S", 0.2)
    (before,) = at_work(name)
    ended: list[int] = []
    rig = None
    made = plane.Plane(
        instance,
        SockAccelSection(cgroup=name),
        lambda: rig.wanted if rig is not None else Wanted(),
        lambda pair, _: ended.append(pair.ended),
    )
    await made.start()
    tasks = [asyncio.create_task(each) for each in (made.run(), made.listen())]
    try:
        await asyncio.sleep(0.3)  # it listens to those that are to go
        await asyncio.to_thread(shutil.rmtree, instance.pin_dir)

        def back() -> bool:
            return install.complete(instance) and not hooks.missing(instance, name) and made.status()[0].state == "ok"

        # All of it is loaded again.
        for _ in range(1200):
            if back():
                break
            await asyncio.sleep(0.05)
        assert back()
        (after,) = at_work(name)
        assert after != before
        # And what the new programs report is heard.
        rig = Rig(instance, cgroup.path_of(name), spaces)
        process = rig.process()
        pair_up(process)
        process.do("c.close(); d.close()")
        for _ in range(200):
            if ended:
                break
            await asyncio.sleep(0.05)
        assert ended == [abi.EndReason.CLOSED]
    finally:
        if rig is not None:
            rig.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await made.stop()


def test_a_link_of_a_service_that_was_killed_meanwhile_goes_too(fresh: tuple[Instance, str]) -> None:
    instance, _ = fresh
    links = [path for path in (instance.pin_dir / "link").rglob("*") if path.is_file()]
    assert len(links) == len(install.CALLS)
    for link in links:
        link.rename(link.with_name(link.name + "~"))
    hooks.detach_calls(instance)
    assert not list(links[0].parent.iterdir())
