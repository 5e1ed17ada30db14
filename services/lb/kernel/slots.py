"""Stretches of LB_SLOTS: room for them, and changing what is in one without any reader choosing wrongly.

A stretch has room for a power of two of slots. Readers take first and count as one word and then a slot, so a slot must
be right before the count that reaches it is, and room given back is used again only after a while.
"""

from __future__ import annotations

import ctypes as ct
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from services.common.kernel.room import Room, room_for
from services.lb import abi

_WORD: Final = struct.Struct("=I")


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
        if ids and self.ids == ids:
            return
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
