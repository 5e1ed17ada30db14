"""The table against a naive model, under news in any order, old ones included."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.identity.ipcache.model import Entry, Source, address_key, network_of, prefix_key
from services.identity.ipcache.table import Table

OWN = "b"
PREFIXES = [ip_network(text) for text in (
    "10.0.0.1/32", "10.0.0.2/32", "10.0.0.0/24", "10.0.0.0/8", "0.0.0.0/0", "fd00::1/128", "fd00::/64", "::/0",
)]  # fmt: skip
ADDRESSES = [ip_address(text) for text in (
    "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.9.9.9", "192.0.2.1", "fd00::1", "fd00::2", "2001:db8::1",
)]  # fmt: skip

prefixes = st.sampled_from(PREFIXES)
nodes = st.sampled_from(["a", OWN, "c"])
sources = st.sampled_from(list(Source))
revisions = st.integers(1, 9)
identities = st.integers(1, 4)


class Naive:
    """Every declaration in one list, searched whole for every question."""

    def __init__(self) -> None:
        self.held: list[Entry] = []

    @staticmethod
    def same(entry: Entry, source: Source, key: bytes, node: str) -> bool:
        by_node = source in (Source.NODE, Source.BLOCK)
        return (entry.source, entry.key) == (source, key) and (not by_node or entry.node == node)

    def known(self, source: Source, key: bytes, node: str) -> Entry | None:
        return next((e for e in self.held if self.same(e, source, key, node)), None)

    def withdraw(self, source: Source, key: bytes, node: str) -> None:
        self.held = [e for e in self.held if not self.same(e, source, key, node)]

    def declare(self, entry: Entry) -> None:
        self.withdraw(entry.source, entry.key, entry.node)
        self.held.append(entry)

    def best(self, key: bytes) -> Entry | None:
        of_key = [e for e in self.held if e.key == key]
        return min(of_key, key=lambda e: (e.source, e.node != OWN, -e.revision, e.node), default=None)

    def all(self) -> dict[bytes, Entry]:
        return {e.key: best for e in self.held if (best := self.best(e.key)) is not None}


class TableMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.table, self.naive = Table(OWN), Naive()
        self.told: dict[bytes, Entry] = {}

    def entry(self, source: Source, prefix: object, node: str, identity: int, revision: int) -> Entry:
        return Entry.of(prefix, identity, node, source, revision)  # type: ignore[arg-type]

    @rule(source=sources, prefix=prefixes, node=nodes, identity=identities, revision=revisions)
    def declare(self, source: Source, prefix: object, node: str, identity: int, revision: int) -> None:
        entry = self.entry(source, prefix, node, identity, revision)
        self.table.declare(entry)
        self.naive.declare(entry)

    @rule(source=sources, prefix=prefixes, node=nodes)
    def withdraw(self, source: Source, prefix: object, node: str) -> None:
        key = prefix_key(prefix)  # type: ignore[arg-type]
        self.table.withdraw(source, key, node)
        self.naive.withdraw(source, key, node)

    @rule(source=sources, prefix=prefixes, node=nodes, identity=identities, revision=revisions)
    def put(self, source: Source, prefix: object, node: str, identity: int, revision: int) -> None:
        entry = self.entry(source, prefix, node, identity, revision)
        known = self.naive.known(source, entry.key, node)
        fresh = known is None or known.revision <= revision
        assert self.table.put(entry) is fresh
        if fresh:
            self.naive.declare(entry)

    @rule(source=sources, prefix=prefixes, node=nodes, revision=revisions)
    def delete(self, source: Source, prefix: object, node: str, revision: int) -> None:
        key = prefix_key(prefix)  # type: ignore[arg-type]
        known = self.naive.known(source, key, node)
        fresh = known is None or known.revision <= revision
        assert self.table.delete(source, key, revision, node) is fresh
        if fresh:
            self.naive.withdraw(source, key, node)

    @rule(source=sources)
    def forget_revisions(self, source: Source) -> None:
        self.table.forget_revisions(source)
        self.naive.held = [e._replace(revision=0) if e.source is source else e for e in self.naive.held]

    @rule()
    def take(self) -> None:
        for change in self.table.take():
            assert change.old == self.told.get(change.key)
            assert change.old != change.new
            if change.new is None:
                del self.told[change.key]
            else:
                self.told[change.key] = change.new
        assert self.told == self.naive.all()

    @invariant()
    def what_counts_is_as_in_the_model(self) -> None:
        wanted = self.naive.all()
        assert {entry.key: entry for entry in self.table.entries()} == wanted
        for address in ADDRESSES:
            holding = [key for key in wanted if address in network_of(key)]
            longest = max(holding, key=lambda key: network_of(key).prefixlen, default=None)
            assert self.table.lookup(address) == (None if longest is None else wanted[longest])


TableMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTable = TableMachine.TestCase

events = st.lists(
    st.tuples(st.sampled_from(PREFIXES[:3]), st.booleans(), identities), min_size=1, max_size=12
)


@given(events, st.data())
def test_late_news_do_not_undo_newer_ones(
    history: list[tuple[object, bool, int]], data: st.DataObject
) -> None:
    """etcd's history of some addresses is told, and pieces of it again, late: nothing changes by that."""
    table = Table(OWN)
    told = []
    for revision, (prefix, present, identity) in enumerate(history, 1):
        key = prefix_key(prefix)  # type: ignore[arg-type]
        entry = Entry(key, identity, "a", Source.POD, revision=revision)
        _tell(table, entry, present)
        told.append((entry, present))
        late, was_there = data.draw(st.sampled_from(told))
        if table.declared(Source.POD, late.key) is not None:  # what is gone is not remembered
            _tell(table, late, was_there)
    last = {entry.key: (entry, present) for entry, present in told}
    assert {e.key: e for e in table.entries()} == {k: e for k, (e, present) in last.items() if present}


