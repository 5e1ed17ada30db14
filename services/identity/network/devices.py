"""The devices packets between nodes pass: found or made, with their programs, and made known to all programs.

One object, compared by being applied: a few requests that name their interface, whatever else the host has. fb<tag>host
is the ipam service's: until that has made it there is none, and nothing waits for it.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import netlink as nl
from services.common.kernel.netlink import IPAddress, Link, Netlink, Rtnl
from services.common.pipeline import abi
from services.common.underlay import Facts
from services.identity.network import install, overlay
from services.identity.network.nodemap import NodeMap
from services.identity.network.programs import Programs

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """overlay: have a VXLAN device (None: leave it as it is, not all is known yet)."""

    overlay: bool | None
    underlay: Facts


@dataclass(frozen=True)
class Found:
    """Indexes, 0 for what is not there. host_mac: of fb<tag>host. sources: of each family the address the host uses
    towards pods.
    """

    overlay: int = 0
    host: int = 0
    uplink: int = 0
    host_mac: str = ""
    sources: tuple[IPAddress, ...] = ()


class Devices:
    """Ops of a reconciler over one object."""

    KEY: Final = "devices"

    def __init__(
        self,
        instance: Instance,
        netlink: Netlink,
        port: int,
        programs: Programs,
        nodemap: NodeMap,
        wanted: Callable[[], Wanted],
        changed: Callable[[], None],
    ) -> None:
        """changed: called after `found` has changed."""
        self._instance = instance
        self._netlink = netlink
        self._port = port
        self._programs = programs
        self._nodemap = nodemap
        self._wanted = wanted
        self._changed = changed
        self._swept = -1
        self.found = Found()

    def desired(self) -> Mapping[str, Wanted]:
        return {self.KEY: self._wanted()}

    async def actual(self) -> Mapping[str, Any]:
        return {}

    async def same(self, desired: Wanted, actual: Any) -> bool:
        return False

    async def update(self, key: str, desired: Wanted) -> None:
        before = self.found
        try:
            await self._netlink.call(self._apply, desired)
        finally:
            if self.found != before:
                self._changed()

    async def delete(self, key: str) -> None:
        pass

    def _apply(self, node: Rtnl, wanted: Wanted) -> None:
        """Each part on its own: what fails of one does not keep the others from being set up."""
        failures: list[Exception] = []

        def part(step: Callable[[], T], otherwise: T) -> T:
            try:
                return step()
            except (errors.FibrilError, OSError) as error:
                failures.append(error)
                return otherwise

        host = node.link(self._instance.node_ifname)
        host = host if host is not None and host.up else None
        if host is not None:
            part(lambda: self._host(node, host), None)
        part(lambda: self._overlay(node, wanted), None)
        part(lambda: self._uplink(node, wanted), None)
        # What failed may have failed for a moment: what works meanwhile is gone on with.
        made = node.link(overlay.ifname(self._instance))
        self.found = Found(
            overlay=made.ifindex if made is not None and made.up else 0,
            host=host.ifindex if host is not None else 0,
            uplink=wanted.underlay.ifindex,
            host_mac=host.mac if host is not None else "",
            sources=part(lambda: self._sources(node, host), self.found.sources),
        )
        if self._programs.ready:
            devices = abi.NetworkDevices(
                overlay_ifindex=self.found.overlay,
                host_ifindex=self.found.host,
                uplink_ifindex=self.found.uplink,
                overlay_port=socket.htons(self._port),
            )
            if host is not None:
                devices.host_mac = abi.mac_bytes(host.mac)
            if wanted.underlay.ipv4:
                devices.v4 = abi.be32(wanted.underlay.ipv4)
            if wanted.underlay.ipv6:
                devices.v6 = abi.FibAddr.of(wanted.underlay.ipv6)
            if self._nodemap.set_devices(devices):
                log.info("devices", extra={"found": str(self.found)})
        if failures:
            raise failures[0]

    def _host(self, node: Rtnl, link: Link) -> None:
        if not link.noarp:
            # Addresses of other nodes' pods, which are routed here, are nobody's to answer for.
            node.apply([nl.link_noarp(link.ifindex)])
        if self._programs.ready:
            self._programs.attach(link.ifindex, install.FROM_HOST)

    def _overlay(self, node: Rtnl, wanted: Wanted) -> None:
        if wanted.overlay is False:
            if overlay.remove(node, self._instance):
                log.info("overlay device removed, no node needs it")
            return
        there = node.ifindex(overlay.ifname(self._instance))
        if not self._programs.ready or (wanted.overlay is None and not there):
            return

        def before_up(made: int) -> None:
            self._programs.attach(made, install.FROM_OVERLAY)

        overlay.ensure(node, self._instance, self._port, before_up)

    def _uplink(self, node: Rtnl, wanted: Wanted) -> None:
        index = wanted.underlay.ifindex if wanted.underlay.ethernet else 0
        if not self._programs.ready:
            return
        if index:
            self._programs.attach(index, install.FROM_UPLINK)
        if self._swept != index:
            for name in self._programs.detach_uplinks(node, index):
                log.info("program taken off", extra={"interface": name})
            self._swept = index

    def _sources(self, node: Rtnl, host: Link | None) -> tuple[IPAddress, ...]:
        """The one used before, while it is there: connections of the host keep it, and no route changes."""
        if host is None:
            return ()
        there = [entry.address for entry in node.addresses(host.ifindex) if entry.scope == nl.SCOPE_UNIVERSE]
        kept = {address.version: address for address in self.found.sources if address in there}
        for address in sorted(there, key=int):
            kept.setdefault(address.version, address)
        return tuple(kept[family] for family in sorted(kept))
