"""What a list of rules says on each protocol and port: from overlapping rules with precedence to ranges in order, each with one
verdict. One sweep over the rules' beginnings and ends.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from services.policy.abi import RULE_NONE, Verdict
from services.policy.model import PORT_MAX, SCTP, TCP, UDP, Action, Port, Tier

SPAN: Final = PORT_MAX + 1
END: Final = 256 * SPAN
"""Protocol and port as one number, below this."""
EVERYTHING: Final = ((0, END),)
_ANY: Final = (TCP, UDP, SCTP)
Spans = tuple[tuple[int, int], ...]
"""Half-open stretches of protocol * SPAN + port."""


@dataclass(frozen=True)
class Asked:
    """A rule that selects the endpoint, for one direction, as far as ports are concerned.

    order: its place among all rules of the policy, in the order they are asked. number: the rule's, for the kernel.
    """

    order: int
    number: int
    tier: Tier
    action: Action
    spans: Spans
    reject: bool = False
    keep: bool = False


@dataclass(frozen=True)
class Default:
    """What holds in NORMAL where no rule matches; deny False: left to BASELINE."""

    deny: bool = False
    reject: bool = False
    keep: bool = False


@dataclass(frozen=True)
class Range:
    """From here to the next one's beginning. number: of the rule that decides."""

    start: int
    verdict: int
    number: int

    @property
    def protocol(self) -> int:
        return self.start // SPAN

    @property
    def port(self) -> int:
        return self.start % SPAN

    @property
    def allowed(self) -> bool:
        return self.verdict & 0x0F == Verdict.ALLOW


def spans_of(ports: Iterable[Port] | None) -> Spans:
    """Stretches that ports cover; those with names must have been resolved."""
    if ports is None:
        return EVERYTHING
    found = []
    for port in ports:
        for protocol in (port.protocol,) if port.protocol else _ANY:
            found.append((protocol * SPAN + port.first, protocol * SPAN + port.last + 1))
    return tuple(found)


_ACTIONS: Final = {Action.ALLOW: Verdict.ALLOW, Action.DENY: Verdict.DENY}


class _First:
    """Of the rules that hold at a place, the one that is asked first."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int]] = []

    def push(self, order: int, end: int) -> None:
        heapq.heappush(self._heap, (order, end))

    def at(self, place: int) -> int:
        """Order of the rule; -1: none."""
        heap = self._heap
        while heap and heap[0][1] <= place:
            heapq.heappop(heap)
        return heap[0][0] if heap else -1


def flatten(rules: Sequence[Asked], default: Default) -> tuple[Range, ...]:
    """Ranges from protocol 0, port 0 to the end; two neighbours differ."""
    by_order = {rule.order: rule for rule in rules}
    starts: list[tuple[int, int, Asked]] = []
    edges = {0}
    for rule in rules:
        for start, end in rule.spans:
            starts.append((start, end, rule))
            edges.add(start)
            if end < END:
                edges.add(end)
    starts.sort(key=lambda each: each[0])
    admin, deny, allow, baseline = (_First() for _ in range(4))
    found: list[Range] = []
    at = 0
    for place in sorted(edges):
        while at < len(starts) and starts[at][0] <= place:
            _, end, rule = starts[at]
            at += 1
            if rule.tier is Tier.ADMIN:
                admin.push(rule.order, end)
            elif rule.tier is Tier.BASELINE:
                baseline.push(rule.order, end)
            elif rule.action is Action.DENY:
                deny.push(rule.order, end)
            else:
                allow.push(rule.order, end)
        verdict, number = _decide(place, by_order, admin, deny, allow, baseline, default)
        if not found or (found[-1].verdict, found[-1].number) != (verdict, number):
            found.append(Range(place, verdict, number))
    return tuple(found)


def _decide(
    place: int,
    rules: dict[int, Asked],
    admin: _First,
    deny: _First,
    allow: _First,
    baseline: _First,
    default: Default,
) -> tuple[int, int]:
    order = admin.at(place)
    if order >= 0 and rules[order].action is not Action.PASS:
        return _of(rules[order])
    for normal in (deny, allow):
        order = normal.at(place)
        if order >= 0:
            return _of(rules[order])
    if default.deny:
        return _flags(Verdict.DEFAULT, default.reject, default.keep), RULE_NONE
    order = baseline.at(place)
    if order >= 0 and rules[order].action is not Action.PASS:
        return _of(rules[order])
    return int(Verdict.ALLOW), RULE_NONE


def _of(rule: Asked) -> tuple[int, int]:
    verdict = _ACTIONS[rule.action]
    if verdict is Verdict.ALLOW:
        return int(verdict), rule.number
    return _flags(verdict, rule.reject, rule.keep), rule.number


def _flags(verdict: Verdict, reject: bool, keep: bool) -> int:
    return int(verdict) | (Verdict.REJECT if reject else 0) | (Verdict.KEEP if keep else 0)


def find(ranges: Sequence[Range], protocol: int, port: int) -> Range:
    """The range that holds a protocol and port."""
    wanted, low, high = protocol * SPAN + port, 0, len(ranges)
    while high - low > 1:
        middle = (low + high) // 2
        if ranges[middle].start <= wanted:
            low = middle
        else:
            high = middle
    return ranges[low]
