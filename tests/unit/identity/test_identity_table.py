"""The table of identities against what etcd would say, however late a watch is and however early this node knows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.common.errors import ResourceExhausted
from services.identity.identities.store import Record
from services.identity.identities.table import Change, Table
from services.identity.numbers import cluster_of, number_of

NUMBERS = st.integers(1, 4)
KEYS = st.sampled_from("abc")


class TableMachine(RuleBasedStateMachine):
    """etcd is a log; the watch tells it in order, reads and writes of the node see its end."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table(0, 4)
        self.etcd: dict[int, Record] = {}
        self.log: list[Record | tuple[str, int]] = []
        self.revision = 0
        self.told = 0
        self.follower: dict[int, Record] = {}

    def _of(self, key: str) -> Record | None:
        return next((record for record in self.etcd.values() if record.name == key), None)

    def _told(self, changes: Sequence[Change]) -> None:
        for number, before, now in changes:
            assert self.follower.get(number) == before != now
            if now is None:
                del self.follower[number]
            else:
                self.follower[number] = now

    def _write(self, number: int, key: str, retired: bool) -> Record:
        self.revision += 1
        record = Record(number, key, self.revision, retired, b"")
        self.etcd[number] = record
        self.log.append(record)
        return record

    @rule(number=NUMBERS, key=KEYS, mine=st.booleans())
    def create_or_revive(self, number: int, key: str, mine: bool) -> None:
        there, theirs = self.etcd.get(number), self._of(key)
        if there == theirs and (theirs is None or theirs.retired):
            record = self._write(number, key, False)
            if mine:
                self._told(self.table.learn(record))

    @rule(number=NUMBERS, mine=st.booleans())
    def retire(self, number: int, mine: bool) -> None:
        there = self.etcd.get(number)
        if there is not None and not there.retired:
            record = self._write(number, there.name, True)
            if mine:
                self._told(self.table.learn(record))

    @rule(number=NUMBERS)
    def expire(self, number: int) -> None:
        there = self.etcd.get(number)
        if there is not None and there.retired:
            self.revision += 1
            del self.etcd[number]
            self.log.append((there.name, self.revision))

    @rule(key=KEYS)
    def read(self, key: str) -> None:
        found = self._of(key)
        if found is not None:
            self._told(self.table.learn(found))
        else:
            self._told(self.table.learn_absent(key, self.revision))
        assert self.table.of(key) == found

    @rule(steps=st.integers(1, 4))
    def watch(self, steps: int) -> None:
        for entry in self.log[self.told : self.told + steps]:
            self.told += 1
            if isinstance(entry, Record):
                if not self.table.knows(entry.name, entry.revision):
                    self._told(self.table.put(entry))
            else:
                self._told(self.table.delete(*entry))

    @invariant()
    def what_was_told_last_is_known(self) -> None:
        if self.told == len(self.log):
            known = {number: self.table.get(number) for number in range(1, 5)}
            assert {number: record for number, record in known.items() if record} == self.etcd

    @invariant()
    def who_is_told_of_changes_knows_all(self) -> None:
        known = {number: self.table.get(number) for number in range(1, 5)}
        assert {number: record for number, record in known.items() if record} == self.follower

    @invariant()
    def indexes_agree(self) -> None:
        known = list(self.follower.values())
        for key in "abc":
            assert self.table.of(key) == next((record for record in known if record.name == key), None)
        assert len({record.name for record in known}) == len(known)
        actives = sorted(record for record in known if not record.retired)
        assert list(self.table.actives()) == actives
        assert list(self.table.actives(2)) == [record for record in actives if record.number > 2]
        assert (self.table.used, self.table.taken) == (len(actives), len(known))
        assert self.table.quarantined == len(known) - len(actives)

    @invariant()
    def a_picked_number_is_free(self) -> None:
        free = [number for number in range(1, 5) if self.table.get(number) is None and number != 3]
        try:
            assert self.table.pick({3}) in free
        except ResourceExhausted:
            assert not free


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_numbers_are_the_clusters_and_all_are_given_out() -> None:
    table = Table(4094, 300)
    for revision in range(1, 301):
        number = table.pick()
        assert cluster_of(number) == 4094 and 1 <= number_of(number) <= 300
        assert table.put(Record(number, str(revision), revision, False, b""))
    with pytest.raises(ResourceExhausted, match=r"all 300 identity numbers .*: 300 used, 0 in quarantine"):
        table.pick()


def test_of_another_etcd_everything_is_news() -> None:
    table = Table(0, 10)
    table.put(Record(1, "a", 100, False, b""))
    table.renew()
    now = Record(1, "b", 5, False, b"")
    assert not table.knows("a", 5) and table.put(now)
    assert table.of("a") is None and table.of("b") == now
