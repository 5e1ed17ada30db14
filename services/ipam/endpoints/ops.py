"""Endpoints in the kernel: link, routes, neighbours, map entries and programs of one pod interface.

Everything blocks on the netlink thread, in one visit an operation; the order is what makes it safe: map
entries and programs are there before a link is up, and what is removed stops receiving first.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import attach, bpf, cgroup, podlink, progs, rtnl, sysctl
from services.common.kernel.attach import Direction
from services.common.kernel.netlink import Netlink, Rtnl
from services.common.kernel.netns import NetNs
from services.common.kernel.podlink import PodLink, WiredLink
from services.common.kernel.rtnl import Message
from services.common.pipeline import install
from services.ipam.endpoints import model
from services.ipam.endpoints import observe as observing
from services.ipam.endpoints.epmaps import EndpointMaps
from services.ipam.endpoints.gate import PolicyGate
from services.ipam.endpoints.model import EndpointRecord, EndpointSpec, Heirs, Place

if TYPE_CHECKING:
    from services.ipam.endpoints.node import NodeSetup

log = logging.getLogger(__name__)


class PodOps:
    """The manager's Kernel. `open` (and again after programs were loaded anew) before use."""

    def __init__(self, instance: Instance, netlink: Netlink, node: NodeSetup) -> None:
        self._instance = instance
        self._netlink = netlink
        self._node = node
        self._maps: EndpointMaps | None = None
        self._programs: dict[Direction, int] = {}
        self._tags: dict[Direction, str] = {}
        self._reason: errors.FibrilError | None = errors.Unavailable("the data path is not installed yet")
        self._gate = PolicyGate(instance)

    # ---- the data path as a whole -----------------------------------------------------------------------
    async def open(self) -> None:
        """Use the pinned maps and programs. Raises what opening them raises; then no endpoint can be made."""
        try:
            await self._netlink.run(self._open)
        except errors.FibrilError as error:
            self.disable(error)
            raise
        self._reason = None

    def disable(self, reason: errors.FibrilError) -> None:
        """No endpoint can be made, for this reason; those there are go on working and can be removed."""
        self._reason = errors.FailedPrecondition(
            f"pods cannot be connected: {reason.message}", fix=reason.fix
        )

    async def close(self) -> None:
        await self._netlink.run(self._close)

    def _open(self) -> None:
        maps = EndpointMaps(self._instance)
        programs: dict[Direction, int] = {}
        try:
            programs["ingress"] = progs.open_prog(install.program_path(self._instance, install.FROM_POD))
            programs["egress"] = progs.open_prog(install.program_path(self._instance, install.TO_POD))
        except errors.FibrilError:
            maps.close()
            for fd in programs.values():
                os.close(fd)
            raise
        self._close()
        self._maps, self._programs = maps, programs
        self._tags = {direction: bpf.prog_info(fd).tag for direction, fd in programs.items()}

    def _close(self) -> None:
        if self._maps is not None:
            self._maps.close()
            self._maps = None
        for fd in self._programs.values():
            os.close(fd)
        self._programs = {}

    def unavailable(self) -> errors.FibrilError | None:
        return self._reason

    def capacity(self) -> int:
        return min(self._maps.capacity, model.ID_MAX) if self._maps is not None else model.ID_MAX

    def mtu(self) -> int:
        return self._node.mtu

    async def admitted(self, record: EndpointRecord) -> None:
        """Wait for the endpoint's policy, on a node that has any. Unavailable: it did not come."""
        await self._gate.wait(record.id, record.host_ifindex)

    # ---- one endpoint -----------------------------------------------------------------------------------
    async def place(self, spec: EndpointSpec) -> Place:
        return await self._netlink.run(_place, spec)

    async def wire(self, record: EndpointRecord) -> int:
        return await self._netlink.call(self._wire, record)

    async def unwire(self, record: EndpointRecord, heirs: Heirs) -> None:
        await self._netlink.call(self._unwire, record, heirs.netns, heirs.cgroup)

    async def repair(self, record: EndpointRecord) -> int:
        return await self._netlink.call(self._repair, record)

    async def check(self, record: EndpointRecord) -> list[str]:
        return await self._netlink.call(self._check, record)

    async def identify(self, records: Sequence[EndpointRecord]) -> None:
        await self._netlink.run(self._identify, records)

    def _identify(self, records: Sequence[EndpointRecord]) -> None:
        # Without maps there is nothing to tell: who makes them fills them from the records.
        if self._maps is not None:
            for record in records:
                self._maps.set_identity(record)

    def _wire(self, node: Rtnl, record: EndpointRecord) -> int:
        link = link_of(record)
        made: list[int] = []

        def before_traffic(wired: WiredLink) -> None:
            if wired.netns_cookie != record.netns_cookie:
                raise _gone(record.netns)
            made.append(wired.host_ifindex)
            if record.ipv6:
                _allow_ipv6(record.host_ifname)
            self._require_maps().put(record, wired.host_ifindex)
            self._attach(record, wired.host_ifindex)

        try:
            try:
                wired = podlink.wire(node, link, before_traffic)
            except errors.AlreadyExists as error:
                # A name of ours without a record is an orphan: its number would not have been given out
                # otherwise.
                if error.field or not node.delete_link(record.host_ifname):
                    raise
                wired = podlink.wire(node, link, before_traffic)
            if not _still_there(record.netns, wired.netns_inode):
                node.delete_link(record.host_ifname)
                raise _gone(record.netns)
        except BaseException as error:
            if made and self._maps is not None:
                self._maps.remove(record, made[-1])
            # It was a namespace when the endpoint was begun.
            if isinstance(error, errors.NotFound) or (
                isinstance(error, errors.InvalidArgument) and error.field == "netns"
            ):
                raise _gone(record.netns) from error
            raise
        return wired.host_ifindex

    def _unwire(self, node: Rtnl, record: EndpointRecord, netns_heir: int, cgroup_heir: int) -> None:
        ifindex = node.ifindex(record.host_ifname) or record.host_ifindex
        if self._maps is not None:
            self._maps.stop_delivery(record)
        node.delete_link(record.host_ifname)
        if self._maps is not None:
            self._maps.remove(record, ifindex, netns_heir, cgroup_heir)

    def _repair(self, node: Rtnl, record: EndpointRecord) -> int:
        ifindex = node.ifindex(record.host_ifname)
        if not ifindex:
            return self._wire_again(node, record)
        self._require_maps().put(record, ifindex, observing.shaping(node.qdiscs(ifindex)).get(ifindex, 0))
        self._attach(record, ifindex)
        if record.ipv6:
            _allow_ipv6(record.host_ifname)
        link = link_of(record)
        node.apply(
            [
                Message(
                    rtnl.SETLINK,
                    {"index": ifindex},
                    [("IFLA_MTU", link.mtu), ("IFLA_ADDRESS", link.host_mac)],
                    what=f"set MTU and MAC of {link.host_ifname}",
                )
            ]
        )
        podlink.host_side(node, link, ifindex)
        try:
            with NetNs.open(record.netns) as netns, Rtnl(netns) as pod:
                inner = pod.ifindex(record.ifname)
                if inner and pod.netns_cookie() == record.netns_cookie:
                    podlink.pod_side(pod, netns, link, inner)
        except (errors.NotFound, errors.InvalidArgument):
            pass  # the path is gone but not the namespace, as the link is there: out of reach
        return ifindex

    def _wire_again(self, node: Rtnl, record: EndpointRecord) -> int:
        """NotFound if the pod's namespace is gone."""
        try:
            place = _place(EndpointSpec(record.container_id, record.ifname, record.netns))
        except (errors.FailedPrecondition, errors.InvalidArgument) as error:
            raise errors.NotFound(error.message) from None
        if place.netns_cookie != record.netns_cookie:
            raise errors.NotFound(f"{record.netns} is another network namespace now")
        if self._maps is not None:
            self._maps.remove(record, record.host_ifindex)
        try:
            return self._wire(node, record)
        except errors.FailedPrecondition as error:
            if error.field == "netns":
                raise errors.NotFound(error.message) from None
            raise

    def _check(self, node: Rtnl, record: EndpointRecord) -> list[str]:
        found = podlink.problems(node, link_of(record))
        ifindex = node.ifindex(record.host_ifname)
        if not ifindex:
            return found
        for direction in self._programs:
            if not self._is_attached(ifindex, direction):
                found.append(f"no current program on {direction} of {record.host_ifname}")
        if self._maps is not None:
            found += observing.map_differences(
                record,
                ifindex,
                observing.shaping(node.qdiscs(ifindex)).get(ifindex, 0),
                self._maps.view_of(record, ifindex),
            )
        return found

    # ---- programs ---------------------------------------------------------------------------------------
    async def refresh_programs(self, records: Iterable[EndpointRecord]) -> list[int]:
        """Attach the current programs wherever others, or none, are attached; numbers of endpoints it
        concerned.

        An endpoint without its interface is passed over.
        """
        return await self._netlink.run(self._refresh, list(records))

    def _refresh(self, records: list[EndpointRecord]) -> list[int]:
        changed = []
        for record in records:
            try:
                if all(self._is_attached(record.host_ifindex, direction) for direction in self._programs):
                    continue
                self._attach(record, record.host_ifindex)
                changed.append(record.id)
            except errors.NotFound:
                continue
        return changed

    def _is_attached(self, ifindex: int, direction: Direction) -> bool:
        """By the code's hash: an equal program from an earlier load uses the same maps."""
        want = bpf.prog_info(self._programs[direction])
        return any(
            entry.prog_id == want.id or (entry.name == want.name and _tag(entry.prog_id) == want.tag)
            for entry in attach.attached(ifindex, direction)
        )

    def _attach(self, record: EndpointRecord, ifindex: int) -> None:
        attach.attach_tc_hooks(ifindex, self._programs, "tcx" if record.spec.ingress_qdisc else "auto")

    async def lacking(self, records: Iterable[EndpointRecord]) -> list[int]:
        """Numbers of endpoints whose pod lacks an address, route or neighbour entry it was given.

        A pod out of reach (its namespace's path is gone) lacks nothing.
        """
        return await self._netlink.run(lambda chosen: [r.id for r in chosen if _lacks(r)], list(records))

    # ---- all endpoints ----------------------------------------------------------------------------------
    async def observe(self) -> observing.Observed:
        """See observe.observe: a fixed number of dumps."""
        return await self._netlink.call(lambda node: observing.observe(node, self._instance, self._maps))

    async def remove_orphan(self, number: int, seen: observing.Observed) -> None:
        """Remove link and map entries of a number no endpoint has. Absent is success."""

        def remove(node: Rtnl) -> None:
            node.delete_link(self._instance.host_ifname(number))
            if self._maps is not None and seen.maps is not None:
                self._maps.remove_all_of(seen.maps, number)

        await self._netlink.call(remove)

    def _require_maps(self) -> EndpointMaps:
        if self._maps is None:
            raise self._reason or errors.FailedPrecondition("the data path is not installed")
        return self._maps


