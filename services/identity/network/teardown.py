"""Remove what the network part leaves in the kernel outside the instance's own devices, with every service dead and
nothing to read but names. The devices themselves, with programs and routes on them, go with all others of the
instance (services.ipam.endpoints.teardown).
"""

from __future__ import annotations

from services.common.instance import Instance
from services.common.kernel.netlink import Netlink, Rtnl
from services.identity.network import overlay, programs, routes


async def remove(instance: Instance) -> list[str]:
    """Overlay device, routes to other nodes, programs on uplinks, in the calling namespace; what there was.

    Again is harmless. Raises the kernel's first error.
    """
    async with Netlink() as netlink:
        return await netlink.call(_remove, instance)


def _remove(node: Rtnl, instance: Instance) -> list[str]:
    done = [f"program on {name}" for name in programs.remove(node, instance)]
    done += [f"route {block}" for block in routes.remove(node, instance)]
    if overlay.remove(node, instance):
        done.append(f"interface {overlay.ifname(instance)}")
    return done
