"""The host's policy at the devices by which its own traffic comes and goes: two tc programs, there while the host has a policy.

    host = HostHooks(instance, netlink, cfg.policy.devices)
    await host.start()      # follows links and routes
    await host.use()        # the programs are pinned, or pinned anew
    host.need(True)         # the host has a policy

    fib_policy_host_in      tc ingress, behind the programs of the balancer and of the identity service
    fib_policy_host_out     tc egress, before the balancer's

As filters of a clsact qdisc with priorities of the instance's own, or by tcx where an `ingress` qdisc is in the way. They
stay when the process goes; what an event says is gone is put back. While the host has no policy they would let everything
pass: they are taken off to save the packets' time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import attach, bpf, progs, tc_classic
from services.common.kernel import events as ev
from services.common.kernel.netlink import Link, Netlink, Rtnl
from services.common.kernel.tc_classic import Direction
from services.common.pipeline.uplinks import uplinks
from services.common.service import ComponentStatus
from services.policy import install

log = logging.getLogger(__name__)

RESYNC_S: Final = 10.0
_SETTLE_S: Final = 0.05
_GROUPS: Final = (ev.GROUP_LINK, ev.GROUP_TC, ev.GROUP_IPV4_ROUTE, ev.GROUP_IPV6_ROUTE)
_HOOKS: Final[dict[Direction, str]] = {"ingress": install.HOST_IN, "egress": install.HOST_OUT}
_ETHERNET: Final = len("00:00:00:00:00:00")
# The kernel keeps so much of a program's name.
_NAME_MAX: Final = 15


@dataclass(frozen=True)
class Device:
    """One that the host's traffic goes by; `problem`: why the programs are not there."""

    name: str
    ifindex: int
    problem: str = ""


def priority_of(instance: Instance, direction: Direction) -> int:
    """Of the instance's filters on interfaces that may be shared: behind the other services' where packets come in, before
    them where they leave. So what the balancer translates is seen as the host's own processes see it.
    """
    number = int(instance.tag, 16)
    return 0x8000 | number & 0x3FFF if direction == "ingress" else 0x1000 | number & 0xFFF


