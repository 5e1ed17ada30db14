"""What is known of translated sockets, looked through by the hundred thousand: lb_socks_near and lb_socks. Blocks."""

from __future__ import annotations

import ctypes as ct
import mmap
import os
import socket
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from services.common.instance import Instance
from services.common.kernel import bpf
from services.common.kernel.maps import BpfMap
from services.common.kernel.sockdiag import Remote
from services.lb import abi
from services.lb.model import TCP, UDP

# Parts of keys and values that a look at all of them needs (abi.SockKey, abi.Sock).
_KEYS: Final = struct.Struct("=Q16s2xBB4x")
_STATES: Final = struct.Struct("=38xBxI28x")
_NEAR: Final = struct.Struct("=Q46xBxI68x")
_OWNERS: Final = struct.Struct("=32xQ32x")
_NEAR_OWNERS: Final = struct.Struct("=Q40xQ72x")
_NETNS: Final = (1 << 48) - 1
_NEAR_ENTRY: Final = abi.SockNear.entry.offset
_CONNECTED: Final = int(abi.SockFlag.CONNECTED)


@dataclass(frozen=True, slots=True)
class Connected:
    """A socket that connect() has bound to a backend."""

    cookie: int
    netns: int
    proto: int
    backend: int
    remote: Remote
    """The backend as the socket knows it."""


class Entries:
    """The pinned maps, open."""

    def __init__(self, instance: Instance) -> None:
        """NotFound if the programs have not been loaded."""
        near = BpfMap.open(instance.pin_dir / abi.MAPS["lb_socks_near"], ct.c_uint32, abi.SockNear)
        try:
            self._near = mmap.mmap(near.fileno(), abi.SOCK_NEAR * ct.sizeof(abi.SockNear))
        finally:
            near.close()
        self._map = BpfMap.open(instance.pin_dir / abi.MAPS["lb_socks"], abi.SockKey, abi.Sock)

    def close(self) -> None:
        self._near.close()
        self._map.close()

    def backends(self) -> set[int]:
        """Ids of those that sockets are connected to."""
        near = bytes(self._near)
        found = {ident for cookie, flags, ident in _NEAR.iter_unpack(near) if cookie and flags & _CONNECTED}
        for _, values in self._map.items_packed():
            found.update(ident for flags, ident in _STATES.iter_unpack(values) if flags & _CONNECTED)
        return found

    def connected(self, backends: frozenset[int] | set[int]) -> list[Connected]:
        """Sockets connected to backends with these ids."""
        return [*self._connected_near(backends), *self._connected_far(backends)]

    def _connected_near(self, backends: frozenset[int] | set[int]) -> Iterator[Connected]:
        near = bytes(self._near)
        for index, (cookie, flags, ident) in enumerate(_NEAR.iter_unpack(near)):
            if cookie and flags & _CONNECTED and ident in backends:
                yield _connected(cookie, near, index * _NEAR.size + _NEAR_ENTRY)

    def _connected_far(self, backends: frozenset[int] | set[int]) -> Iterator[Connected]:
        for keys, values in self._map.items_packed():
            for index, (flags, ident) in enumerate(_STATES.iter_unpack(values)):
                if flags & _CONNECTED and ident in backends:
                    cookie, _, _, kind = _KEYS.unpack_from(keys, index * _KEYS.size)
                    if kind == abi.SockKind.OWN:
                        yield _connected(cookie, values, index * _STATES.size)

    def owners(self) -> dict[int, set[int]]:
        """Cookies of all sockets that have entries, by the cookie of their network namespace."""
        found: defaultdict[int, set[int]] = defaultdict(set)
        for cookie, netns in _NEAR_OWNERS.iter_unpack(bytes(self._near)):
            if cookie:
                found[netns & _NETNS].add(cookie)
        for keys, values in self._map.items_packed():
            for (cookie, _, _, kind), (netns,) in zip(
                _KEYS.iter_unpack(keys), _OWNERS.iter_unpack(values), strict=True
            ):
                if kind == abi.SockKind.OWN:
                    found[netns & _NETNS].add(cookie)
        return found

    def forget(self, cookies: set[int]) -> int:
        """Remove the first entries of sockets that are closed; how many. Their further ones are `sweep`'s.

        The kernel counts who has or wants a slot. Should it do so in this very moment, the count stays too high and the slot
        unused; for the same reason nobody takes off the count of what is in the hash.
        """
        removed = 0
        for cookie in cookies:
            at = cookie % abi.SOCK_NEAR * _NEAR.size
            if int.from_bytes(self._near[at : at + 8], "little") == cookie:
                self._near[at : at + 12] = bytes(12)
                removed += 1
            for proto in (TCP, UDP):
                removed += self._map.delete(abi.SockKey(cookie=cookie, proto=proto, kind=abi.SockKind.OWN))
        return removed

    def sweep(self) -> int:
        """Remove entries that a closed socket has left behind; how many. Each socket has one of kind OWN first and last."""
        further: list[bytes] = []
        for keys, _ in self._map.items_packed():
            for index, (_, _, _, kind) in enumerate(_KEYS.iter_unpack(keys)):
                if kind != abi.SockKind.OWN:
                    further.append(keys[index * _KEYS.size : (index + 1) * _KEYS.size])
        owned: dict[int, bool] = {}
        removed = 0
        for raw in further:
            key = abi.SockKey.from_buffer_copy(raw)
            if key.cookie not in owned:
                owned[key.cookie] = self._owned(key)
            if not owned[key.cookie]:
                removed += self._map.delete(key)
        return removed

    def _owned(self, key: abi.SockKey) -> bool:
        at = key.cookie % abi.SOCK_NEAR * _NEAR.size
        if int.from_bytes(self._near[at : at + 8], "little") == key.cookie:
            return True
        own = abi.SockKey(cookie=key.cookie, proto=key.proto, kind=abi.SockKind.OWN)
        return self._map.lookup(own) is not None


def _connected(cookie: int, data: bytes, at: int) -> Connected:
    entry = abi.Sock.from_buffer_copy(data, at)
    address = entry.addr.ip()
    remote = (address if address is not None else ip_address("::"), socket.ntohs(entry.port))
    return Connected(cookie, entry.netns, entry.proto, entry.backend, remote)


def gone(instance: Instance, backends: set[int]) -> set[int]:
    """Which of these ids no backend has any more; none as long as there is no table of backends.

    Ids must have been read from the kernel before: a table that has grown meanwhile has them, too.
    """
    with BpfMap.open(instance.pin_dir / abi.MAPS["lb_lines"], ct.c_uint32, ct.c_uint32) as outer:
        inner = outer.lookup(int(abi.Table.BACKENDS))
    if inner is None or not inner.value or not backends:
        return set()
    fd = bpf.map_fd_by_id(inner.value)
    try:
        lines = bpf.map_info(fd).max_entries
        with mmap.mmap(fd, lines * abi.LINE, prot=mmap.PROT_READ) as memory:
            return {ident for ident in backends if not _has(memory, lines, ident)}
    finally:
        os.close(fd)


def _has(memory: mmap.mmap, lines: int, ident: int) -> bool:
    index = ident & abi.BACKEND_INDEX
    if index >= lines:
        return False
    at = index * abi.LINE + abi.Backend.id.offset
    return int.from_bytes(memory[at : at + 4], "little") == ident
