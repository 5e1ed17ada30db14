"""A service's tc programs at the devices that lead out of the node: put there while they are needed, kept there, taken off.

    hooks = DeviceHooks(instance, netlink, names, places, path_of, "clients outside are not served")
    hooks.need(True)        # until something is said, all stays as it is
    await hooks.use()       # the programs are pinned, or pinned anew
    await hooks.start()     # looks once, and follows links, routes and filters

They stay when the process goes; what an event says is gone is put back, and everything is looked at now and again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import bpf, progs, tc_shared
from services.common.kernel import events as ev
from services.common.kernel.following import Following
from services.common.kernel.netlink import Link, Netlink, Rtnl
from services.common.kernel.tc_shared import Filter
from services.common.pipeline.uplinks import uplinks

log = logging.getLogger(__name__)

RESYNC_S: Final = 10.0
_GROUPS: Final = (ev.GROUP_LINK, ev.GROUP_TC, ev.GROUP_IPV4_ROUTE, ev.GROUP_IPV6_ROUTE)
_ETHERNET: Final = len("00:00:00:00:00:00")


@dataclass(frozen=True)
class Device:
    """One that leads out of the node; `problem`: why the programs are not there."""

    name: str
    ifindex: int
    problem: str = ""


async def _nothing() -> None:
    """Before a look."""


class DeviceHooks:
    """Used from one event loop, in the node's network namespace."""

    def __init__(
        self,
        instance: Instance,
        netlink: Netlink,
        devices: Sequence[str],
        places: Sequence[Filter],
        path_of: Callable[[str], Path],
        consequence: str,
        before: Callable[[], Awaitable[None]] = _nothing,
    ) -> None:
        """devices: by name; none: those of the default routes. path_of: where a program of that name is pinned.

        consequence: what it means if they cannot be attached, for the log. before: called before each look.
        """
        self._instance = instance
        self._netlink = netlink
        self._names = tuple(devices)
        self._places = tuple(places)
        self._path_of = path_of
        self._consequence = consequence
        self._before = before
        self._programs: dict[Filter, tuple[int, int]] = {}  # descriptor and id
        self._found: list[Device] = []
        self._needed: bool | None = None
        self._problem = ""
        self._settled = asyncio.Event()
        self._settled.set()
        self._following = Following("devices", _GROUPS, self._concerns, self._work, resync_s=RESYNC_S)

    @property
    def needed(self) -> bool | None:
        """None: not known yet, and what is there stays."""
        return self._needed

    @property
    def ready(self) -> bool:
        """Whether there are programs to attach."""
        return bool(self._programs)

    @property
    def problem(self) -> str:
        """Why devices could not be looked at; "" if they could."""
        return self._problem

    @property
    def found(self) -> list[Device]:
        """Devices the programs belong on, as last seen."""
        return self._found

    def attached(self) -> list[Device]:
        """Devices the programs hang on."""
        return [device for device in self._found if not device.problem]

    def problems(self) -> str:
        """What is wrong with which devices, for status; "" if nothing is."""
        return "; ".join(f"{device.name}: {device.problem}" for device in self._found if device.problem)

    def need(self, wanted: bool) -> None:
        """Whether the programs have anything to do, from now on."""
        if self._needed is not wanted:
            self._needed = wanted
            self._settled.clear()
            self._following.wake()

    async def settled(self) -> None:
        """Until what `need` said last has been seen to; `problem` and `problems` tell how that went."""
        await self._settled.wait()

    async def use(self) -> None:
        """The programs are pinned, or pinned anew. NotFound if they are not."""
        await self._netlink.run(self._open)
        self._following.wake()

    async def start(self) -> None:
        """Look once, and follow what changes."""
        await self._following.start()

    async def stop(self) -> None:
        """Everything in the kernel stays."""
        await self._following.stop()
        await self._netlink.run(self._close)

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Tasks that run until `stop`; the end of one is a failure."""
        return self._following.tasks()

    def _concerns(self, event: ev.Event) -> bool:
        if event.link is not None:
            return not event.link.name.startswith(f"fb{self._instance.tag}")
        if event.route is not None:
            return event.route.destination.prefixlen == 0
        ours = {device.ifindex for device in self._found}
        return (
            event.kind == "lost"
            or (event.kind == "filter-gone" and event.ifindex in ours)
            or (event.kind == "qdisc-gone" and event.qdisc is not None and event.qdisc.ifindex in ours)
        )

    async def _work(self) -> None:
        await self._before()
        needed = self._needed
        if needed is None or (needed and not self._programs):
            return
        try:
            if needed:
                self._found = await self._netlink.call(self._apply)
            else:
                await self._netlink.call(remove, self._instance, self._places)
                self._found = []
            problem = ""
        except (errors.FibrilError, OSError) as error:
            problem = str(error)
        if problem and problem != self._problem:
            log.warning(self._consequence, extra={"cause": problem})
        self._problem = problem
        if needed is self._needed:
            self._settled.set()

    def _apply(self, node: Rtnl) -> list[Device]:
        links = node.links()
        routes = [] if self._names else node.routes(proto=0)
        wanted = uplinks(self._names, f"fb{self._instance.tag}", links, routes)
        found = [self._keep(link) for link in wanted]
        keep = {link.ifindex for link in wanted}
        for name in _detach(links, self._instance, self._places, keep):
            log.info("programs taken off", extra={"interface": name})
        missing = [name for name in self._names if name not in {link.name for link in wanted}]
        return found + [Device(name, 0, "does not exist") for name in missing]

    def _keep(self, link: Link) -> Device:
        try:
            if len(link.mac) != _ETHERNET:
                raise errors.FailedPrecondition("is no Ethernet device")
            put = [
                tc_shared.ensure(link.ifindex, place, fd, ident)
                for place, (fd, ident) in self._programs.items()
            ]
        except errors.FibrilError as error:
            return Device(link.name, link.ifindex, str(error))
        if any(put):
            log.info("programs attached", extra={"interface": link.name})
        return Device(link.name, link.ifindex)

    def _open(self) -> None:
        programs: dict[Filter, tuple[int, int]] = {}
        try:
            for place in self._places:
                fd = progs.open_prog(self._path_of(place.name))
                programs[place] = fd, bpf.prog_info(fd).id
        except errors.FibrilError:
            for fd, _ in programs.values():
                os.close(fd)
            raise
        self._close()
        self._programs = programs

    def _close(self) -> None:
        for fd, _ in self._programs.values():
            os.close(fd)
        self._programs = {}


def _detach(
    links: Iterable[Link], instance: Instance, places: Sequence[Filter], keep: Iterable[int] = ()
) -> Iterator[str]:
    for link in links:
        if link.ifindex in keep or link.name.startswith(f"fb{instance.tag}"):
            continue
        with contextlib.suppress(errors.NotFound):
            if any([tc_shared.detach(link.ifindex, place) for place in places]):
                yield link.name


def remove(node: Rtnl, instance: Instance, places: Sequence[Filter]) -> list[str]:
    """Take the programs off what is not the instance's own, with no service alive; names of the interfaces."""
    return list(_detach(node.links(), instance, places))
