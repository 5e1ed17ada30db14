"""Loading programs with BCC in a child process: pins, adoption, all or nothing."""

from __future__ import annotations

import asyncio
import ctypes as ct
from dataclasses import replace
from pathlib import Path

import pytest
from kernel_programs import HERE, counter_spec, load_counter

from services.common import errors
from services.common.kernel import bpf, progs
from services.common.kernel.loader import ProgramSpec, load
from services.common.kernel.maps import BpfMap

PACKET = b"\2" * 64


def counts(pin_dir: Path) -> dict[int, int]:
    with BpfMap.open(pin_dir / "family/v1/counts", ct.c_uint32, ct.c_uint64) as found:
        return {key.value: value.value for key, value in found.items()}


def run(pin_dir: Path, repeat: int = 1) -> None:
    with progs.opened(pin_dir / "prog/test/count_packets") as fd:
        progs.test_run(fd, PACKET, repeat)


def pins(pin_dir: Path) -> set[str]:
    return {str(path.relative_to(pin_dir)) for path in pin_dir.rglob("*") if not path.is_dir()}


ALL_PINS = {
    "family/v1/counts",
    "family/v1/slots",
    "family/v1/samples",
    "prog/test/count_packets",
    "prog/test/second",
}


async def test_programs_and_maps_are_pinned_and_slots_filled(pin_dir: Path) -> None:
    result = await load_counter(pin_dir)
    assert pins(pin_dir) == ALL_PINS
    assert set(result.maps.values()) == {"created"}
    second = progs.info(pin_dir / "prog/test/second")
    assert progs.slots(pin_dir / "family/v1/slots") == {1: second.id}
    run(pin_dir, 5)
    assert counts(pin_dir) == {0: 5, 1: 5}


async def test_a_second_load_keeps_the_maps_and_replaces_the_programs(pin_dir: Path) -> None:
    first = await load_counter(pin_dir)
    run(pin_dir)
    second = await load_counter(pin_dir, defines={"STEP": 6})
    assert set(second.maps.values()) == {"adopted"}
    assert {p.id for p in first.programs.values()}.isdisjoint(p.id for p in second.programs.values())
    run(pin_dir)
    assert counts(pin_dir) == {0: 2, 1: 1, 7: 1}
    assert pins(pin_dir) == ALL_PINS


async def test_a_program_opened_before_a_reload_calls_the_new_slots(pin_dir: Path) -> None:
    """As an attached program does: the slot is replaced under it, atomically."""
    await load_counter(pin_dir)
    with progs.opened(pin_dir / "prog/test/count_packets") as old:
        await load_counter(pin_dir, defines={"STEP": 6})
        progs.test_run(old, PACKET)
    assert counts(pin_dir) == {0: 1, 7: 1}


async def test_the_layout_before_stays_and_older_ones_go_but_for_programs(pin_dir: Path) -> None:
    async def upgrade(version: int) -> None:
        await load_counter(
            pin_dir, maps={name: f"family/v{version}/{name}" for name in ("counts", "slots", "samples")}
        )

    def kept(version: int) -> set[str]:
        return {path.rpartition("/")[2] for path in pins(pin_dir) if path.startswith(f"family/v{version}/")}

    every = {"counts", "slots", "samples"}
    await upgrade(1)
    # Attached, as it were, and never replaced.
    with progs.opened(pin_dir / "prog/test/count_packets") as oldest:
        for version in (2, 9, 10):
            await upgrade(version)
        assert [kept(version) for version in (1, 2, 9, 10)] == [{"slots"}, {"slots"}, every, every]
        assert progs.slots(pin_dir / "family/v1/slots")
        progs.test_run(oldest, PACKET)
    # Whoever goes back finds what he left.
    await upgrade(9)
    assert kept(10) == every


async def test_what_the_verifier_refuses_changes_nothing(pin_dir: Path) -> None:
    await load_counter(pin_dir)
    before = {path: progs.info(pin_dir / path).id for path in ALL_PINS if path.startswith("prog")}
    refused = counter_spec(
        source=HERE / "refused.c", functions={"second": "sched_cls"}, defines={"COUNTS_MAX": 128}
    )
    with pytest.raises(errors.FailedPrecondition) as caught:
        # The good unit comes first: it must not be installed either.
        await load([counter_spec(defines={"STEP": 3}), refused], pin_dir)
    assert "second of refused.c" in caught.value.message
    assert "invalid access to packet" in caught.value.message or "pkt_end" in caught.value.message
    assert {path: progs.info(pin_dir / path).id for path in before} == before
    assert progs.slots(pin_dir / "family/v1/slots") == {1: before["prog/test/second"]}
    assert pins(pin_dir) == ALL_PINS


async def test_a_refused_first_load_leaves_no_pin(pin_dir: Path) -> None:
    with pytest.raises(errors.FailedPrecondition):
        await load(
            [
                counter_spec(
                    source=HERE / "refused.c", functions={"second": "sched_cls"}, defines={"COUNTS_MAX": 128}
                )
            ],
            pin_dir,
        )
    assert pins(pin_dir) == set()


