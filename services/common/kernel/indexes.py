"""Indexes of lines: given out, given back, known again after a restart."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

from services.common import errors

FIRST: Final = 1
"""Line 0 is never used."""


class Indexes:
    """Of which the one that was given back first is used again first."""

    def __init__(self, limit: int, what: str, used: Iterable[int] = ()) -> None:
        """limit: one more than the largest."""
        self._limit, self._what = limit, what
        taken = set(used)
        self._next = max(taken, default=FIRST - 1) + 1
        self._free = deque(index for index in range(FIRST, self._next) if index not in taken)

    def take(self) -> int:
        """ResourceExhausted when there is none left."""
        # Who has just left may still be remembered: new ones come first, as long as the table need not be large for it.
        if self._free and (len(self._free) > 64 or self._next >= self._limit):
            return self._free.popleft()
        if self._next < self._limit:
            self._next += 1
            return self._next - 1
        raise errors.ResourceExhausted(
            f"all {self._limit - FIRST} {self._what} are in use",
            fix=f"remove {self._what} that are not needed",
        )

    def give(self, index: int) -> None:
        self._free.append(index)

    @property
    def used(self) -> int:
        return self._next - FIRST - len(self._free)
