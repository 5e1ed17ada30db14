"""The tables that programs fill: connections, translations. They begin small and grow while traffic goes on.

Growing keeps the table before beside the new one, where programs ask after a miss, until this process has carried over
what is still alive; then it goes. So no connection is lost, and memory follows use.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes as ct
import hashlib
import logging
import random
import struct
from dataclasses import dataclass
from typing import Final

from services.common import errors
from services.common.kernel import bpf
from services.common.kernel.beats import beat, beat_shift
from services.common.kernel.lines import Lines
from services.common.kernel.maps import BpfMap
from services.lb import abi
from services.lb.kernel.fronts import inner_of
from services.lb.kernel.tables import Tables

log = logging.getLogger(__name__)

LOOK_S: Final = 2.0
GROWTH: Final = 4
FLOW_LINES: Final = 4096
NATS: Final = 16384
FULL_FLOWS: Final = 0.25
"""Share of all places at which the table grows: then about one line in 300 has more flows than places."""
FULL_NATS: Final = 0.6
_SAMPLE: Final = 512
_LINES_A_STEP: Final = 2048
_FLOW: Final = struct.Struct("=QIHH")


@dataclass(frozen=True)
class Limits:
    """Entries that the tables may grow to; seconds of silence after which a connection is over."""

    flows: int = 1 << 22
    nats: int = 1 << 20
    syn_s: int = 60
    close_s: int = 10
    tcp_s: int = 21600
    any_s: int = 120


def seed_of(cluster: str) -> int:
    """Of the hash by which all nodes of a cluster choose alike."""
    return int.from_bytes(hashlib.sha256(f"fibril lb {cluster}".encode()).digest()[:8], "little") | 1


class Flows:
    """Makes the tables at once; `run` lets them grow."""

    def __init__(self, tables: Tables, cluster: str, limits: Limits) -> None:
        self._tables, self._limits = tables, limits
        most = max(FLOW_LINES, 1 << (limits.flows // abi.FLOWS_A_LINE).bit_length() - 1)
        self.lines = Lines(tables.lines_outer, abi.Table.FLOWS, FLOW_LINES, most)
        config = tables.config
        config.seed, config.beat_shift = seed_of(cluster), beat_shift()
        config.syn_s, config.close_s = limits.syn_s, limits.close_s
        config.tcp_s, config.any_s = limits.tcp_s, limits.any_s
        # Also where an earlier process has died while the table grew: what lies there by the mask before is carried over.
        config.flow_mask = self.lines.size - 1
        self.flows = 0
        """Estimate of those alive."""
        self.nats = 0
        self.problem = ""
        """Why a table cannot grow; empty if it can."""
        with inner_of(tables.nats_outer, 0, abi.Tuple, abi.Nat, "lb_nats") as inner:
            self.nats_size = inner.info.max_entries if inner is not None else 0
        if not self.nats_size:
            try:
                self._put_nats(0, NATS)
            except BaseException:
                self.lines.close()
                raise

    def _put_nats(self, index: int, size: int) -> None:
        try:
            made = BpfMap.create("lru_hash", abi.Tuple, abi.Nat, size, name="lb_nats")
        except OSError as error:
            raise errors.ResourceExhausted(f"no memory for {size} translations: {error.strerror}") from None
        with made:
            self._tables.nats_outer.update(index, made.fd)
        self.nats_size = size

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.look()
                problem = ""
            except (errors.FibrilError, OSError) as error:
                problem = str(error)
                if problem != self.problem:
                    log.warning("tables of connections cannot grow", extra={"cause": problem})
            self.problem = problem
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Grow what is getting full; finish what an earlier process began."""
        if self._tables.config.before_mask:
            await self._carry_flows()
        self.flows = self._estimate()
        if (
            self.flows > FULL_FLOWS * self.lines.size * abi.FLOWS_A_LINE
            and self.lines.size < self.lines.limit
        ):
            await self._grow_flows()
        if self._tables.nats_outer.lookup(1) is not None:
            await asyncio.to_thread(self._carry_nats)
        self.nats = await asyncio.to_thread(self._count_nats)
        if self.nats > FULL_NATS * self.nats_size and self.nats_size < self._limits.nats:
            await asyncio.to_thread(self._grow_nats)

    # ---- connections ----------------------------------------------------------------------------------------
    def _estimate(self) -> int:
        """Flows that are alive, by a sample of lines."""
        size, mem = self.lines.size, self.lines.mem
        sample = range(size) if size <= _SAMPLE else random.sample(range(size), _SAMPLE)
        now = beat(self._tables.config.beat_shift) >> 2 & abi.STAMP
        found = 0
        for line in sample:
            for sig, _, _, stamp in _FLOW.iter_unpack(mem[line * abi.LINE : (line + 1) * abi.LINE]):
                found += sig != 0 and (now - stamp & abi.STAMP) <= self.limit(stamp)
        return found * size // len(sample)

    def limit(self, stamp: int) -> int:
        """flow_limit(): units of silence after which a flow is over."""
        config = self._tables.config
        if stamp & abi.FlowFlag.CLOSING:
            seconds = config.close_s
        elif not stamp & abi.FlowFlag.TCP:
            seconds = config.any_s
        else:
            seconds = config.tcp_s if stamp & abi.FlowFlag.CONFIRMED else config.syn_s
        return (int(seconds) >> 2) + 1

    async def _grow_flows(self) -> None:
        size = min(self.lines.size * GROWTH, self.lines.limit)
        log.info("table of connections grows", extra={"lines": size, "flows": self.flows})
        outer, config = self._tables.lines_outer, self._tables.config
        before = outer.lookup(int(abi.Table.FLOWS))
        assert before is not None
        fd = bpf.map_fd_by_id(before.value)
        # First where to look after a miss, then the new and empty one, then its size.
        with BpfMap(fd, ct.c_uint32, abi.Backend, "flows before"):
            outer.update(int(abi.Table.FLOWS_BEFORE), fd)
        config.before_mask = self.lines.size - 1
        try:
            self.lines.replace(size)
        except BaseException:
            # Nothing has grown: else each attempt would carry the whole table over, onto itself.
            config.before_mask = 0
            outer.delete(int(abi.Table.FLOWS_BEFORE))
            raise
        config.flow_mask = size - 1
        await self._carry_flows()

    async def _carry_flows(self) -> None:
        """Copy what programs have not carried over themselves, then let go of the table before."""
        before = Lines(self._tables.lines_outer, abi.Table.FLOWS_BEFORE, 1, self.lines.limit)
        try:
            # What programs wrote by the mask before, while this one was new, lies in the same lines.
            for lines in (before, self.lines):
                for start in range(0, before.size, _LINES_A_STEP):
                    raw = lines.mem[start * abi.LINE : (start + _LINES_A_STEP) * abi.LINE]
                    for sig, backend, port, stamp in _FLOW.iter_unpack(raw):
                        if sig:
                            self._carry(sig, backend, port, stamp)
                    await asyncio.sleep(0)
        finally:
            before.close()
        self._tables.config.before_mask = 0
        self._tables.lines_outer.delete(int(abi.Table.FLOWS_BEFORE))

    def _carry(self, sig: int, backend: int, port: int, stamp: int) -> None:
        mem = self.lines.mem
        at = (sig & self.lines.size - 1) * abi.LINE
        places = [at + place * _FLOW.size for place in range(abi.FLOWS_A_LINE)]
        sigs = [_FLOW.unpack_from(mem, place)[0] for place in places]
        if sig in sigs or 0 not in sigs:
            return
        place = places[sigs.index(0)]
        # What it is before what it is found by.
        struct.pack_into("=IHH", mem, place + 8, backend, port, stamp)
        struct.pack_into("=Q", mem, place, sig)

    # ---- translations ---------------------------------------------------------------------------------------
    def _count_nats(self) -> int:
        with inner_of(self._tables.nats_outer, 0, abi.Tuple, abi.Nat, "lb_nats") as inner:
            return (
                sum(len(keys) // inner.info.key_size for keys, _ in inner.items_packed())
                if inner is not None
                else 0
            )

    def _grow_nats(self) -> None:
        size = min(self.nats_size * GROWTH, self._limits.nats)
        log.info("table of translations grows", extra={"size": size, "used": self.nats})
        outer = self._tables.nats_outer
        before = outer.lookup(0)
        assert before is not None
        # First where to look after a miss, then the new and empty one.
        with BpfMap(bpf.map_fd_by_id(before.value), abi.Tuple, abi.Nat, "lb_nats before") as old:
            outer.update(1, old.fd)
        self._put_nats(0, size)
        self._carry_nats()

    def _carry_nats(self) -> None:
        """Copy what programs have not written anew, then let go of the table before."""
        outer = self._tables.nats_outer
        with (
            inner_of(outer, 1, abi.Tuple, abi.Nat, "lb_nats before") as old,
            inner_of(outer, 0, abi.Tuple, abi.Nat, "lb_nats") as new,
        ):
            if old is not None and new is not None and old.info.id != new.info.id:
                for keys, values in old.items_packed():
                    for at in range(len(keys) // ct.sizeof(abi.Tuple)):
                        key = abi.Tuple.from_buffer_copy(keys, at * ct.sizeof(abi.Tuple))
                        value = abi.Nat.from_buffer_copy(values, at * ct.sizeof(abi.Nat))
                        # What is there is newer.
                        with contextlib.suppress(errors.AlreadyExists):
                            new.update(key, value, bpf.NOEXIST)
        outer.delete(1)
