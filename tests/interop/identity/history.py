"""What a recorded history must show. Pure.

A holder *holds* labels and number from the answer that gave them to it until it is next called for, moved, or found otherwise
when its node's process starts again. A call without an answer may or may not have had its effect.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple


class Holding(NamedTuple):
    """That somebody certainly held something, from and until when."""

    begin: float
    end: float
    node: str
    holder: str
    labels: str
    number: int


def holdings(events: Iterable[Mapping[str, Any]], absence_s: float) -> list[Holding]:
    """From the log of all nodes. A node silent for longer than `absence_s` held what it had until then; it may have lost it."""
    found: list[Holding] = []
    held: dict[tuple[str, str], tuple[float, str, int]] = {}
    calls: dict[str, Mapping[str, Any]] = {}
    seen: dict[str, float] = {}

    def end(node: str, holder: str, at: float) -> None:
        begun = held.pop((node, holder), None)
        if begun is not None:
            found.append(Holding(begun[0], at, node, holder, *begun[1:]))

    before: dict[str, tuple[str, int]] = {}  # what a failed call leaves as it was
    last = 0.0
    for event in sorted(events, key=lambda event: event["at"]):
        at, node = event["at"], event["node"]
        gone = seen.get(node, at)
        seen[node] = last = at
        match event["event"]:
            case "started":
                ended = at if at - gone < absence_s else gone
                for holder in [holder for each, holder in held if each == node]:
                    end(node, holder, ended)
                for holder, (number, labels) in event["holders"].items():
                    held[node, holder] = (at, labels, number)
            case "moved":
                end(node, event["holder"], at)
                held[node, event["holder"]] = (at, event["labels"], event["number"])
            case "call":
                holder = event["holder"]
                calls[event["call"]] = event
                if (node, holder) in held:
                    before[event["call"]] = held[node, holder][1:]
                end(node, holder, at)
            case "answer":
                call = calls.pop(event["call"])
                if call["method"] == "allocate":
                    assert event["labels"] == call["labels"], event
                    held[node, call["holder"]] = (at, event["labels"], event["number"])
            case "error":
                call = calls.pop(event["call"])
                assert event["code"] in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"), event
                if event["call"] in before:
                    held[node, call["holder"]] = (at, *before[event["call"]])
    for node, holder in list(held):
        end(node, holder, last)
    return found


def contradictions(history: Iterable[Holding], quarantine_s: float) -> Iterator[str]:
    """What must not be: two numbers for equal labels at a time, or a number with other labels before its quarantine ended."""
    by_labels: dict[str, list[Holding]] = defaultdict(list)
    by_number: dict[int, list[Holding]] = defaultdict(list)
    for holding in sorted(history):
        by_labels[holding.labels].append(holding)
        by_number[holding.number].append(holding)
    for same in by_labels.values():
        longest = same[0]
        for holding in same[1:]:
            if holding.number != longest.number and holding.begin < longest.end:
                yield f"two numbers at a time: {longest} and {holding}"
            longest = max(longest, holding, key=lambda each: each.end)
    for same in by_number.values():
        latest = same[0]
        for earlier, later in pairwise(same):
            latest = max(latest, earlier, key=lambda each: each.end)
            if later.labels != latest.labels and later.begin < latest.end + quarantine_s:
                yield f"a number used again too soon: {latest} and {later}"
