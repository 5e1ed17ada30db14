"""What an identity is, and how label sets are written down. Pure."""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Final

from services.common.errors import InvalidArgument
from services.identity.numbers import LOCAL_CLUSTER, Reserved, cluster_of

LABELS_MAX, LABEL_LENGTH_MAX, HOLDER_LENGTH_MAX = 64, 253, 253
LOCAL_KEYS: Final = ("cidr:", "fqdn:")
"""How keys of labels begin that mean something on this node only."""
_RESERVED_KEY: Final = "reserved:"
_quoted = json.encoder.encode_basestring


class Scope(enum.IntEnum):
    """As in fibril.identity.v1.IdentityScope."""

    RESERVED = 1
    CLUSTER = 2
    LOCAL = 3


class Identity:
    """A number and what it stands for; equal if both are."""

    __slots__ = ("_key", "number")

    def __init__(self, number: int, key: str | Callable[[], str]) -> None:
        """key: the labels in canonical form, or what gives them when they are asked for: there may be very many identities,
        and few of them are ever looked into.
        """
        self.number = number
        self._key = key

    @property
    def key(self) -> str:
        """The labels in canonical form."""
        if not isinstance(self._key, str):
            self._key = self._key()
        return self._key

    @property
    def labels(self) -> Mapping[str, str]:
        """The labels that count."""
        return labels_of(self.key)

    @property
    def scope(self) -> Scope:
        """Where it is known."""
        cluster = cluster_of(self.number)
        return {0: Scope.RESERVED, LOCAL_CLUSTER: Scope.LOCAL}.get(cluster, Scope.CLUSTER)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and (self.number, self.key) == (other.number, other.key)

    def __hash__(self) -> int:
        return hash(self.number)

    def __repr__(self) -> str:
        return f"Identity({self.number}, {self.key!r})"


def canonical(labels: Mapping[str, str]) -> str:
    """A label set as JSON: equal sets give equal text, different sets different text. It is what is hashed for etcd, and so
    must never change.
    """
    return "{" + ",".join([_quoted(key) + ":" + _quoted(labels[key]) for key in sorted(labels)]) + "}"


def labels_of(key: str) -> dict[str, str]:
    """The label set of its canonical form."""
    found: dict[str, str] = json.loads(key)
    return found


def digest(key: str) -> str:
    """The name of a label set in etcd."""
    return hashlib.sha256(key.encode()).hexdigest()


def scope_of(labels: Mapping[str, str]) -> Scope:
    """Where an identity with these labels is known. InvalidArgument for labels that cannot be together: keys of reserved
    identities stand alone, those of this node only ("cidr:…") among themselves.
    """
    local = sum(key.startswith(LOCAL_KEYS) for key in labels)
    reserved = sum(key.startswith(_RESERVED_KEY) for key in labels)
    if not local and not reserved:
        return Scope.CLUSTER
    if local == len(labels):
        return Scope.LOCAL
    if len(labels) == 1 and canonical(labels) in RESERVED:
        return Scope.RESERVED
    if reserved:
        raise InvalidArgument(
            "labels with keys reserved:… are not those of a reserved identity",
            field="labels",
            fix="give one label with an empty value, " + ", ".join(each.label for each in Reserved),
        )
    raise InvalidArgument(
        "labels with keys cidr:… or fqdn:…, known on this node only, are mixed with others",
        field="labels",
        fix="ask for two identities",
    )


def check_labels(labels: Mapping[str, str]) -> None:
    """InvalidArgument for what no identity may have as labels."""
    if len(labels) > LABELS_MAX:
        raise InvalidArgument(
            f"{len(labels)} labels are given, at most {LABELS_MAX} are possible", field="labels"
        )
    for key, value in labels.items():
        if not 0 < len(key) <= LABEL_LENGTH_MAX:
            raise InvalidArgument(
                f"label key {key[:60]!r} has {len(key)} characters",
                field="labels",
                fix=f"use 1 to {LABEL_LENGTH_MAX}",
            )
        if len(value) > LABEL_LENGTH_MAX:
            raise InvalidArgument(
                f"the value of label {key[:60]!r} has {len(value)} characters",
                field=f"labels[{key}]",
                fix=f"use at most {LABEL_LENGTH_MAX}",
            )


def check_holder(holder: str) -> None:
    """InvalidArgument for what no holder may be called."""
    if not 0 < len(holder) <= HOLDER_LENGTH_MAX:
        raise InvalidArgument(
            f"the holder's name has {len(holder)} characters",
            field="holder",
            fix=f"use 1 to {HOLDER_LENGTH_MAX}",
        )


RESERVED: Final = {(key := canonical({each.label: ""})): Identity(each, key) for each in Reserved}
"""The reserved identities, by key."""
INIT: Final = RESERVED[canonical({Reserved.INIT.label: ""})]
"""Of whoever has no label that counts."""
