"""Puts plans into the kernel: the only writer of frontends, services, backends, slots and hints.

In such an order that no program ever finds half of something: a backend before the slot that names it, slots before
the count that reaches them, a service before its frontends; and away in the opposite order. Everything is compared with
what is there and only differences are written. Functions do not block: nearly all of it is memory.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from services.common import errors
from services.common.kernel.indexes import FIRST, Indexes
from services.common.kernel.room import SMALLEST, Room
from services.common.pipeline.abi import FibAddr, IPAddress, addr_bytes
from services.lb import abi
from services.lb.kernel.fronts import range_keys
from services.lb.kernel.hints import Hints
from services.lb.kernel.numbers import next_id
from services.lb.kernel.slots import Stretch
from services.lb.kernel.tables import Tables
from services.lb.model import ANY_V6, BackendKey, Frontend, FrontendType, IPNetwork
from services.lb.plan import FamilyPlan
from services.lb.plan import Stretch as Wanted

BACKEND_HINT_REST_S: Final = 600.0
"""How long what a removed backend still sends is taken for an answer."""

Name = tuple[str, int]
"""A service's name and a family."""

_BACKEND: Final = struct.Struct("=16sIIHBBI6sHQ16x")
_BEGINNING: Final = struct.Struct("=16sIIH")
"""Of a backend's line: address, id, service, port."""
_BEGINNINGS: Final = struct.Struct("=16sII2s38x")
_SERVICES: Final = struct.Struct("=Q8xIIII32x")
_STATE_FLAGS: Final = struct.Struct("=BB")
_STATE: Final = abi.Backend.state.offset
_LAST_ID: Final = 40
"""Where a backend's line keeps the id of whom it was last."""
_NOWHERE: Final = bytes(16)
_VIP, _RANGE, _OF_BACKEND = int(abi.Hint.VIP), int(abi.Hint.RANGE), int(abi.Hint.BACKEND)
_TX, _LOCAL = int(abi.BackendFlag.TX), int(abi.BackendFlag.LOCAL)


@dataclass(frozen=True, slots=True)
class RemovedBackend:
    """A backend that is no more: nothing may go on with it."""

    service: str
    address: IPAddress
    port: int
    protos: frozenset[int]
    id: int


@dataclass(slots=True)
class Held:
    """What the kernel has of one service and family."""

    index: int
    inside: Stretch
    outside: Stretch
    """The same object as `inside` while both are alike."""
    backends: dict[BackendKey, int] = field(default_factory=dict)
    fronts: dict[bytes, bytes] = field(default_factory=dict)
    ranges: dict[bytes, bytes] = field(default_factory=dict)
    sources: frozenset[bytes] = frozenset()
    vips: tuple[tuple[bytes, int], ...] = ()
    """Hints it has set, by address (struct fib_addr)."""
    whole: bool = False
    """Its frontends are as they were wanted last; else some of those here may not be in the kernel."""
    protos: frozenset[int] = frozenset()


def line_name(name: Name) -> int:
    """What a service's line is known by."""
    return abi.name_hash(f"{name[0]}/{name[1]}")


def _front_flags(front: Frontend) -> int:
    """LB_FRONT_* of a frontend."""
    flags = abi.FrontFlag.OUTSIDE.value if front.outside else 0
    return flags | abi.FrontFlag.EVERY.value if front.type is FrontendType.NODE_PORT else flags


def _raw(key: BackendKey) -> bytes:
    """Address and port as a backend's line has them."""
    return addr_bytes(key.address) + key.port.to_bytes(2, "big")


def _key(raw: bytes) -> BackendKey:
    """The same back."""
    return BackendKey(FibAddr.from_buffer_copy(raw).ip() or ANY_V6, int.from_bytes(raw[16:], "big"))


def _hinted(held: Held) -> dict[tuple[bytes, int], None]:
    """The hints that frontends in the kernel need."""
    found: dict[tuple[bytes, int], None] = {}
    for raw in held.fronts:
        found[raw[:16], _VIP] = None
    at = abi.RangeKey.addr.offset
    for raw in held.ranges:
        found |= dict.fromkeys(((raw[at : at + 16], _VIP), (raw[at : at + 16], _RANGE)))
    return found


def _by_service(held: Mapping[bytes, bytes]) -> dict[int, dict[bytes, bytes]]:
    """Frontends by the index of their service."""
    found: dict[int, dict[bytes, bytes]] = {}
    for key, value in held.items():
        found.setdefault(struct.unpack_from("=I", value)[0], {})[key] = value
    return found


