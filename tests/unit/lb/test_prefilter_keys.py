"""Prefixes as bytes, and tables of them against a dictionary."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common import errors
from services.lb.prefilter.keys import Keys, address_of, covering, parse, parse_all, text_of

KEY = st.builds(
    lambda number, length: (number >> 32 - length << 32 - length).to_bytes(4) + bytes((length,)),
    st.integers(0, 0xFFFF) | st.integers(0, 0xFFFFFFFF), st.integers(20, 32),
)  # fmt: skip
ENTRIES = st.dictionaries(KEY, st.just(0) | st.integers(1, 9), max_size=60)


@pytest.mark.parametrize(("text", "means"), [
    ("10.0.0.0/8", "10.0.0.0/8"), ("0.0.0.0/0", "0.0.0.0/0"), ("192.0.2.1", "192.0.2.1/32"), ("::/0", "::/0"),
    ("2001:DB8::/32", "2001:db8::/32"), ("::ffff:1.2.3.4", "::ffff:1.2.3.4/128"), ("fe80::1/128", "fe80::1/128"),
])  # fmt: skip
def test_prefixes_are_read_and_written(text: str, means: str) -> None:
    assert text_of(parse(text)) == means


@pytest.mark.parametrize("text", [
    "", "/", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/0x8", "10.0.0.0/8/8", "10.0.0/8", "10.0.0.1/8", "10.0.0.0 ",
    "::1/64", "fe80::1%eth0", "::/129", "host", "1.2.3.4\0", "10.0.0.0/٨", "010.0.0.1",
])  # fmt: skip
def test_what_is_no_prefix_is_named(text: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        parse_all(["10.0.0.0/8", text])
    assert caught.value.field == "prefixes[1]"


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 32))
def test_parsing_agrees_with_the_standard_library(number: int, length: int) -> None:
    text = f"{ip_address(number)}/{length}"
    try:
        means = str(ip_network(text))
    except ValueError:
        with pytest.raises(ValueError, match="host bits"):
            parse(text)
    else:
        assert text_of(parse(text)) == means


def test_covering_prefixes_come_longest_first() -> None:
    found = [text_of(key) for key in covering(ip_address("192.0.2.129"), 25)]
    assert found[:3] == ["192.0.2.128/25", "192.0.2.0/24", "192.0.2.0/23"]
    assert found[-1] == "0.0.0.0/0"
    assert len(list(covering(ip_address("::1")))) == 129


def test_addresses() -> None:
    assert address_of("::ffff:10.0.0.1", "a") == ip_address("10.0.0.1")
    for text in ("", "10.0.0.1/32", "fe80::1%1"):
        with pytest.raises(errors.InvalidArgument):
            address_of(text, "a")


@settings(max_examples=40)
@given(ENTRIES, ENTRIES, st.lists(KEY, max_size=20))
def test_a_table_is_a_sorted_dictionary(first: dict[bytes, int], put: dict[bytes, int], drop: list[bytes]) -> None:
    keys = Keys.of(4, first).merged(put, drop)
    model = {key: expiry for key, expiry in first.items() if key not in drop} | put
    assert dict(keys.items()) == model
    assert list(keys) == sorted(model)
    assert len(keys) == len(model)
    assert keys.expiring() == sum(1 for expiry in model.values() if expiry)
    assert keys.next_expiry() == min(filter(None, model.values()), default=0)
    assert set(keys.expired(5)) == {key for key, expiry in model.items() if 0 < expiry <= 5}
    for key in [*first, *put, *drop]:
        assert (key in keys) == (key in model)
        assert key not in keys or keys.expiry_at(keys.index(key)) == model[key]


# A large example takes long to draw on a busy machine, which says nothing about the table.
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(KEY, st.just(0) | st.integers(1, 9), min_size=150, max_size=200), ENTRIES, st.lists(KEY, max_size=2))
def test_few_changes_of_many(first: dict[bytes, int], put: dict[bytes, int], drop: list[bytes]) -> None:
    few = dict(list(put.items())[:4])
    keys = Keys.of(4, first).merged(few, drop)
    assert dict(keys.items()) == {key: expiry for key, expiry in first.items() if key not in drop} | few


def test_a_range_of_a_table() -> None:
    keys = Keys.of(4, dict.fromkeys(parse_all(["9.0.0.0/8", "10.0.0.0/8", "10.0.0.0/9", "10.255.255.255", "11.0.0.0/8"]), 0))
    found = keys.within(b"\x0a\0\0\0", b"\x0a\xff\xff\xff")
    assert [text_of(found[at : at + 5]) for at in range(0, len(found), 5)] == ["10.0.0.0/8", "10.0.0.0/9", "10.255.255.255/32"]
