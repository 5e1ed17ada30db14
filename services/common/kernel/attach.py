"""Attach programs to interfaces and cgroups. What is attached here outlives this process.

A tc program hangs either in a clsact qdisc, as a direct-action filter of a priority of our own, or on tcx
(6.6). Measured with 6.18 on two CPUs: clsact takes 1.3 ms for both directions of a new veth, tcx 23 ms,
because the kernel waits for an RCU grace period at each attachment, with the rtnl lock held. So clsact is
the default, and tcx is for where clsact cannot be: an interface with an `ingress` qdisc (the CNI
bandwidth plugin makes one, and cannot if clsact is there first). Replacing a program is atomic in both.
All functions want the interface in the calling thread's network namespace.
"""

from __future__ import annotations

import ctypes as ct
import errno
import functools
import os
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from services.common import errors
from services.common.kernel import bpf, netlink, rtnl, tc_classic

Direction = Literal["ingress", "egress"]
Via = Literal["auto", "clsact", "tcx"]

_TCX: Final = {"ingress": bpf.ATTACH_TYPES["tcx_ingress"], "egress": bpf.ATTACH_TYPES["tcx_egress"]}


@dataclass(frozen=True)
class Attached:
    """A program on a hook. Other plugins' programs are listed as well."""

    prog_id: int
    name: str
    maps: tuple[int, ...] = ()
    """Ids of the maps it uses: by these, owners of programs of the same name are told apart."""


@functools.cache
def has_tcx() -> bool:
    """Whether this kernel has tcx: asks the hook of a device that is always there, the loopback."""
    try:
        _query(1, _TCX["ingress"])
    except OSError as error:
        return error.errno not in (errno.EINVAL, errno.EOPNOTSUPP)
    return True


def attach_tc(ifindex: int, direction: Direction, prog_fd: int, via: Via = "auto") -> None:
    """Put a program on one hook; see attach_tc_hooks."""
    attach_tc_hooks(ifindex, {direction: prog_fd}, via)


def attach_tc_hooks(ifindex: int, programs: Mapping[Direction, int], via: Via = "auto") -> None:
    """Put programs (descriptors) on the hooks of an interface, in place of ours of the same name; idempotent.

    "auto" is clsact unless that is impossible. What hangs there by the other method under the same name
    is taken off after the new one is on, so no packet passes unseen (some may be seen twice). NotFound if
    the interface is gone, FailedPrecondition if the kernel refuses or lacks the method.
    """
    use_tcx = via == "tcx"
    if not use_tcx:
        try:
            tc_classic.attach(ifindex, programs)
        except tc_classic.HookTaken as error:
            if via == "clsact" or not has_tcx():
                raise errors.FailedPrecondition(
                    f"interface {ifindex} has a {error.kind} qdisc where clsact would go",
                    fix="remove it, or use a kernel with tcx (6.6 or newer)",
                ) from None
            use_tcx = True
    if use_tcx and not has_tcx():
        raise errors.FailedPrecondition("this kernel has no tcx", fix="use kernel 6.6 or newer, or clsact")
    for direction, fd in programs.items():
        if use_tcx:
            _attach_tcx(ifindex, direction, fd)
            tc_classic.detach(ifindex, direction)
        elif has_tcx():
            _detach_tcx(ifindex, direction, bpf.prog_info(fd).name)


def detach_tc(ifindex: int, direction: Direction, name: str) -> bool:
    """Take the program called `name` off, however it hangs; whether it was there.

    No interface is fine too.
    """
    classic = name in (entry.name for entry in map(_named, _classic(ifindex, direction)))
    if classic:
        tc_classic.detach(ifindex, direction)
    return (has_tcx() and _detach_tcx(ifindex, direction, name)) or classic


def attached(ifindex: int, direction: Direction) -> list[Attached]:
    """Programs on the hook in the order they run (tcx, then filters), other owners' included.

    NotFound if the interface is gone.
    """
    try:
        tcx = _query(ifindex, _TCX[direction]) if has_tcx() else []
    except OSError as error:
        raise _error(error, f"list programs on {direction} of interface {ifindex}") from None
    return [_named(ident) for ident in [*tcx, *_classic(ifindex, direction)]]


def _classic(ifindex: int, direction: Direction) -> list[int]:
    try:
        return tc_classic.attached(ifindex, direction)
    except errors.NotFound:
        return []


def _attach_tcx(ifindex: int, direction: Direction, prog_fd: int) -> None:
    mine = bpf.prog_info(prog_fd)
    try:
        present = [_named(ident) for ident in _query(ifindex, _TCX[direction])]
        if any(entry.prog_id == mine.id for entry in present):
            return
        old = [entry.prog_id for entry in present if entry.name == mine.name]
        if not old:
            _attach(ifindex, prog_fd, _TCX[direction])
            return
        with _program(old[0]) as old_fd:
            _attach(ifindex, prog_fd, _TCX[direction], bpf.F_REPLACE, old_fd)
    except OSError as error:
        raise _error(error, f"attach {mine.name} to {direction} of interface {ifindex}") from None


