"""Tables of 64-byte lines, inner arrays of an outer one, in this process's memory.

A table grows by building a larger one, copying and flipping the outer pointer: programs that have the old one in hand
read what was there a moment ago. Used by one thread.
"""

from __future__ import annotations

import ctypes as ct
import enum
import mmap
import os
from typing import Any, Final, TypeVar

from services.common import errors
from services.common.kernel import bpf
from services.common.kernel.maps import BpfMap

S = TypeVar("S", bound=ct.Structure)
Outer = BpfMap[Any, ct.c_uint32]
INNER: Final = 1 << 12
MMAPABLE: Final = 1 << 10
"""Flags of these arrays: BPF_F_INNER_MAP lets them differ in size."""
LINE: Final = 64


class Lines:
    """One table. Adopts the array that is there, else makes one of `smallest` lines.

    limit: lines it may grow to.
    """

    def __init__(self, outer: Outer, table: enum.IntEnum, smallest: int, limit: int) -> None:
        self._outer, self._table, self.limit = outer, table, limit
        self._fd = -1
        self.mem: mmap.mmap
        self.size = 0
        """Lines."""
        ident = outer.lookup(int(table))
        if ident is not None and ident.value:
            self._take(bpf.map_fd_by_id(ident.value))
        else:
            self._take(self._make(smallest), publish=True)

    def _make(self, lines: int) -> int:
        try:
            return bpf.map_create("array", 4, LINE, lines, INNER | MMAPABLE, self._table.name.lower()[:15])
        except OSError as error:
            raise errors.ResourceExhausted(
                f"no memory for {lines} lines of {self._table.name.lower()}: {os.strerror(error.errno or 0)}"
            ) from None

    def _take(self, fd: int, before: int = 0, publish: bool = False) -> None:
        """Use an array from now on. before: bytes to be copied into it. publish: programs, too; nothing has changed if that
        fails.
        """
        try:
            size = bpf.map_info(fd).max_entries
            mem = mmap.mmap(fd, size * LINE)
            if before:
                mem[:before] = self.mem[:before]
            if publish:
                self._outer.update(int(self._table), fd)
        except OSError as error:
            os.close(fd)
            raise errors.ResourceExhausted(
                f"no room for {self._table.name.lower()} in this process: {os.strerror(error.errno or 0)}"
            ) from None
        except BaseException:
            os.close(fd)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        # The mapping before lives on as long as a structure in it is in use.
        self._fd, self.size, self.mem = fd, size, mem

    def ensure(self, lines: int) -> bool:
        """Have at least so many lines; whether it grew. ResourceExhausted beyond the limit: nothing has changed."""
        if lines <= self.size:
            return False
        if lines > self.limit:
            raise errors.ResourceExhausted(
                f"{lines} lines of {self._table.name.lower()} are wanted, the limit is {self.limit}",
                fix="declare less, or spread it over more clusters",
            )
        size = self.size
        while size < lines:
            size = min(size * 2, self.limit)
        self._take(self._make(size), before=self.size * LINE, publish=True)
        return True

    def replace(self, lines: int) -> None:
        """An empty table of that size instead: for tables that programs fill."""
        self._take(self._make(lines), publish=True)

    def at(self, index: int, kind: type[S]) -> S:
        """The structure in a line, in the kernel's memory; until the table grows."""
        return kind.from_buffer(self.mem, index * LINE)

    def clear(self, index: int) -> None:
        start = index * LINE
        self.mem[start : start + LINE] = bytes(LINE)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
