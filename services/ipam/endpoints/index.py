"""Endpoint records in memory, found by everything they are known by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from services.ipam.endpoints.model import EndpointRecord, Key


class Index:
    """Finding is one dictionary lookup, whatever the number of endpoints."""

    def __init__(self) -> None:
        self._records: dict[int, EndpointRecord] = {}
        self._keys: dict[Key, int] = {}
        self._addresses: dict[str, int] = {}
        self._ifindexes: dict[int, int] = {}
        # Several interfaces may be in one namespace and belong to one cgroup.
        self._cookies: dict[int, tuple[int, ...]] = {}
        self._cgroups: dict[int, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self._records)

    def put(self, record: EndpointRecord) -> None:
        """Insert, or replace the one with this number."""
        old = self._records.get(record.id)
        if old is not None:
            self._forget(old)
        self._records[record.id] = record
        self._keys[record.key] = record.id
        for address in filter(None, (record.ipv4, record.ipv6)):
            self._addresses[address] = record.id
        if record.host_ifindex:
            self._ifindexes[record.host_ifindex] = record.id
        for table, value in ((self._cookies, record.netns_cookie), (self._cgroups, record.cgroup_id)):
            if value:
                sharing = {*table.get(value, ()), record.id}
                table[value] = tuple(
                    sorted(sharing, key=lambda n: (self._records[n].created_unix_seconds, n))
                )

    def remove(self, record: EndpointRecord) -> None:
        """Absent is fine."""
        old = self._records.pop(record.id, None)
        if old is not None:
            self._forget(old)

    def _forget(self, record: EndpointRecord) -> None:
        if self._keys.get(record.key) == record.id:
            del self._keys[record.key]
        for address in (record.ipv4, record.ipv6):
            if self._addresses.get(address) == record.id:
                del self._addresses[address]
        if self._ifindexes.get(record.host_ifindex) == record.id:
            del self._ifindexes[record.host_ifindex]
        for shared, value in ((self._cookies, record.netns_cookie), (self._cgroups, record.cgroup_id)):
            rest = tuple(number for number in shared.get(value, ()) if number != record.id)
            if rest:
                shared[value] = rest
            else:
                shared.pop(value, None)

    def records(self) -> list[EndpointRecord]:
        """All, sorted by number."""
        return [self._records[number] for number in sorted(self._records)]

    def by_number(self) -> Mapping[int, EndpointRecord]:
        """The live table, not a copy."""
        return self._records

    def keys(self) -> Iterator[Key]:
        return iter(self._keys)

    def by_id(self, number: int) -> EndpointRecord | None:
        return self._records.get(number)

    def by_key(self, key: Key) -> EndpointRecord | None:
        return self._records.get(self._keys.get(key, 0))

    def by_address(self, address: str) -> EndpointRecord | None:
        return self._records.get(self._addresses.get(address, 0))

    def by_ifindex(self, ifindex: int) -> EndpointRecord | None:
        return self._records.get(self._ifindexes.get(ifindex, 0))

    def by_cookie(self, cookie: int) -> EndpointRecord | None:
        """The first of those in a namespace that was created."""
        return self._records.get(next(iter(self._cookies.get(cookie, ())), 0))

    def by_cgroup(self, cgroup_id: int) -> EndpointRecord | None:
        return self._records.get(next(iter(self._cgroups.get(cgroup_id, ())), 0))

    def sharing_cookie(self, cookie: int) -> tuple[int, ...]:
        """Numbers of all endpoints in a namespace, in the order of creation."""
        return self._cookies.get(cookie, ())

    def sharing_cgroup(self, cgroup_id: int) -> tuple[int, ...]:
        return self._cgroups.get(cgroup_id, ())
