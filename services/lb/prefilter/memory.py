"""Inner arrays of the prefilter in this process's memory."""

from __future__ import annotations

import mmap
import os
from typing import Any

from services.common import errors
from services.common.kernel import bpf
from services.common.kernel.maps import BpfMap
from services.lb.prefilter import abi

Outer = BpfMap[Any, Any]


class Memory:
    """One inner array, mapped."""

    def __init__(self, fd: int) -> None:
        """Takes over the descriptor."""
        self.fd = fd
        info = bpf.map_info(fd)
        self.lines, self.line = info.max_entries, info.value_size
        self._mapped = mmap.mmap(fd, self.lines * self.line)
        self.bytes = memoryview(self._mapped)
        self.words = self.bytes.cast("Q")

    @classmethod
    def make(cls, name: str, lines: int, line: int = abi.LINE) -> Memory:
        """Zeroes. ResourceExhausted when the kernel has no memory for it."""
        try:
            return cls(bpf.map_create("array", 4, line, lines, abi.INNER | abi.MMAPABLE, name))
        except OSError as error:
            raise errors.ResourceExhausted(
                f"no memory for {lines * line >> 20} MiB of {name}: {os.strerror(error.errno or 0)}",
                fix="declare fewer prefixes, or give the node more memory",
            ) from None

    @classmethod
    def adopt(cls, outer: Outer, index: int) -> Memory | None:
        """What an outer map has; None: nothing."""
        ident = outer.lookup(index)
        return cls(bpf.map_fd_by_id(ident.value)) if ident is not None and ident.value else None

    def close(self) -> None:
        if self.fd >= 0:
            self.words.release()
            self.bytes.release()
            self._mapped.close()
            os.close(self.fd)
            self.fd = -1
