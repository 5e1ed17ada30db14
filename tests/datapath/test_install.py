"""Installing, installing again and uninstalling."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from services.common.instance import Instance
from services.common.kernel import bpf, features, progs
from services.common.pipeline import abi, install
from services.common.pipeline.counters import open_counters, read_counters
from tests import session
from tests.datapath.harness import Datapath
from tests.datapath.test_from_pod import A, B, ether, ip


@pytest.fixture
def fresh() -> Iterator[Instance]:
    features.ensure_bpffs()
    made = Instance.from_env(f"t-install-{session.name()}")
    yield made
    shutil.rmtree(made.pin_dir, ignore_errors=True)


async def test_every_program_passes_the_verifier_and_fills_its_slot(fresh: Instance) -> None:
    await install.install(fresh)
    ids = {name: progs.info(install.program_path(fresh, name)).id for name in install.PROGRAMS}
    assert progs.slots(install.map_path(fresh, abi.SLOTS_MAP)) == {
        int(slot): ids[name] for slot, name in install.SLOTS.items()}
    assert all(install.map_path(fresh, name).exists() for name in install.MAPS)


async def test_installing_again_keeps_maps_and_foreign_slots_and_replaces_programs(fresh: Instance) -> None:
    await install.install(fresh)
    array = install.map_path(fresh, abi.SLOTS_MAP)
    with progs.opened(install.program_path(fresh, install.TO_POD)) as stranger:
        progs.set_slot(array, abi.Slot.LB, stranger)
    before, slots = maps_ids(fresh), progs.slots(array)
    await install.install(fresh)
    assert maps_ids(fresh) == before
    after = progs.slots(array)
    assert after[abi.Slot.LB] == slots[abi.Slot.LB]
    assert all(after[slot] != slots[slot] for slot in install.SLOTS)


async def test_uninstalling_leaves_nothing_but_what_others_use(fresh: Instance) -> None:
    await install.install(fresh)
    array = install.map_path(fresh, abi.SLOTS_MAP)
    with progs.opened(install.program_path(fresh, install.TO_POD)) as stranger:
        progs.set_slot(array, abi.Slot.LB, stranger)
    await install.uninstall(fresh)
    assert set(progs.slots(array)) == {abi.Slot.LB}
    assert not any(install.program_path(fresh, name).exists() for name in install.PROGRAMS)
    progs.clear_slot(array, abi.Slot.LB)
    await install.install(fresh)
    with progs.opened(install.program_path(fresh, install.TO_POD)) as leftover:
        bpf.pin(leftover, str(install.program_path(fresh, install.TO_POD)) + "~")
    for _ in range(2):
        await install.uninstall(fresh)
        assert not fresh.pin_dir.exists()


def maps_ids(instance: Instance) -> dict[str, int]:
    found = {}
    for name in install.MAPS:
        fd = bpf.get(str(install.map_path(instance, name)))
        found[name] = bpf.map_info(fd).id
        os.close(fd)
    return found


def test_counters_count_every_packet_by_reason_and_direction(dp: Datapath) -> None:
    packets = [bytes(ether() / ip(B) / bytes(50)), bytes(ether() / ip(B, source="10.1.0.99") / bytes(50))]
    with open_counters(dp.instance) as counters:
        before = read_counters(counters)
        for packet in packets:
            for _ in range(3):
                dp.run(packet)
        after = read_counters(counters)
    size = len(packets[0])
    for reason in (0, 3):
        key = (reason, int(abi.Direction.FROM_POD))
        was = before.get(key, (0, 0))
        assert (after[key][0] - was[0], after[key][1] - was[1]) == (3, 3 * size)
    assert after.keys() - before.keys() <= {(0, 1), (3, 1)}


def test_nothing_is_reported_while_nobody_watches(dp: Datapath) -> None:
    fd = dp.programs[install.FROM_POD]
    good, bad = bytes(ether() / ip(B) / bytes(50)), bytes(ether() / ip(B, source="10.1.0.99") / bytes(50))
    for drops, forward, expected in ((0, 0, []), (1, 0, [A.id]), (0, 1, [A.id]), (1, 1, [A.id, A.id])):
        dp.watch(drops, forward)
        for packet in (good, bad):
            progs.test_run(fd, packet)
        assert [abi.Event.from_buffer_copy(sample).src_id for sample in dp.ring.poll()] == expected


def test_forwarded_packets_are_sampled(dp: Datapath) -> None:
    dp.watch(drops=0, forward=10)
    packet = bytes(ether() / ip("192.0.2.1") / bytes(50))
    progs.test_run(dp.programs[install.FROM_POD], packet, repeat=5000)
    # 5,000 draws of one in 10: mean 500, standard deviation 21.
    assert 350 < len(dp.ring.poll()) < 650
