"""The map family `endpoint`: what the data path knows of each pod interface. Blocking; netlink thread
only.
"""

from __future__ import annotations

import ctypes as ct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import bpf
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi, install
from services.common.pipeline.endpoints import AddrTable, IfaceTable
from services.ipam.endpoints.model import EndpointRecord

NAMES: Final = ("ep_iface", "ep_addr", "ep_netns", "ep_cgroup")


def value_of(record: EndpointRecord, ifindex: int, flags: int) -> abi.Endpoint:
    return abi.Endpoint.of(
        id=record.id,
        ifindex=ifindex,
        mac=record.mac,
        host_mac=record.host_mac,
        mtu=record.mtu,
        ipv4=record.ipv4,
        ipv6=record.ipv6,
        identity=record.identity,
        flags=flags,
    )


@dataclass(frozen=True)
class MapView:
    """All four maps at one time. Values of `iface` and `addr` are struct endpoint's bytes, keys of `addr`
    fib_addr's.
    """

    iface: dict[int, bytes]
    addr: dict[bytes, bytes]
    netns: dict[int, int]
    cgroup: dict[int, int]

    def ids(self) -> Iterator[int]:
        """Endpoint numbers that occur in any of them."""
        for raw in (*self.iface.values(), *self.addr.values()):
            yield int(abi.Endpoint.from_buffer_copy(raw).id)
        yield from self.netns.values()
        yield from self.cgroup.values()


class EndpointMaps:
    """The open maps. NotFound from the constructor if they are not pinned."""

    def __init__(self, instance: Instance) -> None:
        def opened(name: str, key: type[Any], value: type[Any]) -> BpfMap[Any, Any]:
            return BpfMap.open(install.map_path(instance, name), key, value)

        self._iface = IfaceTable(instance)
        self._addr = AddrTable(instance)
        self._netns = opened("ep_netns", ct.c_uint64, ct.c_uint32)
        self._cgroup = opened("ep_cgroup", ct.c_uint64, ct.c_uint32)
        self.capacity = min(
            self._iface.info.max_entries,
            self._addr.info.max_entries // 2,
            self._netns.info.max_entries,
            self._cgroup.info.max_entries,
        )

    def close(self) -> None:
        for each in (self._iface, self._addr, self._netns, self._cgroup):
            each.close()

    def put(self, record: EndpointRecord, ifindex: int, flags: int = 0) -> None:
        """Write all entries of an endpoint; ResourceExhausted if a map is full."""
        value = value_of(record, ifindex, flags)
        self._iface.update(ifindex, value)
        for address in filter(None, (record.ipv4, record.ipv6)):
            self._addr.update(abi.FibAddr.of(address), value)
        for table, key in ((self._netns, record.netns_cookie), (self._cgroup, record.cgroup_id)):
            if key:
                try:
                    table.update(key, record.id, bpf.NOEXIST)
                except errors.AlreadyExists:
                    pass  # the first endpoint of a namespace or cgroup stands for it

    def set_identity(self, record: EndpointRecord) -> None:
        """Write the record's identity into the entries there are: what else they hold stays as it is."""
        tables: list[tuple[IfaceTable | AddrTable, Any]] = [(self._iface, record.host_ifindex)]
        tables += [(self._addr, abi.FibAddr.of(a)) for a in (record.ipv4, record.ipv6) if a]
        for table, key in tables:
            value = table.lookup(key)
            if value is not None and value.id == record.id and value.identity != record.identity:
                value.identity = record.identity
                table.update(key, value)

    def stop_delivery(self, record: EndpointRecord) -> None:
        """Remove the address entries: nothing is redirected to the endpoint any more."""
        for address in filter(None, (record.ipv4, record.ipv6)):
            key = abi.FibAddr.of(address)
            value = self._addr.lookup(key)
            if value is not None and value.id == record.id:
                self._addr.delete(key)

    def remove(self, record: EndpointRecord, ifindex: int, netns_heir: int = 0, cgroup_heir: int = 0) -> None:
        """Remove all entries that are this endpoint's own; heirs (0: none) take over its namespace and
        cgroup.
        """
        self.stop_delivery(record)
        if ifindex:
            value = self._iface.lookup(ifindex)
            if value is not None and value.id == record.id:
                self._iface.delete(ifindex)
        for table, key, heir in (
            (self._netns, record.netns_cookie, netns_heir),
            (self._cgroup, record.cgroup_id, cgroup_heir),
        ):
            owner = table.lookup(key) if key else None
            if owner is not None and owner.value == record.id:
                if heir:
                    table.update(key, heir)
                else:
                    table.delete(key)

    def view(self) -> MapView:
        """Everything, by a few system calls."""
        return MapView(
            {key.value: bytes(value) for key, value in self._iface.items()},
            {bytes(key): bytes(value) for key, value in self._addr.items()},
            {key.value: value.value for key, value in self._netns.items()},
            {key.value: value.value for key, value in self._cgroup.items()},
        )

    def view_of(self, record: EndpointRecord, ifindex: int) -> MapView:
        """As `view`, but only what is under the endpoint's own keys."""
        keys = [abi.FibAddr.of(address) for address in (record.ipv4, record.ipv6) if address]
        own, names, groups = (
            self._iface.lookup(ifindex),
            self._netns.lookup(record.netns_cookie),
            self._cgroup.lookup(record.cgroup_id),
        )
        return MapView(
            {ifindex: bytes(own)} if own is not None else {},
            {bytes(key): bytes(value) for key in keys if (value := self._addr.lookup(key)) is not None},
            {record.netns_cookie: names.value} if names is not None else {},
            {record.cgroup_id: groups.value} if groups is not None else {},
        )

    def remove_all_of(self, view: MapView, number: int) -> None:
        """Remove every entry of an endpoint number, as far as `view` shows them."""
        for index, raw in view.iface.items():
            if abi.Endpoint.from_buffer_copy(raw).id == number:
                self._iface.delete(index)
        for key, raw in view.addr.items():
            if abi.Endpoint.from_buffer_copy(raw).id == number:
                self._addr.delete(abi.FibAddr.from_buffer_copy(key))
        for table, entries in ((self._netns, view.netns), (self._cgroup, view.cgroup)):
            for entry, owner in entries.items():
                if owner == number:
                    table.delete(entry)

    def remove_stale(self, view: MapView, record: EndpointRecord) -> None:
        """Remove entries under keys the endpoint does not have (any more)."""
        own = {bytes(abi.FibAddr.of(a)) for a in (record.ipv4, record.ipv6) if a}
        for index, raw in view.iface.items():
            if index != record.host_ifindex and abi.Endpoint.from_buffer_copy(raw).id == record.id:
                self._iface.delete(index)
        for key, raw in view.addr.items():
            if key not in own and abi.Endpoint.from_buffer_copy(raw).id == record.id:
                self._addr.delete(abi.FibAddr.from_buffer_copy(key))
