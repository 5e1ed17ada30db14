"""Which identities each selector selects: kept as identities and selectors come and go, each at the cost of what it concerns.

A selector that demands one of some values of a label is found by these; the few others are tried on every identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from services.identity.numbers import LOCAL_CLUSTER, Reserved, cluster_of
from services.policy.labels import effective, is_reserved
from services.policy.model import EndpointPeer, Entity, EntityPeer, Operator, Selector

Term = EndpointPeer | EntityPeer
"""What matches peers by identity."""

_ENTITIES: Final = {
    Entity.HOST: Reserved.HOST,
    Entity.REMOTE_NODE: Reserved.REMOTE_NODE,
    Entity.INIT: Reserved.INIT,
    Entity.HEALTH: Reserved.HEALTH,
    Entity.KUBE_APISERVER: Reserved.KUBE_APISERVER,
    Entity.UNMANAGED: Reserved.UNMANAGED,
}
# Reserved identities that stand for endpoints: an empty selector selects them, too.
_ENDPOINTS: Final = (Reserved.INIT, Reserved.HEALTH, Reserved.UNMANAGED)


def is_world(number: int) -> bool:
    """Whether an identity is of nobody in the cluster."""
    return number == Reserved.WORLD or cluster_of(number) == LOCAL_CLUSTER


def entity_matches(entity: Entity, number: int) -> bool:
    """Whether an identity belongs to a group."""
    match entity:
        case Entity.ALL:
            return True
        case Entity.NONE:
            return False
        case Entity.WORLD:
            return is_world(number)
        case Entity.CLUSTER:
            return not is_world(number)
        case _:
            return number == _ENTITIES[entity]


def selects(selector: Selector, number: int, labels: Mapping[str, str]) -> bool:
    """Whether a selector of endpoints selects an identity; `labels` are its effective ones."""
    if not is_reserved(labels):
        return not is_world(number) and selector.matches(labels)
    named = any(
        each.key in labels and each.operator in (Operator.IN, Operator.EXISTS) for each in selector.expressions
    )
    if named or number in _ENDPOINTS:
        return selector.matches(labels)
    return False


def matches(term: Term, number: int, labels: Mapping[str, str]) -> bool:
    """Whether a term matches an identity with these effective labels."""
    if isinstance(term, EntityPeer):
        return entity_matches(term.entity, number)
    return selects(term.selector, number, labels)


@dataclass
class _Known:
    """A term in use, and whom it matches."""

    numbers: set[int] = field(default_factory=set)
    users: int = 0


class Selectors:
    """Used from one event loop."""

    def __init__(self) -> None:
        self.labels: dict[int, Mapping[str, str]] = {}
        """Effective labels of all identities known."""
        self._terms: dict[Term, _Known] = {}
        self._by_label: dict[tuple[str, str], set[Term]] = {}
        self._others: set[Term] = set()
        # Identities by label, for new terms.
        self._with: dict[tuple[str, str], set[int]] = {}
        self.tried = 0
        """Terms tried on identities: what tests count."""

    def __len__(self) -> int:
        return len(self._terms)

    # ---- terms ----------------------------------------------------------------------------------------------
    def hold(self, terms: Iterable[Term]) -> None:
        """Keep these up to date; once more for each user."""
        for term in terms:
            known = self._terms.get(term)
            if known is None:
                known = self._terms[term] = _Known()
                for label in demands(term):
                    self._by_label.setdefault(label, set()).add(term)
                if not demands(term):
                    self._others.add(term)
                known.numbers.update(self._find(term))
            known.users += 1

    def drop(self, terms: Iterable[Term]) -> None:
        """The opposite of hold."""
        for term in terms:
            known = self._terms[term]
            known.users -= 1
            if not known.users:
                del self._terms[term]
                self._others.discard(term)
                for label in demands(term):
                    there = self._by_label[label]
                    there.discard(term)
                    if not there:
                        del self._by_label[label]

    def numbers(self, term: Term) -> set[int]:
        """Identities that a term that is held matches; not to be changed."""
        return self._terms[term].numbers

    def tries(self, terms: Iterable[Term]) -> int:
        """How often terms that are not kept up to date yet would have to be tried on identities, at most."""
        return sum(len(self.labels) for term in terms if term not in self._terms and not demands(term))

    def _find(self, term: Term) -> set[int]:
        wanted = demands(term)
        found = set()
        for candidates in [self._with.get(each, ()) for each in wanted] if wanted else [self.labels]:
            for number in candidates:
                self.tried += 1
                if matches(term, number, self.labels[number]):
                    found.add(number)
        return found

    # ---- identities -----------------------------------------------------------------------------------------
    def add(self, number: int, labels: Mapping[str, str]) -> list[Term]:
        """An identity; which terms match it. One that is known must have the same labels."""
        own = effective(labels)
        self.labels[number] = own
        for label in own.items():
            self._with.setdefault(label, set()).add(number)
        found = []
        for term in self._candidates(own):
            self.tried += 1
            if matches(term, number, own):
                self._terms[term].numbers.add(number)
                found.append(term)
        return found

    def remove(self, number: int) -> list[Term]:
        """The opposite of add; which terms matched it."""
        own = self.labels.pop(number, None)
        if own is None:
            return []
        for label in own.items():
            there = self._with[label]
            there.discard(number)
            if not there:
                del self._with[label]
        found = []
        for term in self._candidates(own):
            numbers = self._terms[term].numbers
            if number in numbers:
                numbers.discard(number)
                found.append(term)
        return found

    def matching(self, number: int) -> list[Term]:
        """Terms that match a known identity."""
        own = self.labels.get(number)
        if own is None:
            return []
        return [term for term in self._candidates(own) if number in self._terms[term].numbers]

    def _candidates(self, labels: Mapping[str, str]) -> list[Term]:
        found = list(self._others)
        for label in labels.items():
            found.extend(self._by_label.get(label, ()))
        return found


def demands(term: Term) -> list[tuple[str, str]]:
    """Labels without one of which the term matches nobody; none: there are no such."""
    found: list[tuple[str, str]] = []
    if isinstance(term, EndpointPeer):
        for each in term.selector.expressions:
            if each.operator is Operator.IN and (not found or len(each.values) < len(found)):
                found = [(each.key, value) for value in each.values]
    return found
