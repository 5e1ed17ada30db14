"""Numbers of nodes: persistent, never two nodes' at once, not given on at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common import errors
from services.common.pipeline.abi import ND_MAX
from services.identity.db import open_db
from services.identity.nodes.index import REST_S, NodeIndex


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_number_means_the_same_node_after_a_restart(tmp_path: Path) -> None:
    db = open_db(tmp_path / "identity.db")
    first = NodeIndex(db)
    assert [first.of(name) for name in ("b", "a", "b")] == [1, 2, 1]
    first.forget("b")
    again = NodeIndex(db)
    assert (again.of("a"), again.names(), again.name_of(2), again.name_of(1)) == (2, {"a"}, "a", "")
    db.close()


def test_a_forgotten_number_rests(tmp_path: Path) -> None:
    db, clock = open_db(tmp_path / "identity.db"), Clock()
    index = NodeIndex(db, clock)
    index.of("a")
    index.forget("a")
    index.forget("never seen")
    assert index.of("b") == 2
    clock.now = REST_S
    assert index.of("c") == 1
    db.close()


def test_when_all_are_taken_the_error_says_so(tmp_path: Path) -> None:
    db = open_db(tmp_path / "identity.db")
    with db:
        db.executemany("INSERT INTO node_indexes VALUES (?, ?)", [(f"n{i}", i) for i in range(1, ND_MAX)])
    index = NodeIndex(db)
    with pytest.raises(errors.ResourceExhausted, match=str(ND_MAX - 1)):
        index.of("one more")
    assert index.of("n7") == 7
    db.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["of", "forget", "restart", "wait"]), st.sampled_from("abcde")), max_size=40))
def test_no_two_nodes_share_a_number(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str]]) -> None:
    db, clock = open_db(tmp_path_factory.mktemp("index") / "identity.db"), Clock()
    index, model = NodeIndex(db, clock), dict[str, int]()
    for step, name in steps:
        if step == "of":
            number = index.of(name)
            assert model.setdefault(name, number) == number
            assert 0 < number < ND_MAX
        elif step == "forget":
            index.forget(name)
            model.pop(name, None)
        elif step == "restart":
            index = NodeIndex(db, clock)
        else:
            clock.now += REST_S
        assert len(set(model.values())) == len(model)
        assert all(index.name_of(number) == owner for owner, number in model.items())
    db.close()
