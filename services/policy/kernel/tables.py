"""All tables of the family, open: inner maps adopted, or made."""

from __future__ import annotations

import contextlib
import ctypes as ct
import mmap
from typing import Any, Final

from services.common.instance import Instance
from services.common.kernel import bpf
from services.common.kernel.lines import Lines
from services.common.kernel.maps import BpfMap
from services.common.pipeline.abi import EP_MAX
from services.policy import abi

CELL_LINES_MAX: Final = 1 << 19
POLICIES_MAX: Final = 1 << 16
_SMALLEST: Final = 64


class Tables:
    """Of one instance. NotFound while the maps are not pinned. connections: how many to remember."""

    def __init__(self, instance: Instance, connections: int) -> None:
        pins = instance.pin_dir
        self._exit = contextlib.ExitStack()
        try:
            outer: BpfMap[Any, ct.c_uint32] = self._exit.enter_context(
                BpfMap.open(pins / abi.MAPS["pol_lines"], ct.c_uint32, ct.c_uint32)
            )
            self.policies = Lines(outer, abi.Table.POLICIES, _SMALLEST, POLICIES_MAX)
            self._exit.callback(self.policies.close)
            self.cells = Lines(outer, abi.Table.CELLS, _SMALLEST, CELL_LINES_MAX)
            self._exit.callback(self.cells.close)
            self.peers: BpfMap[abi.Peer, ct.c_uint32] = self._exit.enter_context(
                BpfMap.open(pins / abi.MAPS["pol_peers"], abi.Peer, ct.c_uint32)
            )
            self.prefixes: BpfMap[abi.Prefix, ct.c_uint32] = self._exit.enter_context(
                BpfMap.open(pins / abi.MAPS["pol_prefixes"], abi.Prefix, ct.c_uint32)
            )
            self.stats: BpfMap[Any, ct.c_uint64] = self._exit.enter_context(
                BpfMap.open(pins / abi.MAPS["pol_stats"], ct.c_uint32, ct.c_uint64)
            )
            self.new: BpfMap[abi.CtKey, abi.CtEntry] = self._exit.enter_context(
                BpfMap.open(pins / abi.MAPS["ct_new"], abi.CtKey, abi.CtEntry)
            )
            flows: BpfMap[Any, ct.c_uint32] = self._exit.enter_context(
                BpfMap.open(pins / abi.MAPS["ct_flows"], ct.c_uint32, ct.c_uint32)
            )
            self.flows = self._exit.enter_context(_flows(flows, connections))
            with BpfMap.open(pins / abi.MAPS["pol_eps"], ct.c_uint32, abi.Ep) as eps:
                self.eps_memory = mmap.mmap(eps.fd, EP_MAX * ct.sizeof(abi.Ep))
            with BpfMap.open(pins / abi.MAPS["pol_config"], ct.c_uint32, abi.Config) as config:
                self._config = mmap.mmap(config.fd, mmap.PAGESIZE)
            self.config = abi.Config.from_buffer(self._config)
        except BaseException:
            self._exit.close()
            raise

    def ep(self, number: int) -> abi.Ep:
        """An endpoint's element, in the kernel's memory."""
        return abi.Ep.from_buffer(self.eps_memory, number * ct.sizeof(abi.Ep))

    def stat(self, which: abi.Stat) -> int:
        """A counter of the programs', all CPUs together."""
        return sum(value.value for value in self.stats.lookup_percpu(int(which)) or ())

    def close(self) -> None:
        """Everything in the kernel stays."""
        self._exit.close()


def _flows(outer: BpfMap[Any, ct.c_uint32], size: int) -> BpfMap[abi.CtKey, abi.CtEntry]:
    """The table of connections: the one there is if it has that size, else a new one that takes over what that has."""
    ident = outer.lookup(0)
    before: BpfMap[abi.CtKey, abi.CtEntry] | None = None
    if ident is not None and ident.value:
        before = BpfMap(bpf.map_fd_by_id(ident.value), abi.CtKey, abi.CtEntry, "ct_flows")
        if before.info.max_entries == size:
            return before
    made = BpfMap.create("lru_hash", abi.CtKey, abi.CtEntry, size, name="ct_flows")
    if before is not None:
        # What changes meanwhile is asked anew.
        with before:
            for keys, values in before.items_packed():
                made.update_packed(keys, values)
    outer.update(0, made.fd)
    return made
