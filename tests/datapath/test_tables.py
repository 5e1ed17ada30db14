"""The endpoint tables: hash and ep_near together, also after a writer died between the two."""

from __future__ import annotations

import ctypes as ct

import pytest

from services.common import errors
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi
from services.common.pipeline.endpoints import AddrTable, IfaceTable
from tests.datapath.harness import PODS, A, B, Datapath, make_pod

TABLES = pytest.mark.parametrize("kind", ["iface", "addr"])


def table_and_key(dp: Datapath, kind: str, pod: abi.Endpoint) -> tuple[IfaceTable | AddrTable, int | abi.FibAddr, str]:
    if kind == "iface":
        return dp.ifaces, pod.ifindex, "ep_iface"
    return dp.addrs, abi.FibAddr.of(pod.ipv4), "ep_addr"


def hash_of(dp: Datapath, name: str) -> BpfMap[ct.c_uint32, abi.Endpoint]:
    return BpfMap.open(dp.path(name), ct.c_uint32 if name == "ep_iface" else abi.FibAddr, abi.Endpoint)  # type: ignore[arg-type]


@TABLES
def test_what_is_written_is_read_and_listed(dp: Datapath, kind: str) -> None:
    table, key, _ = table_and_key(dp, kind, B)
    assert bytes(table.lookup(key) or b"") == bytes(B)
    assert sorted({value.id for _, value in table.items()}) == [pod.id for pod in PODS]
    assert len(list(table.items())) == len(PODS) * (1 if kind == "iface" else 2)
    changed = make_pod(B.id, B.ifindex, mtu=900)
    table.update(key, changed)
    assert bytes(table.lookup(key) or b"") == bytes(changed)
    assert table.delete(key) and not table.delete(key)
    assert table.lookup(key) is None


@TABLES
def test_entry_deleted_from_the_hash_by_hand_shows_as_a_bare_id_until_written_again(dp: Datapath, kind: str) -> None:
    table, key, name = table_and_key(dp, kind, B)
    with hash_of(dp, name) as far:
        assert far.delete(key)
    shown = table.lookup(key)
    assert shown is not None and bytes(shown) == bytes(abi.Endpoint(id=B.id))
    assert [value.id for _, value in table.items() if value.id == B.id and not value.ifindex] == [B.id]
    table.update(key, B)
    assert bytes(table.lookup(key) or b"") == bytes(B)


@TABLES
def test_update_that_died_half_way_shows_as_a_bare_id(dp: Datapath, kind: str) -> None:
    table, key, name = table_and_key(dp, kind, B)
    with hash_of(dp, name) as far:
        far.update(key, make_pod(B.id, B.ifindex, mtu=900))
    shown = table.lookup(key)
    assert shown is not None and bytes(shown) == bytes(abi.Endpoint(id=B.id))


@TABLES
def test_entry_only_near_can_be_deleted(dp: Datapath, kind: str) -> None:
    table, key, name = table_and_key(dp, kind, B)
    with hash_of(dp, name) as far:
        far.delete(key)
    assert table.delete(key)
    own = bytes(table._key(key) if kind == "iface" else key)
    assert table.lookup(key) is None and own not in {bytes(found) for found, _ in table.items()}


def test_full_hash_is_refused_before_anything_changes(dp: Datapath) -> None:
    with BpfMap.create("hash", ct.c_uint32, abi.Endpoint, 1) as tiny:
        tiny.update(1, A)
        whole, dp.ifaces._hash = dp.ifaces._hash, tiny
        try:
            with pytest.raises(errors.ResourceExhausted):
                dp.ifaces.update(5000, make_pod(99, 5000))
            assert dp.ifaces.lookup(5000) is None
        finally:
            dp.ifaces._hash = whole
