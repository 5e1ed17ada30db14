"""Frontends in the kernel: a hash that grows, ranges of ports, and source prefixes.

What is in the kernel is read once, at the start; after that this process is the only writer and remembers. `compare`
reads again.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, Generic, TypeVar

from services.common import errors
from services.common.kernel import bpf
from services.common.kernel.lines import Outer
from services.common.kernel.maps import BpfMap
from services.common.pipeline.abi import IPAddress
from services.lb import abi

SMALLEST: Final = 4096

K = TypeVar("K", bound=ct.Structure)
V = TypeVar("V", bound=ct.Structure)


def _all(table: BpfMap[K, V]) -> dict[bytes, bytes]:
    """Everything that is in a map."""
    found: dict[bytes, bytes] = {}
    key_size, value_size = table.info.key_size, table.info.value_size
    for keys, values in table.items_packed():
        for at in range(len(keys) // key_size):
            key = keys[at * key_size : (at + 1) * key_size]
            found[key] = values[at * value_size : (at + 1) * value_size]
    return found


class Known(Generic[K, V]):
    """A map and what is in it, as bytes. `writes` counts changes."""

    def __init__(self, table: BpfMap[K, V], key: type[K], value: type[V]) -> None:
        self.table, self._key, self._value = table, key, value
        self.held = _all(table)
        self.writes = 0

    def put(self, key: bytes, value: bytes) -> None:
        """ResourceExhausted when it is full."""
        if self.held.get(key) == value:
            return
        self.table.update(self._key.from_buffer_copy(key), self._value.from_buffer_copy(value))
        self.held[key] = value
        self.writes += 1

    def put_many(self, pairs: Mapping[bytes, bytes]) -> None:
        """ResourceExhausted when it is full: part of them is there then."""
        new = {key: value for key, value in pairs.items() if self.held.get(key) != value}
        if not new:
            return
        done, failure = self.table.update_packed(b"".join(new), b"".join(new.values()))
        for key in list(new)[:done]:
            self.held[key] = new[key]
        self.writes += done
        if failure is not None:
            raise failure

    def drop(self, key: bytes) -> None:
        if self.held.pop(key, None) is not None:
            self.table.delete(self._key.from_buffer_copy(key))
            self.writes += 1

    def compare(self) -> int:
        """Mend what somebody else has changed; how many elements."""
        there = _all(self.table)
        if there == self.held:
            return 0
        wrong = 0
        for key in there.keys() - self.held.keys():
            self.table.delete(self._key.from_buffer_copy(key))
            wrong += 1
        for key, value in self.held.items():
            if there.get(key) != value:
                self.table.update(self._key.from_buffer_copy(key), self._value.from_buffer_copy(value))
                wrong += 1
        return wrong


class Fronts:
    """The hash of frontends, an inner map that is replaced by a larger one before it is full."""

    def __init__(self, outer: Outer, limit: int) -> None:
        self._outer, self.limit = outer, limit
        self.changed: Callable[[], None] = lambda: None
        """Called after every change."""
        ident = outer.lookup(0)
        if ident is not None and ident.value:
            fd = bpf.map_fd_by_id(ident.value)
        else:
            fd = self._make(SMALLEST)
            outer.update(0, fd)
        self._inner = Known(self._wrap(fd), abi.FrontKey, abi.Front)

    @staticmethod
    def _make(size: int) -> int:
        try:
            return bpf.map_create("hash", 24, 8, size, abi.NO_PREALLOC, "lb_front")
        except OSError as error:
            raise errors.ResourceExhausted(f"no memory for {size} frontends: {error.strerror}") from None

    @staticmethod
    def _wrap(fd: int) -> BpfMap[abi.FrontKey, abi.Front]:
        return BpfMap(fd, abi.FrontKey, abi.Front, "lb_fronts")

    @property
    def held(self) -> Mapping[bytes, bytes]:
        return self._inner.held

    @property
    def size(self) -> int:
        return self._inner.table.info.max_entries

    @property
    def writes(self) -> int:
        return self._inner.writes

    def lookup(self, key: abi.FrontKey) -> abi.Front | None:
        """As the kernel has it."""
        return self._inner.table.lookup(key)

    def put_many(self, pairs: Mapping[bytes, bytes]) -> None:
        """ResourceExhausted beyond the limit: nothing has changed."""
        held = self._inner.held
        if all(held.get(key) == value for key, value in pairs.items()):
            return
        new = sum(key not in held for key in pairs)
        self.ensure(len(held) + new)
        try:
            self._inner.put_many(pairs)
        finally:
            self.changed()

    def drop(self, key: bytes) -> None:
        self._inner.drop(key)
        self.changed()

    def compare(self) -> int:
        found = self._inner.compare()
        if found:
            self.changed()
        return found

    def ensure(self, count: int) -> None:
        """Have room for so many. ResourceExhausted beyond the limit: nothing has changed."""
        if count > self.limit:
            raise errors.ResourceExhausted(
                f"{count} frontends are wanted, the limit is {self.limit}", fix="declare fewer frontends"
            )
        size = self.size
        if count <= size - size // 4:
            return
        while count > size - size // 4:
            size *= 2
        larger = self._wrap(self._make(size))
        held = self._inner.held
        _, failure = larger.update_packed(b"".join(held), b"".join(held.values()))
        if failure is not None:
            larger.close()
            raise failure
        self._outer.update(0, larger.fd)
        self._inner.table.close()
        self._inner.table = larger

    def close(self) -> None:
        self._inner.table.close()


def range_keys(address: IPAddress, proto: int, first: int, last: int) -> Iterator[bytes]:
    """Keys of lb_ranges that together are the ports first to last."""
    while first <= last:
        # The largest block that begins here and does not reach beyond the end.
        size = first & -first or 1 << 16
        while first + size - 1 > last:
            size >>= 1
        yield bytes(abi.RangeKey.of(address, proto, first, 16 - size.bit_length() + 1))
        first += size


def open_known(path: Path, key: type[K], value: type[V]) -> Known[K, V]:
    """A pinned map that only this process writes."""
    return Known(BpfMap.open(path, key, value), key, value)


@contextlib.contextmanager
def inner_of(
    outer: Outer, index: int, key: type[K], value: type[V], label: str
) -> Iterator[BpfMap[K, V] | None]:
    """An inner map as it is now; None: there is none."""
    ident = outer.lookup(index)
    if ident is None or not ident.value:
        yield None
        return
    try:
        fd = bpf.map_fd_by_id(ident.value)
    except FileNotFoundError:  # replaced since
        yield None
        return
    inner = BpfMap(os.dup(fd), key, value, label)
    os.close(fd)
    with inner:
        yield inner
