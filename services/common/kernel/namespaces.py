"""Network namespaces by cookie, which is all that a socket's entry says of where it is.

Nobody tells which namespace has a cookie: one has to enter it and ask. So what can be seen by processes and mounts is asked
once, and what was found is remembered by path. Nothing is kept open, as that would keep a namespace from ending.
Functions block, on a thread that may enter namespaces.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from services.common import errors
from services.common.kernel.netns import NetNs


class Namespaces:
    """Those of this machine that this process can see."""

    def __init__(self) -> None:
        self._paths: dict[int, str] = {}

    def open(self, wanted: set[int]) -> Iterator[tuple[int, NetNs]]:
        """(cookie, namespace) of those that are found, each open until the next is asked for."""
        left = set(wanted)
        for cookie in wanted & self._paths.keys():
            with contextlib.suppress(errors.FibrilError), NetNs.open(self._paths[cookie]) as netns:
                if netns.cookie() == cookie:
                    left.discard(cookie)
                    yield cookie, netns
        if not left:
            return
        self._paths = {cookie: path for cookie, path in self._paths.items() if cookie not in left}
        for path in _paths():
            with contextlib.suppress(errors.FibrilError), NetNs.open(path) as netns:
                cookie = netns.cookie()
                self._paths[cookie] = path
                if cookie in left:
                    left.discard(cookie)
                    yield cookie, netns
                    if not left:
                        return


def _paths() -> Iterator[str]:
    """One path for each namespace, its own first."""
    seen: set[tuple[int, int]] = set()
    for path in ("/proc/self/ns/net", *_mounted(), *_of_processes()):
        with contextlib.suppress(OSError):
            status = os.stat(path)
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                yield path


def _of_processes() -> Iterator[str]:
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            yield f"/proc/{entry.name}/ns/net"


def _mounted() -> Iterator[str]:
    """Namespaces without a process, as pods' may be for a moment."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("nsfs "):
            fields = before.split(" ")
            if fields[3].startswith("net:"):
                yield fields[4].replace("\\040", " ")
