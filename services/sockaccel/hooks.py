"""Where the programs hang: the socket map, two tracepoints, a control group. They outlive the process. Functions block."""

from __future__ import annotations

import contextlib
import ctypes as ct
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.common import errors
from services.common.kernel import attach, bpf, cgroup, progs
from services.sockaccel import abi, install, ulp

if TYPE_CHECKING:
    from services.common.instance import Instance

_KINDS: Final = {install.ULP: "cgroup_setsockopt", install.OPS: "cgroup_sock_ops"}
"""Programs of the control group, in the order they are attached in."""


def attach_all(instance: Instance, group: str, calls: bool = True, before: frozenset[int] = frozenset()) -> None:
    """Have the pinned programs at work on a control group ("": the root) and all below it; idempotent.

    What hands over comes first, what makes pairs last. calls: those behind recv() and send() too. before: marks of programs
    that may hang there still, though nothing of them is pinned any more.
    NotFound: not loaded; FailedPrecondition: the kernel refuses.
    """
    with progs.opened(install.program_path(instance, install.MSG)) as fd:
        _attach_msg(instance, fd)
    if calls:
        for name in install.CALLS:
            _attach_call(instance, name)
    path = cgroup.create(group)
    known = marks(instance) | before
    for name, kind in _KINDS.items():
        if not _belongs(name):
            attach.detach_cgroup(path, kind, name, known)
            continue
        with progs.opened(install.program_path(instance, name)) as fd:
            attach.attach_cgroup(path, kind, fd, known)
    _detach_groups(known, keep=path)


def _belongs(name: str) -> bool:
    """Whether a program of the control group is to hang there: setsockopt() passes through one only where there is need."""
    return name != install.ULP or ulp.possible()


def missing(instance: Instance, group: str, calls: bool = True) -> list[str]:
    """Which programs do not hang where they belong, or do where they do not."""
    found = []
    path = cgroup.path_of(group)
    for name, kind in _KINDS.items():
        wanted = progs.info(install.program_path(instance, name)).id
        there = path.exists() and any(entry.prog_id == wanted for entry in attach.attached_cgroup(path, kind))
        if there != _belongs(name):
            found.append(name)
    if attached_msg(instance) != progs.info(install.program_path(instance, install.MSG)).id:
        found.append(install.MSG)
    return found + [name for name in install.CALLS if calls and not _link_path(instance, name).exists()]


def detach_all(instance: Instance) -> list[Path]:
    """Take them off, with no service alive; which control groups they were on.

    No pair is made from here on; those there are go on until their maps go.
    """
    detach_calls(instance)
    known = marks(instance)
    return _detach_groups(known) if known else []


def detach_calls(instance: Instance) -> None:
    """Take those behind recv() and send() off, which every socket of the machine pays for."""
    for name in install.CALLS:
        # "~": of a process that was killed while it attached.
        for end in ("", "~"):
            _link_path(instance, name + end).unlink(missing_ok=True)


def waits(instance: Instance, cookies: Iterable[int]) -> set[int]:
    """Which pairs (client's cookie) have handed over something that has not been read. NotFound: not loaded."""
    with progs.opened(install.program_path(instance, install.WAITS)) as fd:
        return {cookie for cookie in cookies if _ask(fd, cookie)}


def _ask(prog_fd: int, argument: int) -> int:
    """What a program for a raw tracepoint returns."""
    context = ct.create_string_buffer(struct.pack("Q", argument), 8)
    attr = struct.pack("IIIIQQIIIIQQ", prog_fd, 0, 0, 0, 0, 0, 0, 0, 8, 0, ct.addressof(context), 0)
    _, back = bpf.call(bpf.PROG_TEST_RUN, attr, "test run")
    return int(struct.unpack_from("II", back)[1])


