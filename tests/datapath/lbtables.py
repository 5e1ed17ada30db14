"""The lb family's maps filled by hand: for tests of programs, without the lb service's own writer."""

from __future__ import annotations

import ctypes as ct
import mmap
import os
import socket
import time
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import Any

from services.common.kernel import bpf
from services.common.kernel.maps import BpfMap
from services.common.pipeline.abi import FibAddr, be32
from services.lb import abi

TCP, UDP = 6, 17
SEED = 0x1234567890ABCDEF
_FIRST_SLOT = 16
# CLOCK_MONOTONIC_COARSE: its resolution is the kernel's tick.
_COARSE = 6


def beat_shift() -> int:
    """What makes about a second of the kernel's ticks."""
    return max(0, round(1 / time.clock_getres(_COARSE)).bit_length() - 1)


def _front_flags(address: str, outside: bool) -> int:
    """The unspecified address is a node port's."""
    every = abi.FrontFlag.EVERY if ip_address(address).is_unspecified else 0
    return every | (abi.FrontFlag.OUTSIDE if outside else 0)


class LbTables:
    """Inner maps of small sizes in the outer ones that are pinned below `pin_dir`. `close` unmaps."""

    def __init__(self, pin_dir: Path, lines: int = 256, flows: int = 256, nats: int = 1024) -> None:
        self._pin_dir = pin_dir
        self._mapped: dict[int, mmap.mmap] = {}
        self._fds: list[int] = []
        for table in abi.Table:
            if table is abi.Table.FLOWS_BEFORE:
                continue
            size = {abi.Table.FLOWS: flows, abi.Table.HINT: abi.HINT_LINES}.get(table, lines)
            self.put_lines(table, size)
        self._fronts_fd = bpf.map_create("hash", 24, 8, 4096, abi.NO_PREALLOC, "fronts")
        self._outer("lb_fronts", 0, self._fronts_fd)
        self._nats_fd = bpf.map_create("lru_hash", 40, 48, nats, 0, "nats")
        self._outer("lb_nats", 0, self._nats_fd)
        with BpfMap.open(pin_dir / abi.MAPS["lb_nats"], ct.c_uint32, ct.c_uint32) as outer:
            outer.delete(1)
        with BpfMap.open(pin_dir / abi.MAPS["lb_nats_new"], abi.Tuple, abi.Nat) as new:
            new.delete_batch(list(new.keys()))
        self.config_map = BpfMap.open(pin_dir / abi.MAPS["lb_config"], ct.c_uint32, abi.Config)
        self.config = abi.Config(
            seed=SEED, flow_mask=flows - 1, beat_shift=beat_shift(), syn_s=60, close_s=10, tcp_s=21600, any_s=60,
            snat_ports=(ct.c_uint32 * 2)(1024 << 16 | 29999, 61000 << 16 | 65535),
            # What programs remember of tables before these is of no use.
            epoch=time.monotonic_ns() // 1000 & 0xFFFFFFFF,
        )  # fmt: skip
        self.write_config()
        self._services, self._backends, self._slots = 1, 1, _FIRST_SLOT

    def put_lines(self, table: abi.Table, lines: int) -> None:
        fd = bpf.map_create("array", 4, abi.LINE, lines, abi.INNER | abi.MMAPABLE, "lines")
        self._mapped[table] = mmap.mmap(fd, lines * abi.LINE)
        if table is abi.Table.FLOWS:
            self._flows_fd = fd
        self._outer("lb_lines", int(table), fd)

    def _outer(self, name: str, index: int, fd: int) -> None:
        with BpfMap.open(self._pin_dir / abi.MAPS[name], ct.c_uint32, ct.c_uint32) as outer:
            outer.update(index, fd)
        self._fds.append(fd)

    def write_config(self, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(self.config, name, value)
        self.config_map.update(0, self.config)

    def snat(self, v4: str = "", v6: str = "") -> None:
        self.write_config(
            snat_v4=be32(IPv4Address(v4)) if v4 else 0, snat_v6=FibAddr.of(v6) if v6 else FibAddr()
        )

    def line(self, table: abi.Table, index: int, kind: type[Any]) -> Any:
        """The structure in a line, in the kernel's own memory."""
        return kind.from_buffer(self._mapped[table], index * abi.LINE)

    def hint(self, address: str, bits: int) -> None:
        self._mapped[abi.Table.HINT][abi.hint_of(ip_address(address))] |= bits

    def fronts(self) -> BpfMap[abi.FrontKey, abi.Front]:
        return BpfMap(os.dup(self._fronts_fd), abi.FrontKey, abi.Front, "fronts")

    def nats(self) -> BpfMap[abi.Tuple, abi.Nat]:
        return BpfMap(os.dup(self._nats_fd), abi.Tuple, abi.Nat, "nats")

    def begun(self) -> BpfMap[abi.Tuple, abi.Nat]:
        """Of connections that have only said SYN."""
        return BpfMap.open(self._pin_dir / abi.MAPS["lb_nats_new"], abi.Tuple, abi.Nat)

    def ranges(self) -> BpfMap[abi.RangeKey, abi.Front]:
        return BpfMap.open(self._pin_dir / abi.MAPS["lb_ranges"], abi.RangeKey, abi.Front)

    def grow_flows(self, lines: int) -> None:
        """A larger table takes the place of the one there is, which is asked after a miss from then on."""
        self._mapped[abi.Table.FLOWS_BEFORE] = self._mapped[abi.Table.FLOWS]
        self._outer("lb_lines", int(abi.Table.FLOWS_BEFORE), os.dup(self._flows_fd))
        before = self.config.flow_mask
        self.put_lines(abi.Table.FLOWS, lines)
        self.write_config(flow_mask=lines - 1, before_mask=before)

    def grow_nats(self, nats: int = 4096) -> None:
        """The same for translations."""
        self._outer("lb_nats", 1, os.dup(self._nats_fd))
        self._nats_fd = bpf.map_create("lru_hash", 40, 48, nats, 0, "nats")
        self._outer("lb_nats", 0, self._nats_fd)

    def service(
        self,
        fronts: Iterable[tuple[str, int]],
        backends: Iterable[tuple[str, int]] | Mapping[tuple[str, int], int],
        proto: int = TCP,
        flags: int = 0,
        outside: bool = True,
        affinity_s: int = 0,
    ) -> tuple[int, list[int]]:
        """A service whose backends (or (address, port): flags) all serve both kinds of client; its index and their ids."""
        index = self._services
        self._services += 1
        given = backends if isinstance(backends, Mapping) else dict.fromkeys(backends, 0)
        ids = [self.backend(index, address, port, bits) for (address, port), bits in given.items()]
        stretch = abi.Stretch(first=self._slots, count=len(ids))
        slots = (ct.c_uint32 * len(ids)).from_buffer(self._mapped[abi.Table.SLOTS], self._slots * 4)
        slots[:] = ids
        self._slots += len(ids)
        line = self.line(abi.Table.SERVICES, index, abi.Service)
        line.name, line.flags, line.affinity_s = index, flags, affinity_s
        line.inside = line.outside = stretch
        front = abi.Front(service=index)
        with self.fronts() as table:
            for address, port in fronts:
                front.first = port
                front.flags = _front_flags(address, outside)
                table.update(abi.FrontKey.of(ip_address(address), port, proto), front)
                self.hint(address, abi.Hint.VIP)
        self.fronts_changed()
        return index, ids

    def backend(self, service: int, address: str, port: int, flags: int = 0) -> int:
        ident = self._backends
        self._backends += 1
        line = self.line(abi.Table.BACKENDS, ident, abi.Backend)
        line.addr, line.service, line.port = FibAddr.of(address), service, socket.htons(port)
        line.state, line.flags, line.id = abi.BackendState.ACTIVE, flags, ident
        self.hint(address, abi.Hint.BACKEND)
        return ident

    def node_address(self, address: str) -> None:
        """An address of this node: node ports are served there."""
        with self.fronts() as table:
            table.update(abi.FrontKey.of(ip_address(address), 0, 0), abi.Front(flags=abi.FrontFlag.NODE))
        self.hint(address, abi.Hint.NODE)
        self.fronts_changed()

    def fronts_changed(self) -> None:
        """To be called after a change of `fronts` that programs may know otherwise."""
        self.write_config(epoch=(self.config.epoch + 1) & 0xFFFFFFFF)

    def memory(self, table: abi.Table) -> mmap.mmap:
        """A table's lines."""
        return self._mapped[table]

    def flows(self) -> list[abi.Flow]:
        raw = bytes(self._mapped[abi.Table.FLOWS])
        size = ct.sizeof(abi.Flow)
        found = [abi.Flow.from_buffer_copy(raw, at) for at in range(0, len(raw), size)]
        return [flow for flow in found if flow.sig]

    def forget_flows(self) -> None:
        """As if all had been displaced."""
        table = self._mapped[abi.Table.FLOWS]
        table[:] = bytes(len(table))

    def age_flows(self, units: int = 1) -> None:
        """As if all had been silent for units of four beats more."""
        table = self._mapped[abi.Table.FLOWS]
        for at in range(0, len(table), ct.sizeof(abi.Flow)):
            flow = abi.Flow.from_buffer(table, at)
            if flow.sig:
                flow.stamp = (flow.stamp & ~abi.STAMP) | ((flow.stamp - units) & abi.STAMP)

    def age_nats(self, units: int = 1) -> None:
        """The same of translations."""
        with self.nats() as nats, self.begun() as begun:
            for table in (nats, begun):
                for key, nat in list(table.items()):
                    nat.stamp = (nat.stamp & ~abi.STAMP) | ((nat.stamp - units) & abi.STAMP)
                    table.update(key, nat)

    def stats(self) -> dict[abi.Stat, int]:
        with BpfMap.open(self._pin_dir / abi.MAPS["lb_stats"], ct.c_uint32, ct.c_uint64) as table:
            return {stat: sum(v.value for v in table.lookup_percpu(int(stat)) or []) for stat in abi.Stat}

    def close(self) -> None:
        self.config_map.close()
        for fd in self._fds:
            os.close(fd)
