"""The service's side of the kernel, without the service: what is attached when."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelrig import A4, A6, B4, Rig
from test_shorten import pair_up

from fibril.sockaccel.v1 import sockaccel_pb2 as pb
from services.common import errors
from services.common.pipeline.abi import FibAddr
from services.common.pipeline.endpoints import AddrTable
from services.sockaccel import abi, hooks, install, pairs, plane, release, wiring
from services.sockaccel.api import SockAccelApi
from services.sockaccel.config import SockAccelConfig, SockAccelSection
from services.sockaccel.judged import Judged
from services.sockaccel.plane import Plane
from services.sockaccel.store import Store
from services.sockaccel.tables import Tables
from services.sockaccel.wiring import SockAccelService


@contextlib.asynccontextmanager
async def running(rig: Rig) -> AsyncIterator[Plane]:
    """On the rig's control group and tables."""
    made = Plane(
        rig.instance, SockAccelSection(cgroup=rig.group.name), lambda: rig.wanted, lambda pair, offset: None
    )
    await made.start()
    tasks = [asyncio.create_task(each) for each in (made.run(), made.listen(), made.release())]
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
    """Whether the programs behind recv() and send() are, all of them."""
    return not set(hooks.missing(rig.instance, rig.group.name)) & set(install.CALLS)


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


STUCK = """
there, here = os.pipe()
d.setblocking(False)
def tell(work):
    try:
        return work()
    except OSError as error:
        return errno.errorcode[error.errno]
def why(s): return tell(lambda: s.recv(9).decode())
def spliced(): return tell(lambda: os.splice(d.fileno(), here, 99))
"""


@pytest.mark.parametrize("address", [("AF_INET", "127.0.0.1"), ("AF_INET6", "::1")])
async def test_who_cannot_go_on_is_told_so(rig: Rig, monkeypatch: pytest.MonkeyPatch, address: tuple[str, str]) -> None:
    """A process that splices only, and would never see what waits; and the next of the same is not concerned."""
    monkeypatch.setattr(release, "GRACE_S", 0.3)
    process = rig.process()
    family, host = address
    async with running(rig):
        pair_up(process, family, family, host, host)
        process.do("talk(20)")
        process.do(STUCK + "c.sendall(b'one')")
        assert process.give("spliced()") == "EAGAIN"
        await until(lambda: not rig.pairs())
        assert process.give("why(d)") == "one"
        # Whichever of the two was ended first.
        assert sorted(process.give("[why(c), spliced()]")) == ["ECONNABORTED", "ECONNRESET"]
        pair_up(process, family, family, host, host)
        process.do("talk(20)")
        process.do("import select; c.sendall(b'two'); assert select.select([d], [], [], 5)[0]")
        assert process.give("[spliced(), os.read(there, 9).decode()]") == [3, "two"]


