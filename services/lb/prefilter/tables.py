"""The prefilter's tables in the kernel, made to say what the sets say.

    tables = Tables(instance)
    tables.open()                       # what is pinned; what an earlier process wrote stays
    tables.rebuild(sets)                # beside what is in force, which it then replaces between two packets
    tables.change(sets, keys)           # in place: sets as they are now, and the keys whose set may be another

Everything blocks; used by one thread at a time. `stamp` is for the caller to know what the tables hold.
"""

from __future__ import annotations

import ctypes as ct
import mmap
import time
from collections.abc import Collection
from typing import Final

from services.common.instance import Instance
from services.common.kernel.maps import BpfMap
from services.lb.prefilter import abi, v4, v6
from services.lb.prefilter.memory import Memory
from services.lb.prefilter.model import Sets

IN_PLACE: Final = 2000
"""Changes of at most so many keys, or an eighth of all, are made in place; more are quicker made anew."""
_GRACE_S: Final = 0.02


class Tables:
    """All of family `prefilter` but the limits."""

    def __init__(self, instance: Instance) -> None:
        self._pins = instance.pin_dir
        self._maps: list[BpfMap[ct.c_uint32, ct.c_uint32]] = []
        self._config_memory: mmap.mmap | None = None
        self._cells: v4.Cells | None = None
        self._long4: v4.Long4 | None = None
        self._lengths: v6.Lengths | None = None
        self._wides: v6.Wides | None = None

    @property
    def ready(self) -> bool:
        return self._config_memory is not None

    def open(self) -> None:
        """Use the maps that are pinned, and the tables in them. NotFound while there are none."""
        self.close()
        lines, wides = (
            BpfMap.open(self._pins / abi.MAPS[name], ct.c_uint32, ct.c_uint32)
            for name in ("pf_lines", "pf_wides")
        )
        self._maps = [lines, wides]
        with BpfMap.open(self._pins / abi.MAPS["pf_config"], ct.c_uint32, abi.Config) as config:
            self._config_memory = mmap.mmap(config.fileno(), ct.sizeof(abi.Config))
        with BpfMap.open(self._pins / abi.MAPS["pf_sets"], ct.c_uint32, abi.SetEntry) as sets:
            self._set_memory = mmap.mmap(sets.fileno(), 8 * abi.SETS)
        self._config = abi.Config.from_buffer(self._config_memory)
        self._adopt()

    def close(self) -> None:
        for part in (self._cells, self._long4, self._lengths, self._wides):
            if part is not None:
                part.close()
        self._cells = self._long4 = self._lengths = self._wides = None
        for each in self._maps:
            each.close()
        self._maps = []
        # Mappings go with the last structure in them.
        self._config_memory = None

    @property
    def stamp(self) -> int:
        return int(self._config.stamp)

    @stamp.setter
    def stamp(self, value: int) -> None:
        self._config.stamp = value

    @property
    def flags(self) -> abi.Flag:
        return abi.Flag(self._config.flags)

    def limits(self, wanted: bool) -> None:
        """Whether there are limits to be looked up."""
        self._config.flags = self.flags & ~abi.Flag.LIMITS | (abi.Flag.LIMITS if wanted else 0)

    def memory(self) -> int:
        """Bytes of the tables."""
        parts = (self._cells, self._long4, self._lengths, self._wides)
        return sum(part.memory.lines * part.memory.line for part in parts if part is not None)

    # -- all anew

    def rebuild(self, sets: Sets) -> None:
        """Make tables of these sets and put them in force at once. ResourceExhausted: nothing has changed."""
        v6.require_lengths(v6.lengths_of(sets))
        now = self._config.generation & 1
        then = now ^ 1
        generation = self._config.generations[then]
        ct.memset(ct.addressof(generation), 0, ct.sizeof(generation))
        built: list[v4.Cells | v4.Long4 | v6.Lengths | v6.Wides] = []
        flags = self.flags & abi.Flag.LIMITS
        before = (self._cells, self._long4, self._lengths, self._wides)
        try:
            cells = long4 = lengths = wides = None
            if sets.count(4):
                flags |= abi.Flag.V4
                cells, long4 = self._build4(sets, then)
                built += [cells, long4]
            if sets.count(6):
                flags |= abi.Flag.V6
                lengths, wides = self._build6(sets, then, generation)
                built += [lengths, wides]
        except BaseException:
            for part in built:
                part.close()
            raise
        self._declare(sets)
        self._publish(then, cells, long4, lengths, wides)
        self._cells, self._long4, self._lengths, self._wides = cells, long4, lengths, wides
        # One word: programs go from all of one generation to all of the other.
        self._config.generation = then
        self._config.flags = flags
        self._retire(now)
        for old in before:
            if old is not None:
                old.close()

    def _build4(self, sets: Sets, generation: int) -> tuple[v4.Cells, v4.Long4]:
        lines = v4.Long4.lines_for(v4.long_count(sets))
        while True:
            pages = Memory.make("pf_cells", v4.Cells.lines(v4.page_count(sets)))
            cells = v4.Cells(pages, self._cells_grown)
            long4 = v4.Long4(Memory.make("pf_long4", lines))
            try:
                v4.build(sets, cells, long4)
                return cells, long4
            except v4.Full:
                cells.close()
                long4.close()
                lines += lines // 2

    def _build6(self, sets: Sets, number: int, generation: abi.Generation) -> tuple[v6.Lengths, v6.Wides]:
        lines = v6.Wides.lines_for(sets.count(6))
        while True:
            lengths = v6.Lengths(generation, Memory.make("pf_hints", v6.HINT_LINES))
            wides = v6.Wides(Memory.make("pf_wides", lines, abi.WIDE))
            try:
                v6.build(sets, lengths, wides)
                return lengths, wides
            except v4.Full:
                lengths.close()
                wides.close()
                lines += lines // 2

    def _publish(
        self, number: int, cells: v4.Cells | None, long4: v4.Long4 | None, lengths: v6.Lengths | None,
        wides: v6.Wides | None,
    ) -> None:  # fmt: skip
        """Have a generation that is not in force consist of these."""
        lines, wide = self._maps
        generation = self._config.generations[number]
        for table, part in ((abi.Table.CELLS, cells), (abi.Table.LONG4, long4), (abi.Table.HINTS, lengths)):
            if part is not None:
                lines.update(number * abi.TABLES + table, part.memory.fd)
        generation.lines4 = long4.memory.lines if long4 is not None else 0
        generation.lines6 = wides.memory.lines if wides is not None else 0
        if wides is not None:
            wide.update(number, wides.memory.fd)

    def _retire(self, number: int) -> None:
        """Give the memory of a generation back that is no longer in force."""
        # Programs that began before the change have ended.
        time.sleep(_GRACE_S)
        lines, wide = self._maps
        for table in abi.Table:
            lines.delete(number * abi.TABLES + table)
        wide.delete(number)

    def _declare(self, sets: Sets) -> None:
        flags = (ct.c_uint64 * abi.SETS).from_buffer(self._set_memory)
        for each in sets.ranked:
            flags[each.ident] = abi.SetFlag.ALLOW if each.allow else 0

    # -- in place

    def change(self, sets: Sets, keys: Collection[bytes]) -> None:
        """Have these keys, and no others, say what the sets say. Many, or without room: all is made anew."""
        total = sets.count(4) + sets.count(6)
        wanted = (abi.Flag.V4 if sets.count(4) else abi.Flag(0)) | (
            abi.Flag.V6 if sets.count(6) else abi.Flag(0)
        )
        if len(keys) > max(IN_PLACE, total // 8) or wanted != self.flags & ~abi.Flag.LIMITS:
            self.rebuild(sets)
            return
        self._declare(sets)
        try:
            self._in_place(sets, keys)
        except v4.Full:
            self.rebuild(sets)

    def _in_place(self, sets: Sets, keys: Collection[bytes]) -> None:
        blocks: set[tuple[int, int]] = set()
        for key in keys:
            ident = sets.decide(key)
            if len(key) == 17:
                self._change6(key, ident)
            elif key[-1] > 24:
                self._change4(key, ident)
            else:
                root, spread = int.from_bytes(key[:2]) >> 4, 1 << max(0, 12 - key[-1])
                blocks.add((root, root + spread - 1))
        done = -1
        # Of two that overlap one holds the other.
        for first, last in sorted(blocks, key=lambda block: (block[0], -block[1])):
            if self._cells is not None and last > done:
                self._cells.paint(sets, first, last)
                done = last

    def _change4(self, key: bytes, ident: int) -> None:
        if self._long4 is None or self._cells is None:
            return
        if ident:
            self._long4.put(int.from_bytes(key), ident)
            self._cells.mark(int.from_bytes(key[:4]), key[4])
        else:
            # The mark stays until all is made anew: it costs a look into the hash, no more.
            self._long4.drop(int.from_bytes(key))

    def _change6(self, key: bytes, ident: int) -> None:
        if self._wides is None or self._lengths is None:
            return
        if ident:
            self._wides.put(key, ident)
            self._lengths.announce(int.from_bytes(key[:16]), key[16])
        else:
            self._wides.drop(key)

    def _cells_grown(self, larger: Memory) -> None:
        """Only in place: what is made anew has all its pages from the start."""
        self._maps[0].update((self._config.generation & 1) * abi.TABLES + abi.Table.CELLS, larger.fd)

    def _adopt(self) -> None:
        number = self._config.generation & 1
        lines, wide = self._maps
        found = {table: Memory.adopt(lines, number * abi.TABLES + table) for table in abi.Table}
        wides = Memory.adopt(wide, number)
        cells, long4, hints = found[abi.Table.CELLS], found[abi.Table.LONG4], found[abi.Table.HINTS]
        if cells is not None and long4 is not None:
            self._cells, self._long4 = v4.Cells(cells, self._cells_grown), v4.Long4(long4)
        if hints is not None and wides is not None:
            self._lengths = v6.Lengths(self._config.generations[number], hints)
            self._wides = v6.Wides(wides)
