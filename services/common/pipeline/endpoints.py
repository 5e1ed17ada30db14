"""The pod interfaces as programs see them: ep_iface and ep_addr, each with its share of ep_near in front.

Both tables offer what a BpfMap does (lookup, update, delete, items). For a slot of ep_near that is not marked as crowded,
programs take nothing but what is in it. So an update marks a slot before it writes to the hash what is not in the slot yet,
and a delete empties the slot first: a killed writer leaves nothing near that the hash does not have, and at worst a mark
too many. Should the two disagree all the same, the entry shows as a bare endpoint id: equal to nothing anyone wants, so a
reconciler writes it again, and still somebody's to delete. Blocking; one writer at a time.
"""

from __future__ import annotations

import ctypes as ct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from services.common import errors
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi

if TYPE_CHECKING:
    from services.common.instance import Instance

_REGION_IFACE, _REGION_V4, _REGION_V6 = (n * abi.EP_NEAR_SLOTS for n in range(3))
_V4_PREFIX: Final = bytes(abi.FibAddr.of("0.0.0.0"))[:12]


@dataclass(frozen=True)
class _Near:
    """A slot of ep_near: the pod in it (all zero: none), and whether the hash may have more for this slot."""

    pod: abi.Endpoint
    crowded: bool

    @classmethod
    def of(cls, value: abi.Endpoint) -> _Near:
        pod = abi.Endpoint.from_buffer_copy(value)
        pod.flags &= ~abi.EP_CROWDED
        return cls(pod, bool(value.flags & abi.EP_CROWDED))


_EMPTY: Final = _Near(abi.Endpoint(), False)


class _Table:
    """One hash and what of it is near. Keys go by their bytes."""

    def __init__(self, instance: Instance, name: str, key: type[Any]) -> None:
        self._key: Any = key
        self._hash: BpfMap[Any, abi.Endpoint] = BpfMap.open(instance.pin_dir / abi.MAPS[name], key, abi.Endpoint)
        self._near: BpfMap[ct.c_uint32, abi.Endpoint] = BpfMap.open(
            instance.pin_dir / abi.MAPS["ep_near"], ct.c_uint32, abi.Endpoint)
        self.info = self._hash.info

    def close(self) -> None:
        self._hash.close()
        self._near.close()

    def _slot(self, raw: bytes) -> int:
        """Of a key's bytes."""
        raise NotImplementedError

    def _keys_of(self, pod: abi.Endpoint) -> list[bytes]:
        """The keys of this table under which an element of ep_near answers."""
        raise NotImplementedError

    def _read(self, slot: int) -> _Near:
        value = self._near.lookup(slot)
        return _EMPTY if value is None else _Near.of(value)

    def _write(self, slot: int, pod: abi.Endpoint, crowded: bool) -> None:
        value = abi.Endpoint.from_buffer_copy(pod)
        value.flags |= abi.EP_CROWDED if crowded else 0
        self._near.update(slot, value)

    def _shown(self, raw: bytes, far: abi.Endpoint | None, near: _Near) -> abi.Endpoint | None:
        """What the table shows for a key that the hash has as `far` and whose slot is `near`."""
        if raw in self._keys_of(near.pod):
            return far if far is not None and bytes(far) == bytes(near.pod) else abi.Endpoint(id=near.pod.id)
        return far if far is None or near.crowded else abi.Endpoint(id=far.id)

    def lookup(self, key: Any) -> abi.Endpoint | None:
        """A copy of the value, or None."""
        key = key if isinstance(key, self._key) else self._key(key)
        raw = bytes(key)
        return self._shown(raw, self._hash.lookup(key), self._read(self._slot(raw)))

    def update(self, key: Any, value: abi.Endpoint) -> None:
        """Insert or replace. ResourceExhausted if the hash is full: then nothing has changed."""
        key = key if isinstance(key, self._key) else self._key(key)
        raw = bytes(key)
        slot = self._slot(raw)
        near = self._read(slot)
        present = raw in self._keys_of(near.pod)
        mark = not present and not near.crowded
        if mark:
            self._write(slot, near.pod, True)
        try:
            self._hash.update(key, value)
        except errors.FibrilError:
            if mark:
                self._write(slot, near.pod, False)
            raise
        if present or not near.pod.id:
            self._write(slot, value, near.crowded)

    def delete(self, key: Any) -> bool:
        """Whether there was such an entry."""
        key = key if isinstance(key, self._key) else self._key(key)
        raw = bytes(key)
        slot = self._slot(raw)
        near = self._read(slot)
        present = raw in self._keys_of(near.pod)
        if present:
            self._write(slot, abi.Endpoint(), near.crowded)
        deleted = self._hash.delete(key)
        if near.crowded:
            self._settle(slot)
        return deleted or present

    def _settle(self, slot: int) -> None:
        """Have something in the slot if the hash has anything for it, and the mark only if it has more."""
        there = self._read(slot)
        size = self.info.key_size
        keys = [packed[at:at + size] for packed, _ in self._hash.items_packed() for at in range(0, len(packed), size)]
        mine = [raw for raw in keys if self._slot(raw) == slot]
        pod = there.pod
        if not pod.id and mine:
            pod = self._hash.lookup(self._key.from_buffer_copy(mine[0])) or pod
        self._write(slot, pod, not set(mine) <= set(self._keys_of(pod)))

    def items(self) -> Iterator[tuple[Any, abi.Endpoint]]:
        """All entries."""
        far = {bytes(key): value for key, value in self._hash.items()}
        slots = {slot.value: _Near.of(value) for slot, value in self._near.items() if value.id or value.flags}
        near = {raw for slot, each in slots.items() for raw in self._keys_of(each.pod) if self._slot(raw) == slot}
        for raw in far.keys() | near:
            value = self._shown(raw, far.get(raw), slots.get(self._slot(raw), _EMPTY))
            if value is not None:
                yield self._key.from_buffer_copy(raw), value


class IfaceTable(_Table):
    """ep_iface: host-side interface index -> endpoint."""

    def __init__(self, instance: Instance) -> None:
        """NotFound if the maps are not pinned."""
        super().__init__(instance, "ep_iface", ct.c_uint32)

    def _slot(self, raw: bytes) -> int:
        return _REGION_IFACE + int.from_bytes(raw, sys.byteorder) % abi.EP_NEAR_SLOTS

    def _keys_of(self, pod: abi.Endpoint) -> list[bytes]:
        return [bytes(ct.c_uint32(pod.ifindex))] if pod.ifindex else []


class AddrTable(_Table):
    """ep_addr: address -> endpoint."""

    def __init__(self, instance: Instance) -> None:
        """NotFound if the maps are not pinned."""
        super().__init__(instance, "ep_addr", abi.FibAddr)

    def _slot(self, raw: bytes) -> int:
        region = _REGION_V4 if raw.startswith(_V4_PREFIX) else _REGION_V6
        return region + int.from_bytes(raw[-4:], "big") % abi.EP_NEAR_SLOTS

    def _keys_of(self, pod: abi.Endpoint) -> list[bytes]:
        return [bytes(abi.FibAddr.of(address)) for address in (pod.ipv4, pod.ipv6) if address is not None]
