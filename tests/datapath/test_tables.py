"""The endpoint tables: hash and ep_near together, also after a writer died between the two."""

from __future__ import annotations

import ctypes as ct
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


# -- keys that share a slot


NEIGHBOURS = [f"10.1.{16 * n}.7" for n in range(3)] + ["fd00:1::7", "fd00:1::1007"]
"""Addresses of two slots: 4,096 apart."""


def seen(dp: Datapath, address: str) -> int:
    """Which pod programs find: endpoint_by_address() of bpf/abi/endpoint.h."""
    key = abi.FibAddr.of(address)
    near = dp.near.lookup(dp.addrs._slot(bytes(key)))
    assert near is not None
    if near.id and str(near.ipv6 if ":" in address else near.ipv4) == address:
        return near.id
    with hash_of(dp, "ep_addr") as far:
        found = far.lookup(key) if near.flags & abi.EP_CROWDED else None  # type: ignore[arg-type]
    return found.id if found else 0


def neighbour(number: int, identity: int = 0) -> abi.Endpoint:
    address = NEIGHBOURS[number]
    return abi.Endpoint.of(id=50 + number, ifindex=900 + number, mac="02:00:00:00:02:01", host_mac="02:00:00:00:00:01",
                           mtu=1500, identity=identity, **{"ipv6" if ":" in address else "ipv4": address})  # type: ignore[arg-type]


class Death(Exception):
    """The writer is killed."""


class Mortal:
    """A map whose writer dies before its n-th write from now on."""

    def __init__(self, real: BpfMap[Any, Any], lives: list[int]) -> None:
        self._real, self._lives = real, lives

    def _write(self, name: str, *args: Any) -> Any:
        if not self._lives[0]:
            raise Death
        self._lives[0] -= 1
        return getattr(self._real, name)(*args)

    def update(self, *args: Any) -> Any:
        return self._write("update", *args)

    def delete(self, *args: Any) -> Any:
        return self._write("delete", *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


STEPS = st.lists(max_size=12, elements=st.tuples(
    st.booleans(), st.integers(0, len(NEIGHBOURS) - 1), st.integers(1, 3), st.sampled_from([9, 9, 9, 0, 1, 2])))
"""Update or delete, of whom, the identity to write, writes until death."""


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_programs_find_every_pod_and_nobody_elses_whenever_the_writer_dies(
    dp: Datapath, steps: list[tuple[bool, int, int, int]],
) -> None:
    table, there, lives = dp.addrs, dict[int, abi.Endpoint](), [99]
    real = table._hash, table._near
    table._hash, table._near = Mortal(real[0], lives), Mortal(real[1], lives)  # type: ignore[assignment]
    try:
        for put, number, identity, lives[0] in steps:
            key = abi.FibAddr.of(NEIGHBOURS[number])
            try:
                table.update(key, neighbour(number, identity)) if put else table.delete(key)
            except Death:
                # Whoever comes next knows what is wanted and sees whether it is so.
                lives[0] = 99
                for other, address in enumerate(NEIGHBOURS):
                    unharmed = other != number and other in there
                    assert seen(dp, address) in ((50 + other,) if unharmed else (0, 50 + other))
                wanted = {**there, **({number: neighbour(number, identity)} if put else {})}
                if not put:
                    wanted.pop(number, None)
                for other, address in enumerate(NEIGHBOURS):
                    due = wanted.get(other)
                    if bytes(table.lookup(abi.FibAddr.of(address)) or b"") != bytes(due or b""):
                        table.update(abi.FibAddr.of(address), due) if due else table.delete(abi.FibAddr.of(address))
            lives[0] = 99
            if put:
                there[number] = neighbour(number, identity)
            else:
                there.pop(number, None)
            for other, address in enumerate(NEIGHBOURS):
                assert seen(dp, address) == (50 + other if other in there else 0)
                assert bytes(table.lookup(abi.FibAddr.of(address)) or b"") == bytes(there.get(other, b""))
        # All at once, which takes longer than the rest.
        assert {bytes(k): bytes(v) for k, v in table.items() if v.id >= 50} == {
            bytes(abi.FibAddr.of(NEIGHBOURS[other])): bytes(value) for other, value in there.items()}
        for address in NEIGHBOURS:
            table.delete(abi.FibAddr.of(address))
        if all(step[3] == 9 for step in steps):
            assert not [1 for _, value in dp.near.items() if value.flags & abi.EP_CROWDED]
    finally:
        lives[0] = 99
        for address in NEIGHBOURS:
            table.delete(abi.FibAddr.of(address))
        table._hash, table._near = real


def test_an_entry_that_programs_cannot_find_shows_as_a_bare_id(dp: Datapath) -> None:
    with hash_of(dp, "ep_addr") as far:
        far.update(abi.FibAddr.of(NEIGHBOURS[0]), neighbour(0))  # type: ignore[arg-type]
    try:
        assert seen(dp, NEIGHBOURS[0]) == 0
        assert bytes(dp.addrs.lookup(abi.FibAddr.of(NEIGHBOURS[0])) or b"") == bytes(abi.Endpoint(id=50))
        dp.addrs.update(abi.FibAddr.of(NEIGHBOURS[0]), neighbour(0))
        assert seen(dp, NEIGHBOURS[0]) == 50
    finally:
        dp.addrs.delete(abi.FibAddr.of(NEIGHBOURS[0]))
