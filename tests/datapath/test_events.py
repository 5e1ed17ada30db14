"""Events as user space reads them."""

from __future__ import annotations

import enum
import time
from types import SimpleNamespace
from typing import Any

import pytest
from scapy.layers.inet import TCP

from fibril.monitor.v1 import monitor_pb2 as pb
from services.common import errors
from services.common.pipeline import abi, events
from services.common.pipeline.reasons import Reason
from tests.datapath.harness import A, B, Datapath
from tests.datapath.packets import ether, ip, mac


@pytest.mark.parametrize("family", [4, 6])
def test_event_reads_as_text_and_host_order(dp: Datapath, family: int) -> None:
    packet = bytes(ether() / ip(B, family) / TCP(sport=4000, dport=80, flags="S"))
    before = time.time_ns()
    seen = events.decode(bytes(dp.run(packet).event))
    after = time.time_ns()
    pair = (str(A.ipv4), str(B.ipv4)) if family == 4 else (str(A.ipv6), str(B.ipv6))
    assert (seen.source, seen.destination, seen.source_port, seen.destination_port) == (*pair, 4000, 80)
    assert (seen.source_endpoint, seen.destination_endpoint, seen.protocol, seen.tcp_flags) == (A.id, B.id, 6, 2)
    assert (seen.source_identity, seen.destination_identity) == (A.identity, B.identity)
    assert (seen.verdict, seen.reason, seen.length) == (abi.Verdict.DELIVERED, 0, len(packet))
    assert before - 1_000_000_000 < seen.time_unix_ns < after + 1_000_000_000


def test_a_pause_between_two_clocks_moves_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    now, pauses = 10**18, iter((5 * 10**9, 0, 10**9))

    def monotonic() -> int:
        nonlocal now
        now += next(pauses)
        return now - 7 * 10**17

    monkeypatch.setattr(events, "time", SimpleNamespace(time_ns=lambda: now, monotonic_ns=monotonic))
    assert events.clock_offset() == 7 * 10**17


def test_event_of_a_frame_that_is_not_ip_reads_as_macs(dp: Datapath) -> None:
    seen = events.decode(bytes(dp.run(bytes(ether(type=0x88CC) / bytes(60))).event))
    assert (seen.source, seen.destination, seen.ethertype) == (mac(A), "02:00:00:00:00:01", 0x88CC)
    assert seen.reason == Reason.ETHERTYPE


def test_watch_sets_what_programs_report_and_keeps_other_options(dp: Datapath) -> None:
    packet = bytes(ether() / ip(B) / TCP())
    with events.open_config(dp.instance) as config:
        events.watch(config, drops=False, forward_every=1)
        assert dp.run(packet).verdict == abi.Verdict.DELIVERED
        for wrong in (-1, 1 << 32):
            with pytest.raises(errors.InvalidArgument):
                events.watch(config, drops=True, forward_every=wrong)


@pytest.mark.parametrize(("mine", "theirs", "prefix"), [
    (abi.Verdict, pb.Verdict, "VERDICT_"), (abi.Direction, pb.Direction, "DIRECTION_"),
])  # fmt: skip
def test_numbers_are_those_that_clients_are_told(mine: type[enum.IntEnum], theirs: Any, prefix: str) -> None:
    told = {name.removeprefix(prefix): number for name, number in theirs.items() if number}
    assert told == {each.name: each.value for each in mine}


def test_half_a_record_is_refused() -> None:
    with pytest.raises(ValueError):
        events.decode(bytes(20))
