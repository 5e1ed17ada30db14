"""What is declared of addresses and prefixes, and what counts of it. Pure.

A declaration is known by source, prefix and, for what nodes say of themselves (NODE, BLOCK), the node: an address that
moves from one node to another is declared by both for a while. Of several for one prefix the lowest source counts;
within one source this node's own, which it need not be told by others, then the one with the newest revision.

Nearly every prefix has one declaration; only the others cost anything beyond a line in a dictionary. A change costs
the same whatever the size of the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from services.common.kernel.netlink import IPAddress
from services.identity.ipcache.model import (
    SINGLE_BYTES,
    Entry,
    Source,
    address_key,
    bits_of,
    shorter,
)

_BY_NODE = frozenset({Source.NODE, Source.BLOCK})


class Change(NamedTuple):
    """What counted for a key before and what counts now."""

    key: bytes
    old: Entry | None
    new: Entry | None


class Table:
    """See the module's text."""

    def __init__(self, node: str) -> None:
        """node: this node's name."""
        self._node = node
        self._best: dict[bytes, Entry] = {}
        self._others: dict[bytes, tuple[Entry, ...]] = {}
        # How many prefixes of each length count, of 128: what a lookup has to try.
        self._lengths: dict[int, int] = {}
        self._changed: dict[bytes, Entry | None] = {}
        self._of_node: dict[str, dict[tuple[Source, bytes], Entry]] = {}
        self.version = 0
        """Grows with every change of what counts."""

    def __len__(self) -> int:
        return len(self._best)

    # -- declaring

    def declare(self, entry: Entry) -> None:
        """Declare, in place of the declaration of the same source, prefix and (NODE, BLOCK) node."""
        best = self._best.get(entry.key)
        if best is None:
            self._set(entry.key, None, entry)
            return
        rest = [other for other in self.declarations(entry.key) if not _same(other, entry)]
        self._choose(entry.key, best, [*rest, entry])

    def withdraw(self, source: Source, key: bytes, node: str = "") -> None:
        """Take a declaration back; absent is fine. node: whose, for NODE and BLOCK."""
        best = self._best.get(key)
        if best is not None:
            held = [d for d in self.declarations(key) if not _is(d, source, node)]
            self._choose(key, best, held)

    def put(self, entry: Entry) -> bool:
        """Declare what etcd has had since `entry.revision`; False, and nothing happens, if the declaration it would
        replace is newer.
        """
        held = self.declared(entry.source, entry.key, entry.node)
        if held is not None and held.revision > entry.revision:
            return False
        self.declare(entry)
        return True

    def delete(self, source: Source, key: bytes, revision: int, node: str = "") -> bool:
        """Take back what etcd has not had any more since `revision`; False, and nothing happens, if it is newer."""
        held = self.declared(source, key, node)
        if held is not None and held.revision > revision:
            return False
        self.withdraw(source, key, node)
        return True

    def set_node(self, node: str, entries: Iterable[Entry]) -> None:
        """Make these the only NODE and BLOCK declarations of a node."""
        wanted = {(entry.source, entry.key): entry for entry in entries}
        held = self._of_node.get(node, {})
        for source, key in held.keys() - wanted.keys():
            self.withdraw(source, key, node)
        for name, entry in wanted.items():
            if held.get(name) != entry:
                self.declare(entry)
        if wanted:
            self._of_node[node] = wanted
        else:
            self._of_node.pop(node, None)

    def forget_revisions(self, source: Source) -> None:
        """The revisions of a source start anew (another etcd than before): whatever it says next is newer."""
        for key in list(self._best):
            for held in self.declarations(key):
                if held.source is source and held.revision:
                    self.declare(held._replace(revision=0))

    # -- asking

    def get(self, key: bytes) -> Entry | None:
        """What counts for exactly this prefix."""
        return self._best.get(key)

    def lookup(self, address: IPAddress) -> Entry | None:
        """What counts for the longest prefix that holds the address."""
        raw = address_key(address)
        found = self._best.get(raw)
        if found is not None:
            return found
        least = 96 if address.version == 4 else 0
        for bits in sorted(self._lengths, reverse=True):
            if bits < least:
                break
            found = self._best.get(shorter(raw, bits))
            if found is not None:
                return found
        return None

    def entries(self) -> Iterator[Entry]:
        """All that count, in no order. The table must not change meanwhile."""
        return iter(self._best.values())

    def prefixes(self) -> list[bytes]:
        """Every prefix."""
        return list(self._best)

    def declarations(self, key: bytes) -> tuple[Entry, ...]:
        """All for a prefix; the first counts."""
        best = self._best.get(key)
        return () if best is None else (best, *self._others.get(key, ()))

    def declared(self, source: Source, key: bytes, node: str = "") -> Entry | None:
        """One declaration, whether it counts or not."""
        best = self._best.get(key)
        if best is None or _is(best, source, node):
            return best
        return next((d for d in self._others.get(key, ()) if _is(d, source, node)), None)

    def take(self) -> list[Change]:
        """The difference between what counted when this was last called and what counts now."""
        changed, self._changed = self._changed, {}
        found = [Change(key, old, self._best.get(key)) for key, old in changed.items()]
        return [change for change in found if change.old != change.new]

    # -- choosing

    def _choose(self, key: bytes, best: Entry, held: list[Entry]) -> None:
        if not held:
            self._others.pop(key, None)
            self._set(key, best, None)
            return
        if len(held) > 1:
            held.sort(key=self._rank)
            self._others[key] = tuple(held[1:])
        else:
            self._others.pop(key, None)
        if held[0] != best:
            self._set(key, best, held[0])

    def _rank(self, entry: Entry) -> tuple[int, bool, int, str]:
        # The name only makes the order a total one.
        return entry.source, entry.node != self._node, -entry.revision, entry.node

    def _set(self, key: bytes, old: Entry | None, new: Entry | None) -> None:
        self.version += 1
        self._changed.setdefault(key, old)
        if new is not None:
            self._best[key] = new
        else:
            del self._best[key]
        if len(key) != SINGLE_BYTES and (old is None or new is None):
            bits = bits_of(key)
            count = self._lengths.get(bits, 0) + (1 if old is None else -1)
            if count:
                self._lengths[bits] = count
            else:
                del self._lengths[bits]


def _is(entry: Entry, source: Source, node: str) -> bool:
    return entry.source is source and (source not in _BY_NODE or entry.node == node)


def _same(one: Entry, other: Entry) -> bool:
    return _is(one, other.source, other.node)
