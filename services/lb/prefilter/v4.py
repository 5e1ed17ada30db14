"""IPv4 tables of one generation: cells of /24, and a hash of what is longer.

Whatever is stored at once, a byte or a word, is what programs read at once, so that a change is never seen in part.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv4Address
from typing import Final

from services.lb.prefilter import abi
from services.lb.prefilter.keys import SIZE
from services.lb.prefilter.memory import Memory
from services.lb.prefilter.model import PrefixSet, Sets

_WORD: Final = 0xFFFFFFFFFFFFFFFF
_GOLDEN: Final = 0x9E3779B97F4A7C15
_ROOT_BYTES: Final = abi.ROOT_LINES * abi.LINE
_PAGE_BYTES: Final = abi.PAGE_LINES * abi.LINE
_ENTRIES: Final = abi.LONG4_ENTRIES


class Full(Exception):
    """A hash has no room near where an entry belongs."""


def _unpack(raw: bytes) -> Iterable[tuple[int, int]]:
    """(address, length) of each key."""
    return struct.iter_unpack(">IB", raw)


class Cells:
    """Root cells and pages. `grow` is called with the memory that takes the place of one that is full."""

    def __init__(self, memory: Memory, grow: Callable[[Memory], None]) -> None:
        self.memory = memory
        self._grow = grow
        self._roots = memory.bytes[:_ROOT_BYTES].cast("I")
        self._pages = 1 + max((cell & ~abi.PAGE for cell in self._roots if cell & abi.PAGE), default=-1)

    @staticmethod
    def lines(pages: int) -> int:
        """Lines that so many pages take."""
        return abi.ROOT_LINES + pages * abi.PAGE_LINES

    def page(self, root: int) -> int:
        """Where the page of a root cell begins, in bytes; it is made if there is none."""
        cell = self._roots[root]
        if cell & abi.PAGE:
            return _ROOT_BYTES + (cell & ~abi.PAGE) * _PAGE_BYTES
        number = self._pages
        if self.lines(number + 1) > self.memory.lines:
            self._larger()
        start = _ROOT_BYTES + number * _PAGE_BYTES
        self.memory.bytes[start : start + _PAGE_BYTES] = bytes((cell, 0)) * abi.PAGE_CELLS
        self._pages = number + 1
        self._roots[root] = abi.PAGE | number
        return start

    def _larger(self) -> None:
        before = self.memory
        pages = min(max(2 * self._pages, 16), abi.ROOTS)
        larger = Memory.make("pf_cells", self.lines(pages))
        larger.bytes[: len(before.bytes)] = before.bytes
        self._grow(larger)
        self._roots.release()
        self.memory = larger
        self._roots = larger.bytes[:_ROOT_BYTES].cast("I")
        before.close()

    def close(self) -> None:
        self._roots.release()
        self.memory.close()

    def mark(self, address: int, length: int) -> None:
        """Have prefixes of that length looked for in the cell of an address."""
        start = self.page(address >> 20)
        self.memory.bytes[start + (address >> 7 & 0x1FFE) + 1] |= 1 << 32 - length

    def mark_all(self, raw: bytes) -> None:
        """The same for all of a set's keys beyond /24."""
        root, start = -1, 0
        mem = self.memory.bytes
        for address, length in _unpack(raw):
            if length > 24:
                if address >> 20 != root:
                    root = address >> 20
                    start = self.page(root) + 1
                    mem = self.memory.bytes
                mem[start + (address >> 7 & 0x1FFE)] |= 1 << 32 - length

    def paint(self, sets: Sets, first: int, last: int) -> None:
        """Have all cells between two root cells (inclusive; a /12 or a shorter prefix) say what the sets say."""
        inner: dict[int, dict[int, list[tuple[int, int]]]] = {}
        outer: dict[int, list[tuple[int, int]]] = {}
        lowest, highest = (first << 20).to_bytes(4), ((last << 20) + 0xFFFFF).to_bytes(4)
        for each in reversed(sets.ranked):
            raw = each.v4.within(lowest, highest)
            if min(raw[SIZE[4] - 1 :: SIZE[4]], default=32) > 24:
                continue
            for address, length in _unpack(raw):
                if length <= 12:
                    outer.setdefault(length, []).append((address, each.ident))
                elif length <= 24:
                    inner.setdefault(address >> 20, {}).setdefault(length, []).append((address, each.ident))
        count = last - first + 1
        # What holds all of it may begin before it.
        roots = bytearray((sets.longest(IPv4Address(first << 20), 13 - count.bit_length()),)) * count
        for length in sorted(outer):
            count = 1 << 12 - length
            for address, ident in outer[length]:
                at = (address >> 20) - first
                roots[at : at + count] = (bytes((ident,)) * count)[: len(roots) - at]
        for number, base in enumerate(roots, first):
            self._block(number, base, inner.get(number))

    def _block(self, root: int, base: int, inner: dict[int, list[tuple[int, int]]] | None) -> None:
        if not inner and not self._roots[root] & abi.PAGE:
            self._roots[root] = base
            return
        cells = bytearray((base,)) * abi.PAGE_CELLS
        for length in sorted(inner or ()):
            count = 1 << 24 - length
            for address, ident in (inner or {})[length]:
                at = address >> 8 & 0xFFF
                cells[at : at + count] = bytes((ident,)) * count
        start = self.page(root)
        self.memory.bytes[start : start + _PAGE_BYTES : 2] = cells


