"""Label sets as text, and what labels may be."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidArgument
from services.identity import numbers
from services.identity.identities import model
from services.identity.identities.model import Identity, Scope, canonical, labels_of, scope_of

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
LABELS = st.dictionaries(TEXT, TEXT, max_size=6)


@given(LABELS, LABELS)
def test_sets_are_equal_if_and_only_if_their_text_is(one: dict[str, str], other: dict[str, str]) -> None:
    assert (canonical(one) == canonical(other)) == (one == other)
    shuffled = list(one.items())
    random.shuffle(shuffled)
    assert canonical(dict(shuffled)) == canonical(one)
    assert labels_of(canonical(one)) == one
    assert canonical(one) == json.dumps(one, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def test_the_text_and_what_it_is_called_in_etcd_never_change() -> None:
    key = canonical({"b": 'q"\\\n', "a": "ü"})
    assert key == '{"a":"ü","b":"q\\"\\\\\\n"}'
    assert model.digest(key) == "25739ce7c448858bfbf7e7387847443a46f9c81513d941768c0798e7a04fd114"


def test_scopes() -> None:
    assert scope_of({"app": "web"}) is Scope.CLUSTER is scope_of({})
    assert scope_of({"cidr:::/0": "", "fqdn:example.org": ""}) is Scope.LOCAL
    for each in numbers.Reserved:
        assert scope_of({each.label: ""}) is Scope.RESERVED
        assert model.RESERVED[canonical({each.label: ""})].number == each
    assert Identity(5, '{"reserved:init":""}') == model.INIT
    for number, scope in (
        (1, Scope.RESERVED),
        (numbers.make(9, 1), Scope.CLUSTER),
        (0xFFF00001, Scope.LOCAL),
    ):
        assert Identity(number, "{}").scope is scope


@pytest.mark.parametrize(
    "labels",
    [
        {"reserved:host": "x"},
        {"reserved:": ""},
        {"reserved:host": "", "reserved:world": ""},
        {"reserved:host": "", "cidr:10.0.0.0/8": ""},
        {"cidr:10.0.0.0/8": "", "app": "web"},
    ],
)
def test_labels_that_cannot_be_together(labels: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        scope_of(labels)
    assert caught.value.field == "labels" and caught.value.fix


def test_limits_are_named() -> None:
    model.check_labels({"k" * 253: "v" * 253, "e": ""} | {str(n): "" for n in range(62)})
    for labels, field in (
        ({str(n): "" for n in range(65)}, "labels"),
        ({"": ""}, "labels"),
        ({"k" * 254: ""}, "labels"),
        ({"app": "v" * 254}, "labels[app]"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            model.check_labels(labels)
        assert caught.value.field == field
    model.check_holder("h" * 253)
    for holder in ("", "h" * 254):
        with pytest.raises(InvalidArgument) as caught:
            model.check_holder(holder)
        assert caught.value.field == "holder"
