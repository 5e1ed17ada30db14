"""Writes policies into the kernel's tables: each whole, beside the one before, and then named by the one store that counts.

What an earlier process left stays in force, and its room taken, until everything has been written anew (`prune`).
"""

from __future__ import annotations

import array
import ctypes as ct
import struct
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from services.common.errors import ResourceExhausted
from services.common.kernel.indexes import Indexes
from services.common.kernel.lines import LINE
from services.common.kernel.room import REST_S, Room
from services.common.pipeline.abi import EP_MAX
from services.policy import abi
from services.policy.kernel.tables import POLICIES_MAX, Tables
from services.policy.model import IPNetwork
from services.policy.resolve.resolved import Resolved

_STEP: Final = 4096
_WORD: Final = struct.Struct("=Q")


@dataclass(frozen=True)
class Published:
    """A policy in the kernel. peers, prefixes: numbers of its tables; 0: it has none."""

    line: int
    revision: int
    peers: int
    prefixes: int
    first: int
    count: int
    prefix_classes: Mapping[IPNetwork, int]


class Writer:
    """Used by one thread at a time."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self._left = {line: tables.policies.at(line, abi.Policy) for line in self._found()}
        """What an earlier process left and endpoints still have."""
        self._lines = Indexes(POLICIES_MAX, "different policies", self._left)
        self._room = Room(tables.cells, abi.CELLS_A_LINE)
        self._room.adopt((word.first, word.count) for word in self._left.values() if word.count)
        self._known_before: set[int] = set()
        """Identities that policies left over have classes for."""
        self._pruned = False
        self._next_table = self._last_table() + 1
        self._resting: deque[tuple[float, Published, bool, bool]] = deque()
        self._peer_tables: dict[int, set[int]] = {}
        """Identities in tables of peers, by table."""
        self.known: set[int] = set()
        self._prefix_tables: dict[int, Mapping[IPNetwork, int]] = {}
        self.peers_used = self.prefixes_used = 0
        self.writes = 0
        """Elements written or deleted, and lines."""
        self.freed = 0
        """How often room has been given back: what did not fit may fit now."""

    def _found(self) -> list[int]:
        """Lines of policies that endpoints have."""
        size = ct.sizeof(abi.Ep)
        memory = array.array("I", self.tables.eps_memory[: EP_MAX * size])
        lines = {memory[at] for at in range(0, len(memory), size // 4)} - {0}
        return sorted(line for line in lines if line < self.tables.policies.size)

    def _last_table(self) -> int:
        """The largest number of a table with anything in it: whoever was killed may have left some that no policy names."""
        last: int = 0
        for keys, _ in self.tables.peers.items_packed():
            words = array.array("I", keys)
            last = max((last, *words[::2]))
            self._known_before.update(
                number for table, number in zip(words[::2], words[1::2], strict=True) if table == abi.KNOWN
            )
        for key, _ in self.tables.prefixes.items():
            last = max(last, key.table)
        return last

    # ---- policies -------------------------------------------------------------------------------------------
    def publish(self, resolved: Resolved, before: Published | None, same_peers: bool) -> Published:
        """Have a policy in the tables; no endpoint has it yet. same_peers: `before`'s classes are its classes.

        ResourceExhausted: nothing has changed.
        """
        made = resolved.tables()
        self._check(resolved, same_peers and before is not None, made.prefixes)
        line = self._lines.take()
        first = peers = prefixes = 0
        try:
            self.tables.policies.ensure(line + 1)
            first = self._room.take(len(made.cells)) if made.cells else 0
            for at in range(made.sides[1][0] + self._classes(made.sides[1][1], resolved)):
                made.cells[at] += first
            cells = array.array("Q", made.cells)
            start = first * 8
            self.tables.cells.mem[start : start + len(cells) * 8] = cells.tobytes()
            if not same_peers or before is None:
                peers = self._put_peers(resolved.classes)
            if before is None or before.prefix_classes != made.prefixes:
                prefixes = self._put_prefixes(made.prefixes)
        except BaseException:
            self._lines.give(line)
            if first:
                self._room.give(first, len(made.cells))
            self._drop_peers(peers)
            raise
        if same_peers and before is not None:
            peers = before.peers
        if before is not None and before.prefix_classes == made.prefixes:
            prefixes = before.prefixes
        self._write_line(
            line,
            abi.Policy(
                peers=peers,
                prefixes=prefixes,
                sides=(abi.Side * 2)(
                    *(
                        abi.Side(first + at, made.prefix_classes, abi.ENFORCED if enforced else 0)
                        for at, enforced in made.sides
                    )
                ),
                unknown=made.unknown,
                first=first,
                count=len(made.cells),
            ),
        )
        return Published(line, self._revision(), peers, prefixes, first, len(made.cells), made.prefixes)

    @staticmethod
    def _classes(enforced: bool, resolved: Resolved) -> int:
        return (len(resolved.masks) + 1) * len(resolved.prefix_masks) if enforced else 0

    def _write_line(self, line: int, policy: abi.Policy) -> None:
        start = line * LINE
        self.tables.policies.mem[start : start + LINE] = bytes(policy)
        self.writes += 1

    def _revision(self) -> int:
        config = self.tables.config
        config.revision = config.revision + 1 & 0xFFFFFFFF or 1
        return int(config.revision)

    def _check(self, resolved: Resolved, same_peers: bool, prefixes: Mapping[IPNetwork, int]) -> None:
        more = 0 if same_peers else len(resolved.classes)
        if self.peers_used + more > abi.PEERS_MAX:
            raise ResourceExhausted(
                f"{more} peers more than the {self.peers_used} there are, the limit is {abi.PEERS_MAX}",
                fix="let policies select fewer peers, or use entities",
            )
        if self.prefixes_used + len(prefixes) > abi.PREFIXES_MAX:
            raise ResourceExhausted(
                f"{len(prefixes)} prefixes more than the {self.prefixes_used} there are, "
                f"the limit is {abi.PREFIXES_MAX}",
                fix="join prefixes",
            )

    def retire(self, published: Published, after: Published | None = None) -> None:
        """No endpoint has it any longer. What `after` has of it stays."""
        peers = after is None or after.peers != published.peers
        prefixes = after is None or after.prefixes != published.prefixes
        self._resting.append((time.monotonic() + REST_S, published, peers, prefixes))

    def rest(self) -> None:
        """Give back what no program can be reading any longer; to be called once in a while."""
        now = time.monotonic()
        while self._resting and self._resting[0][0] <= now:
            _, published, peers, prefixes = self._resting.popleft()
            self._lines.give(published.line)
            if published.count:
                self._room.give(published.first, published.count)
            if peers:
                self._drop_peers(published.peers)
            if prefixes:
                self._drop_prefixes(published.prefixes)
            self.freed += 1

    # ---- peers ----------------------------------------------------------------------------------------------
    def _table(self) -> int:
        while True:
            number = self._next_table
            self._next_table = number % 0xFFFFFFFF + 1
            if number not in self._peer_tables and number not in self._prefix_tables:
                return number

    def _put_peers(self, classes: Mapping[int, int]) -> int:
        table = self._table()
        keys = array.array("I", bytes(8 * len(classes)))
        for at, number in enumerate(classes):
            keys[2 * at] = table
            keys[2 * at + 1] = number
        _, failed = self.tables.peers.update_packed(keys.tobytes(), array.array("I", classes.values()).tobytes())
        if failed is not None:
            self.tables.peers.delete_batch(abi.Peer(table, number) for number in classes)
            raise failed
        self._peer_tables[table] = set(classes)
        self.peers_used += len(classes)
        self.writes += len(classes)
        return table

    def _drop_peers(self, table: int) -> None:
        there = self._peer_tables.pop(table, None)
        if there:
            self.tables.peers.delete_batch(abi.Peer(table, number) for number in there)
            self.peers_used -= len(there)
            self.writes += len(there)

    def put_peer(self, published: Published, number: int, found: int) -> None:
        """An identity that nothing has been known of has this class in a policy."""
        self.tables.peers.update(abi.Peer(published.peers, number), found)
        there = self._peer_tables[published.peers]
        self.peers_used += number not in there
        there.add(number)
        self.writes += 1

    def drop_peer(self, published: Published, number: int) -> None:
        there = self._peer_tables.get(published.peers)
        if there is not None and number in there:
            there.discard(number)
            self.tables.peers.delete(abi.Peer(published.peers, number))
            self.peers_used -= 1
            self.writes += 1

    def know(self, numbers: Iterable[int]) -> None:
        """All policies have been told of these identities, as far as they care. An error: none of them is known."""
        new = [number for number in numbers if number not in self.known]
        if not new:
            return
        for word in self._left.values():
            # Nobody gives these a class there.
            fresh = [abi.Peer(word.peers, number) for number in new if number not in self._known_before]
            self.tables.peers.update_batch((peer, ct.c_uint32(word.unknown)) for peer in fresh)
        keys = array.array("I", bytes(8 * len(new)))
        keys[1::2] = array.array("I", new)
        _, failed = self.tables.peers.update_packed(keys.tobytes(), bytes(4 * len(new)))
        if failed is not None:
            # Who is known, but has no class since there is no room, would be one that no rule matches: none that denies either.
            self.tables.peers.delete_batch(abi.Peer(abi.KNOWN, number) for number in new)
            raise failed
        self.known.update(new)
        self.peers_used += len(new)
        self.writes += len(new)

    def forget(self, number: int) -> None:
        """An identity is gone: whoever still has it is unknown. Before it is taken out of policies."""
        self._known_before.discard(number)
        if number in self.known:
            self.tables.peers.delete(abi.Peer(abi.KNOWN, number))
            self.known.discard(number)
            self.peers_used -= 1
            self.writes += 1

    # ---- prefixes -------------------------------------------------------------------------------------------
    def _put_prefixes(self, classes: Mapping[IPNetwork, int]) -> int:
        if not classes:
            return 0
        table = self._table()
        try:
            self.tables.prefixes.update_batch(
                (abi.Prefix.of(table, prefix), ct.c_uint32(found)) for prefix, found in classes.items()
            )
        except BaseException:
            for prefix in classes:
                self.tables.prefixes.delete(abi.Prefix.of(table, prefix))
            raise
        self._prefix_tables[table] = classes
        self.prefixes_used += len(classes)
        self.writes += len(classes)
        return table

    def _drop_prefixes(self, table: int) -> None:
        there = self._prefix_tables.pop(table, None)
        if there:
            # This kind of table knows no batches.
            for prefix in there:
                self.tables.prefixes.delete(abi.Prefix.of(table, prefix))
            self.prefixes_used -= len(there)
            self.writes += len(there)

    # ---- endpoints ------------------------------------------------------------------------------------------
    def set_endpoint(self, number: int, owner: int, published: Published, flags: int) -> None:
        """From now on the endpoint has this policy."""
        ep = self.tables.ep(number)
        if ep.owner != owner:
            self.clear_endpoint(number)
            ep.owner = owner
        if ep.flags != flags:
            ep.flags = flags
        # One store.
        word = published.revision << 32 | published.line
        if _WORD.unpack_from(self.tables.eps_memory, number * ct.sizeof(abi.Ep))[0] != word:
            ct.c_uint64.from_buffer(self.tables.eps_memory, number * ct.sizeof(abi.Ep)).value = word
            self.writes += 1

    def set_flags(self, number: int, owner: int, flags: int) -> None:
        """Switches of an endpoint, whatever policy it has."""
        ep = self.tables.ep(number)
        if ep.owner == owner:
            ep.flags = flags

    def clear_endpoint(self, number: int) -> None:
        """Nothing is known of it: everything is denied."""
        ct.c_uint64.from_buffer(self.tables.eps_memory, number * ct.sizeof(abi.Ep)).value = 0
        ep = self.tables.ep(number)
        ep.owner = ep.flags = 0

    # ---- what was there before ------------------------------------------------------------------------------
    def prune(self, endpoints: Iterable[int]) -> None:
        """All that is to be there has been written: what is left from earlier goes, but for what endpoints have whose own does
        not fit. Again, when that may have changed.
        """
        keep = set(endpoints)
        size = ct.sizeof(abi.Ep)
        memory = array.array("I", self.tables.eps_memory[: EP_MAX * size])
        held: dict[int, abi.Policy] = {}
        for number, line in enumerate(memory[:: size // 4]):
            if line and number not in keep:
                self.clear_endpoint(number)
            elif line in self._left:
                held[line] = self._left[line]
        if self._pruned and len(held) == len(self._left):
            return
        for line, word in self._left.items():
            if line not in held:
                self._lines.give(line)
                if word.count:
                    self._room.give(word.first, word.count)
        self._left, self._pruned = held, True
        if not held:
            self._known_before.clear()
        self._prune_peers()
        there = self._prefix_tables.keys() | {word.prefixes for word in held.values()}
        for key in [key for key, _ in self.tables.prefixes.items() if key.table not in there]:
            self.tables.prefixes.delete(key)
        self.freed += 1

    @property
    def left(self) -> bool:
        """Whether endpoints have what an earlier process left."""
        return bool(self._left)

    def _prune_peers(self) -> None:
        there = self._peer_tables.keys() | {word.peers for word in self._left.values()}
        gone: list[abi.Peer] = []
        for keys, _ in self.tables.peers.items_packed():
            words = array.array("I", keys)
            for table, number in zip(words[::2], words[1::2], strict=True):
                if number not in self.known if table == abi.KNOWN else table not in there:
                    gone.append(abi.Peer(table, number))
        self.tables.peers.delete_batch(gone)

    @property
    def cells_used(self) -> int:
        return self._room.used

    @property
    def policies_used(self) -> int:
        return self._lines.used
