"""Maglev tables (Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, section 3.4).

The same set of backends gives the same table on every node, in whatever order they are given. Weighted: a backend
with half the weight takes its turn in every other round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final

SIZES: Final = (251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071)
"""Primes, each a little less than a power of two."""
ENTRIES_A_BACKEND: Final = 100
"""With which the busiest backend has at most one hundredth more than its share (paper, 5.3)."""


def size_for(backends: int) -> int:
    """The smallest size that has enough entries for each of so many backends; the largest if none has."""
    return next((size for size in SIZES if size >= backends * ENTRIES_A_BACKEND), SIZES[-1])


def table(backends: Iterable[tuple[bytes, int]], size: int) -> Sequence[int]:
    """Which backend (its index in order of the names) each of `size` slots belongs to, a prime.

    backends: name, unique, and weight of each, at least 1. Empty if there are none; if there are more than slots, those
    that come late in order get none.
    """
    given = sorted(backends)
    if not given:
        return ()
    heaviest = max(weight for _, weight in given)
    position, skip = [], []
    for name, _ in given:
        digest = hashlib.blake2b(name, digest_size=16).digest()
        position.append(int.from_bytes(digest[:8], "little") % size)
        skip.append(int.from_bytes(digest[8:], "little") % (size - 1) + 1)
    entries = [-1] * size
    left = size
    equal = all(weight == heaviest for _, weight in given)
    everyone = range(len(given))
    turns = [0] * len(given)
    while True:
        if equal:
            turn: Iterable[int] = everyone
        else:
            # Whoever has collected a whole turn by now.
            due = []
            for index, (_, weight) in enumerate(given):
                turns[index] += weight
                if turns[index] >= heaviest:
                    turns[index] -= heaviest
                    due.append(index)
            turn = due
        for index in turn:
            at, step = position[index], skip[index]
            while entries[at] >= 0:
                at += step
                if at >= size:
                    at -= size
            entries[at] = index
            left -= 1
            if not left:
                return entries
            at += step
            position[index] = at - size if at >= size else at
