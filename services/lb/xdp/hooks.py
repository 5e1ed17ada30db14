"""The XDP program on the node's uplinks: put there, kept there, taken away. It never takes another's place.

Native is in the driver, generic behind it in the stack; a veth can only be native where its other end takes
frames (its peer has GRO or an XDP program), for what XDP sends would be lost there. Functions block: netlink thread.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import bpf, progs, xdp
from services.common.kernel.maps import BpfMap
from services.common.kernel.netlink import Link, Rtnl
from services.common.kernel.xdp import Feature, Mode
from services.common.pipeline.datapath import Parts
from services.common.pipeline.uplinks import uplinks
from services.lb import install
from services.lb.xdp import abi

log = logging.getLogger(__name__)

# The kernel keeps so much of a program's name.
_NAME: Final = install.XDP[:15]
_ETHERNET: Final = len("00:00:00:00:00:00")


@dataclass(frozen=True)
class Hook:
    """How the program is on one device. mode NONE: it is not, and `problem` says why."""

    device: str
    ifindex: int
    mac: str
    mode: Mode
    transmits: bool
    """Whether XDP on other devices can send by it."""
    redirect: bool = False
    """Whether it can send its own frames back only by redirection."""
    note: str = ""
    """Why generic, where native was possible to ask for."""
    problem: str = ""


def parts() -> Parts:
    """What is loaded for XDP. A kernel that refuses it keeps all the rest."""
    return Parts("lb.xdp", install.install_xdp, complete)


def complete(instance: Instance) -> bool:
    pins = [instance.pin_dir / path for path in install.xdp().maps.values()]
    pins += [install.program_path(instance, name) for name in (install.XDP, *install.XDP_TAILS)]
    return all(path.exists() for path in pins)


def wanted_mode(link: Link, configured: str, can: Feature | None) -> tuple[Mode, str]:
    """The mode to try first on a device, and why it is generic if it is. Pure."""
    if configured == "generic":
        return Mode.GENERIC, ""
    veth = link.kind == "veth"
    if can is None:
        return (Mode.GENERIC, "a veth") if veth else (Mode.NATIVE, "")
    if not can & Feature.BASIC:
        return Mode.GENERIC, "its driver has no XDP"
    if veth and not can & Feature.TRANSMIT:
        return Mode.GENERIC, "the other end of the veth takes no frames from XDP: it needs GRO"
    return Mode.NATIVE, ""


class Hooks:
    """`open` before use, and again after the program was loaded anew."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._fd = -1
        self._id = 0
        self._mark = 0
        self._own: BpfMap[ct.c_uint32, abi.Own] | None = None
        self._ports: BpfMap[ct.c_uint32, abi.Port] | None = None

    @property
    def ready(self) -> bool:
        return self._fd >= 0

    def open(self) -> None:
        """Use what is pinned. NotFound if it is not."""
        self.close()
        pins = self._instance.pin_dir
        self._own = BpfMap.open(pins / abi.MAPS["lb_xdp"], ct.c_uint32, abi.Own)
        self._ports = BpfMap.open(pins / abi.MAPS["lb_xdp_ports"], ct.c_uint32, abi.Port)
        self._mark = _mark_of(self._instance)
        self._fd = progs.open_prog(install.program_path(self._instance, install.XDP))
        self._id = bpf.prog_info(self._fd).id

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        for table in (self._own, self._ports):
            if table is not None:
                table.close()
        self._fd, self._own, self._ports = -1, None, None

    def apply(self, node: Rtnl, names: Sequence[str], configured: str) -> list[Hook]:
        """Have the program on these devices (see `uplinks`) and on no other. `configured`: auto, native or generic."""
        links = node.links()
        wanted = uplinks(names, f"fb{self._instance.tag}", links, [] if names else node.routes(proto=0))
        hooks = [self._keep(node, link, configured) for link in wanted]
        self._note([hook for hook in hooks if hook.mode is not Mode.NONE])
        keep = {link.ifindex for link in wanted}
        _detach([link for link in links if link.ifindex not in keep], node, self._mark)
        missing = [name for name in names if name not in {link.name for link in wanted}]
        return hooks + [Hook(name, 0, "", Mode.NONE, False, problem="does not exist") for name in missing]

    def _keep(self, node: Rtnl, link: Link, configured: str) -> Hook:
        try:
            return self._attach(node, link, configured)
        except errors.FibrilError as error:
            return Hook(link.name, link.ifindex, link.mac, Mode.NONE, False, problem=str(error))

    def _attach(self, node: Rtnl, link: Link, configured: str) -> Hook:
        if len(link.mac) != _ETHERNET:
            raise errors.FailedPrecondition("is no Ethernet device")
        if link.xdp_mode and not _is_mine(link, self._mark):
            other = xdp.name_of(link.xdp_prog_id) if link.xdp_prog_id else "more than one"
            raise errors.FailedPrecondition(f"has another XDP program, {other}, which is left alone")
        can = xdp.features(link.ifindex)
        mode, note = wanted_mode(link, configured, can)
        if configured == "native" and mode is Mode.GENERIC:
            raise errors.FailedPrecondition(note)
        try:
            self._put(node, link, mode)
        except errors.FailedPrecondition as error:
            if configured != "auto" or mode is Mode.GENERIC:
                raise
            mode, note = Mode.GENERIC, str(error)
            self._put(node, link, mode)
        transmits = mode is Mode.GENERIC or bool((can or 0) & Feature.TRANSMIT)
        redirect = link.kind == "veth" and mode is Mode.NATIVE
        return Hook(link.name, link.ifindex, link.mac, mode, transmits, redirect, note)

    def _put(self, node: Rtnl, link: Link, mode: Mode) -> None:
        if link.xdp_mode == mode and link.xdp_prog_id == self._id:
            return
        if link.xdp_mode == mode:
            with _program(link.xdp_prog_id) as old:
                xdp.put(node, link.ifindex, mode, self._fd, old)
        else:
            if link.xdp_mode:
                # One mode at a time; tc has the packets meanwhile.
                _detach([link], node, self._mark)
            xdp.put(node, link.ifindex, mode, self._fd)
        log.info("XDP program attached", extra={"device": link.name, "mode": mode.name.lower()})

    def _note(self, hooks: Sequence[Hook]) -> None:
        """Tell the program whose frames it is to take, and by which devices it may send."""
        assert self._own is not None and self._ports is not None
        macs = sorted({hook.mac for hook in hooks})[: abi.MACS]
        self._own.update(0, abi.Own.of(macs, any(hook.redirect for hook in hooks)))
        ports = {hook.ifindex: hook for hook in hooks if hook.transmits} if len(hooks) > 1 else {}
        for key in list(self._ports.keys()):
            if key.value not in ports:
                self._ports.delete(key)
        for index, hook in ports.items():
            self._ports.update(index, abi.Port(mac=abi.mac_word(hook.mac)))


