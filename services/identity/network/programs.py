"""The programs that packets between nodes meet, on the devices they come and go by.

    fib_from_overlay   tc ingress of the VXLAN device: what peers send
    fib_from_uplink    tc ingress of the uplink: what arrives as it is, for pods of this node
    fib_from_host      tc egress of fb<tag>host: what the host sends to pods of other nodes

Attached as filters of a clsact qdisc, or by tcx where an `ingress` qdisc is in its way. The uplink is not this
node's own: other filters there are left alone, and the priority is the instance's, so that nodes that share an uplink
share it in peace. Programs outlive this process; they are looked at whenever an event says that one may be gone.
Functions block: netlink thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Final

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import bpf, progs, tc_shared
from services.common.kernel.netlink import Rtnl
from services.common.kernel.tc_classic import Direction
from services.common.kernel.tc_shared import Filter
from services.common.pipeline import abi
from services.common.pipeline.datapath import Parts
from services.identity.network import install

log = logging.getLogger(__name__)

_HOOKS: Final[dict[str, Direction]] = {
    install.FROM_OVERLAY: "ingress", install.FROM_UPLINK: "ingress", install.FROM_HOST: "egress",
}  # fmt: skip


def parts() -> Parts:
    """What the identity service loads."""
    return Parts(install.SERVICE, install.install, complete)


def complete(instance: Instance) -> bool:
    """Whether all programs and maps are pinned and the slots filled."""
    pins = [install.program_path(instance, name) for name in install.PROGRAMS]
    pins += [instance.pin_dir / path for path in install.spec().maps.values()]
    if not all(path.exists() for path in pins):
        return False
    return set(map(int, install.SLOTS)) <= set(progs.slots(instance.pin_dir / abi.MAPS[abi.SLOTS_MAP]))


def priority_of(instance: Instance) -> int:
    """Of the instance's filters on interfaces that may be shared."""
    return 0x4000 | int(instance.tag, 16) & 0x3FFF


def places(instance: Instance) -> dict[str, Filter]:
    """Where the programs hang, by name."""
    priority = priority_of(instance)
    return {name: Filter(direction, name, priority) for name, direction in _HOOKS.items()}


class Programs:
    """`open` before use, and again after programs were loaded anew."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._places = places(instance)
        self._fds: dict[str, int] = {}
        self._ids: dict[str, int] = {}

    @property
    def ready(self) -> bool:
        return bool(self._fds)

    def open(self) -> None:
        """Use the pinned programs. NotFound if they are not pinned."""
        fds: dict[str, int] = {}
        try:
            for name in _HOOKS:
                fds[name] = progs.open_prog(install.program_path(self._instance, name))
        except errors.FibrilError:
            for fd in fds.values():
                os.close(fd)
            raise
        self.close()
        self._fds = fds
        self._ids = {name: bpf.prog_info(fd).id for name, fd in fds.items()}

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds, self._ids = {}, {}

    def attach(self, ifindex: int, name: str) -> bool:
        """Have a program on its hook of an interface; whether it had to be put there.

        Unavailable before `open`; otherwise as `tc_shared.ensure`.
        """
        if name not in self._fds:
            raise errors.Unavailable("the network's BPF programs are not there yet")
        if not tc_shared.ensure(ifindex, self._places[name], self._fds[name], self._ids[name]):
            return False
        log.info("program attached", extra={"program": name, "ifindex": ifindex})
        return True

    def detach_uplinks(self, node: Rtnl, keep: int) -> list[str]:
        """Take our program off every interface that could have been the uplink, but one; their names."""
        return list(_detach(node, self._instance, keep))


def _detach(node: Rtnl, instance: Instance, keep: int = 0) -> Iterator[str]:
    place = places(instance)[install.FROM_UPLINK]
    for link in node.links():
        if link.ifindex == keep or link.name.startswith(f"fb{instance.tag}"):
            continue
        with contextlib.suppress(errors.NotFound):
            if tc_shared.detach(link.ifindex, place):
                yield link.name


def remove(node: Rtnl, instance: Instance) -> list[str]:
    """Take the programs off what is not the instance's own; names of the interfaces."""
    return list(_detach(node, instance))
