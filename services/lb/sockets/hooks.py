"""The programs on a control group: put there, kept there, taken away. Others' are left alone.

They stay when the process goes. A newer version takes the older one's place hook by hook, each atomically; what removes
entries hangs first and is taken off last, so that no socket leaves one behind. Functions block.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.common import errors
from services.common.kernel import attach, bpf, cgroup, progs
from services.common.pipeline.datapath import Parts
from services.lb import abi, install

if TYPE_CHECKING:
    from services.common.instance import Instance

log = logging.getLogger(__name__)

_FIRST: Final = install.SOCK_RELEASE
# It is the last of these; and who asks must get answers before anybody is translated.
_ORDER: Final = tuple(reversed(install.SOCKETS))


def parts() -> Parts:
    """What is loaded for sockets. A kernel that refuses it keeps all the rest."""
    return Parts("lb.sockets", install.install_sockets, complete)


def complete(instance: Instance) -> bool:
    pins = [instance.pin_dir / path for path in install.sockets().maps.values()]
    pins += [install.program_path(instance, name) for name in install.SOCKETS]
    return all(path.exists() for path in pins)


class Hooks:
    """`open` before use, and again after the programs were loaded anew."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._fds: dict[str, int] = {}
        self._ids: dict[str, int] = {}
        self._mark = 0

    @property
    def ready(self) -> bool:
        return bool(self._fds)

    def open(self) -> None:
        """Use the pinned programs. NotFound if they are not pinned."""
        fds: dict[str, int] = {}
        try:
            for name in _ORDER:
                fds[name] = progs.open_prog(install.program_path(self._instance, name))
            self._mark = _mark(self._instance)
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

    def attach(self, name: str) -> int:
        """Have all programs on the group of that name ("": the root), which is made if need be; how many were missing."""
        path = cgroup.create(name)
        missing = 0
        for program in _ORDER:
            kind = install.SOCKETS[program]
            there = attach.attached_cgroup(path, kind)
            if any(entry.prog_id == self._ids[program] for entry in there):
                continue
            attach.attach_cgroup(path, kind, self._fds[program], self._mark)
            missing += 1
        return missing

    def detach_others(self, name: str) -> list[Path]:
        """Take the programs off every other group than this; which."""
        return _detach(self._mark, keep=cgroup.path_of(name))


def remove(instance: Instance) -> list[Path]:
    """Take an instance's programs off all groups with no service alive; which."""
    try:
        return _detach(_mark(instance))
    except errors.NotFound:
        return []


def _mark(instance: Instance) -> int:
    """What all programs of an instance use, of whatever version they are, and nobody else's: a map."""
    try:
        fd = bpf.get(str(instance.pin_dir / abi.MAPS["lb_socks"]))
    except FileNotFoundError:
        raise errors.NotFound("the programs for sockets have not been loaded") from None
    try:
        return bpf.map_info(fd).id
    finally:
        os.close(fd)


def _detach(mark: int, keep: Path | None = None) -> list[Path]:
    gone = []
    for path in _groups():
        # Groups come and go.
        with contextlib.suppress(errors.NotFound):
            if path != keep and _has(path, mark):
                for name in reversed(_ORDER):
                    attach.detach_cgroup(path, install.SOCKETS[name], name, mark)
                log.info("programs for sockets removed", extra={"cgroup": str(path)})
                gone.append(path)
    return gone


def _has(path: Path, mark: int) -> bool:
    """Whether a group has any of an instance's programs: the first to come and last to go tells."""
    return any(
        entry.name == _FIRST and mark in entry.maps
        for entry in attach.attached_cgroup(path, install.SOCKETS[_FIRST])
    )


def _groups() -> Iterator[Path]:
    for directory, _, _ in os.walk(cgroup.mount_point()):
        yield Path(directory)
