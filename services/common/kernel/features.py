"""What Fibril needs of this host, each lack with a sentence that says what to do.

Nothing here changes the host but `ensure_bpffs`. Probing takes a few ms and is done by trying, not by
version.
"""

from __future__ import annotations

import ctypes as ct
import errno
import importlib.util
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.common import errors
from services.common.kernel import attach, bpf, cgroup

CAPABILITIES: Final = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}
_REDIRECT_PEER: Final = 155
_SET_RETVAL: Final = 187

_libc = ct.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ct.c_char_p, ct.c_char_p, ct.c_char_p, ct.c_ulong, ct.c_char_p]


@dataclass(frozen=True)
class Feature:
    """One requirement.

    `message` says what there is or what is missing; `fix` is empty if there is nothing to do.
    """

    name: str
    ok: bool
    message: str
    fix: str = ""
    required: bool = True


@dataclass(frozen=True)
class Features:
    features: tuple[Feature, ...]

    def __getitem__(self, name: str) -> Feature:
        return next(feature for feature in self.features if feature.name == name)

    def missing(self) -> list[Feature]:
        """Required ones that are not there."""
        return [feature for feature in self.features if feature.required and not feature.ok]

    def require(self) -> None:
        """FailedPrecondition (PermissionDenied for capabilities) naming everything that is missing."""
        lacks = self.missing()
        if not lacks:
            return
        kind = (
            errors.PermissionDenied
            if any(lack.name == "capabilities" for lack in lacks)
            else errors.FailedPrecondition
        )
        raise kind(
            "; ".join(lack.message for lack in lacks), fix="; ".join(lack.fix for lack in lacks if lack.fix)
        )


def probe(bpffs: Path | str = "/sys/fs/bpf") -> Features:
    """Look at everything; never raises for something missing."""
    return Features(tuple(_probe(Path(bpffs))))


def _probe(bpffs: Path) -> Iterator[Feature]:
    lacking = [name for name, number in CAPABILITIES.items() if not capabilities() >> number & 1]
    yield Feature(
        "capabilities",
        not lacking,
        f"this process lacks {', '.join(lacking)}" if lacking else "all capabilities",
        "run it as root, or grant these (systemd: AmbientCapabilities=, containers: --cap-add)"
        if lacking
        else "",
    )
    mounted = bpf.is_bpffs(bpffs)
    yield Feature(
        "bpffs",
        mounted,
        f"{bpffs} is {'a' if mounted else 'not a'} bpf file system",
        "" if mounted else f"mount -t bpf bpf {bpffs}",
    )
    yield _ring_buffer()
    yield _redirect_peer()
    tcx = attach.has_tcx()
    yield Feature(
        "tcx",
        tcx,
        "tcx is there"
        if tcx
        else "the kernel has no tcx, so interfaces with an ingress qdisc "
        "(bandwidth limits by the CNI bandwidth plugin) cannot be served",
        "" if tcx else "use kernel 6.6 or newer if you need that",
        required=False,
    )
    yield _cgroup2()
    jit = _first_line("/proc/sys/net/core/bpf_jit_enable")
    yield Feature(
        "jit",
        jit != "0",
        "the BPF JIT is on"
        if jit != "0"
        else "the BPF JIT is off: the data path would be several times slower",
        "" if jit != "0" else "sysctl -w net.core.bpf_jit_enable=1",
        required=False,
    )
    yield _present("bcc", importlib.util.find_spec("bcc") is not None, "python3-bpfcc")
    yield _present("nft", shutil.which("nft") is not None, "nftables")
    yield _present("libbpf", _has_library("libbpf.so.1"), "libbpf1")
    ipv6 = Path("/proc/sys/net/ipv6").is_dir()
    yield Feature(
        "ipv6",
        ipv6,
        "IPv6 is there" if ipv6 else "the kernel has no IPv6: pods get IPv4 only",
        "" if ipv6 else "boot without ipv6.disable=1",
        required=False,
    )