class HostHooks:
    """Used from one event loop, in the node's network namespace."""

    def __init__(self, instance: Instance, netlink: Netlink, devices: Sequence[str]) -> None:
        """devices: that the host's traffic goes by; none: those of the default routes."""
        self._instance = instance
        self._netlink = netlink
        self._names = tuple(devices)
        self._fds: dict[Direction, int] = {}
        self._ids: dict[Direction, int] = {}
        self._found: list[Device] = []
        self._needed: bool | None = None
        self._problem = ""
        self._events: ev.Events | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._dirty = asyncio.Event()

    def need(self, wanted: bool) -> None:
        """Whether the host has a policy, from now on. Until this is said, all stays as it is."""
        if self._needed is not wanted:
            self._needed = wanted
            self._dirty.set()

    async def use(self) -> None:
        """The programs are pinned, or pinned anew. NotFound if they are not."""
        await self._netlink.run(self._open)
        self._dirty.set()

    async def start(self) -> None:
        """Look once, and follow what changes."""
        self._events = ev.Events(_GROUPS)
        await self._work()
        self._tasks = [
            asyncio.create_task(self._follow(self._events), name="host.events"),
            asyncio.create_task(self._run(), name="host.devices"),
        ]

    async def stop(self) -> None:
        """Everything in the kernel stays."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._events is not None:
            self._events.close()
            self._events = None
        await self._netlink.run(self._close)

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Tasks that run until `stop`; the end of one is a failure."""
        return tuple(self._tasks)

    def attached(self) -> list[Device]:
        """Devices the programs hang on."""
        return [device for device in self._found if not device.problem]

    def status(self) -> list[ComponentStatus]:
        if self._problem:
            return [ComponentStatus("host", "degraded", self._problem)]
        if not self._needed:
            return [ComponentStatus("host", "ok", "the host has no policy")]
        if not self._fds:
            return [ComponentStatus("host", "degraded", "the host's policy waits for the programs")]
        wrong = [device for device in self._found if device.problem]
        if wrong:
            text = "; ".join(f"{device.name}: {device.problem}" for device in wrong)
            return [ComponentStatus("host", "degraded", f"{text}; the host's policy is not enforced there")]
        if not self._found:
            text = (
                "there is no default route, so the host's policy is enforced towards its own pods only; "
                "name the devices in policy.devices"
            )
            return [ComponentStatus("host", "degraded", text)]
        names = ", ".join(device.name for device in self._found)
        return [ComponentStatus("host", "ok", f"the host's policy is enforced at {names}")]

    async def _follow(self, events: ev.Events) -> None:
        prefix = f"fb{self._instance.tag}"
        async for event in events:
            if event.link is not None:
                concerned = not event.link.name.startswith(prefix)
            elif event.route is not None:
                concerned = event.route.destination.prefixlen == 0
            else:
                ours = {device.ifindex for device in self._found}
                concerned = (
                    event.kind == "lost"
                    or (event.kind == "filter-gone" and event.ifindex in ours)
                    or (
                        event.kind == "qdisc-gone" and event.qdisc is not None and event.qdisc.ifindex in ours
                    )
                )
            if concerned:
                self._dirty.set()

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESYNC_S):
                    await self._dirty.wait()
                # Changes come in bunches.
                await asyncio.sleep(_SETTLE_S)
            self._dirty.clear()
            await self._work()

    async def _work(self) -> None:
        if self._needed is None or (self._needed and not self._fds):
            return
        try:
            if self._needed:
                self._found = await self._netlink.call(self._apply)
            else:
                await self._netlink.call(remove, self._instance)
                self._found = []
            problem = ""
        except (errors.FibrilError, OSError) as error:
            problem = str(error)
        if problem and problem != self._problem:
            log.warning("the host's policy is not enforced", extra={"cause": problem})
        self._problem = problem

    def _apply(self, node: Rtnl) -> list[Device]:
        links = node.links()
        routes = [] if self._names else node.routes(proto=0)
        wanted = uplinks(self._names, f"fb{self._instance.tag}", links, routes)
        found = [self._keep(link) for link in wanted]
        keep = {link.ifindex for link in wanted}
        for name in _detach(links, self._instance, keep):
            log.info("programs taken off", extra={"interface": name})
        missing = [name for name in self._names if name not in {link.name for link in wanted}]
        return found + [Device(name, 0, "does not exist") for name in missing]

    def _keep(self, link: Link) -> Device:
        try:
            if len(link.mac) != _ETHERNET:
                raise errors.FailedPrecondition("is no Ethernet device")
            if self._attach(link.ifindex):
                log.info("programs attached", extra={"interface": link.name})
        except errors.FibrilError as error:
            return Device(link.name, link.ifindex, str(error))
        return Device(link.name, link.ifindex)

    def _attach(self, ifindex: int) -> bool:
        """Whether anything had to be put there."""
        lacks = {
            direction: fd
            for direction, fd in self._fds.items()
            if tc_classic.attached(ifindex, direction, priority_of(self._instance, direction))
            != [self._ids[direction]]
        }
        if not lacks:
            return False
        taken = tc_classic.taken_by(ifindex)
        if not taken:
            for direction, fd in lacks.items():
                tc_classic.attach(ifindex, {direction: fd}, priority_of(self._instance, direction))
            return True
        # Looked at first: to try and fail would be news, by which this is tried again.
        lacks = {
            direction: fd
            for direction, fd in lacks.items()
            if self._ids[direction] not in {entry.prog_id for entry in attach.attached(ifindex, direction)}
        }
        if lacks and not attach.has_tcx():
            raise errors.FailedPrecondition(
                f"has a qdisc of kind {taken} where clsact would go",
                fix="replace it by clsact, which takes the same filters",
            )
        if lacks:
            attach.attach_tc_hooks(ifindex, lacks, via="tcx")
        return bool(lacks)

    def _open(self) -> None:
        fds: dict[Direction, int] = {}
        try:
            for direction, name in _HOOKS.items():
                fds[direction] = progs.open_prog(install.program_path(self._instance, name))
        except errors.FibrilError:
            for fd in fds.values():
                os.close(fd)
            raise
        self._close()
        self._fds = fds
        self._ids = {direction: bpf.prog_info(fd).id for direction, fd in fds.items()}

    def _close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds, self._ids = {}, {}


def _detach(links: Iterable[Link], instance: Instance, keep: Iterable[int] = ()) -> Iterator[str]:
    for link in links:
        if link.ifindex in keep or link.name.startswith(f"fb{instance.tag}"):
            continue
        with contextlib.suppress(errors.NotFound):
            gone = [tc_classic.detach(link.ifindex, d, priority_of(instance, d)) for d in _HOOKS]
            if any(gone):
                tc_classic.remove_unused(link.ifindex)
            else:
                gone = [attach.detach_tc(link.ifindex, d, name[:_NAME_MAX]) for d, name in _HOOKS.items()]
            if any(gone):
                yield link.name


def remove(node: Rtnl, instance: Instance) -> list[str]:
    """Take the programs off what is not the instance's own, with no service alive; names of the interfaces."""
    return list(_detach(node.links(), instance))
