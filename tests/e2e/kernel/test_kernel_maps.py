"""Map access on real maps of each type."""

from __future__ import annotations

import ctypes as ct
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common import errors
from services.common.kernel import bpf
from services.common.kernel.maps import BATCH, BpfMap

NO_PREALLOC = 1


class Key(ct.Structure):
    _fields_ = (("a", ct.c_uint32), ("b", ct.c_uint32))


class Value(ct.Structure):
    _fields_ = (("n", ct.c_uint64),)


Made = BpfMap[Key, Value]


@pytest.fixture(params=["hash", "hash-no-prealloc", "lru_hash", "lpm_trie"])
def table(request: pytest.FixtureRequest) -> Iterator[Made]:
    kind, _, bare = request.param.partition("-")
    flags = NO_PREALLOC if bare or kind == "lpm_trie" else 0
    with BpfMap.create(kind, Key, Value, 3 * BATCH, flags, "test") as made:
        yield made


def key(number: int) -> Key:
    return Key(32, number)  # a full-length prefix where the map is a trie


def content(table: Made) -> dict[int, int]:
    return {k.b: v.n for k, v in table.items()}


def test_an_element_can_be_put_found_and_removed(table: Made) -> None:
    assert table.lookup(key(1)) is None
    table.update(key(1), Value(5))
    found = table.lookup(key(1))
    assert found is not None
    assert found.n == 5
    assert table.delete(key(1)) is True
    assert table.delete(key(1)) is False
    assert list(table.keys()) == []


def test_batches_larger_than_one_system_call_are_complete(table: Made) -> None:
    wanted = {number: number * 2 for number in range(2 * BATCH + 7)}
    assert table.update_batch((key(k), Value(v)) for k, v in wanted.items()) == len(wanted)
    assert content(table) == wanted
    assert table.count() == len(wanted)
    assert {k.b for k in iter(table.keys())} == set(wanted)


def test_elements_go_in_and_out_as_bytes(table: Made) -> None:
    wanted = {number: number * 2 for number in range(2 * BATCH + 7)}
    keys = b"".join(bytes(key(k)) for k in wanted)
    values = b"".join(bytes(Value(v)) for v in wanted.values())
    assert table.update_packed(keys, values) == (len(wanted), None)
    assert content(table) == wanted
    batches = list(table.items_packed())
    assert sorted(b"".join(k for k, _ in batches)) == sorted(keys)
    assert sorted(b"".join(v for _, v in batches)) == sorted(values)


def test_deleting_a_batch_passes_over_absent_keys(table: Made) -> None:
    table.update_batch((key(n), Value(n)) for n in range(10))
    assert table.delete_batch(key(n) for n in (100, 3, 101, 4, 9, 102)) == 3
    assert set(content(table)) == {0, 1, 2, 5, 6, 7, 8}


def test_new_only_and_existing_only(table: Made) -> None:
    with pytest.raises(errors.NotFound):
        table.update(key(1), Value(1), bpf.EXIST)
    table.update(key(1), Value(1), bpf.NOEXIST)
    with pytest.raises(errors.AlreadyExists):
        table.update(key(1), Value(2), bpf.NOEXIST)


@pytest.mark.parametrize("kind", ["hash", "lpm_trie"])
@pytest.mark.parametrize("batched", [True, False])
def test_a_full_map_says_its_name_count_and_limit(kind: str, batched: bool) -> None:
    with BpfMap.create(kind, Key, Value, 8, NO_PREALLOC, "tiny") as table:
        with pytest.raises(errors.ResourceExhausted, match="tiny is full: 8 of 8"):
            if batched:
                table.update_batch((key(n), Value(n)) for n in range(9))
            else:
                for number in range(9):
                    table.update(key(number), Value(number))
        assert table.count() == 8


@pytest.mark.parametrize("kind", ["hash", "lpm_trie"])
def test_a_full_map_says_how_many_bytes_it_took(kind: str) -> None:
    with BpfMap.create(kind, Key, Value, 8, NO_PREALLOC, "tiny") as table:
        done, error = table.update_packed(b"".join(bytes(key(n)) for n in range(10)), bytes(80))
        assert done == 8
        assert isinstance(error, errors.ResourceExhausted)


def test_every_cpu_has_a_value_of_its_own() -> None:
    with BpfMap.create("percpu_hash", Key, Value, 8) as table:
        table.update(key(1), Value(3))
        values = table.lookup_percpu(key(1))
        assert values is not None
        assert [v.n for v in values] == [3] * bpf.possible_cpus()
        assert [(k.b, len(vs)) for k, vs in table.items_percpu()] == [(1, bpf.possible_cpus())]
        with pytest.raises(TypeError, match="per-CPU"):
            table.lookup(key(1))


def test_simple_types_may_be_given_as_numbers() -> None:
    with BpfMap.create("array", ct.c_uint32, ct.c_uint64, 4) as table:
        table.update(3, 9)
        assert [(k.value, v.value) for k, v in table.items()] == [(0, 0), (1, 0), (2, 0), (3, 9)]
        assert table.lookup(4) is None


def test_a_pinned_map_opens_only_with_its_own_sizes(pin_dir: Path) -> None:
    pin_dir.mkdir()
    with BpfMap.create("hash", Key, Value, 8) as table:
        bpf.pin(table.fd, str(pin_dir / "m"))
    with BpfMap.open(pin_dir / "m", Key, Value) as again:
        assert again.info.max_entries == 8
    with pytest.raises(errors.FailedPrecondition, match="8-byte keys"):
        BpfMap.open(pin_dir / "m", ct.c_uint32, Value)
    with pytest.raises(errors.NotFound, match="no BPF map pinned"):
        BpfMap.open(pin_dir / "other", Key, Value)
