"""Which labels count."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidArgument
from services.identity.identities.config import IdentitiesConfig
from services.identity.identities.filter import LabelFilter


@pytest.mark.parametrize(
    ("key", "counts"),
    [
        ("app", True),
        ("app.kubernetes.io/name", True),
        ("io.kubernetes.pod.namespace", True),
        ("team.example.org/owner", True),
        ("mykubernetes.io/thing", True),
        ("job-name", False),
        ("job-names", True),
        ("pod-template-hash", False),
        ("controller-revision-hash", False),
        ("controller-uid", False),
        ("statefulset.kubernetes.io/pod-name", False),
        ("apps.kubernetes.io/pod-index", False),
        ("batch.kubernetes.io/job-completion-index", False),
        ("io.kubernetes.pod.name", False),
        ("io.kubernetes.container.name", False),
        ("kubernetes.io/arch", False),
        ("failure-domain.beta.kubernetes.io/zone", False),
        ("annotation.io.kubernetes.pod.terminationGracePeriod", False),
        ("topology.kubernetes.io/zone", False),
    ],
)
def test_by_default_what_differs_between_pods_or_rollouts_does_not_count(key: str, counts: bool) -> None:
    assert IdentitiesConfig().filter().counts(key) is counts


def test_the_longest_pattern_decides() -> None:
    some = LabelFilter(include=("*", "a.b/c", "x*"), exclude=("a.b/*", "x*", "*.z/****"))
    labels = {"a.b/c": "1", "a.b/d": "2", "xy": "3", "free": "4", "a\nb.z/c": "5"}
    assert some.apply(labels) == {"a.b/c": "1", "free": "4"}
    assert LabelFilter(include=("app",), exclude=()).apply({"app": "", "application": ""}) == {"app": ""}
    assert LabelFilter(include=(), exclude=()).apply({"app": ""}) == {}
    assert LabelFilter(include=("a.c",), exclude=()).apply({"abc": "", "a.c": ""}) == {"a.c": ""}


def test_a_filter_is_a_value() -> None:
    one, same = LabelFilter(("a*",), ("ab",)), LabelFilter(("a*",), ("ab",))
    assert one.counts("abc") and one == same and hash(one) == hash(same)
    assert one != LabelFilter(("a*",), ())
    assert repr(one) == "LabelFilter(include=('a*',), exclude=('ab',))"


def test_what_is_refused_is_named() -> None:
    with pytest.raises(InvalidArgument) as caught:
        IdentitiesConfig(exclude=("a", ""))
    assert caught.value.field == "exclude[1]"
    for wrong, field in (({"lease_s": 1}, "lease_s"), ({"lease_s": 60, "quarantine_s": 119}, "quarantine_s")):
        with pytest.raises(InvalidArgument) as caught:
            IdentitiesConfig(**wrong)
        assert caught.value.field == field


@given(st.dictionaries(st.text(min_size=1), st.text()), st.lists(st.text(min_size=1)))
def test_any_pattern_is_taken_by_its_letters(labels: dict[str, str], keys: list[str]) -> None:
    plain = tuple(key for key in keys if "*" not in key)
    kept = LabelFilter(exclude=plain, include=("*",)).apply(labels)
    assert kept == {key: value for key, value in labels.items() if key not in plain}
