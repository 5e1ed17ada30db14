"""All tables of the family, open: inner maps adopted, or made small."""

from __future__ import annotations

import contextlib
import ctypes as ct
import mmap
from pathlib import Path
from typing import Any, Final

from services.common.instance import Instance
from services.common.kernel.lines import Lines, Outer
from services.common.kernel.maps import BpfMap
from services.lb import abi
from services.lb.kernel.fronts import Fronts, Known, open_known

FRONT_MAX: Final = 1 << 20
SLOT_LINES_MAX: Final = 1 << 20
_SMALLEST_LINES: Final = 64


class Tables:
    """Of one instance. NotFound while the maps are not pinned."""

    def __init__(self, instance: Instance) -> None:
        pins = instance.pin_dir
        self._exit = contextlib.ExitStack()
        try:
            self.lines_outer: Outer = self._open(pins, "lb_lines", ct.c_uint32)
            self.nats_outer: Outer = self._open(pins, "lb_nats", ct.c_uint32)
            fronts: Outer = self._open(pins, "lb_fronts", ct.c_uint32)
            self.services = self._lines(abi.Table.SERVICES, _SMALLEST_LINES, abi.SERVICE_MAX)
            self.backends = self._lines(abi.Table.BACKENDS, _SMALLEST_LINES, abi.BACKEND_INDEX + 1)
            self.slots = self._lines(abi.Table.SLOTS, _SMALLEST_LINES, SLOT_LINES_MAX)
            self.hints = self._lines(abi.Table.HINT, abi.HINT_LINES, abi.HINT_LINES)
            self.fronts = Fronts(fronts, FRONT_MAX)
            self._exit.callback(self.fronts.close)
            self.ranges: Known[abi.RangeKey, abi.Front] = open_known(
                pins / abi.MAPS["lb_ranges"], abi.RangeKey, abi.Front
            )
            self._exit.callback(self.ranges.table.close)
            self.sources: Known[abi.SourceKey, abi.Admitted] = open_known(
                pins / abi.MAPS["lb_sources"], abi.SourceKey, abi.Admitted
            )
            self._exit.callback(self.sources.table.close)
            self.stats: BpfMap[Any, ct.c_uint64] = self._open(pins, "lb_stats", ct.c_uint64)
            self.exhausted = self._exit.enter_context(
                BpfMap.open(pins / abi.MAPS["lb_exhausted"], abi.FullKey, abi.Full)
            )
            with BpfMap.open(pins / abi.MAPS["lb_config"], ct.c_uint32, abi.Config) as config:
                self._config = mmap.mmap(config.fd, mmap.PAGESIZE)
            self.config = abi.Config.from_buffer(self._config)
            self.fronts.changed = self._front_changed
        except BaseException:
            self._exit.close()
            raise

    def _open(self, pins: Path, name: str, value: type[Any]) -> BpfMap[Any, Any]:
        return self._exit.enter_context(BpfMap.open(pins / abi.MAPS[name], ct.c_uint32, value))

    def _lines(self, table: abi.Table, smallest: int, limit: int) -> Lines:
        lines = Lines(self.lines_outer, table, smallest, limit)
        self._exit.callback(lines.close)
        return lines

    def _front_changed(self) -> None:
        """Has programs look frontends up anew."""
        self.config.epoch = (self.config.epoch + 1) & 0xFFFFFFFF

    def stat(self, which: abi.Stat) -> int:
        """A counter of the programs', all CPUs together."""
        return sum(value.value for value in self.stats.lookup_percpu(int(which)) or ())

    def close(self) -> None:
        """Everything in the kernel stays."""
        self._exit.close()
