"""Who probes whom."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from services.identity.nodes.ring import successors

K = 4
NAMES = st.sets(st.text("abcdefgh0123456789-", min_size=1, max_size=6), min_size=1, max_size=30)


@given(NAMES)
def test_each_is_probed_by_as_many_as_it_probes(names: set[str]) -> None:
    chosen = {name: successors(name, names, K) for name in names}
    expected = min(K, len(names) - 1)
    probed = Counter(other for others in chosen.values() for other in others)
    for name, others in chosen.items():
        assert len(others) == len(set(others)) == expected
        assert name not in others
        assert probed[name] == expected


@given(NAMES, st.text("abcdefgh0123456789-", min_size=1, max_size=6))
def test_one_that_joins_changes_few(names: set[str], newcomer: str) -> None:
    before = {name: successors(name, names - {newcomer}, K) for name in names - {newcomer}}
    after = {name: successors(name, names | {newcomer}, K) for name in names - {newcomer}}
    changed = [name for name in before if before[name] != after[name]]
    assert len(changed) <= K
    for name in changed:
        assert set(after[name]) - set(before[name]) == {newcomer}


def test_the_order_of_names_does_not_matter() -> None:
    names = [f"node-{number}" for number in range(20)]
    assert successors("node-3", names, K) == successors("node-3", reversed(names), K)
    assert successors("stranger", names, K) == successors("stranger", [*names, "stranger"], K)
