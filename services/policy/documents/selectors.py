"""Label selectors of documents: of Kubernetes' kind, which Cilium has taken over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fibril.policy.v1 import policy_pb2 as pb
from services.common.errors import InvalidArgument
from services.policy import convert
from services.policy.documents.fields import Fields
from services.policy.model import HOSTNAME, NAMESPACE, RESERVED

NAMESPACE_LABELS: Final = "io.cilium.k8s.namespace.labels."
_OPERATORS: Final = {
    "In": pb.LABEL_OPERATOR_IN,
    "NotIn": pb.LABEL_OPERATOR_NOT_IN,
    "Exists": pb.LABEL_OPERATOR_EXISTS,
    "DoesNotExist": pb.LABEL_OPERATOR_DOES_NOT_EXIST,
}
_SOURCES: Final = ("k8s:", "any:", "container:")


def bare(key: str) -> str:
    """A label's key without its source."""
    for source in _SOURCES:
        key = key.removeprefix(source)
    return key


def selector(
    fields: Fields, key_of: Callable[[str], str] = bare, into: pb.LabelSelector | None = None
) -> pb.LabelSelector:
    """A selector; its conditions are added to those of `into`."""
    found = into if into is not None else pb.LabelSelector()
    labels = fields.child("matchLabels")
    for key, value in labels.pairs() if labels is not None else ():
        assert labels is not None
        _equals(found, _usable(labels, key, key_of(key)), value)
    for each in fields.children("matchExpressions"):
        operator = each.take("operator", str, "")
        if operator not in _OPERATORS:
            raise each.refuse("operator", f"is {operator!r}", f"one of: {', '.join(_OPERATORS)}")
        key = each.take("key", str, "")
        if not key:
            raise each.refuse("key", "is missing")
        values = each.texts("values")
        if (operator in ("In", "NotIn")) != bool(values):
            raise each.refuse("values", f"do not fit operator {operator}")
        found.match_expressions.add(key=_usable(each, "key", key_of(key)), operator=_OPERATORS[operator], values=values)
        each.done()
    fields.done()
    return found


def _usable(fields: Fields, name: str, key: str) -> str:
    try:
        return convert.label_key(key, name)
    except InvalidArgument as error:
        raise fields.refuse(name[:60], f"is not usable: {error.message}", error.fix) from None


def _equals(found: pb.LabelSelector, key: str, value: str) -> None:
    if key in found.match_labels and found.match_labels[key] != value:
        found.match_expressions.add(key=key, operator=pb.LABEL_OPERATOR_IN, values=[value])
    else:
        found.match_labels[key] = value


def namespace_key(key: str) -> str:
    """A namespace's label, as its endpoints have it."""
    return NAMESPACE_LABELS + bare(key)


def within(found: pb.LabelSelector, namespace: str) -> pb.LabelSelector:
    """Only of a namespace, unless the selector speaks of namespaces itself, or of those who have none."""
    if not names_namespace(found):
        found.match_labels[NAMESPACE] = namespace
    return found


def everywhere(found: pb.LabelSelector) -> pb.LabelSelector:
    """Of all namespaces: whoever is in one, unless the selector speaks of that itself."""
    if not names_namespace(found):
        found.match_expressions.add(key=NAMESPACE, operator=pb.LABEL_OPERATOR_EXISTS)
    return found


def selects_namespace(found: pb.LabelSelector, namespace: str) -> bool:
    """Whether endpoints of a namespace are among those selected, by what is said of namespaces' names."""
    conditions = convert.selector(found, "").expressions
    return all(each.matches({NAMESPACE: namespace}) for each in conditions if each.key == NAMESPACE)


def selects_init(found: pb.LabelSelector) -> bool:
    """Whether it names endpoints that have no labels yet."""
    key = f"{RESERVED}init"
    return key in found.match_labels or any(each.key == key for each in found.match_expressions)


def nodes_selector(fields: Fields) -> pb.LabelSelector:
    """A selector of nodes: of their labels the name alone is known. A condition on another would select nobody, silently."""
    found = selector(fields)
    for key in (*found.match_labels, *(each.key for each in found.match_expressions)):
        if key != HOSTNAME:
            raise fields.refuse("", f"asks for label {key[:60]!r} of nodes, which is not known here", f"use {HOSTNAME}")
    return found


def names_namespace(found: pb.LabelSelector) -> bool:
    """Whether it says anything about namespaces, or names a reserved identity."""
    keys = [*found.match_labels, *(each.key for each in found.match_expressions)]
    return any(key == NAMESPACE or key.startswith((NAMESPACE_LABELS, RESERVED)) for key in keys)
