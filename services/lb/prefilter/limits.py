"""Limits and counters in the kernel."""

from __future__ import annotations

import contextlib
import ctypes as ct
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

from services.common.instance import Instance
from services.common.kernel import bpf
from services.common.kernel.maps import BpfMap
from services.common.pipeline.abi import FibAddr
from services.lb.prefilter import abi
from services.lb.prefilter.model import LINK_LOCAL

RATE_MAX: Final = 1_000_000_000
BURST_S: Final = 3600
"""A burst is at most what the rate gives in this time."""
_UNIT: Final = 256
_SECOND: Final = 1_000_000_000 * _UNIT


@dataclass(frozen=True)
class Limit:
    """ident: its number in the kernel."""

    prefix: IPv4Network | IPv6Network
    rate: int
    burst: int
    ident: int

    def entry(self) -> abi.Limit:
        """As programs read it."""
        interval = max(1, _SECOND // self.rate)
        near = self.prefix.version == 6 and self.prefix.subnet_of(LINK_LOCAL)
        return abi.Limit(interval=interval, burst=(self.burst - 1) * interval, near=near)

    def holds(self, address: IPv4Address | IPv6Address) -> bool:
        """Whether a source comes under it, if under no longer one."""
        return address in self.prefix and (address not in LINK_LOCAL or bool(self.entry().near))


@dataclass(frozen=True)
class Traffic:
    """Packets and bytes."""

    packets: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.packets + other.packets, self.bytes + other.bytes)


class LimitTables:
    """Maps pf_rules, pf_limits, pf_sources and pf_counters. Blocks."""

    def __init__(self, instance: Instance, sources: int) -> None:
        """sources: whose rates are kept at the same time."""
        self._pins = instance.pin_dir
        self.sources = sources
        self._exit = contextlib.ExitStack()

    def open(self) -> None:
        """Use the maps that are pinned. NotFound while there are none."""
        self.close()
        self._rules = self._map("pf_rules", abi.RuleKey, ct.c_uint32)
        self._limits = self._map("pf_limits", ct.c_uint32, abi.Limit)
        self._counters = self._map("pf_counters", ct.c_uint32, abi.Counter)
        self._outer = self._map("pf_sources", ct.c_uint32, ct.c_uint32)
        ident = self._outer.lookup(0)
        fd = bpf.map_fd_by_id(ident.value) if ident is not None and ident.value else -1
        if fd < 0 or bpf.map_info(fd).max_entries != self.sources:
            if fd >= 0:
                os.close(fd)
            fd = bpf.map_create("lru_hash", ct.sizeof(abi.Source), 8, self.sources, 0, "pf_buckets")
            # All begin anew: they have their bursts again.
            self._outer.update(0, fd)
        self._buckets = self._exit.enter_context(BpfMap(fd, abi.Source, ct.c_uint64, "pf_buckets"))

    def _map(self, name: str, key: type, value: type) -> BpfMap:  # type: ignore[type-arg]
        return self._exit.enter_context(BpfMap.open(self._pins / abi.MAPS[name], key, value))

    def close(self) -> None:
        self._exit.close()

    def agree(self, limits: Iterable[Limit]) -> None:
        """Have exactly these limits. Each is changed in one store that counts."""
        wanted = {limit.ident: limit for limit in limits}
        keys = {bytes(abi.RuleKey.of(limit.prefix)): limit.ident for limit in wanted.values()}
        for key, ident in list(self._rules.items()):
            if keys.get(bytes(key)) != ident.value:
                self._rules.delete(key)
        for limit in wanted.values():
            entry = limit.entry()
            if bytes(self._limits.lookup(limit.ident) or b"") != bytes(entry):
                self._limits.update(limit.ident, entry)
            self._rules.update(abi.RuleKey.of(limit.prefix), limit.ident)

    def clear_limit(self, ident: int) -> None:
        """Have a new limit's counters begin at nothing."""
        for element in (abi.COUNT_DROPPED + ident, abi.COUNT_PASSED + ident):
            self._counters.update(element, abi.Counter())

    def clear_set(self, ident: int) -> None:
        """Have a new set's counters begin at nothing."""
        self._counters.update(ident, abi.Counter())

    def count(self, element: int) -> Traffic:
        """What was counted: by number of a set, COUNT_DROPPED or COUNT_PASSED and number of a limit."""
        values = self._counters.lookup_percpu(element) or []
        return Traffic(sum(value.packets for value in values), sum(value.bytes for value in values))

    def limited(self, limit: Limit, address: IPv4Address | IPv6Address) -> bool:
        """Whether the next packet of a source would be one too many."""
        source = abi.Source(addr=FibAddr.of(address), rule=limit.ident)
        if address.version == 6:
            source.addr = FibAddr.of(IPv6Address(int(address) >> 64 << 64))
        full = self._buckets.lookup(source)
        if full is None:
            return False
        entry = limit.entry()
        ahead: int = full.value - time.clock_gettime_ns(time.CLOCK_MONOTONIC) * _UNIT
        return bool(entry.burst < ahead <= (entry.burst + entry.interval) * 2)