def link_of(record: EndpointRecord) -> PodLink:
    return PodLink(
        host_ifname=record.host_ifname,
        host_mac=record.host_mac,
        pod_mac=record.mac,
        mtu=record.mtu,
        netns=record.netns,
        pod_ifname=record.ifname,
        v4=IPv4Address(record.ipv4) if record.ipv4 else None,
        v6=IPv6Address(record.ipv6) if record.ipv6 else None,
        gateway4=IPv4Address(record.ipv4_gateway) if record.ipv4_gateway else None,
        gateway6=IPv6Address(record.ipv6_gateway) if record.ipv6_gateway else None,
    )


def _place(spec: EndpointSpec) -> Place:
    try:
        with NetNs.open(spec.netns) as netns, NetNs.current() as home:
            own = netns.same_as(home)
            cookie = netns.cookie()
    except errors.NotFound:
        raise _gone(spec.netns) from None
    except errors.InvalidArgument:
        if _is_leftover(spec.netns):
            raise _gone(spec.netns) from None
        raise
    if own:
        raise errors.InvalidArgument(f"{spec.netns} is the node's own network namespace", field="netns")
    cgroup_id = 0
    if spec.cgroup_path:
        try:
            cgroup_id = cgroup.cgroup_id(cgroup.path_of(spec.cgroup_path))
        except errors.NotFound as error:
            raise errors.FailedPrecondition(error.message, field="cgroup_path") from None
    return Place(cookie, cgroup_id)