def _detach_tcx(ifindex: int, direction: Direction, name: str) -> bool:
    try:
        for entry in map(_named, _query(ifindex, _TCX[direction])):
            if entry.name == name:
                with _program(entry.prog_id) as fd:
                    bpf.call(
                        bpf.PROG_DETACH, struct.pack("IIIIIIQ", ifindex, fd, _TCX[direction], 0, 0, 0, 0)
                    )
                return True
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENOENT):
            return False
        raise _error(error, f"detach {name} from {direction} of interface {ifindex}") from None
    return False


def attach_xdp(ifindex: int, prog_fd: int) -> None:
    """Set the XDP program of an interface, in place of any other. NotFound if the interface is gone."""
    with rtnl.RtnlSocket() as socket:
        socket.apply([netlink.xdp_set(ifindex, prog_fd)])


def detach_xdp(ifindex: int) -> bool:
    """Remove the XDP program of an interface; whether the interface was there."""
    with rtnl.RtnlSocket() as socket:
        try:
            socket.apply([netlink.xdp_set(ifindex, -1)])
        except errors.NotFound:
            return False
    return True


def attach_cgroup(path: Path | str, attach_type: str, prog_fd: int, uses_map: int | Collection[int] = 0) -> None:
    """Attach to a cgroup (names of bpf.ATTACH_TYPES), beside others' programs, in place of our older one: the one of
    the same name, that uses this map, or one of these, if any is named.
    """
    kind = bpf.ATTACH_TYPES[attach_type]
    mine = bpf.prog_info(prog_fd)
    with _cgroup(path) as cgroup:
        try:
            present = map(_named, _query(cgroup, kind))
            old = [entry for entry in present if _is(entry, mine.name, uses_map)]
            if any(entry.prog_id == mine.id for entry in old):
                return
            if not old:
                _attach(cgroup, prog_fd, kind, bpf.F_ALLOW_MULTI)
                return
            with _program(old[0].prog_id) as old_fd:
                _attach(cgroup, prog_fd, kind, bpf.F_ALLOW_MULTI | bpf.F_REPLACE, old_fd)
        except OSError as error:
            raise _error(error, f"attach {mine.name} to {attach_type} of cgroup {path}") from None


def detach_cgroup(path: Path | str, attach_type: str, name: str, uses_map: int | Collection[int] = 0) -> bool:
    """Take the program called `name` (that uses this map, or one of these) off a cgroup; whether it was there."""
    kind = bpf.ATTACH_TYPES[attach_type]
    with _cgroup(path) as cgroup:
        for entry in attached_cgroup(path, attach_type):
            if _is(entry, name, uses_map):
                with _program(entry.prog_id) as fd:
                    bpf.call(bpf.PROG_DETACH, struct.pack("IIIIIIQ", cgroup, fd, kind, 0, 0, 0, 0))
                return True
    return False


def attached_cgroup(path: Path | str, attach_type: str) -> list[Attached]:
    """Programs attached to this very cgroup (not to its parents). NotFound if it is gone."""
    with _cgroup(path) as cgroup:
        return [_named(ident) for ident in _query(cgroup, bpf.ATTACH_TYPES[attach_type])]


def _query(target: int, kind: int) -> list[int]:
    ids = (ct.c_uint32 * 64)()
    _, back = bpf.call(
        bpf.PROG_QUERY,
        struct.pack("IIIIQIIQQQQ", target, kind, 0, 0, ct.addressof(ids), len(ids), 0, 0, 0, 0, 0),
    )
    return list(ids[: struct.unpack_from("I", back, 24)[0]])


def _attach(target: int, prog_fd: int, kind: int, flags: int = 0, replaced_fd: int = 0) -> None:
    bpf.call(bpf.PROG_ATTACH, struct.pack("IIIIIIQ", target, prog_fd, kind, flags, replaced_fd, 0, 0))


@contextmanager
def _program(ident: int) -> Iterator[int]:
    fd = bpf.prog_fd_by_id(ident)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _cgroup(path: Path | str) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise errors.NotFound(f"cgroup {path} does not exist") from None
    try:
        yield fd
    finally:
        os.close(fd)


def _is(entry: Attached, name: str, uses_map: int | Collection[int]) -> bool:
    wanted = (uses_map,) if isinstance(uses_map, int) else uses_map
    return entry.name == name and (not uses_map or any(each in entry.maps for each in wanted))


def _named(ident: int) -> Attached:
    try:
        with _program(ident) as fd:
            info = bpf.prog_info(fd)
            return Attached(ident, info.name, info.map_ids)
    except FileNotFoundError:  # detached and freed since it was listed
        return Attached(ident, "")


def _error(error: OSError, what: str) -> errors.FibrilError:
    if error.errno == errno.ENODEV:
        return errors.NotFound(f"{what}: no such interface here")
    if error.errno in (errno.EPERM, errno.EACCES):
        return errors.PermissionDenied(
            f"{what}: {error.strerror}", fix="run as root with CAP_BPF and CAP_NET_ADMIN"
        )
    if error.errno == errno.E2BIG:
        return errors.FailedPrecondition(
            f"{what}: as many programs are there as the kernel takes",
            fix="remove some, such as those of nodes that ended without `fibril down`",
        )
    return errors.FailedPrecondition(f"{what}: {error.strerror}")
