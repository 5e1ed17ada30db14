"""Pinned maps with ctypes keys and values.

A `BpfMap` is for one thread. Keys and values are ctypes Structures (or simple types such as c_uint32) laid
out as in the C header of the family; opening compares their sizes with the map's.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from services.common import errors
from services.common.kernel import bpf

K = TypeVar("K", bound="ct.Structure | ct._SimpleCData[Any] | ct.Array[Any]")
V = TypeVar("V", bound="ct.Structure | ct._SimpleCData[Any] | ct.Array[Any]")

BATCH = 1024
_NO_BATCH = frozenset({errno.EINVAL, errno.EOPNOTSUPP, 524})  # 524: the kernel's ENOTSUPP
_FULL = frozenset({errno.E2BIG, errno.ENOSPC, errno.ENOMEM})


class BpfMap(Generic[K, V]):
    """One open map.

    Iteration over a map that is being changed may miss or repeat elements, as the kernel's does.
    """

    def __init__(self, fd: int, key: type[K], value: type[V], label: str) -> None:
        """Take over descriptor `fd` (closed by `close`).

        FailedPrecondition if sizes differ from the map's.
        """
        self.fd, self.label = fd, label
        self._key: Any = key
        self._value: Any = value
        self.info = bpf.map_info(fd)
        self.percpu = self.info.type in bpf.PERCPU_TYPES
        if (ct.sizeof(key), ct.sizeof(value)) != (self.info.key_size, self.info.value_size):
            os.close(fd)
            raise errors.FailedPrecondition(
                f"map {label} has {self.info.key_size}-byte keys and {self.info.value_size}-byte values, "
                f"this program expects {ct.sizeof(key)} and {ct.sizeof(value)}",
                fix="loader and service must be of one version",
            )
        self._cpus = bpf.possible_cpus() if self.percpu else 1
        # The kernel pads each CPU's value to 8 bytes.
        self._stride = (ct.sizeof(value) + 7) // 8 * 8 if self.percpu else ct.sizeof(value)

    @classmethod
    def open(cls, path: Path | str, key: type[K], value: type[V]) -> Self:
        """Open the map pinned at `path`. NotFound, PermissionDenied, or FailedPrecondition on other sizes."""
        try:
            fd = bpf.get(str(path))
        except FileNotFoundError:
            raise errors.NotFound(
                f"no BPF map pinned at {path}", fix="start the service that creates it"
            ) from None
        except PermissionError as error:
            raise errors.PermissionDenied(
                f"may not open BPF map {path}: {error.strerror}", fix="run as root with CAP_BPF"
            ) from None
        return cls(fd, key, value, str(path))

    @classmethod
    def create(
        cls, kind: str, key: type[K], value: type[V], max_entries: int, flags: int = 0, name: str = ""
    ) -> Self:
        """A new unpinned map (`kind` from bpf.MAP_TYPES), e.g. the inner one of a hash of maps."""
        fd = bpf.map_create(kind, ct.sizeof(key), ct.sizeof(value), max_entries, flags, name)
        return cls(fd, key, value, name)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        return self.fd

    def lookup(self, key: K | int) -> V | None:
        """A copy of the value, or None. For per-CPU maps see lookup_percpu."""
        if self.percpu:
            raise TypeError(f"{self.label} is per-CPU: use lookup_percpu")
        where = self._as_key(key)
        value: V = self._value()
        return value if self._find(where, ct.addressof(value)) else None

    def lookup_percpu(self, key: K | int) -> list[V] | None:
        """One value for each possible CPU, or None."""
        where, raw = self._as_key(key), ct.create_string_buffer(self._stride * self._cpus)
        if not self._find(where, ct.addressof(raw)):
            return None
        return self._split(raw, 0)

    def update(self, key: K | int, value: V | int, flags: int = bpf.ANY) -> None:
        """Insert or replace. ResourceExhausted if full; AlreadyExists/NotFound with flags NOEXIST/EXIST.

        In a per-CPU map every CPU gets the value.
        """
        where, what = self._as_key(key), self._as_value(value)
        buffer: Any = what
        if self.percpu:
            buffer = ct.create_string_buffer(bytes(what).ljust(self._stride, b"\0") * self._cpus)
        try:
            bpf.map_elem(bpf.MAP_UPDATE, self.fd, ct.addressof(where), ct.addressof(buffer), flags)
        except OSError as error:
            raise self._error(error.errno or 0, "update") from None

    def delete(self, key: K | int) -> bool:
        """Whether there was such an element. Elements of arrays cannot be deleted (FailedPrecondition)."""
        where = self._as_key(key)
        try:
            bpf.map_elem(bpf.MAP_DELETE, self.fd, ct.addressof(where), 0)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._error(error.errno or 0, "delete") from None
        return True

    def keys(self) -> Iterator[K]:
        """All keys, one system call each."""
        current: K | None = None
        while True:
            following: K = self._key()
            try:
                bpf.map_elem(
                    bpf.MAP_NEXT_KEY,
                    self.fd,
                    ct.addressof(current) if current is not None else 0,
                    ct.addressof(following),
                )
            except FileNotFoundError:
                return
            yield following
            current = following

    def items(self) -> Iterator[tuple[K, V]]:
        """All elements, by batches where the kernel can (not for per-CPU maps: see items_percpu)."""
        if self.percpu:
            raise TypeError(f"{self.label} is per-CPU: use items_percpu")
        for key, raw, at in self._walk():
            yield key, self._value.from_buffer_copy(raw, at)

    def items_percpu(self) -> Iterator[tuple[K, list[V]]]:
        """All elements with one value for each possible CPU."""
        for key, raw, at in self._walk():
            yield key, self._split(raw, at)

    def count(self) -> int:
        """Elements present (max_entries for arrays). Walks the map."""
        if self.info.type.endswith("array") and self.info.type != "prog_array":
            return self.info.max_entries
        return sum(1 for _ in self._walk())

    def update_batch(self, pairs: Iterable[tuple[K, V]], flags: int = bpf.ANY) -> int:
        """Insert or replace many; how many. What precedes a failing element is done. Not for per-CPU maps."""
        done = 0
        pending = list(pairs)
        while done < len(pending):
            chunk = pending[done : done + BATCH]
            keys = (self._key * len(chunk))(*(k for k, _ in chunk))
            values = (self._value * len(chunk))(*(v for _, v in chunk))
            count, failure = bpf.map_batch(
                bpf.MAP_UPDATE_BATCH,
                self.fd,
                len(chunk),
                ct.addressof(keys),
                ct.addressof(values),
                elem_flags=flags,
            )
            if (failure in _NO_BATCH and not count) or (failure and count >= len(chunk)):
                for key, value in chunk:
                    self.update(key, value, flags)
                count = len(chunk)
            elif failure:
                raise self._error(failure, "update")
            done += count
        return done

    def update_packed(self, keys: bytes, values: bytes) -> tuple[int, errors.FibrilError | None]:
        """Insert or replace many, given as bytes one behind the other: how many were done, and what stopped the next.

        For tables whose elements would take longer to wrap than to write. Not for per-CPU maps.
        """
        total, done = len(keys) // self.info.key_size, 0
        raw_keys, raw_values = (
            ct.create_string_buffer(keys, len(keys)),
            ct.create_string_buffer(values, len(values)),
        )
        while done < total:
            at_key = ct.addressof(raw_keys) + done * self.info.key_size
            at_value = ct.addressof(raw_values) + done * self.info.value_size
            wanted = min(BATCH, total - done)
            count, failure = bpf.map_batch(bpf.MAP_UPDATE_BATCH, self.fd, wanted, at_key, at_value)
            # A kernel that refuses batches as such leaves the count as it was.
            if failure in _NO_BATCH and count in (0, wanted):
                try:
                    bpf.map_elem(bpf.MAP_UPDATE, self.fd, at_key, at_value)
                    count, failure = 1, 0
                except OSError as error:
                    failure = error.errno or 0
            done += count
            if failure:
                return done, self._error(failure, "update")
        return done, None

    def items_packed(self) -> Iterator[tuple[bytes, bytes]]:
        """All elements as bytes, some thousand at a time: keys one behind the other, values likewise."""
        if self.percpu:
            raise TypeError(f"{self.label} is per-CPU: use items_percpu")
        for keys, values, count in self._batches():
            yield bytes(keys)[: count * self.info.key_size], values.raw[: count * self._stride]

    def delete_batch(self, keys: Iterable[K]) -> int:
        """Delete many, absent ones included; how many were there."""
        deleted = 0
        pending = list(keys)
        while pending:
            chunk = pending[:BATCH]
            array = (self._key * len(chunk))(*chunk)
            count, failure = bpf.map_batch(bpf.MAP_DELETE_BATCH, self.fd, len(chunk), ct.addressof(array), 0)
            if failure == errno.ENOENT and count < len(chunk):
                # The batch stops at an absent key: count those before it and go on behind it.
                deleted += count
                pending = pending[count + 1 :]
                continue
            if failure:
                count = sum(self.delete(key) for key in chunk)
            deleted += count
            pending = pending[len(chunk) :]
        return deleted

    def _as_key(self, key: K | int) -> K:
        made: K = key if isinstance(key, self._key) else self._key(key)
        return made

    def _as_value(self, value: V | int) -> V:
        made: V = value if isinstance(value, self._value) else self._value(value)
        return made

    def _find(self, key: K, value: int) -> bool:
        try:
            bpf.map_elem(bpf.MAP_LOOKUP, self.fd, ct.addressof(key), value)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._error(error.errno or 0, "lookup") from None
        return True

    def _split(self, raw: ct.Array[ct.c_char], at: int) -> list[V]:
        return [self._value.from_buffer_copy(raw, at + cpu * self._stride) for cpu in range(self._cpus)]

    def _walk(self) -> Iterator[tuple[K, ct.Array[ct.c_char], int]]:
        """(key, buffer, offset of its value) of every element."""
        width = self._stride * self._cpus
        for keys, values, count in self._batches():
            for index in range(count):
                yield self._key.from_buffer_copy(keys, index * self.info.key_size), values, index * width

    def _batches(self) -> Iterator[tuple[Any, ct.Array[ct.c_char], int]]:
        """(array of keys, buffer of values, elements in both)."""
        size, width = BATCH, self._stride * self._cpus
        # The kernel keeps its position here: a bucket number, or a whole key in LPM tries.
        token = ct.create_string_buffer(max(8, self.info.key_size))
        first = True
        while True:
            keys, values = (self._key * size)(), ct.create_string_buffer(width * size)
            count, failure = bpf.map_batch(
                bpf.MAP_LOOKUP_BATCH,
                self.fd,
                size,
                ct.addressof(keys),
                ct.addressof(values),
                0 if first else ct.addressof(token),
                ct.addressof(token),
            )
            if failure == errno.ENOSPC and size < 1 << 20:  # one bucket holds more than `size`
                size *= 4
                continue
            if failure in _NO_BATCH and first:
                for key, raw, _ in self._walk_slowly():
                    yield (self._key * 1)(key), raw, 1
                return
            if failure not in (0, errno.ENOENT):
                raise self._error(failure, "lookup")
            yield keys, values, count
            if failure == errno.ENOENT:
                return
            first = False

    def _walk_slowly(self) -> Iterator[tuple[K, ct.Array[ct.c_char], int]]:
        for key in self.keys():
            raw = ct.create_string_buffer(self._stride * self._cpus)
            if self._find(key, ct.addressof(raw)):
                yield key, raw, 0

    def _error(self, number: int, operation: str) -> errors.FibrilError:
        if number in _FULL and operation == "update":
            count = self.count()
            return errors.ResourceExhausted(
                f"map {self.label} is full: {count} of {self.info.max_entries} entries"
                if number != errno.ENOMEM
                else f"no memory for an element of map {self.label} ({count} entries)",
                fix="remove entries or raise the size of the map",
            )
        if number == errno.EEXIST:
            return errors.AlreadyExists(f"map {self.label} already has this key")
        if number == errno.ENOENT:
            return errors.NotFound(f"map {self.label} has no such key")
        return errors.FailedPrecondition(
            f"{operation} in map {self.label} ({self.info.shape()}): {os.strerror(number)}"
        )
