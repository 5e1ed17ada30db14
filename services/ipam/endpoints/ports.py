"""What the endpoint manager asks of others: addresses, and the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from services.common import errors
from services.ipam.endpoints.model import EndpointRecord, EndpointSpec, Heirs, Lease, Place


class Addresses(Protocol):
    """The address book, as endpoints see it."""

    async def lease(self, record: EndpointRecord) -> Lease:
        """Addresses for the record's spec, with usable gateways. The same owner gets the same ones again."""

    async def release(self, owner: str) -> None:
        """Give all of the owner's addresses back; none is fine."""

    async def sweep(self, live: set[str]) -> None:
        """Release what endpoints hold whose owner is not in `live`."""


class Kernel(Protocol):
    """What endpoints are made of (see ops.PodOps)."""

    def unavailable(self) -> errors.FibrilError | None:
        """Why no endpoint can be made now."""

    def capacity(self) -> int:
        """How many endpoints the maps hold."""

    def mtu(self) -> int:
        """MTU for pods that ask for none, bytes."""

    async def place(self, spec: EndpointSpec) -> Place:
        """FailedPrecondition if the namespace (field netns) or cgroup (cgroup_path) is gone."""

    async def wire(self, record: EndpointRecord) -> int:
        """Make all of it; the host side's ifindex. Leaves nothing if it raises."""

    async def unwire(self, record: EndpointRecord, heirs: Heirs) -> None:
        """Remove all of it; absent is success."""

    async def repair(self, record: EndpointRecord) -> int:
        """Make what is missing; the host side's ifindex. NotFound if the namespace is gone."""

    async def identify(self, records: Sequence[EndpointRecord]) -> None:
        """Tell programs the records' identities. Calls take effect in their order, `wire` and `repair`
        included; an endpoint the kernel does not have is passed over.
        """

    async def admitted(self, record: EndpointRecord) -> None:
        """Wait for the endpoint's policy, on a node that has any. Unavailable: it did not come."""

    async def check(self, record: EndpointRecord) -> list[str]:
        """Every difference, one sentence each."""
