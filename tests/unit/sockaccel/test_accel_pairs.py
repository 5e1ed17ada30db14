"""Pairs as clients see them, and watchers of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from fibril.sockaccel.v1 import sockaccel_pb2 as pb
from fibril.types.v1 import types_pb2
from services.common.errors import Aborted, InvalidArgument
from services.common.pipeline.abi import FibAddr
from services.sockaccel import abi, pairs


def made(cookie: int = 5, **fields: int) -> abi.Pair:
    pair = abi.Pair(made=2_000_000_000, **fields)
    for number, end in enumerate(pair.ends):
        end.cookie, end.addr, end.port, end.endpoint = cookie + number, FibAddr.of(f"10.0.0.{number}"), 80 + number, number
    return pair


def shown(pair: abi.Pair) -> pb.Pair:
    return pairs.message(pair, "web", lambda number: f"pod{number}", 1_000_000_000)


def test_a_pair_is_told_with_names_and_in_unix_time() -> None:
    pair = made(flags=abi.PairFlag.REDIRECTED)
    pair.ends[0].mode, pair.ends[0].bytes, pair.ends[1].tcp_sends = abi.Mode.SHORT, 700, 3
    found = shown(pair)
    assert (found.id, found.class_name, found.redirected, found.made_unix_seconds) == (5, "web", True, 3.0)
    assert (found.client.address, found.client.port, found.client.pod) == ("10.0.0.0", 80, "")
    assert (found.server.address, found.server.port, found.server.pod) == ("10.0.0.1", 81, "pod1")
    assert found.client.shortened and found.client.short_bytes == 700
    assert not found.server.shortened and found.server.tcp_sends == 3


@pytest.mark.parametrize(("fields", "mode", "state"), [
    ({}, abi.Mode.TCP, pb.PAIR_STATE_PROVING),
    ({}, abi.Mode.SHORT, pb.PAIR_STATE_SHORTENED),
    ({"flags": abi.PairFlag.OFF}, abi.Mode.TCP, pb.PAIR_STATE_OFF),
    ({"ended": abi.EndReason.BULK}, abi.Mode.SHORT, pb.PAIR_STATE_ENDED),
])  # fmt: skip
def test_states(fields: dict[str, int], mode: int, state: int) -> None:
    pair = made(**fields)
    pair.ends[1].mode = mode
    found = shown(pair)
    assert found.state == state
    assert found.end_reason == fields.get("ended", 0)
    assert found.server.shortened == (state == pb.PAIR_STATE_SHORTENED)


def test_numbers_are_the_contracts() -> None:
    assert {each.value for each in abi.EndReason} == set(pb.EndReason.values())
    for each in abi.EndReason:
        if each is not abi.EndReason.NOT_ENDED:
            assert pb.EndReason.Name(each.value) == f"END_REASON_{each.name}"  # type: ignore[arg-type]


def test_filters() -> None:
    pair = shown(made())
    for wanted in (
        pb.PairFilter(), pb.PairFilter(pod="pod1"), pb.PairFilter(class_name="web"), pb.PairFilter(port=80),
        pb.PairFilter(state=pb.PAIR_STATE_PROVING, port=81),
    ):  # fmt: skip
        assert pairs.matches(pair, wanted)
    for wanted in (
        pb.PairFilter(pod="pod0"), pb.PairFilter(class_name="x"), pb.PairFilter(port=82), pb.PairFilter(pod="pod1", port=9),
    ):  # fmt: skip
        assert not pairs.matches(pair, wanted)
    with pytest.raises(InvalidArgument, match="99"):
        pairs.check(pb.PairFilter(state=99))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument) as refused:
        pairs.check(pb.PairFilter(port=70000))
    assert refused.value.field == "filter.port"


async def told(looks: Sequence[Sequence[abi.Pair]], ended: Sequence[abi.Pair], count: int) -> list[tuple[int, int]]:
    """What a watcher with these looks is told: kind and id, so many."""
    rest = [list(each) for each in looks]
    watch = pairs.Watch(pb.PairFilter(), 0.001)

    async def look() -> list[pb.Pair]:
        return [shown(pair) for pair in (rest.pop(0) if len(rest) > 1 else rest[0])]

    found = []
    async for answer in watch.run(look):
        found.append((int(answer.kind), int(answer.pair.id)))
        if answer.kind == types_pb2.WATCH_KIND_SYNCED:
            for pair in ended:
                watch.ended(shown(pair))
        if len(found) == count:
            break
    return found


PUT, SYNCED, DELETE = types_pb2.WATCH_KIND_PUT, types_pb2.WATCH_KIND_SYNCED, types_pb2.WATCH_KIND_DELETE


def test_a_watch_is_a_snapshot_a_mark_and_what_changes() -> None:
    busy = made(5)
    busy.ends[0].bytes = 9
    found = asyncio.run(told([[made(5), made(7)], [busy, made(7)], [busy]], [], 5))
    assert found == [(PUT, 5), (PUT, 7), (SYNCED, 0), (PUT, 5), (DELETE, 7)]


def test_a_pair_that_came_and_went_between_two_looks_is_told() -> None:
    found = asyncio.run(told([[made(5)], [made(5)]], [made(9, ended=abi.EndReason.CLOSED)], 3))
    assert found == [(PUT, 5), (SYNCED, 0), (DELETE, 9)]


def test_who_falls_behind_is_told_so() -> None:
    async def run() -> None:
        watch = pairs.Watch(pb.PairFilter(), 0.001)
        for number in range(20_000):
            watch.ended(pb.Pair(id=number + 1))

        async def look() -> list[pb.Pair]:
            return []

        async for _ in watch.run(look):
            pass

    with pytest.raises(Aborted, match="behind"):
        asyncio.run(run())
