"""Remove all that pods and the node's set-up left in the kernel, with every service dead and nothing to
read but names.
"""

from __future__ import annotations

import shutil

from services.common.instance import Instance
from services.common.kernel.netlink import Netlink
from services.ipam.endpoints import node


async def remove(instance: Instance) -> list[str]:
    """Links, routes, rules, kernel parameters and pins of the instance, in the calling namespace; what
    there was.

    Again is harmless. Raises the first error of the kernel, after trying everything. No service may be
    running.
    """
    async with Netlink() as netlink:
        done = await netlink.call(node.remove, instance)
    if instance.pin_dir.is_dir():
        # Links are gone, so no program is attached any more: unpinning frees maps and programs.
        shutil.rmtree(instance.pin_dir)
        done.append(f"pins below {instance.pin_dir}")
    return done
