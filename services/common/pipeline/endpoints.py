"""The pod interfaces as programs see them: ep_iface and ep_addr, each with its share of ep_near in front.

Both tables offer what a BpfMap does (lookup, update, delete, items). An update writes the hash first and a delete
empties the slot first, so a killed writer leaves nothing near that the hash does not have. Should the two disagree all the
same, the entry shows as a bare endpoint id: equal to nothing anyone wants, so a reconciler writes it again, and
still somebody's to delete. Blocking; one writer at a time.
"""

from __future__ import annotations

import ctypes as ct
import ipaddress
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi

if TYPE_CHECKING:
    from services.common.instance import Instance

_ZERO: Final = bytes(ct.sizeof(abi.Endpoint))
_REGION_IFACE, _REGION_V4, _REGION_V6 = (n * abi.EP_NEAR_SLOTS for n in range(3))


def _agreed(far: abi.Endpoint | None, near: abi.Endpoint | None) -> abi.Endpoint | None:
    """What a table shows for a key that the hash has as `far` and ep_near as `near`."""
    if near is None or (far is not None and bytes(far) == bytes(near)):
        return far
    return abi.Endpoint(id=near.id)


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

    def _slot(self, key: Any) -> int:
        raise NotImplementedError

    def _keys_of(self, value: abi.Endpoint) -> Iterator[Any]:
        """The keys of this table under which an element of ep_near answers."""
        raise NotImplementedError

    def _near_value(self, key: Any) -> abi.Endpoint | None:
        value = self._near.lookup(self._slot(key))
        if value is None or all(bytes(key) != bytes(own) for own in self._keys_of(value)):
            return None
        return value

    def lookup(self, key: Any) -> abi.Endpoint | None:
        """A copy of the value, or None."""
        key = key if isinstance(key, self._key) else self._key(key)
        return _agreed(self._hash.lookup(key), self._near_value(key))

    def update(self, key: Any, value: abi.Endpoint) -> None:
        """Insert or replace. ResourceExhausted if the hash is full: then nothing has changed."""
        key = key if isinstance(key, self._key) else self._key(key)
        self._hash.update(key, value)
        slot = self._slot(key)
        taken = bytes(self._near.lookup(slot) or _ZERO)
        if taken == _ZERO or self._near_value(key) is not None:
            self._near.update(slot, value)

    def delete(self, key: Any) -> bool:
        """Whether there was such an entry."""
        key = key if isinstance(key, self._key) else self._key(key)
        near = self._near_value(key) is not None
        if near:
            self._near.update(self._slot(key), abi.Endpoint())
        return self._hash.delete(key) or near

    def items(self) -> Iterator[tuple[Any, abi.Endpoint]]:
        """All entries."""
        far = {bytes(key): value for key, value in self._hash.items()}
        near = {bytes(key): value for slot, value in self._near.items() if bytes(value) != _ZERO
                for key in self._keys_of(value) if self._slot(key) == slot.value}
        for raw in far.keys() | near.keys():
            value = _agreed(far.get(raw), near.get(raw))
            if value is not None:
                yield self._key.from_buffer_copy(raw), value


class IfaceTable(_Table):
    """ep_iface: host-side interface index -> endpoint."""

    def __init__(self, instance: Instance) -> None:
        """NotFound if the maps are not pinned."""
        super().__init__(instance, "ep_iface", ct.c_uint32)

    def _slot(self, key: ct.c_uint32) -> int:
        return _REGION_IFACE + key.value % abi.EP_NEAR_SLOTS

    def _keys_of(self, value: abi.Endpoint) -> Iterator[ct.c_uint32]:
        if value.ifindex:
            yield ct.c_uint32(value.ifindex)


class AddrTable(_Table):
    """ep_addr: address -> endpoint."""

    def __init__(self, instance: Instance) -> None:
        """NotFound if the maps are not pinned."""
        super().__init__(instance, "ep_addr", abi.FibAddr)

    def _slot(self, key: abi.FibAddr) -> int:
        region = _REGION_V4 if isinstance(key.ip(), ipaddress.IPv4Address) else _REGION_V6
        return region + int.from_bytes(bytes(key)[-4:], "big") % abi.EP_NEAR_SLOTS

    def _keys_of(self, value: abi.Endpoint) -> Iterator[abi.FibAddr]:
        for address in (value.ipv4, value.ipv6):
            if address is not None:
                yield abi.FibAddr.of(address)
