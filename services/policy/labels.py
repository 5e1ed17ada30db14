"""Labels as selectors see them: those of an identity or an endpoint, and what they imply."""

from __future__ import annotations

from collections.abc import Mapping

from services.policy.model import DEFAULT_NAMESPACE, NAMESPACE, NAMESPACE_NAME, RESERVED


def effective(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels, with the namespace where they name none; reserved ones as they are."""
    found = dict(labels)
    if not is_reserved(labels):
        found[NAMESPACE_NAME] = found.setdefault(NAMESPACE, DEFAULT_NAMESPACE)
    return found


def is_reserved(labels: Mapping[str, str]) -> bool:
    """Whether they stand for a reserved identity: host, world, …"""
    return len(labels) == 1 and next(iter(labels)).startswith(RESERVED)
