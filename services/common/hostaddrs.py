"""The addresses of this host, whoever gave it them: packets from them are the host's own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from ipaddress import ip_interface
from typing import Final

from services.common import errors
from services.common.kernel import events as ev
from services.common.kernel import netlink as nl
from services.common.kernel.netlink import IPAddress, Netlink, Rtnl

log = logging.getLogger(__name__)

RESYNC_S: Final = 60.0
_SETTLE_S: Final = 0.05


class HostAddresses:
    """Follows them from `start` on, in the network namespace of the thread that calls it."""

    def __init__(self, netlink: Netlink, changed: Callable[[], None]) -> None:
        self._netlink = netlink
        self._changed = changed
        self._events: ev.Events | None = None
        self.addresses: frozenset[IPAddress] = frozenset()
        """Those others can send to: neither loopback nor link-local."""
        self.taken: frozenset[IPAddress] = frozenset()
        """All that reaches it when a pod sends to it: these, IPv4's link-local ones and those of narrower scope, and what each
        of its networks calls all hosts (IPv4's broadcast) or any router (IPv6's anycast), which routers take for their own.
        """

    async def start(self) -> None:
        """Look once."""
        # Before looking, so that no change falls between.
        self._events = ev.Events((ev.GROUP_IPV4_ADDRESS, ev.GROUP_IPV6_ADDRESS))
        await self._look()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None

    async def run(self) -> None:
        """Until cancelled; after `start`."""
        assert self._events is not None
        dirty = asyncio.Event()
        listening = asyncio.create_task(self._listen(self._events, dirty), name="hostaddrs.events")
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RESYNC_S):
                        await dirty.wait()
                    # Changes come in bunches.
                    await asyncio.sleep(_SETTLE_S)
                dirty.clear()
                await self._look()
        finally:
            listening.cancel()
            # It must let go of the socket before that is closed.
            await asyncio.gather(listening, return_exceptions=True)

    async def _listen(self, events: ev.Events, dirty: asyncio.Event) -> None:
        async for _ in events:
            dirty.set()

    async def _look(self) -> None:
        try:
            found = await self._netlink.call(Rtnl.addresses)
        except (errors.FibrilError, OSError) as error:
            log.warning("cannot list the host's addresses", extra={"cause": str(error)})
            return
        addresses = frozenset(
            entry.address
            for entry in found
            if entry.scope == nl.SCOPE_UNIVERSE
            and not entry.address.is_loopback
            and not entry.address.is_link_local
        )
        taken = frozenset(address for entry in found for address in _taken(entry))
        if (addresses, taken) != (self.addresses, self.taken):
            self.addresses, self.taken = addresses, taken
            self._changed()


def _taken(entry: nl.Address) -> Iterator[IPAddress]:
    # Pods get no further with these: they are refused before anybody is asked.
    if entry.address.is_loopback or (entry.address.version == 6 and entry.address.is_link_local):
        return
    yield entry.address
    if entry.prefix < entry.address.max_prefixlen - 1:
        network = ip_interface((entry.address, entry.prefix)).network
        yield network.broadcast_address if network.version == 4 else network.network_address