async def test_a_slot_out_of_range_takes_everything_back(pin_dir: Path) -> None:
    await load_counter(pin_dir)
    before = progs.slots(pin_dir / "family/v1/slots")
    with pytest.raises(errors.FailedPrecondition, match="slot 9"):
        await load_counter(pin_dir, slots={"slots": {1: "second", 9: "second"}})
    assert progs.slots(pin_dir / "family/v1/slots") == before
    assert pins(pin_dir) == ALL_PINS


async def test_a_pinned_map_of_another_shape_is_named_with_both_shapes(pin_dir: Path) -> None:
    await load_counter(pin_dir)
    with pytest.raises(errors.FailedPrecondition) as caught:
        await load_counter(pin_dir, defines={"COUNTS_MAX": 256})
    assert "map counts" in caught.value.message
    assert "128 entries" in caught.value.message
    assert "256 entries" in caught.value.message


async def test_a_compiler_error_names_file_and_line(pin_dir: Path) -> None:
    with pytest.raises(errors.Internal, match=r"broken\.c:5.*\n?.*no_such_name"):
        await load([ProgramSpec(HERE / "broken.c", {"second": "sched_cls"}, "test")], pin_dir)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"maps": {"nothing": "x/v1/nothing"}, "slots": {}}, "no map nothing"),
        ({"source": HERE / "gone.c"}, "gone.c"),
        ({"functions": {"second": "sched_clz"}}, "unknown program type"),
    ],
)
async def test_a_wrong_spec_says_what_is_wrong(pin_dir: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=words):
        await load_counter(pin_dir, **changes)


async def test_a_tracepoint_the_kernel_lacks_is_named(pin_dir: Path) -> None:
    with pytest.raises(errors.FailedPrecondition, match="has no tracepoint no_such_one") as caught:
        await load([replace(counter_spec(), functions={"second": "tp_btf/no_such_one"}, slots={})], pin_dir)
    assert "Traceback" not in str(caught.value) and pins(pin_dir) == set()


async def test_two_instances_do_not_share_maps(pin_dir: Path) -> None:
    await load_counter(pin_dir / "a")
    await load_counter(pin_dir / "b")
    run(pin_dir / "a", 3)
    assert counts(pin_dir / "a") == {0: 3, 1: 3}
    assert counts(pin_dir / "b") == {}


async def test_loads_of_one_instance_at_once_both_succeed(pin_dir: Path) -> None:
    results = await asyncio.gather(load_counter(pin_dir), load_counter(pin_dir))
    assert sorted(set(result.maps.values()) == {"created"} for result in results) == [False, True]
    run(pin_dir)
    assert counts(pin_dir) == {0: 1, 1: 1}


async def test_what_a_killed_loader_left_behind_is_cleared(pin_dir: Path) -> None:
    await load_counter(pin_dir)
    with progs.opened(pin_dir / "prog/test/second") as fd:
        bpf.pin(fd, str(pin_dir / "prog/test/second~"))
    await load_counter(pin_dir)
    assert pins(pin_dir) == ALL_PINS


async def test_a_directory_that_is_no_bpffs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.FailedPrecondition, match="not on a bpf file system") as caught:
        await load_counter(tmp_path)
    assert "mount -t bpf" in caught.value.fix


async def test_every_map_type_in_use_can_be_adopted(pin_dir: Path) -> None:
    names = ["m_array", "m_percpu", "m_hash", "m_lru", "m_pchash", "m_lpm", "m_outer"]
    spec = ProgramSpec(
        HERE / "shapes.c", {"touch": "sched_cls"}, "test", maps={name: f"shapes/v1/{name}" for name in names}
    )
    await load([spec], pin_dir)

    class Prefix(ct.Structure):
        _fields_ = (("length", ct.c_uint32), ("address", ct.c_uint32))

    for power, name in enumerate(names[:5]):
        with BpfMap.open(pin_dir / f"shapes/v1/{name}", ct.c_uint32, ct.c_uint64) as found:
            found.update(1, 1 << power)
    with BpfMap.open(pin_dir / "shapes/v1/m_lpm", Prefix, ct.c_uint64) as trie:
        trie.update(Prefix(32, 1), 32)
    with (
        BpfMap.create("hash", ct.c_uint32, ct.c_uint64, 64, 1, "inner") as inner,
        BpfMap.open(pin_dir / "shapes/v1/m_outer", ct.c_uint32, ct.c_uint32) as outer,
    ):
        inner.update(1, 64)
        outer.update(1, inner.fd)
    again = await load([spec], pin_dir)
    assert set(again.maps.values()) == {"adopted"}
    with progs.opened(pin_dir / "prog/test/touch") as fd:
        assert progs.test_run(fd, PACKET).retval == 127
