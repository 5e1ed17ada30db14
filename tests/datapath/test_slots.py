"""Slots are independent: each service fills and empties its own, atomically, while packets run."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.layers.inet import TCP, UDP

from services.common.instance import Instance
from services.common.kernel import loader, progs
from services.common.pipeline import abi, install
from services.common.pipeline.reasons import Reason
from tests.datapath.harness import HOST_MAC, REDIRECT, SHAPED, A, B, Datapath
from tests.datapath.packets import delivered, ether, ip, mac

PROGRAMS = {abi.Slot.LB: "fib_t_lb", abi.Slot.POLICY_EGRESS: "fib_t_egress", abi.Slot.POLICY_INGRESS: "fib_t_ingress"}


@pytest.fixture(scope="module")
def foreign(instance: Instance) -> Iterator[dict[abi.Slot, int]]:
    """Programs of another service, loaded in a process of their own against the pinned maps."""
    spec = loader.ProgramSpec(
        source=Path(__file__).with_name("slots.c"), service="t", functions=dict.fromkeys(PROGRAMS.values(), "sched_cls"),
        maps={name: path for name, path in abi.MAPS.items() if name.startswith("pl_")})
    result = asyncio.run(loader.load([spec], instance.pin_dir))
    assert set(result.maps.values()) == {"adopted"}
    fds = {slot: progs.open_prog(instance.pin_dir / "prog/t" / name) for slot, name in PROGRAMS.items()}
    yield fds
    for fd in fds.values():
        os.close(fd)


@pytest.fixture
def slots(dp: Datapath, foreign: dict[abi.Slot, int]) -> Iterator[Path]:
    array = dp.path(abi.SLOTS_MAP)
    for slot, fd in foreign.items():
        progs.set_slot(array, slot, fd)
    yield array
    for slot in foreign:
        progs.clear_slot(array, slot)


def test_lb_changes_where_forward_sends(dp: Datapath, slots: Path) -> None:
    result = dp.run(bytes(ether() / ip("10.1.0.200") / TCP(dport=80)))
    assert (result.verdict, result.event.dst_id) == (abi.Verdict.DELIVERED, B.id)


def test_policies_see_both_identities_and_drop(dp: Datapath, slots: Path) -> None:
    good = ether() / ip(B) / TCP(dport=80)
    assert dp.run(bytes(good)).data == delivered(good, B)
    assert dp.run(bytes(ether() / ip(B) / TCP(dport=23))).reason == Reason.MALFORMED
    assert dp.run(bytes(ether() / ip(B, 6) / UDP(dport=1000))).reason == Reason.ARP


def test_ingress_policy_holds_for_what_comes_through_the_stack(dp: Datapath, slots: Path) -> None:
    for port, verdict in ((80, abi.Verdict.DELIVERED), (1000, abi.Verdict.DROPPED)):
        packet = ether(src=HOST_MAC, dst=mac(A)) / ip(A, source="192.0.2.1") / TCP(dport=port)
        assert dp.run(bytes(packet), install.TO_POD).verdict == verdict


def test_ingress_policy_of_a_shaped_pod_runs_once_at_its_egress(dp: Datapath, slots: Path) -> None:
    """FORWARD leaves it to to_pod, where the redirected packet comes by."""
    assert dp.run(bytes(ether() / ip(SHAPED) / TCP(dport=1000))).action == REDIRECT


def test_an_emptied_slot_is_skipped(dp: Datapath, slots: Path) -> None:
    packet = bytes(ether() / ip(B) / TCP(dport=23))
    assert dp.run(packet).verdict == abi.Verdict.DROPPED
    progs.clear_slot(slots, abi.Slot.POLICY_EGRESS)
    assert dp.run(packet).verdict == abi.Verdict.DELIVERED
    progs.clear_slot(slots, abi.Slot.LB)
    assert dp.run(bytes(ether() / ip("10.1.0.200") / TCP(dport=80))).verdict == abi.Verdict.TO_STACK


@pytest.mark.parametrize(("slot", "emptied", "packet"), [
    (abi.Slot.LB, abi.Slot.FORWARD, ether() / ip(B) / TCP(dport=80)),
    (abi.Slot.POLICY_INGRESS, abi.Slot.DELIVER, ether() / ip(B) / TCP(dport=80)),
    (None, abi.Slot.NEIGHBOUR, ether(type=0x806) / bytes(28)),
], ids=["forward", "deliver", "neighbour"])
def test_a_missing_program_of_our_own_is_named(
        dp: Datapath, foreign: dict[abi.Slot, int], slot: abi.Slot | None, emptied: abi.Slot, packet: object) -> None:
    array = dp.path(abi.SLOTS_MAP)
    if slot is not None:
        progs.set_slot(array, slot, foreign[slot])
    progs.clear_slot(array, emptied)
    try:
        assert dp.run(bytes(packet)).reason == Reason.SLOT_MISSING  # type: ignore[call-overload]
    finally:
        progs.set_slot(array, emptied, dp.programs[install.SLOTS[emptied]])
        if slot is not None:
            progs.clear_slot(array, slot)


def test_no_packet_is_lost_while_slots_are_replaced(dp: Datapath, foreign: dict[abi.Slot, int]) -> None:
    """Packets run on one thread, LB and both policies come and go on another: every packet is delivered."""
    array = dp.path(abi.SLOTS_MAP)
    dp.watch(drops=0, forward=0)
    packet = bytes(ether() / ip(B) / TCP(dport=80))
    begun, stop, changes = threading.Event(), threading.Event(), 0
    results: set[int] = set()

    def send() -> None:
        while not stop.is_set():
            results.update(progs.test_run(dp.programs[install.FROM_POD], packet).retval for _ in range(200))
            begun.set()

    sender = threading.Thread(target=send)
    sender.start()
    try:
        assert begun.wait(20)
        for _ in range(10):
            for slot, fd in foreign.items():
                progs.set_slot(array, slot, fd)
            progs.set_slot(array, abi.Slot.FORWARD, dp.programs["fib_forward"])
            for slot in foreign:
                progs.clear_slot(array, slot)
            changes += 7
    finally:
        stop.set()
        sender.join()
        for slot in foreign:
            progs.clear_slot(array, slot)
    assert changes == 70 and results == {REDIRECT}