def _lacks(record: EndpointRecord) -> bool:
    link = link_of(record)
    try:
        with NetNs.open(record.netns) as netns, Rtnl(netns) as pod:
            inner = pod.ifindex(record.ifname)
            if not inner or pod.netns_cookie() != record.netns_cookie:
                return False
            addresses = {entry.address for entry in pod.addresses(inner)}
            routes = {route.destination for route in pod.routes(inner)}
            neighbours = {entry.address for entry in pod.neighbours(inner) if entry.permanent}
    except (errors.NotFound, errors.InvalidArgument):
        return False
    default = {4: IPv4Network("0.0.0.0/0"), 6: IPv6Network("::/0")}
    return not all(
        address in addresses
        and gateway in neighbours
        and {podlink.host_network(gateway), default[address.version]} <= routes
        for address, gateway in link.families()
    )


def _gone(netns: str) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(
        f"network namespace {netns} is gone",
        field="netns",
        fix="create it first, and keep it while the call runs",
    )


def _is_leftover(path: str) -> bool:
    """Whether this is the empty file on which a namespace was mounted: its removal is two steps."""
    try:
        status, parent = os.stat(path), os.stat(os.path.dirname(path))
    except OSError:
        return True
    # Files of namespaces are empty too, but on a file system of their own.
    return stat.S_ISREG(status.st_mode) and status.st_size == 0 and status.st_dev == parent.st_dev


def _still_there(path: str, inode: int) -> bool:
    try:
        return os.stat(path).st_ino == inode
    except OSError:
        return False


def _tag(prog_id: int) -> str:
    try:
        fd = bpf.prog_fd_by_id(prog_id)
    except OSError:
        return ""
    try:
        return bpf.prog_info(fd).tag
    finally:
        os.close(fd)


def _allow_ipv6(ifname: str) -> None:
    """Some hosts switch IPv6 off for every new interface; the pod's host side needs it."""
    if sysctl.read(f"net/ipv6/conf/{ifname}/disable_ipv6") == "1":
        sysctl.ensure(f"net/ipv6/conf/{ifname}/disable_ipv6", 0)
