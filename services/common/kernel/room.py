"""Room for stretches in a table of lines: given out in powers of two, used again only when no program reads it any more."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from services.common.kernel.lines import Lines

SMALLEST: Final = 4
REST_S: Final = 1.0
"""After which no program reads a stretch that was given back."""


def room_for(count: int) -> int:
    """Places that a stretch of `count` takes."""
    return max(SMALLEST, 1 << (count - 1).bit_length())


class Room:
    """Which places are free. Free pieces of one size are as good as each other, so nothing is searched."""

    def __init__(self, lines: Lines, per_line: int, clock: Callable[[], float] = time.monotonic) -> None:
        """per_line: places in a line; those of the first line are never used."""
        self.lines = lines
        self._per_line = per_line
        self._clock = clock
        self._end = per_line
        self._free: dict[int, list[int]] = {}
        self._resting: deque[tuple[float, int, int]] = deque()
        self.used = 0
        """Places given out."""

    def adopt(self, taken: Iterable[tuple[int, int]]) -> None:
        """Stretches (first, count) that are in use; before anything is given out."""
        for first, count in sorted(set(taken)):
            self._give(self._end, first)
            self._end = max(self._end, first + room_for(count))
            self.used += room_for(count)

    def _give(self, first: int, end: int) -> None:
        while first < end:
            size = 1 << ((end - first).bit_length() - 1)
            if size >= SMALLEST:
                self._free.setdefault(size, []).append(first)
            first += size

    def take(self, count: int) -> int:
        """First place of room for so many. ResourceExhausted."""
        self._wake()
        size = room_for(count)
        if free := self._free.get(size):
            first = free.pop()
        else:
            first = self._end
            self.lines.ensure(-(-(first + size) // self._per_line))
            self._end = first + size
        self.used += size
        return first

    def give(self, first: int, count: int) -> None:
        """Room that was taken for `count` is not wanted any more; programs may still be reading it."""
        self._resting.append((self._clock() + REST_S, first, room_for(count)))
        self.used -= room_for(count)

    def _wake(self) -> None:
        now = self._clock()
        while self._resting and self._resting[0][0] <= now:
            _, first, size = self._resting.popleft()
            self._free.setdefault(size, []).append(first)
