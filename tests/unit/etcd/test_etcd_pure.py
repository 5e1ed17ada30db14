"""What needs no server: addresses, prefixes, and what a watcher is told about any history."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidArgument
from services.common.etcd.client import EtcdClient, KeyValue, Listing, encode, key_value, range_end
from services.common.etcd.endpoint import Address, EtcdTls
from services.common.etcd.watch import Delete, Event, Mirror, Put, Snapshot, Synced


@pytest.mark.parametrize(
    ("url", "target", "secure"),
    [
        ("http://127.0.0.1:2379", "dns:///127.0.0.1:2379", False),
        ("https://etcd.example:2379/", "dns:///etcd.example:2379", True),
        ("https://[fd00::1]:2379", "dns:///[fd00::1]:2379", True),
        ("etcd.example:2379", "dns:///etcd.example:2379", False),
        ("unix:/run/etcd/client:0", "unix:/run/etcd/client:0", False),
        ("unix:///run/etcd/client:0", "unix:/run/etcd/client:0", False),
    ],
)
def test_an_endpoint_is_understood(url: str, target: str, secure: bool) -> None:
    assert Address.parse(url) == Address(url, target, secure)


@pytest.mark.parametrize(
    "url", ["", "http://host", "ftp://host:1", "host:0", "host:65536", "host:port", "http://a:1/b", "fd00::1:2379",
            "unix:relative", "http://:1"],
)  # fmt: skip
def test_a_malformed_endpoint_is_refused(url: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        EtcdClient([url])
    assert caught.value.field == "etcd"


def test_no_endpoint_and_half_a_certificate_are_refused() -> None:
    with pytest.raises(InvalidArgument):
        EtcdClient([])
    with pytest.raises(InvalidArgument) as caught:
        EtcdTls(cert=Path("/x"))
    assert caught.value.field == "key"


@given(st.binary(max_size=4), st.binary(max_size=6))
def test_a_prefix_ends_where_its_keys_end(prefix: bytes, key: bytes) -> None:
    end = range_end(prefix)
    inside = key >= prefix and (end == b"\0" or key < end)
    assert inside == key.startswith(prefix)


@given(st.binary())
def test_a_key_that_is_not_utf8_comes_back_unchanged(raw: bytes) -> None:
    class Message:
        key, value, mod_revision, create_revision, lease = raw, b"", 1, 1, 0

    assert encode(key_value(Message).key) == raw


# What a consumer holds after the events, and nothing but the events.
def replay(events: list[Event], held: dict[str, bytes]) -> None:
    for event in events:
        match event:
            case Snapshot(kvs):
                assert not held
                held.update({kv.key: kv.value for kv in kvs})
            case Put(key, value):
                held[key] = value
            case Delete(key):
                del held[key]
            case Synced():
                pass


# One step of a history: a transaction on some keys (None deletes), and what becomes of the watcher after it.
STEP = st.tuples(
    st.dictionaries(st.sampled_from("abcd"), st.none() | st.binary(max_size=2), min_size=1),
    st.sampled_from(("told", "told", "not told", "cut off", "compacted", "another etcd")),
)


@given(st.lists(STEP))
def test_whatever_happens_a_consumer_of_the_events_holds_what_etcd_holds(
    steps: list[tuple[dict[str, bytes | None], str]],
) -> None:
    mirror = Mirror()
    held: dict[str, bytes] = {}
    store: dict[str, KeyValue] = {}
    history: list[tuple[bool, Put]] = []
    revision, cluster = 1, 7
    replay(mirror.listed(Listing((), revision, cluster)), held)
    for changes, fate in steps:
        if fate == "another etcd":
            cluster, revision, history = cluster + 1, 1, []
            # Same keys, same revisions as may have been known, other values.
            store = {k: KeyValue(k, b"other" + kv.value, kv.mod_revision, 1) for k, kv in store.items()}
            revision = max([kv.mod_revision for kv in store.values()], default=1)
        revision += 1
        for key, value in changes.items():
            if value is not None:
                store[key] = KeyValue(key, value, revision, 1)
                history.append((False, Put(key, value, revision)))
            elif store.pop(key, None) is not None:
                history.append((True, Put(key, b"", revision)))
        if fate == "told":
            replay(mirror.changed(history), held)
        elif fate == "cut off":  # goes on after the last revision seen; a server may repeat itself
            replay(mirror.changed(h for h in history if h[1].mod_revision >= mirror.revision), held)
        elif fate in ("compacted", "another etcd"):
            assert mirror.same_etcd(cluster, revision) == (fate == "compacted")
            history = []
            events = mirror.listed(
                Listing(tuple(sorted(store.values(), key=lambda kv: kv.key)), revision, cluster)
            )
            order = [0 if isinstance(e, Delete) else 1 if isinstance(e, Put) else 2 for e in events]
            assert order == sorted(order) and order[-1] == 2
            revisions = [e.mod_revision for e in events if isinstance(e, Put)]
            assert revisions == sorted(revisions)
            replay(events, held)
        if fate in ("told", "cut off", "compacted", "another etcd"):
            assert held == {key: kv.value for key, kv in store.items()}


def test_a_listing_tells_only_what_differs() -> None:
    mirror = Mirror()
    old = [KeyValue(key, b"1", 5, 5) for key in "abc"]
    mirror.listed(Listing(tuple(old), 5, 7))
    new = (old[0], KeyValue("b", b"2", 9, 5), KeyValue("d", b"1", 8, 8))
    assert mirror.listed(Listing(new, 10, 7)) == [
        Delete("c", 10),
        Put("d", b"1", 8),
        Put("b", b"2", 9),
        Synced(10),
    ]


def test_every_change_of_one_transaction_is_told_and_none_twice() -> None:
    mirror = Mirror()
    mirror.listed(Listing((), 5, 7))
    both = [(False, Put(key, b"1", 6)) for key in "ab"]
    assert mirror.changed(both) == [Put("a", b"1", 6), Put("b", b"1", 6)]
    assert mirror.changed(both) == []
