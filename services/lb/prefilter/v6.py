"""IPv6 tables of one generation: a hash of all prefixes, and hints which lengths exist where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from services.common import errors
from services.lb.prefilter import abi
from services.lb.prefilter.keys import SIZE
from services.lb.prefilter.memory import Memory
from services.lb.prefilter.model import PrefixSet, Sets
from services.lb.prefilter.v4 import Full

_WORD: Final = 0xFFFFFFFFFFFFFFFF
_LINE_WORDS: Final = abi.WIDE // 8
_LAST: Final = 3 * (abi.WIDE_ENTRIES - 1) + 2
HINTED: Final = 24
"""Lengths from here on are hinted: such a prefix holds at most 256 blocks of 32 bits."""
HINT_LINES: Final = abi.HINT_COUNT * 8 // abi.LINE


class Lengths:
    """Which bit stands for a length, and the hints of where it exists."""

    def __init__(self, generation: abi.Generation, hints: Memory) -> None:
        """generation: in the kernel's memory."""
        self._generation = generation
        self.memory = hints
        self._words = hints.words
        self._bits: dict[int, int] = {}
        for bit in range(abi.LENGTHS):
            entry = generation.lengths[abi.length_at(bit)]
            if entry.used:
                self._bits[entry.length] = bit

    def announce(self, address: int, length: int) -> None:
        """Have prefixes of that length looked for where this one is. ResourceExhausted."""
        bit = self._bits.get(length)
        if bit is None:
            bit = self._new(length)
        if length < HINTED:
            self._generation.always |= 1 << bit
            return
        first = address >> 96
        for block in range(first, first + (1 << 32 - length if length < 32 else 1)):
            self._words[(block * 0x9E3779B1 & 0xFFFFFFFF) >> 16] |= 1 << bit

    def _new(self, length: int) -> int:
        bit = len(self._bits)
        if bit == abi.LENGTHS:
            raise too_many_lengths(bit + 1)
        self._generation.lengths[abi.length_at(bit)] = abi.Length.of(length)
        self._bits[length] = bit
        return bit

    def close(self) -> None:
        self.memory.close()


def too_many_lengths(count: int) -> errors.ResourceExhausted:
    return errors.ResourceExhausted(
        f"IPv6 prefixes of {count} different lengths, at most {abi.LENGTHS} are looked up",
        fix="round prefixes of rare lengths to others",
    )


def require_lengths(lengths: int) -> None:
    """ResourceExhausted if there are more different lengths than can be looked up; one bit a length."""
    if lengths.bit_count() > abi.LENGTHS:
        raise too_many_lengths(lengths.bit_count())


class Wides:
    """The hash of all prefixes."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._words = memory.words

    @staticmethod
    def lines_for(entries: int) -> int:
        """So many that few lines are full."""
        return max(16, entries * 5 // (abi.WIDE_ENTRIES * 3) + 1)

    def fill(self, each: PrefixSet, seen: Callable[[int, int], None]) -> None:
        """Put a set's keys into an empty table, and tell of each. Full."""
        words, lines, ident = self._words, self.memory.lines, each.ident
        used = bytearray(lines)
        later: list[bytes] = []
        for key in each.v6:
            address, length = int.from_bytes(key[:16]), key[16]
            value = abi.hash6(address, length)
            line = (value >> 32) * lines >> 32
            count = used[line]
            seen(address, length)
            if count < abi.WIDE_ENTRIES:
                at = line * _LINE_WORDS + 3 * count
                words[at] = address >> 64
                words[at + 1] = address & _WORD
                words[at + 2] = (value & 0xFFFFFFFF) << 32 | length << 8 | ident
                used[line] = count + 1
            else:
                later.append(key)
        for key in later:
            self.put(key, ident)

    def put(self, key: bytes, ident: int) -> None:
        """Add or change one. Full: there is no room; nothing has changed."""
        at, meta, free = self._search(key)
        if at < 0:
            if free < 0:
                raise Full
            at = free
            address = int.from_bytes(key[:16])
            # Nobody's, and not the end of the line, while it is written.
            self._words[at + 2] = abi.TOMB6
            self._words[at] = address >> 64
            self._words[at + 1] = address & _WORD
        self._words[at + 2] = meta | ident

    def put_better(self, key: bytes, ident: int, ranks: Mapping[int, int]) -> None:
        """Add one unless it is there for a set of a better rank."""
        at, _, _ = self._search(key)
        if at < 0 or ranks[ident] < ranks[self._words[at + 2] & 0xFF]:
            self.put(key, ident)

    def drop(self, key: bytes) -> None:
        at, _, _ = self._search(key)
        if at >= 0:
            # A line that was full once may go on in the next.
            self._words[at + 2] = abi.TOMB6 if at % _LINE_WORDS == _LAST - 2 else 0

    def _search(self, key: bytes) -> tuple[int, int, int]:
        """Where the entry is (-1: nowhere), its meta without a set, and the first free place (-1: none)."""
        words, lines, free = self._words, self.memory.lines, -1
        address, length = int.from_bytes(key[:16]), key[16]
        value = abi.hash6(address, length)
        meta = (value & 0xFFFFFFFF) << 32 | length << 8
        hi, lo = address >> 64, address & _WORD
        line = (value >> 32) * lines >> 32
        for _ in range(abi.PROBES):
            start = line * _LINE_WORDS
            for at in range(start, start + 3 * abi.WIDE_ENTRIES, 3):
                word = words[at + 2]
                if (word ^ meta) < abi.SETS and words[at] == hi and words[at + 1] == lo and word & 0xFF:
                    return at, meta, free
                if free < 0 and word in (0, abi.TOMB6):
                    free = at
            if not words[start + _LAST]:
                break
            line = line + 1 if line + 1 < lines else 0
        return -1, meta, free

    def close(self) -> None:
        self.memory.close()


def build(sets: Sets, lengths: Lengths, wides: Wides) -> None:
    """Fill empty tables. Full, ResourceExhausted."""
    ranks = {each.ident: rank for rank, each in enumerate(sets.ranked)}
    for number, each in enumerate(sorted(sets.ranked, key=lambda one: -len(one.v6))):
        if number == 0:
            wides.fill(each, lengths.announce)
            continue
        for key in each.v6:
            wides.put_better(key, each.ident, ranks)
            lengths.announce(int.from_bytes(key[:16]), key[16])


def lengths_of(sets: Sets) -> int:
    """One bit for each length there is."""
    found = 0
    for each in sets.ranked:
        for length in set(each.v6.raw[SIZE[6] - 1 :: SIZE[6]]):
            found |= 1 << length
    return found
