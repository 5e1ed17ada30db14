"""By what numbers the kernel names rules: hashes of policy, place and what the rule says.

So a number never means anything else than it did: a rule that is changed is another, with another number, and what the kernel
has recorded, maybe for an earlier process, is not taken for what a rule says now. A number is given up when no policy has had
it for a while (`sweep`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from services.policy.abi import RULE_FIRST
from services.policy.model import PolicyKey, Rule, Tier

_MASK: Final = 0x7FFFFFFF
ONLY_TRIED: Final = _MASK + 1
"""From here on: rules that are tried out, and never in the kernel."""


@dataclass(frozen=True, eq=False)
class RuleRef:
    """A rule and where it is from. number: what the kernel calls it. One object a rule as long as it does not change."""

    key: PolicyKey
    index: int
    rule: Rule
    number: int

    @property
    def order(self) -> tuple[int, int, PolicyKey, int]:
        """By which rules are asked; in NORMAL priority does not count."""
        priority = 0 if self.rule.tier is Tier.NORMAL else self.rule.priority
        return self.rule.tier, priority, self.key, self.index


@dataclass(frozen=True)
class Numbered:
    """What is known of a rule by its number, also for a while after it has gone. title: what people call it."""

    key: PolicyKey
    index: int
    title: str
    digest: bytes

    @property
    def place(self) -> tuple[PolicyKey, int]:
        return self.key, self.index


class RuleNumbers:
    """Used from one event loop."""

    def __init__(self) -> None:
        self._rules: dict[int, Numbered] = {}
        self._idle: set[int] = set()
        """Which nobody used when that was looked for last."""

    def __len__(self) -> int:
        return len(self._rules)

    def ref(self, key: PolicyKey, index: int, rule: Rule) -> RuleRef:
        """A policy's rule, with its number."""
        text = f"{int(key.kind)}/{key.namespace}/{key.name}/{index}/{rule!r}"
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        number = int.from_bytes(digest[:4], "little") & _MASK
        while number < RULE_FIRST or ((there := self._rules.get(number)) is not None and there.digest != digest):
            number = number + 1 & _MASK
        self._rules.setdefault(number, Numbered(key, index, rule.title(index), digest))
        self._idle.discard(number)
        return RuleRef(key, index, rule, number)

    def rule(self, number: int) -> Numbered | None:
        """The rule with that number."""
        return self._rules.get(number)

    def sweep(self, used: Iterable[int]) -> None:
        """Give up those that nobody uses, and nobody did the last time: what the kernel says of them is read a moment later."""
        idle = self._rules.keys() - set(used)
        for number in idle & self._idle:
            del self._rules[number]
        self._idle = idle - self._idle
