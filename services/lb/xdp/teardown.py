"""Take the fast path off a node's devices with every service dead."""

from __future__ import annotations

from services.common.instance import Instance
from services.common.kernel.netlink import Netlink
from services.lb.xdp import hooks


async def remove(instance: Instance) -> list[str]:
    """In the calling namespace, before the instance's pins go: by them its program is told from another's. What there
    was. Again is harmless.
    """
    async with Netlink() as netlink:
        return [f"XDP program on {name}" for name in await netlink.call(hooks.remove, instance)]
