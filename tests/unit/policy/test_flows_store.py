"""What is remembered of flows, and who reads it while more come."""

from __future__ import annotations

import asyncio
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import Aborted
from services.policy.flows.store import BUNCH, FlowStore, Named, Record, address_text, parse
from tests.unit.policy.flowrig import Names, raw

NOBODY = Named("", "", {}, {}, "", "")


def numbered(first: int, count: int) -> list[bytes]:
    """Flows whose revision is their sequence number."""
    return [raw(time=1, revision=number) for number in range(first, first + count)]


def everything(_record: Record) -> bool:
    return True


def test_a_record_is_what_the_kernel_wrote() -> None:
    record = parse(
        7,
        raw("10.0.0.1", "fd00::2", 258, 443, time=5, src_id=1, dst_id=2, src_identity=3, dst_identity=4, rule=16, revision=6,
            suppressed=8, reason=9, type=4, verdict=2, direction=1, family=10, proto=17, tcp_flags=18,
            icmp_type=11, icmp_code=12),
        NOBODY,
    )  # fmt: skip
    assert (address_text(record.src), address_text(record.dst)) == ("10.0.0.1", "fd00::2")
    assert record._replace(src=b"", dst=b"") == Record(
        7, 5, b"", b"", 1, 2, 3, 4, 16, 6, 8, 9, 258, 443, 4, 2, 1, 10, 17, 18, 11, 12, NOBODY
    )


@given(st.integers(1, 20), st.lists(st.integers(0, 12), max_size=8), st.integers(0, 70))
def test_the_last_so_many_stay(size: int, batches: list[int], after: int) -> None:
    store, total = FlowStore(size, Names()), 0
    for batch in batches:
        store.add(numbered(total + 1, batch))
        total += batch
    assert store.seen == total and len(store) == min(size, total)
    found = list(store.since(after))
    assert [each.sequence for each in found] == [
        n for n in range(1, total + 1) if n > max(after, total - size)
    ]
    assert all(each.revision == each.sequence for each in found)


def test_what_comes_while_one_reads_does_not_shift_what_is_read() -> None:
    store = FlowStore(4, Names())
    store.add(numbered(1, 4))
    reading = store.since()
    first = [each.sequence for each in islice(reading, 2)]
    store.add(numbered(5, 3))
    rest = list(reading)
    assert first == [1, 2] and [each.sequence for each in rest] == [3, 4]
    assert [each.revision for each in rest] == [3, 4]


def test_counted_by_verdict_and_reason_for_good() -> None:
    store = FlowStore(2, Names())
    store.add([raw(), raw(), raw(verdict=2, reason=300), raw(verdict=3, reason=7)])
    assert store.counts() == {(1, 0): 2, (2, 300): 1, (3, 7): 1}


async def test_a_long_search_lets_others_have_their_turn() -> None:
    store, turns = FlowStore(BUNCH * 4, Names()), 0
    store.add(numbered(1, BUNCH * 4))

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    assert [each async for each in store.select(lambda record: record.sequence < 0)] == []
    task.cancel()
    assert turns >= 3


async def test_followers_see_each_flow_once() -> None:
    store = FlowStore(8, Names())
    following = store.follow(0, lambda record: record.sequence % 2 == 0)
    store.add(numbered(1, 5))
    assert [(await anext(following)).sequence for _ in range(2)] == [2, 4]
    waiting = asyncio.ensure_future(anext(following))
    await asyncio.sleep(0)
    store.add(numbered(6, 1))
    assert (await asyncio.wait_for(waiting, 20)).sequence == 6


async def test_who_falls_too_far_behind_is_told() -> None:
    store = FlowStore(4, Names())
    following = store.follow(0, everything)
    store.add(numbered(1, 2))
    assert (await anext(following)).sequence == 1
    store.add(numbered(3, 7))
    assert (await anext(following)).sequence == 2
    with pytest.raises(Aborted, match="3 flows were forgotten"):
        await anext(following)


def test_a_flow_keeps_the_names_of_its_time() -> None:
    """The pod has gone, another has its number; and so with the rule and the identity."""
    names = Names()
    store = FlowStore(4, names)
    record = raw(src_id=1, src_identity=4, rule=16)
    store.add([record, record])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names, "pod", lambda _: "other")
        patch.setattr(names, "rule", lambda _: ("", "other"))
        patch.setattr(names, "labels", lambda _: {"app": "other"})
        store.add([record])
    old = Named("shop/p1", "", {"app": "1", "id": "4"}, {}, "Policy shop/api", "rule16")
    new = Named("other", "", {"app": "other"}, {"app": "other"}, "", "other")
    assert [each.names for each in store.since()] == [old, old, new]