def attached_msg(instance: Instance) -> int:
    """Id of the program at the socket map; 0: none, or the kernel does not tell (before 5.17)."""
    ids = (ct.c_uint32 * 8)()
    with _socks(instance) as fd:
        try:
            _, back = bpf.call(
                bpf.PROG_QUERY,
                struct.pack(
                    "IIIIQIIQQQQ", fd, bpf.ATTACH_TYPES["sk_msg_verdict"], 0, 0, ct.addressof(ids), len(ids), 0, 0, 0, 0, 0
                ),
            )
        except OSError:
            return 0
    return ids[0] if struct.unpack_from("I", back, 24)[0] else 0


def _attach_msg(instance: Instance, prog_fd: int) -> None:
    if attached_msg(instance) == bpf.prog_info(prog_fd).id:
        return
    with _socks(instance) as fd:
        try:
            bpf.call(
                bpf.PROG_ATTACH,
                struct.pack("IIIIIIQ", fd, prog_fd, bpf.ATTACH_TYPES["sk_msg_verdict"], 0, 0, 0, 0),
            )
        except OSError as error:
            raise errors.FailedPrecondition(
                f"the kernel refuses a program at a map of sockets: {error.strerror}",
                fix="this needs Linux 5.12 or newer with CONFIG_NET_SOCK_MSG",
            ) from None


def _attach_call(instance: Instance, name: str) -> None:
    """A link of a tracepoint is pinned under the program's name; of a newer program in the place of the older."""
    path = _link_path(instance, name)
    with progs.opened(install.program_path(instance, name)) as fd:
        if path.exists() and _linked(path) == bpf.prog_info(fd).id:
            return
        try:
            link = bpf.call(bpf.RAW_TRACEPOINT_OPEN, struct.pack("QIIQ", 0, fd, 0, 0))[0]
        except OSError as error:
            raise errors.FailedPrecondition(
                f"cannot attach to tracepoint {install.CALLS[name]}: {error.strerror}", fix="this needs Linux 6.3 or newer"
            ) from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = path.with_name(name + "~")
        fresh.unlink(missing_ok=True)
        bpf.pin(link, str(fresh))
        fresh.rename(path)
    finally:
        os.close(link)


def _linked(path: Path) -> int:
    """Id of the program of a pinned link (struct bpf_link_info: type, id, prog_id)."""
    fd = bpf.get(str(path))
    try:
        out = ct.create_string_buffer(64)
        bpf.call(bpf.INFO_BY_FD, struct.pack("IIQ", fd, len(out), ct.addressof(out)), "link info")
        return int(struct.unpack_from("III", out.raw)[2])
    finally:
        os.close(fd)


def _link_path(instance: Instance, name: str) -> Path:
    return instance.pin_dir / "link" / install.SERVICE / name


@contextlib.contextmanager
def _socks(instance: Instance) -> Iterator[int]:
    try:
        fd = bpf.get(str(instance.pin_dir / abi.MAPS["sa_socks"]))
    except FileNotFoundError:
        raise errors.NotFound("the programs of socket acceleration have not been loaded") from None
    try:
        yield fd
    finally:
        os.close(fd)


def marks(instance: Instance) -> frozenset[int]:
    """What programs of an instance use, of whatever version they are, and nobody else's: the maps that are pinned. One is
    enough, so losing pins, or another version's layout, does not make a stranger of a program.
    """
    found = set()
    for path in install.MAPS.values():
        with contextlib.suppress(FileNotFoundError):
            fd = bpf.get(str(instance.pin_dir / path))
            try:
                found.add(bpf.map_info(fd).id)
            finally:
                os.close(fd)
    return frozenset(found)


def _detach_groups(known: frozenset[int], keep: Path | None = None) -> list[Path]:
    gone = []
    for directory, _, _ in os.walk(cgroup.mount_point()):
        path = Path(directory)
        # Groups come and go.
        with contextlib.suppress(errors.NotFound):
            if path != keep and any([attach.detach_cgroup(path, kind, name, known) for name, kind in _KINDS.items()]):
                gone.append(path)
    return gone
