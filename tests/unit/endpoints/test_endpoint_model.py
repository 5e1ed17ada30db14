"""The pure rules of endpoints."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common import errors
from services.ipam.endpoints import model
from services.ipam.endpoints.index import Index
from services.ipam.endpoints.model import EndpointRecord, EndpointSpec, Ids, State


def record(number: int = 1, **changes: object) -> EndpointRecord:
    spec = EndpointSpec(f"c{number}", netns=f"/run/netns/{number}", labels={"a": "b"}).checked()
    made = EndpointRecord(
        number, spec, State.READY, created_unix_seconds=float(number), netns_cookie=7, cgroup_id=9,
        ipv4=f"10.0.0.{number}", ipv6=f"fd00::{number}", host_ifindex=100 + number, mac="02:00:00:00:00:01",
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("container_id", ["", "-a", ".a", "a/b", "a b", "a" * 129, "ä"])
def test_malformed_container_ids_are_refused(container_id: str) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        EndpointSpec(container_id, netns="/n").checked()
    assert refused.value.field == "container_id"


@pytest.mark.parametrize("ifname", ["a/b", "a b", ".", "..", "a:1", "x" * 16, "é" * 8, "a\0b"])
def test_malformed_interface_names_are_refused(ifname: str) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        EndpointSpec("c", ifname, netns="/n").checked()
    assert refused.value.field == "ifname"


def test_a_checked_spec_is_canonical() -> None:
    spec = EndpointSpec("c", "", netns="/n", ipv6="FD00:0::01", cgroup_path="/kube/pod/").checked()
    assert (spec.ifname, spec.pool, spec.ipv6, spec.cgroup_path) == ("eth0", "default", "fd00::1", "kube/pod")
    assert spec.checked() == spec


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"netns": "n"}, "netns"), ({"netns": "/a\0"}, "netns"), ({"mtu": 1279}, "mtu"), ({"mtu": 65_536}, "mtu"),
        ({"ipv4": "10.0.0.01"}, "ipv4"), ({"ipv4": "fd00::1"}, "ipv4"), ({"ipv6": "10.0.0.1"}, "ipv6"),
        ({"pod": "a\nb"}, "pod"), ({"pod": "x" * 254}, "pod"), ({"labels": {"": "x"}}, "labels"),
        ({"labels": {str(n): "" for n in range(65)}}, "labels"), ({"cgroup_path": "a/../b"}, "cgroup_path"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(changes: dict[str, object], field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as refused:
        dataclasses.replace(EndpointSpec("c", netns="/n"), **changes).checked()
    assert refused.value.field == field


def test_states_follow_each_other_as_documented() -> None:
    allowed = {(before, after) for before in State for after in State if after in model.FOLLOWING[before]}
    assert (State.CREATING, State.READY) in allowed
    assert (State.DELETING, State.READY) not in allowed
    for before in State:
        for after in State:
            if (before, after) in allowed:
                assert record(state=before).to(after, "why").message == "why"
            else:
                with pytest.raises(errors.Internal):
                    record(state=before).to(after)


def test_a_record_survives_the_database() -> None:
    made = record(state=State.DEGRADED, message="ü", ipv6="")
    assert EndpointRecord.decode(made.encode()) == made


def test_a_record_of_a_newer_version_is_read() -> None:
    data = (
        record().encode().replace(b'{"id"', b'{"colour":"red","id"').replace(b'"spec":{', b'"spec":{"x":1,')
    )
    assert EndpointRecord.decode(data) == record()


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"id":1,"spec":{},"state":1}', b'{"id":1,"state":77,"spec":{}}']
)
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        EndpointRecord.decode(data)


def test_a_namespace_path_is_not_an_option_that_differs() -> None:
    one = EndpointSpec("c", netns="/a").checked()
    assert model.differing_options(one, dataclasses.replace(one, netns="/b")) == []
    other = dataclasses.replace(one, mtu=1400, labels={"x": "y"})
    assert model.differing_options(one, other) == ["mtu", "labels"]


def test_the_lowest_free_number_is_taken() -> None:
    ids = Ids([1, 2, 4, 7])
    assert [ids.take() for _ in range(4)] == [3, 5, 6, 8]


def test_a_number_given_back_rests() -> None:
    ids = Ids(rest=2)
    taken = [ids.take() for _ in range(4)]
    for number in taken[:3]:
        ids.give_back(number)
    # 1 has been overtaken by two others, 2 and 3 rest.
    assert [ids.take(), ids.take()] == [1, 5]


def test_resting_numbers_are_taken_before_none_is() -> None:
    ids = Ids(rest=10, limit=3)
    for _ in range(3):
        ids.take()
    ids.give_back(2)
    assert ids.take() == 2
    with pytest.raises(errors.ResourceExhausted, match="all 3"):
        ids.take()


@given(st.lists(st.integers(0, 30), max_size=200), st.sets(st.integers(1, 20)))
def test_numbers_in_use_are_unique(choices: list[int], used: set[int]) -> None:
    ids, held = Ids(used, rest=3, limit=25), set(used)
    for choice in choices:
        if choice < 20 or not held:
            if len(held) == 25:
                continue
            number = ids.take()
            assert number not in held and 1 <= number <= 25
            held.add(number)
        else:
            number = sorted(held)[choice % len(held)]
            ids.give_back(number)
            held.remove(number)
        assert len(ids) == len(held)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3), st.booleans()), max_size=60))
def test_the_index_finds_exactly_what_is_there(steps: list[tuple[int, int, bool]]) -> None:
    index, there = Index(), {}
    for number, variant, put in steps:
        made = record(
            number, ipv4=f"10.0.{variant}.{number}", netns_cookie=variant, host_ifindex=variant * 10 + number
        )
        if put:
            index.put(made)
            there[number] = made
        else:
            index.remove(made)
            there.pop(number, None)
    assert index.records() == [there[number] for number in sorted(there)]
    for made in there.values():
        assert (
            index.by_key(made.key)
            == index.by_address(made.ipv4)
            == index.by_ifindex(made.host_ifindex)
            == made
        )
        assert set(index.sharing_cookie(made.netns_cookie)) == (
            {m.id for m in there.values() if m.netns_cookie == made.netns_cookie}
            if made.netns_cookie
            else set()
        )
    assert index.by_address("10.9.9.9") is None
    first = min(there.values(), key=lambda m: m.created_unix_seconds, default=None)
    assert index.by_cgroup(9) == first