async def test_who_cannot_go_on_is_told_so_though_the_report_was_lost(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "GRACE_S", 0.1)
    monkeypatch.setattr(release, "MISSED_S", 0.2)
    process = rig.process()
    task = asyncio.create_task(release.Releaser(lambda: rig.tables).run())
    try:
        pair_up(process)
        process.do("talk(20)")
        process.do(STUCK + "c.sendall(b'one')")
        assert process.give("spliced()") == "EAGAIN"
        await until(lambda: not rig.pairs())
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_nobody_is_ended_for_somebody_stuck_who_has_closed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "GRACE_S", 0.0)
    monkeypatch.setattr(release, "MISSED_S", 0.1)
    process = rig.process()
    pair_up(process)
    process.do("talk(20)")
    process.do(STUCK + "d.sendall(b'two'); c.sendall(b'one')")
    assert process.give("spliced()") == "EAGAIN" and any(end.stuck == abi.Stuck.STUCK for end in rig.pairs()[0].ends)
    process.do("d.close()")
    await until(lambda: not rig.pairs()[0].ends[1].sock)
    task = asyncio.create_task(release.Releaser(lambda: rig.tables).run())
    try:
        await asyncio.sleep(0.5)
        assert rig.pairs(), "it has been ended"
        assert process.give("[why(c), why(c)]") == ["two", ""]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_who_reads_after_all_is_left_in_peace(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    # Longer than a busy machine may hold it up between its two calls.
    monkeypatch.setattr(release, "GRACE_S", 1.0)
    process = rig.process()
    async with running(rig):
        pair_up(process)
        process.do("talk(20)")
        process.do(STUCK + "c.sendall(b'one')")
        assert process.give("[spliced(), why(d)]") == ["EAGAIN", "one"]
        await asyncio.sleep(1.5)
        process.do("d.settimeout(5); talk(20)")


def ended(*_: object) -> None:
    raise KeyboardInterrupt


class Known:
    """What the service knows besides, of a rig."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.amiss: dict[str, str] = {}
        self.watches: set[pairs.Watch] = set()
        self.off: set[int] = set()

    async def shown(self) -> list[pb.Pair]:
        return [pairs.message(pair, "", str, 0) for pair in self._rig.pairs()]

    async def switch_pair(self, cookie: int, on: bool) -> None:
        raise NotImplementedError

    async def pairs_of(self, bit: int) -> set[int]:
        return {pair.ends[0].cookie for pair in self._rig.pairs() if pair.class_ == bit}

    def forget(self, cookies: set[int]) -> None:
        self.off |= cookies


async def test_without_tables_nothing_is_declared(rig: Rig, tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db")
    not_started = Plane(rig.instance, SockAccelSection(), lambda: None, lambda pair, offset: None)
    api = SockAccelApi(store, not_started, Known(rig))
    declared = pb.Class(name="new", scopes=[pb.SCOPE_PODS])
    for call in (
        api.UpsertClass(pb.UpsertClassRequest(declared=declared), None),
        api.DeleteClass(pb.DeleteClassRequest(name="local-proxies"), None),
        api.Switch(pb.SwitchRequest(all=True), None),
        api.Switch(pb.SwitchRequest(class_name="local-proxies"), None),
    ):
        with pytest.raises(errors.Unavailable):
            await call
    assert store.on and list(store.classes) == ["local-proxies"] and store.classes["local-proxies"][1].enabled
    store.close()
    await not_started.stop()


async def test_a_class_that_cannot_be_deleted_keeps_its_pairs(rig: Rig, tmp_path: Path) -> None:
    """A disk that cannot be written."""
    process, store, known = rig.process(), Store(tmp_path / "s.db"), Known(rig)
    pair_up(process)
    async with running(rig) as made:
        api = SockAccelApi(store, made, known)
        store._db.execute("PRAGMA query_only = 1")
        with pytest.raises(errors.FailedPrecondition):
            await api.DeleteClass(pb.DeleteClassRequest(name="local-proxies"), None)
        assert list(store.classes) == ["local-proxies"] and not known.off
        store._db.execute("PRAGMA query_only = 0")
        await api.DeleteClass(pb.DeleteClassRequest(name="local-proxies"), None)
        assert not store.classes and known.off == {rig.pairs()[0].ends[0].cookie}
    store.close()


async def test_pairs_are_judged_anew_when_an_identity_has_changed_with_the_service_dead(rig: Rig) -> None:
    """And by no other restart."""
    process = rig.process()
    async with running(rig):
        pair_up(process)
        process.do("talk(20)")
    before = rig.tables.config().epoch
    async with running(rig):
        assert rig.tables.config().epoch == before
    with contextlib.closing(AddrTable(rig.instance)) as addresses:
        for address in (A4, A6):
            pod = addresses.lookup(FibAddr.of(address))
            assert pod is not None
            pod.identity += 1
            addresses.update(FibAddr.of(address), pod)
    sent = rig.pairs()[0].ends[0].tcp_sends
    async with running(rig):
        assert rig.tables.config().epoch != before
        process.do("talk(20)")
        assert rig.pairs()[0].ends[0].tcp_sends > sent and rig.pairs()[0].ends[0].mode == abi.Mode.SHORT


@pytest.mark.parametrize("number", [2, 3], ids=["", "of a second interface"])
async def test_an_identity_that_programs_learn_late_has_pairs_judged_anew(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(plane, "RESYNC_S", 0.1)
    rig.wanted = replace(rig.wanted, endpoints=frozenset({1, 2, number}))
    with contextlib.closing(AddrTable(rig.instance)) as addresses:
        pod = addresses.lookup(FibAddr.of(B4))
        assert pod is not None
        pod.id = number
        addresses.update(FibAddr.of(B4), pod)
        async with running(rig):
            before = rig.tables.config().epoch
            pod.identity += 1
            addresses.update(FibAddr.of(B4), pod)
            await until(lambda: rig.tables.config().epoch != before)


async def test_who_ended_between_two_changes_has_pairs_judged_by_the_next(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair that is switched off in one table, and was not told."""
    process = rig.process()
    async with running(rig):
        pair_up(process)
        process.do("talk(20)")
    (pair,) = rig.pairs()
    rig.wanted = replace(rig.wanted, off=frozenset({pair.ends[0].cookie}))
    with monkeypatch.context() as patch:
        patch.setattr(rig.tables._config, "update", ended)
        with pytest.raises(KeyboardInterrupt):
            rig.tables.write(rig.wanted, begin=Judged(rig.instance.run_dir / "sockaccel.judged").begin)
    assert rig.tables.switched_off() == rig.wanted.off
    async with running(rig):
        process.do("talk(20)")
        assert rig.pairs()[0].ends[0].sends == pair.ends[0].sends


def test_who_sees_the_new_epoch_sees_all_the_rest(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    update = rig.tables._config.update

    def seen(key: Any, value: Any) -> None:
        written.append(bytes(value))
        update(key, value)

    before = rig.tables.config()
    monkeypatch.setattr(rig.tables._config, "update", seen)
    rig.write(on=False, classes=0)
    after = rig.tables.config()
    assert written[-1] == bytes(after) and after.epoch == before.epoch + 1
    # What comes before has the old epoch, and all the rest.
    after.epoch = before.epoch
    assert written[:-1] == [bytes(after)]


@contextlib.asynccontextmanager
async def service(rig: Rig) -> AsyncIterator[SockAccelService]:
    """Its kernel's side alone, on a node without pods."""
    made = SockAccelService(rig.instance, SockAccelConfig(sockaccel=SockAccelSection(cgroup=rig.group.name)))
    try:
        await made._plane.start()
        yield made
    finally:
        await made.stop()
        shutil.rmtree(rig.instance.state_dir)


async def test_what_was_switched_off_stays_so_whatever_is_written_first(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that takes longer to begin than pods are waited for."""
    monkeypatch.setattr(wiring, "ABSENT_S", -1.0)
    pair_up(rig.process())
    (pair,) = rig.pairs()
    off = {int(pair.ends[0].cookie)}
    rig.write(off=frozenset(off))
    async with service(rig):
        assert not rig.tables.config().within, "the tables are written"
        assert rig.tables.switched_off() == off


async def test_a_pair_that_is_switched_off_while_all_are_looked_at_stays_so(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wiring, "_TIDY_S", 0.05)
    look, looked, go = Tables.tidy, threading.Event(), threading.Event()

    def slowly(tables: Tables, doubtful: set[int]) -> tuple[set[int], set[int]]:
        found = look(tables, doubtful)
        looked.set()
        assert go.wait(30)
        return found

    monkeypatch.setattr(Tables, "tidy", slowly)
    process = rig.process()
    async with service(rig) as made:
        task = asyncio.create_task(made._tidy())
        try:
            assert await asyncio.to_thread(looked.wait, 30)
            pair_up(process)
            (pair,) = rig.pairs()
            await made.switch_pair(pair.ends[0].cookie, False)
            looked.clear()
            go.set()
            assert await asyncio.to_thread(looked.wait, 30)
            assert made._off == {pair.ends[0].cookie}
            process.do("c.close(); d.close()")
            await until(lambda: not made._off)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
