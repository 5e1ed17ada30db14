"""The table of connections, seen from user space: what is over is taken out a few thousand at a time, what is there counted."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Final

from services.common.errors import FibrilError
from services.common.kernel.beats import beat
from services.common.pipeline.abi import FibAddr, IPAddress
from services.common.service import ComponentStatus
from services.policy import abi
from services.policy.kernel.tables import Tables
from services.policy.model import ICMP, ICMPV6, TCP

STEP: Final = 2048
STEP_S: Final = 0.25
ROUND_S: Final = 15.0
FULL: Final = 0.97


@dataclass(frozen=True)
class Connection:
    """One that the kernel knows. established: it is in the table of those."""

    source: IPAddress
    destination: IPAddress
    protocol: int
    source_port: int
    destination_port: int
    entry: abi.CtEntry
    established: bool
    idle_s: int
    alive: bool

    @property
    def state(self) -> str:
        flags, both = abi.CtFlag(self.entry.flags), abi.CtFlag.CLIENT_FIN | abi.CtFlag.SERVER_FIN
        if not self.alive or flags & abi.CtFlag.RESET or flags & both == both:
            return "closed"
        if flags & both:
            return "closing"
        return "established" if flags & abi.CtFlag.ANSWERED else "new"


class Connections:
    """Used from one event loop."""

    def __init__(self, tables: Callable[[], Tables | None], capacity: int) -> None:
        self._tables, self.capacity = tables, capacity
        self.alive = 0
        """As of the last round."""
        self.collected = 0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            tables = self._tables()
            if tables is not None:
                await self._round(tables)
            await asyncio.sleep(ROUND_S)

    async def _round(self, tables: Tables) -> None:
        alive = 0
        walk = tables.flows.items()
        while self._tables() is tables:
            try:
                some = list(islice(walk, STEP))
                over = [key for key, entry in some if not is_alive(tables, entry, key.proto)]
                tables.flows.delete_batch(over)
            except FibrilError:
                return
            alive += len(some) - len(over)
            self.collected += len(over)
            if len(some) < STEP:
                self.alive = alive
                return
            await asyncio.sleep(STEP_S)

    def find(
        self, source: IPAddress, destination: IPAddress, protocol: int, source_port: int, destination_port: int
    ) -> Connection | None:
        """The connection that a packet belongs to, of those not over. None for ICMP, whose connections have ids, not ports."""
        tables = self._tables()
        if tables is None or protocol in (ICMP, ICMPV6):
            return None
        low, key = key_of(source, destination, protocol, source_port, destination_port)
        for table, established in ((tables.flows, True), (tables.new, False)):
            entry = table.lookup(key)
            if entry is None or not is_alive(tables, entry, protocol):
                continue
            forward = bool(entry.flags & abi.CtFlag.CLIENT_LOW) == low
            ends = (source, destination, source_port, destination_port)
            client, server, client_port, server_port = ends if forward else (ends[1], ends[0], ends[3], ends[2])
            idle = max(0, (beat(tables.config.beat_shift) - entry.seen + 0x80000000 & 0xFFFFFFFF) - 0x80000000)
            return Connection(client, server, protocol, client_port, server_port, entry, established, idle, True)
        return None

    def status(self) -> list[ComponentStatus]:
        tables = self._tables()
        full = self.alive >= FULL * self.capacity
        text = (
            "the table is full: connections longest silent are forgotten, and asked about anew; raise policy.connections"
            if full
            else f"{self.alive} established connections"
        )
        lost = f"; {refused} could not be recorded" if tables is not None and (refused := tables.stat(abi.Stat.TABLE)) else ""
        return [
            ComponentStatus(
                "connections", "degraded" if full else "ok", text + lost, used=self.alive, capacity=self.capacity
            )
        ]


def key_of(
    source: IPAddress, destination: IPAddress, protocol: int, source_port: int, destination_port: int
) -> tuple[bool, abi.CtKey]:
    """The key in both tables, and whether the source is the lower end: as the programs compare them. Not for ICMP."""
    one, two = FibAddr.of(source), FibAddr.of(destination)
    low = (one.q[1], one.q[0]) < (two.q[1], two.q[0])
    ports = (socket.htons(source_port), socket.htons(destination_port))
    if low:
        return low, abi.CtKey(low=one, high=two, low_port=ports[0], high_port=ports[1], proto=protocol)
    return low, abi.CtKey(low=two, high=one, low_port=ports[1], high_port=ports[0], proto=protocol)


def is_alive(tables: Tables, entry: abi.CtEntry, protocol: int) -> bool:
    """Whether a connection's entry still counts: ct_alive of the programs."""
    config, flags = tables.config, entry.flags
    both = abi.CtFlag.CLIENT_FIN | abi.CtFlag.SERVER_FIN
    if protocol != TCP:
        limit = min(config.any_s, abi.PASSES_S) if flags & abi.CtFlag.PASSES else config.any_s
    elif flags & abi.CtFlag.RESET or flags & both == both:
        limit = config.close_s
    else:
        limit = config.tcp_s if flags & abi.CtFlag.ANSWERED else config.syn_s
    idle = beat(config.beat_shift) - entry.seen & 0xFFFFFFFF
    # A program may have noted a beat that begins only now.
    return bool(idle <= limit or idle > 0x7FFFFFFF)
