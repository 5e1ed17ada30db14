"""The balancer's tc programs: slot LB for what pods send, and two on the devices that clients outside come by.

    packets = Packets(instance, netlink, cfg.lb.devices)
    await packets.start()        # raises nothing for what the host lacks: see `status`
    packets.need(True)           # there are frontends that clients outside reach

    fib_lb_uplink       tc ingress, before the identity service's program: frontends, and answers to this node
    fib_lb_uplink_out   tc egress: answers of this host's own processes

They stay when the process goes; what an event says is gone is put back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import progs
from services.common.kernel.netlink import Netlink, Rtnl
from services.common.kernel.tc_shared import Filter
from services.common.pipeline import devices as pipeline
from services.common.pipeline.abi import MAPS, SLOTS_MAP
from services.common.pipeline.datapath import Datapath, Parts
from services.common.pipeline.devices import Device, DeviceHooks
from services.common.service import ComponentStatus
from services.lb import install


def parts() -> Parts:
    """What is loaded for tc."""
    return Parts("lb.packets", install.install_packets, complete)


def complete(instance: Instance) -> bool:
    """Whether all is pinned and the slot filled."""
    spec = install.packets()
    pins = [instance.pin_dir / path for path in spec.maps.values()]
    pins += [install.program_path(instance, name) for name in spec.functions]
    if not all(path.exists() for path in pins):
        return False
    return set(map(int, install.SLOTS)) <= set(progs.slots(instance.pin_dir / MAPS[SLOTS_MAP]))


def priority_of(instance: Instance) -> int:
    """Of the instance's filters on interfaces that may be shared: smaller than the identity service's."""
    return 0x2000 | int(instance.tag, 16) & 0x1FFF


def places(instance: Instance) -> tuple[Filter, ...]:
    """Where the programs hang."""
    priority = priority_of(instance)
    return (
        Filter("ingress", install.UPLINK, priority),
        Filter("egress", install.UPLINK_OUT, priority),
    )


class Packets:
    """Used from one event loop, in the node's network namespace."""

    def __init__(self, instance: Instance, netlink: Netlink, devices: Sequence[str]) -> None:
        """devices: that clients outside come by; none: those of the default routes."""
        self._hooks = DeviceHooks(
            instance,
            netlink,
            devices,
            places(instance),
            lambda name: install.program_path(instance, name),
            "clients outside are not served",
            self._before,
        )
        self._datapath = Datapath(instance, parts(), self._hooks.use, self._lost)

    def need(self, wanted: bool) -> None:
        """Whether anything is reached from outside, from now on. Until this is said, all stays as it is."""
        self._hooks.need(wanted)

    async def start(self) -> None:
        """Load, look once, and follow what changes."""
        await self._hooks.start()

    async def stop(self) -> None:
        """Everything in the kernel stays."""
        await self._hooks.stop()

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Tasks that run until `stop`; the end of one is a failure."""
        return self._hooks.tasks()

    def attached(self) -> list[Device]:
        """Devices the programs hang on."""
        return self._hooks.attached()

    def status(self) -> list[ComponentStatus]:
        loaded, hooks = self._datapath.status()[0], self._hooks
        if loaded.state != "ok":
            return [ComponentStatus("packets", loaded.state, loaded.message)]
        if hooks.problem:
            return [ComponentStatus("packets", "degraded", hooks.problem)]
        if hooks.needed is None:
            text = "pods; who outside is to be served is not known yet, and what is there stays"
            return [ComponentStatus("packets", "ok", text)]
        if not hooks.needed:
            return [ComponentStatus("packets", "ok", "pods; nothing is reached from outside")]
        if wrong := hooks.problems():
            return [ComponentStatus("packets", "degraded", f"{wrong}; clients there are not served")]
        if not hooks.found:
            text = (
                "there is no default route, so clients outside are not served; name the devices in lb.devices"
            )
            return [ComponentStatus("packets", "degraded", text)]
        return [ComponentStatus("packets", "ok", "pods and " + ", ".join(device.name for device in hooks.found))]

    async def _before(self) -> None:
        if self._datapath.problem is not None:
            await self._datapath.install()

    def _lost(self, reason: errors.FibrilError) -> None:
        """What is loaded and attached goes on; `status` names the reason."""


def remove(node: Rtnl, instance: Instance) -> list[str]:
    """Take the programs off what is not the instance's own, with no service alive; names of the interfaces."""
    return pipeline.remove(node, instance, places(instance))
