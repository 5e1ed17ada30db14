"""Probes in step with what is to be probed. For one thread; probes go with the process."""

from __future__ import annotations

import ctypes as ct
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from services.common import errors
from services.common.kernel import progs, uprobe
from services.common.kernel.maps import BpfMap
from services.sockaccel.tls import programs
from services.sockaccel.tls.scan import ENTRY, RETURN, File, Key

if TYPE_CHECKING:
    from services.common.instance import Instance


class Probes:
    """Opened once the programs are loaded."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._at: dict[Key, list[int]] = {}
        self._spaces: BpfMap[ct.c_uint32, ct.c_uint32] = BpfMap.open(
            instance.pin_dir / programs.MAPS["tls_spaces"], ct.c_uint32, ct.c_uint32
        )
        self._stats: BpfMap[ct.c_uint32, ct.c_uint64] = BpfMap.open(
            instance.pin_dir / programs.MAPS["tls_stats"], ct.c_uint32, ct.c_uint64
        )

    def close(self) -> None:
        """All probes go."""
        for key in list(self._at):
            self._drop(key)
        self._spaces.close()
        self._stats.close()

    def choose(self, inodes: set[int]) -> None:
        """Network namespaces whose processes are looked at: none else is, whatever is probed."""
        there = {int(key.value) for key in self._spaces.keys()}  # noqa: SIM118 - it is no mapping
        for inode in there - inodes:
            self._spaces.delete(inode)
        for inode in inodes - there:
            self._spaces.update(inode, 1)

    def agree(self, wanted: Mapping[Key, File]) -> dict[Key, str]:
        """Have probes in these files and no others; why some have none.

        Those are tried again with each call: the process by which a file was reached may have ended.
        """
        for key in list(self._at):
            if key not in wanted:
                self._drop(key)
        refused = {}
        for key, file in wanted.items():
            if key not in self._at and file.places:
                try:
                    self._at[key] = self._attach(file)
                except errors.FibrilError as error:
                    refused[key] = str(error)
        return refused

    def stat(self, which: int) -> int:
        return sum(int(each.value) for each in self._stats.lookup_percpu(which) or ())

    def _attach(self, file: File) -> list[int]:
        held: list[int] = []
        try:
            # Where two have one place, the later one's arguments are there (places.py).
            for offset, function in {offset: function for function, offset in sorted(file.places.items())}.items():
                name = ENTRY[function]
                if name in ("fib_tls_read", "fib_tls_read_ex"):
                    held.append(self._one(RETURN, file, offset, True))
                held.append(self._one(name, file, offset, False))
        except BaseException:
            _close(held)
            raise
        return held

    def _one(self, name: str, file: File, offset: int, returning: bool) -> int:
        with progs.opened(programs.path(self._instance, name)) as program:
            return uprobe.attach(program, file.reach, offset, returning)

    def _drop(self, key: Key) -> None:
        _close(self._at.pop(key))


def _close(held: list[int]) -> None:
    for each in held:
        os.close(each)
