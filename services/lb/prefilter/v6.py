"""IPv6 tables of one generation: a hash of all prefixes, and hints which lengths exist where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

from services.common import errors
from services.lb.prefilter import abi
from services.lb.prefilter.keys import SIZE
from services.lb.prefilter.memory import Memory
from services.lb.prefilter.model import PrefixSet, Sets
from services.lb.prefilter.v4 import Full

_WORD: Final = 0xFFFFFFFFFFFFFFFF
_LINE_WORDS: Final = abi.WIDE // 8
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

    def reserve(self, lengths: int) -> None:
        """Give each of these lengths (one bit each) its bit in an empty table. ResourceExhausted."""
        require_lengths(lengths)
        for length in reversed(range(129)):
            if lengths >> length & 1:
                self._take(length)

    def announce(self, address: int, length: int) -> None:
        """Have prefixes of that length looked for where this one is. Full: there is no bit for it here."""
        bit = self._bits.get(length)
        if bit is None:
            # What is found first must be the longest.
            if len(self._bits) == abi.LENGTHS or any(length > other for other in self._bits):
                raise Full
            bit = self._take(length)
        if length < HINTED:
            self._generation.always |= 1 << bit
            return
        first = address >> 96
        for block in range(first, first + (1 << 32 - length if length < 32 else 1)):
            self._words[(block * 0x9E3779B1 & 0xFFFFFFFF) >> 16] |= 1 << bit

    def _take(self, length: int) -> int:
        bit = self._bits[length] = len(self._bits)
        self._generation.lengths[abi.length_at(bit)] = abi.Length.of(length)
        return bit

    def close(self) -> None:
        self.memory.close()


def require_lengths(lengths: int) -> None:
    """ResourceExhausted if there are more different lengths than can be looked up; one bit a length."""
    if lengths.bit_count() > abi.LENGTHS:
        raise errors.ResourceExhausted(
            f"IPv6 prefixes of {lengths.bit_count()} different lengths, at most {abi.LENGTHS} are looked up",
            fix="round prefixes of rare lengths to others",
        )


class Wides:
    """The hash of all prefixes."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._words = memory.words

    @staticmethod
    def lines_for(entries: int) -> int:
        """With room for a half more."""
        return max(16, entries * 10 // (abi.WIDE_ENTRIES * 6) + 1)

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
            # The rest is for those who have this line as their other one.
            if count < abi.WIDE_ENTRIES - 1:
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
        entry = _entry(key)
        at = self._find(entry)
        if at < 0:
            self._write(self._room(entry), entry, ident)
        else:
            self._words[at + 2] = entry.meta | ident

    def put_better(self, key: bytes, ident: int, ranks: Mapping[int, int]) -> None:
        """Add one unless it is there for a set of a better rank."""
        at = self._find(_entry(key))
        if at < 0 or ranks[ident] < ranks[self._words[at + 2] & 0xFF]:
            self.put(key, ident)

    def drop(self, key: bytes) -> None:
        at = self._find(_entry(key))
        if at >= 0:
            self._words[at + 2] = 0

    def _write(self, at: int, entry: _Entry, ident: int) -> None:
        first = abi.places(entry.value, self.memory.lines)[0]
        if at // _LINE_WORDS != first:
            self._words[first * _LINE_WORDS + abi.WIDE_SPILLS] = 1
        # Nobody's while it is written.
        self._words[at + 2] = 0
        self._words[at] = entry.hi
        self._words[at + 1] = entry.lo
        self._words[at + 2] = entry.meta | ident

    def _places(self, value: int) -> Iterable[int]:
        """Where an entry with that hash may be."""
        for line in abi.places(value, self.memory.lines):
            yield from range(line * _LINE_WORDS, line * _LINE_WORDS + 3 * abi.WIDE_ENTRIES, 3)

    def _find(self, entry: _Entry) -> int:
        """-1: nowhere."""
        words = self._words
        for at in self._places(entry.value):
            meta = words[at + 2]
            if (
                meta & 0xFF
                and meta & ~0xFF == entry.meta
                and words[at] == entry.hi
                and words[at + 1] == entry.lo
            ):
                return at
        return -1

    def _room(self, entry: _Entry) -> int:
        """A free place for an entry, if need be by moving another to its other line. Full."""
        free = self._free(entry.value)
        if free >= 0:
            return free
        words = self._words
        for at in self._places(entry.value):
            hi, lo, meta = words[at], words[at + 1], words[at + 2]
            other = _Entry(abi.hash6(hi << 64 | lo, meta >> 8 & 0xFF), hi, lo, meta & ~0xFF)
            elsewhere = self._free(other.value)
            if elsewhere >= 0:
                # In both for a moment rather than in none.
                self._write(elsewhere, other, meta & 0xFF)
                return at
        raise Full

    def _free(self, value: int) -> int:
        return next((at for at in self._places(value) if not self._words[at + 2]), -1)

    def close(self) -> None:
        self.memory.close()


class _Entry(NamedTuple):
    """A prefix as the table has it; meta without a set."""

    value: int
    hi: int
    lo: int
    meta: int


def _entry(key: bytes) -> _Entry:
    address, length = int.from_bytes(key[:16]), key[16]
    value = abi.hash6(address, length)
    return _Entry(value, address >> 64, address & _WORD, (value & 0xFFFFFFFF) << 32 | length << 8)


def build(sets: Sets, lengths: Lengths, wides: Wides) -> None:
    """Fill empty tables. Full, ResourceExhausted."""
    lengths.reserve(lengths_of(sets))
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
