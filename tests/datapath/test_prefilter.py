"""The prefilter against a model that knows nothing of tables: the longest prefix of all sets decides."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes as ct
import errno
import os
import random
import shutil
import struct
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import features, loader, progs
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi as pipeline
from services.common.pipeline.abi import IPAddress, PlCounter
from services.common.pipeline.reasons import Reason
from services.lb.prefilter import abi, install, v6
from services.lb.prefilter.keys import Keys, parse, parse_all
from services.lb.prefilter.model import PrefixSet, Sets
from services.lb.prefilter.state import State
from services.lb.prefilter.tables import Tables
from tests import session

DROP, PASS = 1, 2
PROGRAM = "fib_prefilter_t"


def frame(source: str | IPAddress, tags: int = 0) -> bytes:
    """An IP packet without a payload that counts."""
    address = ip_address(source)
    macs = bytes(12) + b"\x81\x00\x00\x05" * tags
    if address.version == 4:
        return macs + b"\x08\x00" + struct.pack(">BBHHHBBH", 0x45, 0, 40, 0, 0, 64, 6, 0) + address.packed + bytes(24)
    return macs + b"\x86\xdd" + struct.pack(">IHBB", 0x60000000, 20, 6, 64) + address.packed + bytes(36)


class Rig:
    """An instance with the maps and the program."""

    def __init__(self, stack: contextlib.ExitStack, tmp: Path) -> None:
        features.ensure_bpffs()
        made = Instance.from_env(f"t-pf-{session.name()}")
        self.instance = made
        self.tmp = tmp
        stack.callback(shutil.rmtree, made.pin_dir, ignore_errors=True)
        asyncio.run(install.install(made))
        spec = loader.ProgramSpec(
            source=Path(__file__).with_name("prefilter_t.c"), service="test", functions={PROGRAM: "xdp"},
            maps={**abi.MAPS, "pl_counters": pipeline.MAPS["pl_counters"]},
        )  # fmt: skip
        asyncio.run(loader.load([spec], made.pin_dir))
        self._fd = stack.enter_context(progs.opened(made.pin_dir / "prog" / "test" / PROGRAM))

    def run(self, source: str | IPAddress, tags: int = 0, repeat: int = 1) -> int:
        return progs.test_run(self._fd, frame(source, tags), repeat).retval

    def raw(self, data: bytes) -> int:
        return progs.test_run(self._fd, data).retval

    def dropped(self, reason: Reason) -> int:
        path = self.instance.pin_dir / pipeline.MAPS["pl_counters"]
        with BpfMap.open(path, ct.c_uint32, PlCounter) as counters:
            key = int(reason) * pipeline.DIR_COUNT + int(pipeline.Direction.FROM_UPLINK)
            return sum(value.packets for value in counters.lookup_percpu(key) or [])


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with contextlib.ExitStack() as stack:
        yield Rig(stack, tmp_path_factory.mktemp("prefilter"))


@pytest.fixture
def tables(rig: Rig) -> Iterator[Tables]:
    made = Tables(rig.instance)
    made.open()
    try:
        yield made
    finally:
        made.rebuild(Sets(()))
        made.limits(False)
        made.close()


@pytest.fixture
def state(rig: Rig, tmp_path: Path) -> Iterator[State]:
    made = open_state(rig, tmp_path)
    try:
        yield made
    finally:
        for name in list(made.own):
            made.delete(name)
        for prefix in list(made.limits):
            made.remove_limit(prefix)
        made.close()


def open_state(rig: Rig, where: Path, sources: int = 1024) -> State:
    """As a process that starts has it."""
    made = State(replace(rig.instance, state_root=where), sources)
    made.use_maps()
    return made


def a_set(ident: int, *prefixes: str, allow: bool = False) -> PrefixSet:
    keys = parse_all(prefixes)
    return PrefixSet(
        f"s{ident}", ident, allow,
        Keys.of(4, {key: 0 for key in keys if len(key) == 5}), Keys.of(6, {key: 0 for key in keys if len(key) == 17}),
    )  # fmt: skip


def entries(*prefixes: str, expiry: int = 0) -> dict[bytes, int]:
    return dict.fromkeys(parse_all(prefixes), expiry)


# -- the model

# Few bits differ, so that prefixes lie within each other.
_FOUR = st.builds(
    lambda high, low: (high << 20 | low) & 0xFFFFFFFF,
    st.sampled_from([0x0A0, 0x0A1, 0x0A2, 0xC00]), st.integers(0, 0xFFFFF) | st.sampled_from([0, 1, 255, 256, 257]),
)  # fmt: skip
_SIX = st.builds(
    lambda high, low: high << 96 | low,
    st.sampled_from([0x20010DB8, 0x20010DB9, 0xFE800000, 0xFD000000]),
    st.sampled_from([0, 1, 1 << 64, 1 << 80, (1 << 96) - 1, 1 << 40]) | st.integers(0, (1 << 96) - 1),
)
_PREFIX = st.one_of(
    st.builds(lambda a, n: str(ip_network((a >> 32 - n << 32 - n, n))), _FOUR, st.integers(0, 32)),
    st.builds(lambda a, n: str(IPv6Network((a >> 128 - n << 128 - n, n))), _SIX, st.integers(0, 128)),
)
_CHANGE = st.tuples(st.integers(1, 4), st.booleans(), st.lists(_PREFIX, min_size=1, max_size=12))


def expected(sets: dict[int, set[str]], address: IPAddress) -> int:
    """Sets 1 and 2 deny, 3 and 4 allow."""
    best = (-1, 0, 0)
    for ident, prefixes in sets.items():
        for prefix in map(ip_network, prefixes):
            if prefix.version == address.version and address in prefix:
                best = max(best, (prefix.prefixlen, int(ident > 2), -ident))
    least = 10 if address.version == 6 and address in IPv6Network("fe80::/10") else 0
    return DROP if best[0] >= least and not best[1] else PASS


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(_CHANGE, min_size=1, max_size=8), st.lists(_FOUR, max_size=10), st.lists(_SIX, max_size=10), st.data())
def test_the_longest_prefix_of_all_sets_decides(
    rig: Rig, changes: list[tuple[int, bool, list[str]]], fours: list[int], sixes: list[int], data: st.DataObject
) -> None:
    tables = Tables(rig.instance)
    tables.open()
    model: dict[int, set[str]] = {ident: set() for ident in range(1, 5)}
    try:
        for ident, remove, prefixes in changes:
            model[ident] = model[ident] - set(prefixes) if remove else model[ident] | set(prefixes)
            sets = Sets([a_set(number, *texts, allow=number > 2) for number, texts in model.items()])
            tables.change(sets, parse_all(prefixes))
            if data.draw(st.integers(0, 5)) == 0:
                # Another process goes on with what is there.
                tables.close()
                tables.open()
        addresses: list[IPAddress] = [*map(IPv4Address, fours), *map(IPv6Address, sixes)]
        for prefix in (ip_network(text) for texts in model.values() for text in texts):
            addresses += [prefix[0], prefix[-1]]
        for address in addresses:
            assert rig.run(address) == expected(model, address), address
        tables.rebuild(sets)
        for address in addresses:
            assert rig.run(address) == expected(model, address), address
    finally:
        tables.rebuild(Sets(()))
        tables.close()


def test_nothing_declared_lets_everything_through(rig: Rig, tables: Tables) -> None:
    tables.rebuild(Sets([a_set(1, "10.0.0.0/8", "fd00::/8")]))
    assert (rig.run("10.1.1.1"), rig.run("fd00::1")) == (DROP, DROP)
    tables.rebuild(Sets(()))
    assert (rig.run("10.1.1.1"), rig.run("fd00::1")) == (PASS, PASS)
    assert tables.flags == 0
    assert tables.memory() == 0


def test_tags_and_what_is_no_ip(rig: Rig, tables: Tables) -> None:
    tables.rebuild(Sets([a_set(1, "10.0.0.0/8", "fd00::/8")]))
    for source in ("10.1.1.1", "fd00::1"):
        assert [rig.run(source, tags) for tags in range(5)] == [DROP] * 5
    whole = frame("10.1.1.1")
    assert [rig.raw(whole[:end]) for end in range(14, 34)] == [PASS] * 20
    assert rig.raw(bytes(12) + b"\x08\x06" + bytes(46)) == PASS


def test_neighbours_are_met_by_link_local_prefixes_only(rig: Rig, tables: Tables) -> None:
    tables.rebuild(Sets([a_set(1, "8000::/1", "fe80::bad/128")]))
    assert [rig.run(source) for source in ("9000::1", "fe80::1", "fe80::bad")] == [DROP, PASS, DROP]


def test_more_lengths_than_bits_are_refused(rig: Rig, tables: Tables) -> None:
    fits = [f"2001:db8::/{length}" for length in range(32, 96)]
    tables.rebuild(Sets([a_set(1, *fits)]))
    assert rig.run("2001:db8::1") == DROP
    with pytest.raises(errors.ResourceExhausted, match="65 different lengths"):
        tables.rebuild(Sets([a_set(1, *fits, "2001:db8::/96")]))
    with pytest.raises(errors.ResourceExhausted, match="65 different lengths"):
        tables.change(Sets([a_set(1, *fits, "2001:db8::/96")]), [parse("2001:db8::/96")])
    assert rig.run("2001:db8::1") == DROP
    assert v6.lengths_of(Sets([a_set(1, *fits)])).bit_count() == 64


def test_a_table_grows_under_many_small_changes(rig: Rig, tables: Tables) -> None:
    """Addresses that fall into few pages and then into many."""
    rnd = random.Random(5)
    texts: list[str] = []
    for _ in range(6):
        new = [str(IPv4Address(rnd.getrandbits(32))) for _ in range(150)]
        new += [str(IPv6Address(0x20010DB8 << 96 | rnd.getrandbits(80))) for _ in range(150)]
        texts += new
        tables.change(Sets([a_set(1, *texts)]), parse_all(new))
        assert all(rig.run(text) == DROP for text in rnd.sample(texts, 100))
    tables.change(Sets([a_set(1, *texts[300:])]), parse_all(texts[:300]))
    assert [rig.run(text) for text in texts[:300:9]] == [PASS] * 34
    assert all(rig.run(text) == DROP for text in texts[300::9])


def test_a_million_prefixes(rig: Rig, tables: Tables) -> None:
    rnd = random.Random(7)
    raw = {rnd.getrandbits(32).to_bytes(4) + b"\x20" for _ in range(1_000_000)}
    each = PrefixSet("drop", 1, False, Keys.of(4, dict.fromkeys(raw, 0)))
    begin = time.process_time()
    tables.rebuild(Sets([each]))
    took = time.process_time() - begin
    assert took < 20, took  # 2 s on an idle machine
    assert tables.memory() < 46 << 20
    for key in rnd.sample(sorted(raw), 1000):
        assert rig.run(IPv4Address(key[:4])) == DROP
    for _ in range(1000):
        number = rnd.getrandbits(32)
        assert rig.run(IPv4Address(number)) == (DROP if number.to_bytes(4) + b"\x20" in raw else PASS)


# -- limits

BOTH = pytest.mark.parametrize(("prefix", "source", "neighbour", "other"), [
    ("0.0.0.0/0", "192.0.2.1", "192.0.2.2", "fd00::1"),
    ("fd00::/8", "fd00::1", "fd00:0:0:1::1", "2001:db8::1"),
])  # fmt: skip


@BOTH
def test_a_source_may_send_a_burst_and_then_its_rate(
    rig: Rig, state: State, prefix: str, source: str, neighbour: str, other: str
) -> None:
    limit = state.set_limit(ip_network(prefix), 50, 5)
    before = rig.dropped(Reason.PREFILTER_RATE)
    # One more may pass every 20 ms, as many as go by while these are sent.
    begin = time.monotonic()
    seen = [rig.run(source) for _ in range(8)]
    early = seen.count(PASS) - 5
    assert seen[:5] == [PASS] * 5 and 0 <= early <= 50 * (time.monotonic() - begin), seen
    assert state.counters.limited(limit, ip_address(source)) or time.monotonic() - begin >= (1 + early) / 50
    assert not state.counters.limited(limit, ip_address(neighbour))
    assert rig.run(neighbour) == PASS
    assert [rig.run(other) for _ in range(20)] == [PASS] * 20
    assert state.counters.count(abi.COUNT_PASSED + limit.ident).packets == 6 + early
    assert state.counters.count(abi.COUNT_DROPPED + limit.ident).packets == 3 - early
    assert rig.dropped(Reason.PREFILTER_RATE) - before == 3 - early
    # Who sends nothing for a tenth of a second, as a test that has no CPU, has saved up a burst and no more.
    last = time.monotonic()
    until, passed, due, saved = last + 0.5, 0, 0, 0.0
    while (now := time.monotonic()) < until:
        saved, last = min(saved + 50 * (now - last), 5), now
        due, saved = (due + 1, saved - 1) if saved >= 1 else (due, saved)
        passed += rig.run(source) == PASS
    assert due - 3 <= passed <= 50 * (time.monotonic() - begin) - early, (passed, due)


def test_an_ipv6_source_is_a_64(rig: Rig, state: State) -> None:
    state.set_limit(ip_network("::/0"), 1, 2)
    sources = ["2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8:0:1::1"]
    assert [rig.run(source) for source in sources] == [PASS, PASS, DROP, PASS]
    # Neighbour discovery goes on.
    assert [rig.run("fe80::1") for _ in range(5)] == [PASS] * 5
    state.set_limit(ip_network("fe80::/64"), 1, 2)
    assert [rig.run("fe80::1") for _ in range(3)] == [PASS, PASS, DROP]


def test_the_longest_limit_holds_and_sets_come_first(rig: Rig, state: State) -> None:
    state.set_limit(ip_network("10.0.0.0/8"), 1, 1)
    state.set_limit(ip_network("10.1.0.0/16"), 1, 3)
    state.add("friends", True, entries("10.1.1.1"), False)
    state.add("foes", False, entries("10.1.1.2"), False)
    assert [rig.run("10.1.0.9") for _ in range(4)] == [PASS] * 3 + [DROP]
    assert [rig.run("10.2.0.9") for _ in range(2)] == [PASS, DROP]
    assert [rig.run("10.1.1.1") for _ in range(9)] == [PASS] * 9
    assert rig.run("10.1.1.2") == DROP
    state.remove_limit(ip_network("10.1.0.0/16"))
    assert [rig.run("10.1.0.8") for _ in range(2)] == [PASS, DROP]
    # A limit that is made wider holds at once, whatever the source did under the one before.
    state.set_limit(ip_network("10.0.0.0/8"), 1_000_000, 1000)
    assert [rig.run("10.1.0.8") for _ in range(9)] == [PASS] * 9


# -- declarations


def test_counters_are_by_set_and_begin_anew_with_it(rig: Rig, state: State) -> None:
    before = rig.dropped(Reason.PREFILTER_DENIED)
    state.set_prefixes("a", False, entries("10.0.0.0/8"), False)
    state.set_prefixes("b", True, entries("10.0.0.1"), False)
    rig.run("10.9.9.9", repeat=7)
    rig.run("10.0.0.1", repeat=5)
    one, two = (state.counters.count(state.own[name].ident) for name in "ab")
    assert (one.packets, one.bytes, two.packets) == (7, 7 * len(frame("10.9.9.9")), 5)
    assert rig.dropped(Reason.PREFILTER_DENIED) - before == 7
    ident = state.own["a"].ident
    state.delete("a")
    assert rig.run("10.9.9.9") == PASS
    state.add("c", False, entries("11.0.0.0/8"), False)
    assert state.own["c"].ident == ident
    assert state.counters.count(ident).packets == 0


def test_what_is_declared_outlives_the_process_and_the_kernels_tables(rig: Rig, tmp_path: Path) -> None:
    state = open_state(rig, tmp_path)
    state.set_prefixes("a", False, entries("10.0.0.0/8", "fd00::/8"), False)
    state.add("a", False, entries("11.0.0.0/8", "12.0.0.1"), False)
    state.remove("a", entries("10.0.0.0/8"))
    state.set_limit(ip_network("13.0.0.0/8"), 1, 1)
    state.protect([ip_address("11.1.1.1")])
    state.close()

    def check() -> None:
        got = [rig.run(source) for source in ("10.0.0.1", "11.0.0.1", "11.1.1.1", "12.0.0.1", "12.0.0.2", "fd00::1")]
        assert got == [PASS, DROP, PASS, DROP, PASS, DROP]

    check()
    # Killed and started again: nothing is written.
    state = open_state(rig, tmp_path)
    assert set(state.own["a"].v4) == set(entries("11.0.0.0/8", "12.0.0.1"))
    check()
    state.close()
    # After a reboot, or killed half-way through a change.
    tables = Tables(rig.instance)
    tables.open()
    tables.rebuild(Sets([a_set(9, "0.0.0.0/0")]))
    tables.stamp = 0
    tables.close()
    state = open_state(rig, tmp_path)
    check()
    assert state.limits[ip_network("13.0.0.0/8")].rate == 1
    state.delete("a")
    state.remove_limit(ip_network("13.0.0.0/8"))
    assert not state.declared
    state.close()


def test_a_change_that_fails_has_changed_nothing(rig: Rig, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    state.set_prefixes("a", False, entries("10.0.0.0/8"), False)
    stamp = state._db.stamp()

    def full() -> int:
        raise errors.ResourceExhausted("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(state._db, "commit", full)
        for call in (
            lambda: state.add("a", False, entries("11.0.0.0/8", "12.0.0.1"), False),
            lambda: state.set_prefixes("a", True, entries("13.0.0.0/8"), False),
            lambda: state.delete("a"),
            lambda: state.set_limit(ip_network("14.0.0.0/8"), 1, 1),
        ):
            with pytest.raises(errors.ResourceExhausted):
                call()
            got = [rig.run(f"{first}.0.0.1") for first in (10, 11, 12, 13, 14, 14, 14)]
            assert got == [DROP, PASS, PASS, PASS, PASS, PASS, PASS]
    assert state._db.stamp() == stamp
    assert len(state.own["a"]) == 1


def test_tables_that_are_wrong_never_count_as_right(rig: Rig, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    state.set_prefixes("a", False, entries("10.0.0.0/8"), False)
    real = state._tables.change
    calls = 0

    def no_memory(*_: object) -> None:
        raise errors.ResourceExhausted("no memory")

    def half(sets: Sets, keys: Collection[bytes]) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            real(sets, keys)
        no_memory()

    # Neither made whole nor taken back.
    with monkeypatch.context() as full:
        full.setattr(state._tables, "change", half)
        with pytest.raises(errors.ResourceExhausted):
            state.set_prefixes("a", False, entries("11.0.0.0/8"), False)
    assert set(state.own["a"].v4) == set(entries("10.0.0.0/8")) and rig.run("11.0.0.1") == DROP

    def no_descriptors(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    # It needs nothing that it could lose by trying.
    with monkeypatch.context() as full:
        full.setattr(BpfMap, "open", no_descriptors)
        state.mend()
    assert state.ready and [rig.run("10.0.0.1"), rig.run("11.0.0.1")] == [DROP, PASS]
    # There was no memory when a process began, and then somebody makes a small change.
    state._tables.rebuild(Sets([a_set(9, "0.0.0.0/0")]))
    state._tables.stamp = 0
    with monkeypatch.context() as full:
        full.setattr(state._tables, "rebuild", no_memory)
        with pytest.raises(errors.ResourceExhausted):
            state.use_maps()
        with pytest.raises(errors.ResourceExhausted):
            state.add("a", False, entries("12.0.0.1"), False)
    state.add("a", False, entries("12.0.0.1"), False)
    assert [rig.run(source) for source in ("10.0.0.1", "11.0.0.1", "12.0.0.1")] == [DROP, PASS, DROP]


def test_entries_expire(rig: Rig, state: State) -> None:
    now = int(time.time())
    state.add("a", False, entries("10.0.0.0/8", expiry=now - 1), False)
    state.add("a", False, {**entries("11.0.0.1", expiry=now + 600), **entries("fd00::1")}, False)
    assert rig.run("10.1.1.1") == DROP
    assert state.expire() == now + 600
    assert [rig.run(source) for source in ("10.1.1.1", "11.0.0.1", "fd00::1")] == [PASS, DROP, DROP]
    # Renewed, then for good.
    state.add("a", False, entries("11.0.0.1", expiry=now + 1200), False)
    assert state.expire() == now + 1200
    state.add("a", False, entries("11.0.0.1"), False)
    assert state.expire() == 0


def test_denying_everybody_needs_force_and_leaves_the_cluster(rig: Rig, state: State) -> None:
    for everything in ("0.0.0.0/0", "::/0"):
        with pytest.raises(errors.FailedPrecondition, match="force"):
            state.add("a", False, entries("10.0.0.0/8", everything), False)
    state.add("b", True, entries("0.0.0.0/0"), False)
    state.delete("b")
    state.protect([ip_address("192.168.7.1"), ip_address("fd00:7::1")])
    state.add("a", False, entries("0.0.0.0/0", "::/0"), True)
    got = [rig.run(source) for source in ("192.168.7.1", "192.168.7.2", "fd00:7::1", "fd00:7::2")]
    assert got == [PASS, DROP, PASS, DROP]
    state.protect([ip_address("192.168.7.3")], keep=True)
    assert [rig.run(source) for source in ("192.168.7.1", "192.168.7.2", "192.168.7.3")] == [PASS, DROP, PASS]
    state.protect([ip_address("192.168.7.2")])
    assert [rig.run(source) for source in ("192.168.7.1", "192.168.7.2")] == [DROP, PASS]
    state.protect([])