class Program:
    """Over open tables. `held` is by name and family."""

    def __init__(self, tables: Tables, removed: Callable[[RemovedBackend], None]) -> None:
        self.tables = tables
        self._removed = removed
        self.hints = Hints(tables.hints)
        self.held: dict[Name, Held] = {}
        self.writes = 0
        """Lines and words stored, slots and elements of maps not counted."""
        self._addresses: frozenset[IPAddress] = frozenset()
        self._resting: deque[tuple[float, bytes]] = deque()
        self._adopt()

    # ---- what an earlier process left ---------------------------------------------------------------------
    def _adopt(self) -> None:
        tables = self.tables
        self._left: dict[int, int] = {}
        """Lines by name."""
        words = []
        for index, (name, *stretches) in enumerate(_SERVICES.iter_unpack(tables.services.mem[:])):
            if name and index:
                self._left[name] = index
                words += [(first, count) for first, count in (stretches[:2], stretches[2:]) if count]
        self._left_backends: dict[int, dict[bytes, int]] = {}
        """Ids by address and port, by the index of their service."""
        used = []
        for index, (address, ident, service, port) in enumerate(_BEGINNINGS.iter_unpack(tables.backends.mem[:])):
            if ident and index and address != _NOWHERE:
                used.append(index)
                self._left_backends.setdefault(service, {})[address + port] = ident
        self._backend_indexes = Indexes(tables.backends.limit, "backends", used)
        self._service_indexes = Indexes(tables.services.limit, "services", self._left.values())
        self.room = Room(tables.slots, abi.SLOTS_A_LINE)
        self.room.adopt(words)
        self._left_fronts = _by_service(tables.fronts.held)
        self._left_ranges = _by_service(tables.ranges.held)
        self._left_sources: dict[int, list[bytes]] = {}
        named = set(self._left.values())
        for source in list(tables.sources.held):
            index = struct.unpack_from("!I", source, 4)[0]
            if index in named:
                self._left_sources.setdefault(index, []).append(source)
            else:
                # Of a service that never got as far as its name: whoever has the line next would admit them.
                tables.sources.drop(source)

    def _begin(self, name: Name, wanted: Iterable[BackendKey]) -> Held:
        """What there is of a service, or a line for it. ResourceExhausted."""
        index = self._left.pop(line_name(name), 0)
        if index:
            return self._found(index, wanted)
        index = self._service_indexes.take()
        try:
            self.tables.services.ensure(index + 1)
        except BaseException:
            self._service_indexes.give(index)
            raise
        self.tables.services.clear(index)
        empty = Stretch(self.room)
        return Held(index, empty, empty)

    def _found(self, index: int, wanted: Iterable[BackendKey] = ()) -> Held:
        """What an earlier process left in a line. wanted: backends that it has most likely."""
        line = self.tables.services.at(index, abi.Service)
        inside = Stretch.read(self.room, line.inside)
        same = bytes(line.inside) == bytes(line.outside)
        held = Held(index, inside, inside if same else Stretch.read(self.room, line.outside))
        left = self._left_backends.pop(index, {})
        for raw in left:
            self.hints.add(raw[:16], _OF_BACKEND)
        for key in wanted:
            if ident := left.pop(_raw(key), 0):
                held.backends[key] = ident
        held.backends.update((_key(raw), ident) for raw, ident in left.items())
        held.fronts = self._left_fronts.pop(index, {})
        held.ranges = self._left_ranges.pop(index, {})
        held.sources = frozenset(self._left_sources.pop(index, ()))
        # Frontends stay reachable also where what is wanted now cannot be written.
        held.vips = tuple(_hinted(held))
        for address, bit in held.vips:
            self.hints.add(address, bit)
        return held

    @property
    def used(self) -> tuple[int, int]:
        """Services and backends that have a line."""
        return self._service_indexes.used, self._backend_indexes.used

    def state_of(self, name: Name, key: BackendKey) -> abi.BackendState:
        """A backend's state in the kernel, whoever wrote it; FREE if it is not there."""
        held = self.held.get(name)
        if held is not None:
            ident = held.backends.get(key, 0)
        else:
            ident = self._left_backends.get(self._left.get(line_name(name), 0), {}).get(_raw(key), 0)
        return abi.BackendState(
            self.tables.backends.at(ident & abi.BACKEND_INDEX, abi.Backend).state if ident else abi.BackendState.FREE
        )

    def expect(self, services: int, backends: int, fronts: int) -> None:
        """Have room for so many, where there may be as many: each time a table grows, all programs under way are waited for,
        and many little steps would take as many waits.
        """
        tables = self.tables
        for lines, count in ((tables.services, services), (tables.backends, backends)):
            with contextlib.suppress(errors.ResourceExhausted):
                lines.ensure(min(count + FIRST, lines.limit))
        with contextlib.suppress(errors.ResourceExhausted):
            tables.fronts.ensure(min(fronts, tables.fronts.limit))
        with contextlib.suppress(errors.ResourceExhausted):
            # As much as random choice takes; a Maglev table takes more.
            places = backends + services * SMALLEST
            tables.slots.ensure(min(places // abi.SLOTS_A_LINE + FIRST, tables.slots.limit))

    # ---- one service ----------------------------------------------------------------------------------------
    def apply(self, name: Name, plan: FamilyPlan, sources: tuple[IPNetwork, ...]) -> None:
        """Have the kernel do as planned. ResourceExhausted: part of it may be done, and is gone on with next time."""
        held = self.held.get(name)
        if held is None:
            held = self.held[name] = self._begin(name, plan.states)
        held.protos = frozenset(front.proto for front in plan.fronts)
        local = plan.local
        for key, state in plan.states.items():
            self._backend(held, key, state, _LOCAL if local and key in local else 0)
        self._stretches(held, plan)
        admitted = frozenset(bytes(abi.SourceKey.of(held.index, prefix)) for prefix in sources)
        self._admit(held, admitted)
        line = self.tables.services.at(held.index, abi.Service)
        wanted = (plan.flags.value, plan.affinity_s, line_name(name))
        if (line.flags, line.affinity_s, line.name) != wanted:
            line.flags, line.affinity_s, line.name = wanted
            self.writes += 1
        self._expel(held, admitted)
        self._fronts(held, plan)
        # All that are wanted are held by now.
        if len(held.backends) > len(plan.states):
            self._forget_backends(name, held, held.backends.keys() - plan.states.keys())

    def remove(self, name: Name) -> bool:
        """Take a service away; whether it was there."""
        held = self.held.pop(name, None)
        if held is None:
            return False
        self._take_away(name, held)
        return True

    def prune(self, keep: Iterable[str] = ()) -> int:
        """Take away what an earlier process left and nobody has wanted since, but for services of these names; how many."""
        for name in ((each, family) for each in keep for family in (4, 6)):
            if index := self._left.pop(line_name(name), 0):
                self.held[name] = self._found(index)
        count = len(self._left)
        while self._left:
            _, index = self._left.popitem()
            self._take_away(("", 0), self._found(index))
        # Of services whose line is gone.
        for backends in self._left_backends.values():
            for ident in backends.values():
                self._free(ident)
        self._left_backends.clear()
        return count

    def _take_away(self, name: Name, held: Held) -> None:
        self._drop_fronts(held, held.fronts, held.ranges)
        for address, bit in held.vips:
            self.hints.remove(address, bit)
        for key in held.sources:
            self.tables.sources.drop(key)
        line = self.tables.services.at(held.index, abi.Service)
        line.inside = line.outside = abi.Stretch()
        self._release(held.inside)
        if held.outside is not held.inside:
            self._release(held.outside)
        self._forget_backends(name, held, set(held.backends))
        self.tables.services.clear(held.index)
        self._service_indexes.give(held.index)
        self.writes += 1

    @staticmethod
    def _release(stretch: Stretch) -> None:
        stretch.set((), False, lambda _: None)

    # ---- backends -------------------------------------------------------------------------------------------
    def _backend(self, held: Held, key: BackendKey, state: abi.BackendState, flags: int) -> None:
        ident = held.backends.get(key)
        if ident is None:
            self._new_backend(held, key, state, flags)
            return
        at = (ident & abi.BACKEND_INDEX) * abi.LINE + _STATE
        was, before = _STATE_FLAGS.unpack_from(self.tables.backends.mem, at)
        wanted = before & _TX | flags
        if was != state or before != wanted:
            line = self.tables.backends.at(ident & abi.BACKEND_INDEX, abi.Backend)
            line.state, line.flags = state, wanted
            self.writes += 1

    def _new_backend(self, held: Held, key: BackendKey, state: abi.BackendState, flags: int) -> None:
        index = self._backend_indexes.take()
        lines = self.tables.backends
        try:
            lines.ensure(index + 1)
        except BaseException:
            self._backend_indexes.give(index)
            raise
        at = index * abi.LINE
        ident = next_id(index, struct.unpack_from("=Q", lines.mem, at + _LAST_ID)[0])
        address, port = addr_bytes(key.address), socket.htons(key.port)
        self.hints.add(address, _OF_BACKEND)
        _BACKEND.pack_into(
            lines.mem, at, address, ident, held.index, port, state, flags, 0, bytes(6), 0, ident
        )
        held.backends[key] = ident
        self.writes += 1

    def _forget_backends(self, name: Name, held: Held, gone: Iterable[BackendKey]) -> None:
        for key in list(gone):
            ident = held.backends.pop(key)
            self._free(ident)
            self._resting.append((time.monotonic() + BACKEND_HINT_REST_S, addr_bytes(key.address)))
            self._removed(RemovedBackend(name[0], key.address, key.port, held.protos, ident))

    def _free(self, ident: int) -> None:
        index = ident & abi.BACKEND_INDEX
        line = self.tables.backends.at(index, abi.Backend)
        line.id = 0
        line.state = abi.BackendState.FREE
        self._backend_indexes.give(index)
        self.writes += 1

    def set_next_hop(self, ident: int, ifindex: int, mac: bytes, mtu: int) -> None:
        """Where packets to a backend go next; ifindex 0: programs must look themselves. An id that is gone is fine."""
        line = self.tables.backends.at(ident & abi.BACKEND_INDEX, abi.Backend)
        if line.id != ident:
            return
        flags = line.flags & ~abi.BackendFlag.TX
        if (line.ifindex, bytes(line.mac), line.mtu, bool(line.flags & abi.BackendFlag.TX)) == (
            ifindex, mac, mtu, bool(ifindex)
        ):  # fmt: skip
            return
        line.flags = flags
        line.ifindex, line.mac, line.mtu = ifindex, (type(line.mac))(*mac), mtu
        if ifindex:
            line.flags = flags | abi.BackendFlag.TX
        self.writes += 1

    # ---- stretches ------------------------------------------------------------------------------------------
    def _stretches(self, held: Held, plan: FamilyPlan) -> None:
        shared = plan.inside == plan.outside or not any(front.outside for front in plan.fronts)
        if shared:
            self._set(held, held.inside, plan.inside, ("inside", "outside"))
            if held.outside is not held.inside:
                before, held.outside = held.outside, held.inside
                self._word(held, ("outside",), held.inside.word)
                self._release(before)
            return
        if held.outside is held.inside:
            held.outside = Stretch(self.room)
            self._set(held, held.outside, plan.outside, ("outside",))
            if not held.outside.ids:
                self._word(held, ("outside",), abi.Stretch())
        else:
            self._set(held, held.outside, plan.outside, ("outside",))
        self._set(held, held.inside, plan.inside, ("inside",))

    def _set(self, held: Held, stretch: Stretch, wanted: Wanted, words: tuple[str, ...]) -> None:
        ids = [held.backends[key] for key in wanted.members]
        if wanted.order:
            ids = [ids[index] for index in wanted.order]
        stretch.set(ids, wanted.ordered, lambda word: self._word(held, words, word))

    def _word(self, held: Held, words: tuple[str, ...], word: abi.Stretch) -> None:
        line = self.tables.services.at(held.index, abi.Service)
        for name in words:
            # Eight aligned bytes: one store.
            setattr(line, name, word)
        self.writes += 1

    # ---- frontends ------------------------------------------------------------------------------------------
    def _fronts(self, held: Held, plan: FamilyPlan) -> None:
        exact: dict[bytes, bytes] = {}
        ranges: dict[bytes, bytes] = {}
        vips: dict[tuple[bytes, int], None] = {}
        for front in plan.fronts:
            value = abi.front(held.index, front.port, _front_flags(front))
            address = addr_bytes(front.address)
            vips[address, _VIP] = None
            if front.port == front.port_last:
                exact[abi.front_key(front.address, front.port, front.proto)] = value
            else:
                vips[address, _RANGE] = None
                ranges.update(
                    dict.fromkeys(range_keys(front.address, front.proto, front.port, front.port_last), value)
                )
        if held.whole and (exact, ranges, tuple(vips)) == (held.fronts, held.ranges, held.vips):
            return
        # What is about to be written is held already: a table may be full in the middle of it.
        held.whole = False
        gone, gone_ranges = held.fronts.keys() - exact.keys(), held.ranges.keys() - ranges.keys()
        held.fronts, held.ranges = held.fronts | exact, held.ranges | ranges
        before = set(held.vips)
        held.vips = tuple(dict.fromkeys((*held.vips, *vips)))
        for address, bit in vips.keys() - before:
            self.hints.add(address, bit)
        self.tables.fronts.put_many(exact)
        self.tables.ranges.put_many(ranges)
        self._drop_fronts(held, gone, gone_ranges)
        held.fronts, held.ranges, held.vips, held.whole = exact, ranges, tuple(vips), True
        for address, bit in before - vips.keys():
            self.hints.remove(address, bit)

    def _drop_fronts(self, held: Held, exact: Iterable[bytes], ranges: Iterable[bytes]) -> None:
        """Unless they are another service's by now."""
        mine = struct.pack("=I", held.index)
        for known, keys in ((self.tables.fronts, exact), (self.tables.ranges, ranges)):
            for key in list(keys):
                if known.held.get(key, b"")[:4] == mine:
                    known.drop(key)

    def _admit(self, held: Held, wanted: frozenset[bytes]) -> None:
        """Before the service's line says that sources count: nobody who is admitted is refused for a moment."""
        if wanted:
            # Held first: a table may be full in the middle of it, and what is there must go with the service.
            held.sources |= wanted
            self.tables.sources.put_many(dict.fromkeys(wanted, b"\1"))

    def _expel(self, held: Held, wanted: frozenset[bytes]) -> None:
        for key in held.sources - wanted:
            self.tables.sources.drop(key)
        held.sources = wanted

    # ---- the node -------------------------------------------------------------------------------------------
    def set_addresses(self, addresses: frozenset[IPAddress]) -> None:
        """Those of this node, where its node ports are."""
        mark = bytes(abi.Front(flags=abi.FrontFlag.NODE))
        wanted = {bytes(abi.FrontKey.of(address, 0, 0)): mark for address in addresses}
        for address in addresses - self._addresses:
            self.hints.add(addr_bytes(address), abi.Hint.NODE)
        self.tables.fronts.put_many(wanted)
        for key, value in list(self.tables.fronts.held.items()):
            if value == mark and key not in wanted:
                self.tables.fronts.drop(key)
        for address in self._addresses - addresses:
            self.hints.remove(addr_bytes(address), abi.Hint.NODE)
        self._addresses = addresses

    def rest(self) -> None:
        """What is done once in a while: hints of backends that left long ago."""
        now = time.monotonic()
        while self._resting and self._resting[0][0] <= now:
            self.hints.remove(self._resting.popleft()[1], _OF_BACKEND)

    def damaged(self, name: Name, held: Held) -> bool:
        """Whether somebody else has written into a service's lines."""
        line = self.tables.services.at(held.index, abi.Service)
        if line.name != line_name(name) or bytes(line.inside) != bytes(held.inside.word):
            return True
        if bytes(line.outside) != bytes(held.outside.word):
            return True
        for stretch in (held.inside, held.outside):
            count = len(stretch.ids)
            there = struct.unpack_from(f"={count}I", self.tables.slots.mem, stretch.first * 4)
            if list(there) != stretch.ids:
                return True
        lines = self.tables.backends.mem
        for key, ident in held.backends.items():
            due = _BEGINNING.pack(addr_bytes(key.address), ident, held.index, socket.htons(key.port))
            at = (ident & abi.BACKEND_INDEX) * abi.LINE
            if lines[at : at + len(due)] != due:
                return True
        return False

    def mend(self, name: Name, held: Held) -> None:
        """Write a service's lines anew, as they are held to be."""
        line = self.tables.services.at(held.index, abi.Service)
        for key, ident in held.backends.items():
            backend = self.tables.backends.at(ident & abi.BACKEND_INDEX, abi.Backend)
            backend.addr, backend.service = FibAddr.of(key.address), held.index
            backend.port, backend.id = socket.htons(key.port), ident
        for stretch in (held.inside, held.outside):
            struct.pack_into(f"={len(stretch.ids)}I", self.tables.slots.mem, stretch.first * 4, *stretch.ids)
        line.inside, line.outside, line.name = held.inside.word, held.outside.word, line_name(name)
