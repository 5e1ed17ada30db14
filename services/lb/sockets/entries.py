"""What lb_socks holds, looked through by the hundred thousand. Blocks."""

from __future__ import annotations

import ctypes as ct
import mmap
import os
import socket
import struct
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from services.common.instance import Instance
from services.common.kernel import bpf
from services.common.kernel.maps import BpfMap
from services.common.kernel.sockdiag import Remote
from services.common.pipeline.abi import FibAddr
from services.lb import abi

# Parts of keys and values that a look at all of them needs (abi.SockKey, abi.Sock).
_KEYS: Final = struct.Struct("=Q16s2xBB4x")
_VALUES: Final = struct.Struct("=16s16s16sQI4x2sH2sB9x")
_STATES: Final = struct.Struct("=56xI10xB9x")
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
    """The pinned map, open."""

    def __init__(self, instance: Instance) -> None:
        """NotFound if the programs have not been loaded."""
        self._map = BpfMap.open(instance.pin_dir / abi.MAPS["lb_socks"], abi.SockKey, abi.Sock)

    def close(self) -> None:
        self._map.close()

    def backends(self) -> set[int]:
        """Ids of those that sockets are connected to."""
        found: set[int] = set()
        for _, values in self._map.items_packed():
            found.update(ident for ident, flags in _STATES.iter_unpack(values) if flags & _CONNECTED)
        return found

    def connected(self, backends: frozenset[int] | set[int]) -> list[Connected]:
        """Sockets connected to backends with these ids."""
        found = []
        for keys, values in self._map.items_packed():
            for index, (ident, flags) in enumerate(_STATES.iter_unpack(values)):
                if flags & _CONNECTED and ident in backends:
                    cookie, _, proto, kind = _KEYS.unpack_from(keys, index * _KEYS.size)
                    if kind == abi.SockKind.OWN:
                        found.append(_connected(cookie, proto, values, index))
        return found

    def sweep(self) -> int:
        """Remove entries that a closed socket has left behind; how many. Each socket has one of kind OWN first and last."""
        further: list[bytes] = []
        for keys, _ in self._map.items_packed():
            for index, (_, _, _, kind) in enumerate(_KEYS.iter_unpack(keys)):
                if kind != abi.SockKind.OWN:
                    further.append(keys[index * _KEYS.size : (index + 1) * _KEYS.size])
        owned: dict[tuple[int, int], bool] = {}
        removed = 0
        for raw in further:
            key = abi.SockKey.from_buffer_copy(raw)
            owner = (key.cookie, key.proto)
            if owner not in owned:
                own = abi.SockKey(cookie=key.cookie, proto=key.proto, kind=abi.SockKind.OWN)
                owned[owner] = self._map.lookup(own) is not None
            if not owned[owner]:
                removed += self._map.delete(key)
        return removed

    @property
    def size(self) -> int:
        """Entries that fit."""
        return self._map.info.max_entries


def _connected(cookie: int, proto: int, values: bytes, index: int) -> Connected:
    _, addr, _, netns, backend, _, port, _, _ = _VALUES.unpack_from(values, index * _VALUES.size)
    address = FibAddr.from_buffer_copy(addr).ip()
    remote = (address if address is not None else ip_address("::"), socket.ntohs(port))
    return Connected(cookie, netns, proto, backend, remote)


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
