"""Which pod a process, a control group or a network namespace belongs to.

A process belongs to the pod of its cgroup v2 group or the nearest one above; if that is none's, to the pod of its
network namespace: some runtimes do not tell the cgroup, and a process may have entered a pod's network only.
"""

from __future__ import annotations

import asyncio
import ctypes as ct
import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fibril.endpoint.v1 import endpoint_pb2 as ep
from services.common import errors
from services.common.kernel import cgroup
from services.common.kernel.netns import NetNs
from services.identity.workload.endpoints import Endpoints

_FILEID_KERNFS: Final = 0xFE
_O_PATH: Final = 0o10000000

_libc = ct.CDLL(None, use_errno=True)
_libc.open_by_handle_at.argtypes = [ct.c_int, ct.c_void_p, ct.c_int]


class Whoami:
    """Answers from memory and /proc; NotFound for what does not exist or belongs to no pod of this node."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints

    async def by_pid(self, pid: int) -> ep.Endpoint:
        """By process id in this process's pid namespace. Unavailable while the pods are not known yet."""
        self._check_known()
        for ident in await asyncio.to_thread(_cgroups_of, pid):
            endpoint = self._endpoints.by_cgroup(ident)
            if endpoint is not None:
                return endpoint
        cookie = await asyncio.to_thread(_netns_of, pid)
        endpoint = self._endpoints.by_netns(cookie) if cookie else None
        if endpoint is not None:
            return endpoint
        raise errors.NotFound(f"process {pid} ({_command(pid)}) belongs to no pod of this node")

    async def by_cgroup(self, ident: int) -> ep.Endpoint:
        """By the id of the pod's cgroup or of one below it."""
        self._check_known()
        endpoint = self._endpoints.by_cgroup(ident)
        if endpoint is not None:
            return endpoint
        for above in await asyncio.to_thread(_ancestors, ident):
            endpoint = self._endpoints.by_cgroup(above)
            if endpoint is not None:
                return endpoint
        raise errors.NotFound(f"control group {ident} belongs to no pod of this node")

    async def by_netns(self, cookie: int) -> ep.Endpoint:
        """By network namespace cookie."""
        self._check_known()
        endpoint = self._endpoints.by_netns(cookie)
        if endpoint is not None:
            return endpoint
        raise errors.NotFound(f"network namespace {cookie} belongs to no pod of this node")

    def _check_known(self) -> None:
        if not self._endpoints.known:
            raise errors.Unavailable(
                "the ipam service has not told yet which pods there are",
                fix="is it running? see: fibril status",
            )


def _cgroups_of(pid: int) -> list[int]:
    """Ids of a process's group and those above it, nearest first. NotFound if there is no such process."""
    group = cgroup.of_process(pid)
    if group is None:
        if not Path(f"/proc/{pid}").exists():
            raise errors.NotFound(f"there is no process {pid}")
        return []
    return list(_ids(group))


def _ids(group: Path) -> Iterator[int]:
    """Ids of a group and those above it. A removed one ("… (deleted)" in /proc) has none, those above it have."""
    top = cgroup.mount_point()
    # A group outside this process's cgroup namespace is shown as "/../…".
    while group != top and group.is_relative_to(top) and ".." not in group.parts:
        try:
            yield cgroup.cgroup_id(group)
        except errors.NotFound:
            pass
        group = group.parent


def _ancestors(ident: int) -> list[int]:
    group = _group_with(ident)
    return list(_ids(group))[1:]


def _group_with(ident: int) -> Path:
    """The directory of a cgroup id. NotFound."""
    top = cgroup.mount_point()
    handle = ct.create_string_buffer(struct.pack("IiQ", 8, _FILEID_KERNFS, ident), 16)
    mount = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fd = _libc.open_by_handle_at(mount, handle, _O_PATH)
        number = ct.get_errno()
    finally:
        os.close(mount)
    if fd >= 0:
        try:
            return Path(os.readlink(f"/proc/self/fd/{fd}"))
        finally:
            os.close(fd)
    if number != errno.ESTALE:
        # Without CAP_DAC_READ_SEARCH, or before Linux 5.5: look at each.
        for directory, _, _ in os.walk(top):
            if _inode(directory) == ident:
                return Path(directory)
    raise errors.NotFound(f"there is no control group {ident}")


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0


def _netns_of(pid: int) -> int:
    """Cookie of a process's network namespace; 0 for one that has none any more. Enters it for a moment."""
    try:
        with NetNs.open(f"/proc/{pid}/ns/net") as space:
            return space.cookie()
    except (errors.NotFound, errors.InvalidArgument):
        return 0


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "gone"
