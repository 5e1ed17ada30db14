"""Remove what load balancing leaves in the kernel outside the instance's own devices and pins, with every service dead."""

from __future__ import annotations

from services.common.instance import Instance
from services.common.kernel.netlink import Netlink
from services.lb import packets
from services.lb.sockets import teardown as sockets
from services.lb.xdp import teardown as xdp


async def remove(instance: Instance) -> list[str]:
    """In the node's namespace, before the instance's pins go: by them its programs are told from others'. What there was.
    Again is harmless.
    """
    async with Netlink() as netlink:
        done = [f"balancer on {name}" for name in await netlink.call(packets.remove, instance)]
    return [*await sockets.remove(instance), *await xdp.remove(instance), *done]
