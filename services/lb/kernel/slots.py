"""Stretches of LB_SLOTS: room for them, and changing what is in one without any reader choosing wrongly.

A stretch has room for a power of two of slots. Readers take first and count as one word and then a slot, so a slot must
be right before the count that reaches it is, and room given back is used again only after a while.
"""

from __future__ import annotations

import ctypes as ct
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from services.common.kernel.lines import Lines
from services.lb import abi

SMALLEST: Final = 4
FIRST: Final = abi.SLOTS_A_LINE
"""Slots of the first line are never used."""
REST_S: Final = 1.0
"""After which no program reads a stretch that was given back."""
_WORD: Final = struct.Struct("=I")


def room_for(count: int) -> int:
    """Slots that a stretch of `count` takes."""
    return max(SMALLEST, 1 << (count - 1).bit_length())


class Room:
    """Which slots are free. Free pieces of one size are as good as each other, so nothing is searched."""

    def __init__(self, lines: Lines, clock: Callable[[], float] = time.monotonic) -> None:
        self.lines = lines
        self._clock = clock
        self._end = FIRST
        self._free: dict[int, list[int]] = {}
        self._resting: deque[tuple[float, int, int]] = deque()
        self.used = 0
        """Slots given out."""

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
        """First slot of room for so many. ResourceExhausted."""
        self._wake()
        size = room_for(count)
        if free := self._free.get(size):
            first = free.pop()
        else:
            first = self._end
            self.lines.ensure(-(-(first + size) // abi.SLOTS_A_LINE))
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


class Stretch:
    """What one of a service's words leads to. `writes` counts stores into slots."""

    def __init__(self, room: Room, first: int = 0, ids: Sequence[int] = ()) -> None:
        self._room = room
        self.first = first
        self.ids = list(ids)
        self._size = room_for(len(self.ids)) if self.ids else 0
        self.writes = 0

    @classmethod
    def read(cls, room: Room, word: abi.Stretch) -> Stretch:
        """One that is in the kernel."""
        count = word.count
        if not count:
            return cls(room)
        ids = struct.unpack_from(f"={count}I", room.lines.mem, word.first * 4)
        return cls(room, word.first, ids)

    @property
    def word(self) -> abi.Stretch:
        """What the service's line has to say."""
        return abi.Stretch(first=self.first, count=len(self.ids))

    def set(self, ids: Sequence[int], ordered: bool, publish: Callable[[abi.Stretch], None]) -> None:
        """Have these in it. `publish` stores the word; it is called when and only when the word changes.

        ResourceExhausted: nothing has changed.
        """
        if room_for(len(ids)) != self._size if ids else True:
            self._move(ids, publish)
        elif ordered:
            self._in_place(ids, publish)
        else:
            self._exchange(ids, publish)

    def _move(self, ids: Sequence[int], publish: Callable[[abi.Stretch], None]) -> None:
        old, size = self.first, self._size
        if ids:
            first = self._room.take(len(ids))
            struct.pack_into(f"={len(ids)}I", self._room.lines.mem, first * 4, *ids)
            self.writes += len(ids)
            self.first, self._size = first, room_for(len(ids))
        elif not self.ids:
            return
        else:
            self.first, self._size = 0, 0
        self.ids = list(ids)
        publish(self.word)
        if size:
            self._room.give(old, size)

    def _in_place(self, ids: Sequence[int], publish: Callable[[abi.Stretch], None]) -> None:
        """A table: as many slots, of which a few change hands. A table of another length is a new one."""
        if len(ids) != len(self.ids):
            self._move(ids, publish)
            return
        if self.ids != ids:
            for at, (old, new) in enumerate(zip(self.ids, ids, strict=True)):
                if old != new:
                    self._store(at, new)
            self.ids = list(ids)

    def _exchange(self, ids: Sequence[int], publish: Callable[[abi.Stretch], None]) -> None:
        """A list: who is new takes the place of who is gone; then the last one fills the hole, or more are added."""
        gone = Counter(self.ids)
        gone.subtract(ids)
        new = [ident for ident, count in gone.items() for _ in range(-count)]
        holes = []
        if any(count > 0 for count in gone.values()):
            for at, ident in enumerate(self.ids):
                if gone[ident] > 0:
                    gone[ident] -= 1
                    holes.append(at)
        while holes and new:
            self._put(holes.pop(), new.pop())
        for ident in new:
            self.ids.append(ident)
            self._store(len(self.ids) - 1, ident)
        # From the end, so that what fills a hole is no hole itself.
        for at in reversed(holes):
            last = self.ids.pop()
            if at < len(self.ids):
                self._put(at, last)
        if new or holes:
            publish(self.word)

    def _put(self, at: int, ident: int) -> None:
        self.ids[at] = ident
        self._store(at, ident)

    def _store(self, at: int, ident: int) -> None:
        # Four aligned bytes: one store.
        ct.c_uint32.from_buffer(self._room.lines.mem, (self.first + at) * 4).value = ident
        self.writes += 1
