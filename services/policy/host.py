"""The host's policy at the devices by which its own traffic comes and goes: two tc programs, there while the host has a policy.

    host = HostHooks(instance, netlink, cfg.policy.devices)
    await host.start()      # follows links and routes
    await host.use()        # the programs are pinned, or pinned anew
    host.need(True)         # the host has a policy

    fib_policy_host_in      tc ingress, behind the programs of the balancer and of the identity service
    fib_policy_host_out     tc egress, before the balancer's

They stay when the process goes; what an event says is gone is put back. While the host has no policy they would let everything
pass: they are taken off to save the packets' time.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.common.instance import Instance
from services.common.kernel.netlink import Netlink, Rtnl
from services.common.kernel.tc_classic import Direction
from services.common.kernel.tc_shared import Filter
from services.common.pipeline import devices as pipeline
from services.common.pipeline.devices import DeviceHooks
from services.common.service import ComponentStatus
from services.policy import install


def priority_of(instance: Instance, direction: Direction) -> int:
    """Of the instance's filters on interfaces that may be shared: behind the other services' where packets come in, before
    them where they leave. So what the balancer translates is seen as the host's own processes see it.
    """
    number = int(instance.tag, 16)
    return 0x8000 | number & 0x3FFF if direction == "ingress" else 0x1000 | number & 0xFFF


def places(instance: Instance) -> tuple[Filter, ...]:
    """Where the programs hang."""
    return (
        Filter("ingress", install.HOST_IN, priority_of(instance, "ingress")),
        Filter("egress", install.HOST_OUT, priority_of(instance, "egress")),
    )


class HostHooks(DeviceHooks):
    """Used from one event loop, in the node's network namespace."""

    def __init__(self, instance: Instance, netlink: Netlink, devices: Sequence[str]) -> None:
        """devices: that the host's traffic goes by; none: those of the default routes."""
        super().__init__(
            instance,
            netlink,
            devices,
            places(instance),
            lambda name: install.program_path(instance, name),
            "the host's policy is not enforced",
        )

    def status(self) -> list[ComponentStatus]:
        if self.problem:
            return [ComponentStatus("host", "degraded", self.problem)]
        if not self.needed:
            return [ComponentStatus("host", "ok", "the host has no policy")]
        if not self.ready:
            return [ComponentStatus("host", "degraded", "the host's policy waits for the programs")]
        if wrong := self.problems():
            text = f"{wrong}; the host's policy is not enforced there"
            return [ComponentStatus("host", "degraded", text)]
        if not self.found:
            text = (
                "there is no default route, so the host's policy is enforced towards its own pods only; "
                "name the devices in policy.devices"
            )
            return [ComponentStatus("host", "degraded", text)]
        names = ", ".join(device.name for device in self.found)
        return [ComponentStatus("host", "ok", f"the host's policy is enforced at {names}")]


def remove(node: Rtnl, instance: Instance) -> list[str]:
    """Take the programs off what is not the instance's own, with no service alive; names of the interfaces."""
    return pipeline.remove(node, instance, places(instance))
