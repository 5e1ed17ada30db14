"""Keeps the fast path where it is wanted: on the uplinks, while somebody needs it.

    xdp = Xdp(instance, netlink, cfg.lb.xdp, cfg.lb.devices, ("services", "prefilter"))
    await xdp.start()                  # raises nothing for what the host lacks: see `status`
    xdp.need("services", True)         # there are frontends that clients outside reach

Without XDP packets are balanced all the same, by tc: so what is missing here is named and never stops anything. The program
stays when the process goes, and is adopted by the next; it is taken off when all who could need it have said no.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import events as ev
from services.common.kernel.following import Following
from services.common.kernel.netlink import Netlink
from services.common.kernel.xdp import Mode
from services.common.pipeline.datapath import Datapath
from services.common.service import ComponentStatus
from services.lb.xdp import hooks
from services.lb.xdp.hooks import Hook, Hooks

log = logging.getLogger(__name__)

RESYNC_S: Final = 10.0
_GROUPS: Final = (ev.GROUP_LINK, ev.GROUP_IPV4_ROUTE, ev.GROUP_IPV6_ROUTE)


class Xdp:
    """Used from one event loop, in the node's network namespace."""

    def __init__(
        self, instance: Instance, netlink: Netlink, mode: str, devices: Sequence[str], sources: Iterable[str]
    ) -> None:
        """mode: off, auto, native or generic. devices: none: those of the default routes. sources: who will say
        whether it is needed.
        """
        self._instance = instance
        self._netlink = netlink
        self._mode = mode
        self._devices = tuple(devices)
        self._needs: dict[str, bool | None] = dict.fromkeys(sources)
        self._hooks = Hooks(instance)
        self._datapath = Datapath(instance, hooks.parts(), self._use, self._lost)
        self._found: list[Hook] = []
        self._callbacks: list[Callable[[], None]] = []
        self._problem = ""
        self._following = Following("xdp", _GROUPS, self._concerns, self._work, resync_s=RESYNC_S)

    def need(self, source: str, wanted: bool) -> None:
        """Whether `source` has use for the program from now on."""
        if self._needs.get(source) is not wanted:
            self._needs[source] = wanted
            self._following.wake()

    def on_change(self, callback: Callable[[], None]) -> None:
        """To be called when `attached` is other than before."""
        self._callbacks.append(callback)

    @property
    def wanted(self) -> bool | None:
        """None: not known yet, and what is there stays."""
        if self._mode == "off":
            return False
        if self._mode != "auto" or any(self._needs.values()):
            return True
        return None if None in self._needs.values() else False

    async def start(self) -> None:
        """Look once, and follow what changes."""
        await self._following.start()

    async def stop(self) -> None:
        """The program stays."""
        await self._following.stop()
        await self._netlink.run(self._hooks.close)

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Tasks that run until `stop`; the end of one is a failure."""
        return self._following.tasks()

    def attached(self) -> list[Hook]:
        """Devices the program hangs on."""
        return [hook for hook in self._found if hook.mode is not Mode.NONE]

    def status(self) -> list[ComponentStatus]:
        if self._mode == "off":
            return [ComponentStatus("xdp", "ok", "off (lb.xdp)")]
        if self._problem:
            return [ComponentStatus("xdp", "degraded", f"{self._problem}; packets are balanced by tc")]
        if self.wanted is None:
            return [ComponentStatus("xdp", "ok", "not known yet whether it is needed; what is there stays")]
        if not self.wanted:
            return [ComponentStatus("xdp", "ok", "not attached: nothing is reached from outside")]
        wrong = [hook for hook in self._found if hook.problem]
        if wrong:
            text = "; ".join(f"{hook.device}: {hook.problem}" for hook in wrong)
            return [ComponentStatus("xdp", "degraded", f"{text}; packets there are balanced by tc")]
        if not self._found:
            return [
                ComponentStatus(
                    "xdp", "degraded", "there is no default route; name the devices in lb.devices"
                )
            ]
        return [ComponentStatus("xdp", "ok", ", ".join(map(_text, self._found)))]

    def _concerns(self, event: ev.Event) -> bool:
        if event.link is not None:
            return not event.link.name.startswith(f"fb{self._instance.tag}")
        return event.kind == "lost" or (event.route is not None and event.route.destination.prefixlen == 0)

    async def _work(self) -> None:
        try:
            await self._agree()
            problem = ""
        except (errors.FibrilError, OSError) as error:
            problem = str(error)
        if problem != self._problem and problem:
            log.warning("no XDP", extra={"cause": problem})
        self._problem = problem

    async def _agree(self) -> None:
        wanted = self.wanted
        there = self._hooks.ready and hooks.complete(self._instance)
        if wanted and not there and not await self._datapath.install():
            raise self._datapath.problem or errors.Unavailable("the XDP program is not there")
        if wanted is None:
            return
        before = self._found
        if wanted:
            self._found = await self._netlink.call(self._hooks.apply, self._devices, self._mode)
        else:
            await self._netlink.call(hooks.remove, self._instance)
            self._found = []
        if self._found != before:
            for callback in self._callbacks:
                callback()

    async def _use(self) -> None:
        await self._netlink.run(self._hooks.open)

    def _lost(self, reason: errors.FibrilError) -> None:
        """What is attached goes on; `status` names the reason."""


def _text(hook: Hook) -> str:
    note = f" ({hook.note})" if hook.note else ""
    return f"{hook.mode.name.lower()} on {hook.device}{note}"