def _tell(table: Table, entry: Entry, present: bool) -> None:
    if present:
        table.put(entry)
    else:
        table.delete(Source.POD, entry.key, entry.revision)


def test_an_address_moves_from_node_to_node_whatever_is_told_first() -> None:
    key = address_key(ip_address("192.0.2.7"))
    old = Entry(key, 6, "a", Source.NODE, revision=5)
    new = Entry(key, 6, "c", Source.NODE, revision=8)
    for order in ("take first", "leave first"):
        table = Table(OWN)
        table.set_node("a", [old])
        if order == "take first":
            table.set_node("c", [new])
            assert table.get(key) == new
            table.set_node("a", [])
        else:
            table.set_node("a", [])
            assert table.get(key) is None
            table.set_node("c", [new])
        assert table.get(key) == new


def test_a_node_says_nothing_more_than_what_it_said_last() -> None:
    table = Table(OWN)
    entries = [Entry.of(prefix, 6, "a", Source.NODE, 3) for prefix in PREFIXES[:3]]
    table.set_node("a", entries)
    table.take()
    table.set_node("a", [entries[0], entries[1]._replace(identity=7)])
    assert {(c.key, c.new and c.new.identity) for c in table.take()} == {
        (entries[1].key, 7), (entries[2].key, None)}  # fmt: skip
    table.set_node("a", [entries[0], entries[1]._replace(identity=7)])
    assert table.take() == []


def test_what_changes_to_and_fro_is_no_change() -> None:
    table = Table(OWN)
    entry = Entry.of(PREFIXES[0], 1, "a", Source.POD, 1)
    table.declare(entry)
    table.withdraw(Source.POD, entry.key)
    assert table.take() == []


def test_a_change_costs_the_same_in_a_large_table() -> None:
    table = Table(OWN)
    for number in range(10_000):
        table.declare(Entry(number.to_bytes(16), 1, "a", Source.POD, revision=1))
    table.take()
    table.put(Entry((77).to_bytes(16), 2, "a", Source.POD, revision=2))
    assert len(table.take()) == 1
