"""By what numbers the kernel names rules: the same after a restart, so that what it has recorded keeps its meaning."""

from __future__ import annotations

import hashlib

from services.policy.abi import RULE_FIRST
from services.policy.model import PolicyKey

_MASK = 0x7FFFFFFF


class RuleNumbers:
    """Used from one event loop. A rule keeps its number for the life of the process."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[PolicyKey, int], int] = {}
        self._rules: dict[int, tuple[PolicyKey, int]] = {}

    def number(self, key: PolicyKey, index: int) -> int:
        """Of a policy's rule."""
        found = self._numbers.get((key, index))
        if found is None:
            text = f"{int(key.kind)}/{key.namespace}/{key.name}/{index}"
            found = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") & _MASK
            while found < RULE_FIRST or found in self._rules:
                found = found + 1 & _MASK
            self._numbers[key, index] = found
            self._rules[found] = key, index
        return found

    def rule(self, number: int) -> tuple[PolicyKey, int] | None:
        """Policy and index of the rule with that number."""
        return self._rules.get(number)
