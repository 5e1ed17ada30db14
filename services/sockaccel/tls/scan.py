"""Which files of chosen pods' processes have TLS in them.

A file is known by device, inode and time of change: many processes, of many pods, share a library. What was found in one is
remembered. It is reached by what a process has mapped, not by its path: that may be another's by now (a library that was
upgraded), and lead elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from services.sockaccel.tls import elf
from services.sockaccel.tls.places import cheap

ENTRY: Final = {
    "SSL_write": "fib_tls_write",
    "SSL_write_ex": "fib_tls_write",
    "SSL_read": "fib_tls_read",
    "SSL_read_ex": "fib_tls_read_ex",
    "gnutls_record_send": "fib_tls_write",
    "gnutls_record_recv": "fib_tls_read",
    "crypto/tls.(*Conn).Write": "fib_tls_go_write",
}
"""Function -> program at its beginning."""
RETURN: Final = "fib_tls_done"
"""Program where functions that read return."""
LIBRARIES: Final = {"SSL_write": "openssl", "gnutls_record_send": "gnutls", "crypto/tls.(*Conn).Write": "go"}
_LIBRARY: Final = re.compile(r"lib(ssl|gnutls)[.\d-].*")
_GO: Final = b"\xff Go buildinf:"
_GO_TLS: Final = b"crypto/tls"
_BUILT_IN: Final = (b"BoringSSL", b"ssl/ssl_lib.c")
"""OpenSSL names its sources where it reports errors; a program that only uses it does not."""
GO_READS: Final = "what it reads is not seen: a probe where a Go function returns would break its stack"
_SIZE_MAX: Final = 512 << 20

_KNOWN_MAX: Final = 4096

Key = tuple[int, int, int]


@dataclass
class File:
    """A library or program, and who uses it."""

    reach: Path
    """Where this process finds it."""
    path: str
    """Where its processes do."""
    places: dict[str, int] = field(default_factory=dict)
    """Function -> offset in the file where it is probed."""
    problem: str = ""
    pods: set[str] = field(default_factory=set)
    processes: set[int] = field(default_factory=set)

    @property
    def library(self) -> str:
        return next((name for function, name in LIBRARIES.items() if function in self.places), "")


class Scanner:
    """For one thread. `look` reads /proc."""

    def __init__(self) -> None:
        self._known: dict[Key, tuple[dict[str, int], str]] = {}

    def look(self, spaces: Mapping[int, str]) -> dict[Key, File]:
        """Files with TLS that processes in these network namespaces (inode -> pod) have mapped.

        A program without any that could be told is left out, one that hides it is not.
        """
        found: dict[Key, File] = {}
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            # Processes come and go.
            with contextlib.suppress(OSError):
                pod = spaces.get(os.stat(f"{entry.path}/ns/net").st_ino)
                if pod is not None:
                    self._process(int(entry.name), pod, found)
        for key in list(self._known):
            # Programs come and go: those that were there are not read again, as long as there is room.
            if len(self._known) > _KNOWN_MAX and key not in found:
                del self._known[key]
        return {key: file for key, file in found.items() if file.places or file.problem}

    def _process(self, pid: int, pod: str, found: dict[Key, File]) -> None:
        program = os.readlink(f"/proc/{pid}/exe")
        # A thread group without a name of its own is the kernel's, or is ending.
        places = {program: Path(f"/proc/{pid}/exe")}
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                parts = line.rstrip("\n").split(None, 5)
                if len(parts) == 6 and "x" in parts[1] and _LIBRARY.fullmatch(os.path.basename(parts[5])):
                    first, _, last = parts[0].partition("-")
                    places.setdefault(parts[5], Path(f"/proc/{pid}/map_files/{int(first, 16):x}-{int(last, 16):x}"))
        for path, reach in places.items():
            with contextlib.suppress(OSError):
                state = reach.stat()
                key = state.st_dev, state.st_ino, state.st_mtime_ns
                if key not in found:
                    functions, problem = self._inside(reach, key, state.st_size)
                    found[key] = File(reach, path, functions, problem)
                found[key].pods.add(pod)
                found[key].processes.add(pid)

    def _inside(self, reach: Path, known: tuple[int, int, int], size: int) -> tuple[dict[str, int], str]:
        if known not in self._known:
            self._known[known] = _inside(reach, size)
        return self._known[known]


def _inside(reach: Path, size: int) -> tuple[dict[str, int], str]:
    """Functions in a file, and what is amiss with it."""
    if size > _SIZE_MAX:
        return {}, f"larger than {_SIZE_MAX >> 20} MiB"
    try:
        places = cheap(reach, elf.functions(reach, ENTRY))
    except elf.Unreadable as error:
        return {}, str(error)
    if places:
        return places, GO_READS if "crypto/tls.(*Conn).Write" in places else ""
    has = elf.contains(reach, (_GO, _GO_TLS, *_BUILT_IN))
    if {_GO, _GO_TLS} <= has:
        return {}, "a Go program without symbols: build it without -ldflags=-s"
    if not has.isdisjoint(_BUILT_IN):
        return {}, "has TLS built in, without symbols"
    return {}, ""