def capabilities() -> int:
    """The effective set of this process, as a bit mask."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def ensure_bpffs(path: Path | str = "/sys/fs/bpf") -> bool:
    """Mount a bpf file system at `path` unless one is there; whether it did.

    PermissionDenied without CAP_SYS_ADMIN, FailedPrecondition if the kernel has none.
    """
    if bpf.is_bpffs(path):
        return False
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.FailedPrecondition(
            f"cannot make the mount point {path}: {error.strerror}",
            fix="is /sys mounted read-only? mount it read-write",
        ) from None
    if _libc.mount(b"bpf", os.fsencode(path), b"bpf", 0, b"mode=0700") == 0:
        return True
    number = ct.get_errno()
    if number == errno.EPERM:
        raise errors.PermissionDenied(
            f"may not mount a bpf file system at {path}",
            fix=f"run as root, or let an administrator `mount -t bpf bpf {path}`",
        )
    raise errors.FailedPrecondition(
        f"cannot mount a bpf file system at {path}: {os.strerror(number)}",
        fix="the kernel needs CONFIG_BPF_SYSCALL" if number == errno.ENODEV else "",
    )


def _denied(error: OSError) -> bool:
    return error.errno in (errno.EPERM, errno.EACCES)


def _ring_buffer() -> Feature:
    try:
        os.close(bpf.map_create("ringbuf", 0, 0, os.sysconf("SC_PAGESIZE"), name="probe"))
    except OSError as error:
        if _denied(error):
            return Feature("ringbuf", False, "may not create BPF maps", "run as root with CAP_BPF")
        return Feature("ringbuf", False, "the kernel has no BPF ring buffer", "use kernel 5.8 or newer")
    return Feature("ringbuf", True, "BPF ring buffers work")


def has_set_retval() -> bool:
    """Whether programs at a control group's connect hook may say which error a call ends with (5.18)."""
    try:
        # bpf_set_retval(0), then "allowed".
        _try_helper("cgroup_sock_addr", _SET_RETVAL, (0,), bpf.ATTACH_TYPES["cgroup_inet4_connect"])
    except OSError:
        return False
    return True


def _try_helper(kind: str, helper: int, arguments: tuple[int, ...], attach_type: int = 0) -> None:
    """Load a program that calls a helper and returns 1. OSError as the kernel's."""
    moves = [(0xB7, register, 0, value) for register, value in enumerate(arguments, 1)]
    code = b"".join(
        struct.pack("=BBhi", *each)
        for each in [*moves, (0x85, 0, 0, helper), (0xB7, 0, 0, 1), (0x95, 0, 0, 0)]
    )
    instructions, licence = ct.create_string_buffer(code, len(code)), ct.create_string_buffer(b"GPL")
    attr = struct.pack(
        "IIQQIIQII16sII",
        bpf.PROG_TYPES.index(kind),
        len(code) // 8,
        ct.addressof(instructions),
        ct.addressof(licence),
        0,
        0,
        0,
        0,
        0,
        b"probe",
        0,
        attach_type,
    )
    os.close(bpf.call(bpf.PROG_LOAD, attr)[0])


def _redirect_peer() -> Feature:
    try:
        _try_helper("sched_cls", _REDIRECT_PEER, (1, 0))
    except OSError as error:
        if _denied(error):
            return Feature(
                "redirect_peer",
                False,
                "may not load BPF programs",
                "run as root with CAP_BPF and CAP_NET_ADMIN",
            )
        return Feature(
            "redirect_peer",
            False,
            "the kernel has no bpf_redirect_peer for tc programs",
            "use kernel 5.10 or newer with CONFIG_NET_CLS_ACT and CONFIG_NET_CLS_BPF",
        )
    return Feature("redirect_peer", True, "bpf_redirect_peer works")


def _cgroup2() -> Feature:
    try:
        return Feature("cgroup2", True, f"cgroup2 is mounted at {cgroup.mount_point()}")
    except errors.FailedPrecondition as error:
        return Feature("cgroup2", False, error.message, error.fix)


def _present(name: str, there: bool, package: str) -> Feature:
    return Feature(
        name,
        there,
        f"{name} is there" if there else f"{name} is missing",
        "" if there else f"apt-get install {package}",
    )


def _has_library(name: str) -> bool:
    try:
        ct.CDLL(name)
    except OSError:
        return False
    return True


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
