"""The VXLAN device, fb<tag>vx: one for all nodes and both families of the underlay.

    external    the program that sends a packet says where to, the one that receives it learns where from
    gbp         room for the upper 8 bits of a sender's identity; the VNI carries the lower 24
    no address  what is taken out of a tunnel is the program's, never the host's stack's: the program is attached
                before the device is up

Functions block: netlink thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import netlink as nl
from services.common.kernel import vxlan
from services.common.kernel.netlink import Rtnl

log = logging.getLogger(__name__)


def ifname(instance: Instance) -> str:
    """Name of the device. No endpoint's has it: those end in hexadecimal digits."""
    return f"fb{instance.tag}vx"


def ensure(node: Rtnl, instance: Instance, port: int, before_up: Callable[[int], None]) -> None:
    """Have the device, up. `before_up` gets the index each time, before packets can arrive.

    FailedPrecondition naming network.overlay_port if somebody else has the port.
    """
    name = ifname(instance)
    wanted = vxlan.Vxlan(port)
    found = vxlan.read(node, name)
    if found is not None and found[1] != wanted:
        log.warning("overlay device is not as it should be, made anew", extra={"is": str(found[1])})
        node.delete_link(name)
        found = None
    try:
        if found is None:
            node.apply([vxlan.vxlan_add(name, wanted)])
            index = node.ifindex(name)
            node.apply([nl.no_link_local(index)])
            log.info("overlay device made", extra={"interface": name, "port": port})
        else:
            index = found[0].ifindex
            if found[0].mtu != vxlan.MTU_MAX:
                node.apply([nl.link_mtu(index, vxlan.MTU_MAX)])
        before_up(index)
        if found is None or not found[0].up:
            node.apply([nl.link_up(index)])
    except errors.AlreadyExists:
        # A device that was made stays, down: taking it away again would be news each time this is tried.
        names = vxlan.others(node, port, name)
        who = f"VXLAN device {', '.join(names)}" if names else "another program"
        raise errors.FailedPrecondition(
            f"UDP port {port} is taken by {who}, so there is no overlay",
            field="network.overlay_port",
            fix="remove it, or set another port on all nodes",
        ) from None


def remove(node: Rtnl, instance: Instance) -> bool:
    """Remove the device; whether it was there."""
    return node.delete_link(ifname(instance))
