"""The pods of this node as workload identity needs them: found by number, cgroup and network namespace.

Whoever follows the ipam service's WatchEndpoints feeds an EndpointView; whoever asks sees it as Endpoints.
"""

from __future__ import annotations

from typing import Protocol

from fibril.endpoint.v1 import endpoint_pb2 as ep


class Endpoints(Protocol):
    """What is known of the pods of this node."""

    @property
    def known(self) -> bool:
        """Whether all pods have been told of once; until then an absent one means nothing."""

    def by_id(self, number: int) -> ep.Endpoint | None:
        """By endpoint number."""

    def by_cgroup(self, cgroup_id: int) -> ep.Endpoint | None:
        """By the pod's own cgroup v2 id; of several interfaces of one pod, the first made."""

    def by_netns(self, cookie: int) -> ep.Endpoint | None:
        """By network namespace cookie, likewise."""


class EndpointView:
    """Endpoints from a stream of changes: `restart`, then a `put` each, `synced`, then what changes.

    What a stream that began anew does not mention until `synced` is gone; before that, nothing is. A stream that was resumed
    needs no `restart`. Messages are kept, not copied.
    """

    def __init__(self) -> None:
        self.known = False
        self._by_id: dict[int, ep.Endpoint] = {}
        self._cgroups: dict[int, set[int]] = {}
        self._netns: dict[int, set[int]] = {}
        self._stale: set[int] = set()

    def restart(self) -> None:
        """A stream with a snapshot begins."""
        self._stale = set(self._by_id)

    def put(self, endpoint: ep.Endpoint) -> None:
        """An endpoint is there, or has changed."""
        self.delete(endpoint.id)
        self._by_id[endpoint.id] = endpoint
        for index, key in self._keys(endpoint):
            index.setdefault(key, set()).add(endpoint.id)

    def delete(self, number: int) -> None:
        """An endpoint is gone; an unknown one is fine."""
        self._stale.discard(number)
        endpoint = self._by_id.pop(number, None)
        if endpoint is None:
            return
        for index, key in self._keys(endpoint):
            index[key].discard(number)
            if not index[key]:
                del index[key]

    def synced(self) -> None:
        """The snapshot is complete."""
        for number in list(self._stale):
            self.delete(number)
        self.known = True

    def by_id(self, number: int) -> ep.Endpoint | None:
        return self._by_id.get(number)

    def by_cgroup(self, cgroup_id: int) -> ep.Endpoint | None:
        return self._first(self._cgroups, cgroup_id)

    def by_netns(self, cookie: int) -> ep.Endpoint | None:
        return self._first(self._netns, cookie)

    def _keys(self, endpoint: ep.Endpoint) -> list[tuple[dict[int, set[int]], int]]:
        found = [(self._cgroups, endpoint.cgroup_id), (self._netns, endpoint.netns_cookie)]
        return [(index, key) for index, key in found if key]

    def _first(self, index: dict[int, set[int]], key: int) -> ep.Endpoint | None:
        numbers = index.get(key)
        return self._by_id[min(numbers)] if numbers else None
