"""Remove what policies leave in the kernel outside the instance's own devices and pins, with every service dead."""

from __future__ import annotations

from services.common.instance import Instance
from services.common.kernel.netlink import Netlink
from services.policy import host


async def remove(instance: Instance) -> list[str]:
    """In the node's namespace, before the instance's pins go. What there was; again is harmless."""
    async with Netlink() as netlink:
        return [f"host policy on {name}" for name in await netlink.call(host.remove, instance)]
