"""A reader of events: what it gets, and what it is told about what it lost."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from fibril.monitor.v1 import monitor_pb2 as pb
from services.common.pipeline.events import Event
from services.ipam.monitor import Watcher

DROP = Event(
    time_unix_ns=1, verdict=pb.VERDICT_DROPPED, reason=2, direction=1, source_endpoint=3, destination_endpoint=0,
    source="a", destination="b", source_port=0, destination_port=0, protocol=0, ethertype=0, length=60, tcp_flags=0,
    icmp_type=0, icmp_code=0, ifindex=5,
)  # fmt: skip
PASSED = dataclasses.replace(DROP, verdict=pb.VERDICT_DELIVERED, reason=0, destination_endpoint=4)


@pytest.mark.parametrize(
    ("forwarded", "endpoint", "event", "wanted"),
    [
        (False, 0, DROP, True), (False, 0, PASSED, False), (True, 0, PASSED, True), (True, 0, DROP, True),
        (False, 3, DROP, True), (False, 4, DROP, False), (True, 4, PASSED, True), (True, 5, PASSED, False),
    ],
)  # fmt: skip
def test_a_reader_gets_what_it_asked_for(forwarded: bool, endpoint: int, event: Event, wanted: bool) -> None:
    assert Watcher(forwarded, endpoint, 10).wants(event) is wanted


async def test_a_slow_reader_is_told_what_it_lost() -> None:
    watcher = Watcher(False, 0, 3)
    for number in range(5):
        watcher.put(pb.Event(length=number))
    events, lost = await watcher.take()
    assert ([event.length for event in events], lost) == ([0, 1, 2], 2)
    waiting = asyncio.create_task(watcher.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    watcher.put(pb.Event(length=9))
    events, lost = await waiting
    assert ([event.length for event in events], lost) == ([9], 0)