class Long4:
    """The hash of prefixes beyond /24."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._words = memory.words

    @staticmethod
    def lines_for(entries: int) -> int:
        """With room for a quarter more."""
        return max(16, entries * 10 // (_ENTRIES * 6) + 1)

    def fill(self, each: PrefixSet) -> None:
        """Put a set's keys into an empty table. Full."""
        words, lines, ident = self._words, self.memory.lines, each.ident
        used = bytearray(lines)
        later: list[int] = []
        for address, length in _unpack(each.v4.raw):
            if length > 24:
                key = address << 8 | length
                line = ((key * _GOLDEN & _WORD) >> 32) * lines >> 32
                count = used[line]
                # The rest is for those who have this line as their other one.
                if count < _ENTRIES - 1:
                    words[line * _ENTRIES + count] = key << abi.LONG4_SHIFT | ident
                    used[line] = count + 1
                else:
                    later.append(key)
        for key in later:
            self._words[self._room(key)] = key << abi.LONG4_SHIFT | ident

    def put(self, key: int, ident: int) -> None:
        """Add or change one. Full: there is no room; nothing has changed."""
        at = self.find(key)
        self._words[at if at >= 0 else self._room(key)] = key << abi.LONG4_SHIFT | ident

    def put_better(self, key: int, ident: int, ranks: Mapping[int, int]) -> None:
        """Add one unless it is there for a set of a better rank."""
        at = self.find(key)
        if at < 0 or ranks[ident] < ranks[self._words[at] & 0xFF]:
            self.put(key, ident)

    def drop(self, key: int) -> None:
        at = self.find(key)
        if at >= 0:
            self._words[at] = 0

    def find(self, key: int) -> int:
        """Where the word of a key is; -1: nowhere."""
        words = self._words
        for start in self._starts(key):
            for at in range(start, start + _ENTRIES):
                if words[at] >> abi.LONG4_SHIFT == key:
                    return at
        return -1

    def _starts(self, key: int) -> tuple[int, int]:
        first, second = abi.places(abi.hash4(key), self.memory.lines)
        return first * _ENTRIES, second * _ENTRIES

    def _room(self, key: int) -> int:
        """A free place for a key, if need be by moving another to its other line. Full."""
        starts = self._starts(key)
        free = self._free(*starts)
        if free >= 0:
            return free
        for start in starts:
            for at in range(start, start + _ENTRIES):
                word = self._words[at]
                elsewhere = self._free(*self._starts(word >> abi.LONG4_SHIFT))
                if elsewhere >= 0:
                    # In both for a moment rather than in none.
                    self._words[elsewhere] = word
                    return at
        raise Full

    def _free(self, *starts: int) -> int:
        words = self._words
        for start in starts:
            for at in range(start, start + _ENTRIES):
                if not words[at]:
                    return at
        return -1

    def close(self) -> None:
        self.memory.close()


def build(sets: Sets, cells: Cells, long4: Long4) -> None:
    """Fill empty tables. Full."""
    cells.paint(sets, 0, abi.ROOTS - 1)
    ranks = {each.ident: rank for rank, each in enumerate(sets.ranked)}
    for number, each in enumerate(sorted(sets.ranked, key=lambda one: -len(one.v4))):
        cells.mark_all(each.v4.raw)
        if number == 0:
            long4.fill(each)
            continue
        for key in each.v4:
            if key[-1] > 24:
                long4.put_better(int.from_bytes(key), each.ident, ranks)


def long_count(sets: Sets) -> int:
    """Prefixes beyond /24 in all sets; the length is the last byte of a key."""
    lengths = (each.v4.raw[SIZE[4] - 1 :: SIZE[4]] for each in sets.ranked)
    return sum(len(raw) - sum(raw.count(length) for length in range(25)) for raw in lengths)


def page_count(sets: Sets) -> int:
    """Blocks of /12 that have something within: as many pages as there will be at most."""
    blocks: set[int] = set()
    for each in sets.ranked:
        index = 0
        while index < len(each.v4):
            block = int.from_bytes(each.v4.at(index)[:2]) >> 4
            blocks.add(block)
            index = (
                each.v4.find((block + 1 << 20).to_bytes(4), index) if block + 1 < abi.ROOTS else len(each.v4)
            )
    return len(blocks)