def remove(node: Rtnl, instance: Instance) -> list[str]:
    """Take an instance's program off all devices with no service alive; their names."""
    try:
        mark = _mark_of(instance)
    except errors.NotFound:
        return []
    return _detach(node.links(), node, mark)


def _mark_of(instance: Instance) -> int:
    """The id of the map that the program goes on by: whatever its age, it is the instance's if it uses that one."""
    path = instance.pin_dir / abi.MAPS[abi.TAILS_MAP]
    try:
        fd = bpf.get(str(path))
    except FileNotFoundError:
        raise errors.NotFound(f"no map pinned at {path}") from None
    try:
        return bpf.map_info(fd).id
    finally:
        os.close(fd)


def _detach(links: Iterable[Link], node: Rtnl, mark: int) -> list[str]:
    gone = []
    for link in links:
        if link.xdp_mode in (Mode.NATIVE, Mode.GENERIC) and _is_mine(link, mark):
            with contextlib.suppress(FileNotFoundError), _program(link.xdp_prog_id) as fd:
                if xdp.take(node, link.ifindex, Mode(link.xdp_mode), fd):
                    gone.append(link.name)
                    log.info("XDP program removed", extra={"device": link.name})
    return gone


def _is_mine(link: Link, mark: int) -> bool:
    """Whether the program of a device is this instance's."""
    try:
        with _program(link.xdp_prog_id) as fd:
            known = bpf.prog_info(fd)
    except FileNotFoundError:
        return False
    return known.name == _NAME and mark in known.map_ids


@contextlib.contextmanager
def _program(ident: int) -> Iterator[int]:
    fd = bpf.prog_fd_by_id(ident)
    try:
        yield fd
    finally:
        os.close(fd)
