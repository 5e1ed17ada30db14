"""What watchers get, what the kernel is asked for, and how records read."""

from __future__ import annotations

import asyncio
import ctypes as ct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common import errors
from services.common.pipeline.abi import FibAddr
from services.identity.workload import abi
from services.identity.workload.abi import Kind
from services.identity.workload.trace import Sight, Watcher, joint

ACTOR = abi.Actor(1, 7, 100, 99, 0, "sh")
WATCHERS = st.builds(
    lambda host, endpoint: Watcher(Kind.EXEC, host and not endpoint, endpoint),
    st.booleans(),
    st.integers(0, 3),
)


def sight(path: str) -> Sight:
    return Sight(abi.Exec(ACTOR, path, ()), None)


@given(st.lists(WATCHERS, min_size=1, max_size=4), st.integers(0, 4))
def test_the_kernel_reports_whatever_any_watcher_wants(watchers: list[Watcher], endpoint: int) -> None:
    asked = joint(watchers)
    reported = endpoint == asked.endpoint if asked.endpoint else bool(endpoint or asked.host)
    wanted = any(watcher.wants(endpoint) for watcher in watchers)
    assert reported or not wanted
    if len(watchers) == 1:
        assert reported == wanted


async def test_what_a_slow_watcher_has_no_room_for_is_counted() -> None:
    watcher = Watcher(Kind.EXEC, False, 0, size=2)
    for path in "abc":
        watcher.put(sight(path))
    assert [s.event.path for s in await watcher.take() if isinstance(s.event, abi.Exec)] == ["a", "b"]
    assert watcher.lost == 1
    waiting = asyncio.create_task(watcher.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    watcher.put(sight("d"))
    assert await waiting == [sight("d")]


async def test_a_watcher_gets_what_came_before_a_failure() -> None:
    watcher = Watcher(Kind.EXEC, False, 0)
    watcher.put(sight("a"))
    watcher.fail(errors.Internal("broken"))
    assert await watcher.take() == [sight("a")]
    with pytest.raises(errors.Internal):
        await watcher.take()


def who(kind: Kind) -> abi.Who:
    return abi.Who(time=1, kind=kind, endpoint=7, pid=100, parent=99, uid=0, comm=b"sh")


def test_an_execution_is_read_back() -> None:
    path, args = b"/bin/s\xff", b"sh\0-c\0\0x y\0"
    head = bytes(abi.ExecRecord(who=who(Kind.EXEC), path_len=len(path), args_len=len(args)))
    cut = head[: abi.ExecRecord.data.offset] + path + args
    assert abi.head(cut) == (Kind.EXEC, 7)
    assert abi.decode(cut) == abi.Exec(ACTOR, "/bin/s\ufffd", ("sh", "-c", "", "x y"))


def test_a_connection_is_read_back() -> None:
    raw = abi.ConnectRecord(
        who=who(Kind.CONNECT),
        dst=FibAddr.of("10.0.0.1"),
        src=FibAddr.of("fd00::1"),
        sport=5,
        dport=80,
        proto=6,
    )
    assert abi.decode(bytes(raw)) == abi.Connect(ACTOR, 6, "fd00::1", 5, "10.0.0.1", 80)
    assert abi.decode(bytes(abi.ConnectRecord(who=who(Kind.CONNECT), proto=17))) == abi.Connect(
        ACTOR, 17, "", 0, "", 0
    )


@pytest.mark.parametrize(
    ("raw", "words"), [(b"", ()), (b"a\0", ("a",)), (b"a\0b", ("a", "b")), (b"\0", ("",))]
)
def test_arguments_are_split_at_zeroes(raw: bytes, words: tuple[str, ...]) -> None:
    assert abi.arguments(raw) == words


def test_strangers_are_refused() -> None:
    for record in (b"", bytes(10), bytes(abi.Who(kind=9))):
        with pytest.raises(ValueError):
            abi.head(record)
    assert ct.sizeof(abi.Who) == 64
