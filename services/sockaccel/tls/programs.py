"""The programs in TLS libraries, and the contract of bpf/abi/tls.h in ctypes, version 2."""

from __future__ import annotations

import asyncio
import ctypes as ct
import enum
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.common import errors
from services.common.kernel import btf, loader

if TYPE_CHECKING:
    from services.common.instance import Instance

SERVICE: Final = "sockaccel"
FAMILY: Final = "tls/v2"
MAPS: Final = {name: f"{FAMILY}/{name}" for name in ("tls_spaces", "tls_ports", "tls_calls", "tls_stats", "tls_records")}
"""Map -> pin path below an instance's pin directory."""
PROGRAMS: Final = ("fib_tls_write", "fib_tls_go_write", "fib_tls_read", "fib_tls_read_ex", "fib_tls_done")
KERNEL: Final = ("fib_tls_ops", "fib_tls_msg")
"""Those of the kernel's own TLS."""
SPACES_MAX: Final = 4096
HEAD: Final = 512
FIELDS: Final = {
    "AT_TASK_NSPROXY": "task_struct.nsproxy",
    "AT_NSPROXY_NET": "nsproxy.net_ns",
    "AT_NET_INUM": "net.ns.inum",
    "AT_TASK_COMM": "task_struct.comm",
}
KERNEL_FIELDS: Final = {
    "AT_NET_INUM": "net.ns.inum",
    "AT_TASK_COMM": "task_struct.comm",
    "AT_SK_NET": "sock.__sk_common.skc_net.net",
    "AT_ULP_OPS": "inet_connection_sock.icsk_ulp_ops",
    "AT_ULP_NAME": "tcp_ulp_ops.name",
}
REGISTERS: Final = {
    "x86_64": {
        "AT_FIRST": "pt_regs.di", "AT_SECOND": "pt_regs.si", "AT_THIRD": "pt_regs.dx", "AT_FOURTH": "pt_regs.cx",
        "AT_RESULT": "pt_regs.ax", "AT_GO_FIRST": "pt_regs.ax", "AT_GO_SECOND": "pt_regs.bx", "AT_GO_THIRD": "pt_regs.cx",
    },
}  # fmt: skip
"""Where a function's arguments and result are: System V's calling convention, and Go's (ABIInternal, Go 1.17)."""
_ARM_ARGUMENTS: Final = {
    "AT_FIRST": 0, "AT_SECOND": 8, "AT_THIRD": 16, "AT_FOURTH": 24, "AT_RESULT": 0, "AT_GO_FIRST": 0, "AT_GO_SECOND": 8,
    "AT_GO_THIRD": 16,
}  # fmt: skip


class Stat(enum.IntEnum):
    """enum tls_stat."""

    SEEN = 0
    LOST = 1
    HELD = 2
    TAKEN = 3


class Port(ct.Structure):
    """struct tls_port."""

    _fields_ = (("netns", ct.c_uint64), ("port", ct.c_uint32), ("zero", ct.c_uint32))


class Record(ct.Structure):
    """struct tls_record."""

    _fields_ = (
        ("time", ct.c_uint64), ("session", ct.c_uint64), ("pid", ct.c_uint32), ("thread", ct.c_uint32),
        ("netns", ct.c_uint32), ("captured", ct.c_uint16), ("received", ct.c_uint8), ("kernel", ct.c_uint8),
        ("comm", ct.c_char * 16), ("head", ct.c_ubyte * HEAD),
    )  # fmt: skip


assert ct.sizeof(Port) == 16
assert ct.sizeof(Record) == 48 + HEAD


def spec() -> loader.ProgramSpec:
    """Those in libraries. Blocks for some 20 ms; FailedPrecondition: a kernel without a field, or another machine."""
    machine = platform.machine()
    if machine == "aarch64":
        arguments = _ARM_ARGUMENTS
    elif machine in REGISTERS:
        arguments = btf.offsets(REGISTERS[machine])
    else:
        raise errors.FailedPrecondition(f"TLS cannot be looked into on {machine} machines")
    return loader.ProgramSpec(
        source=Path("sockaccel/tls.c"),
        functions=dict.fromkeys(PROGRAMS, "kprobe"),
        service=SERVICE,
        maps=MAPS,
        defines={**btf.offsets(FIELDS), **arguments},
    )


def kernel_spec() -> loader.ProgramSpec:
    """Those of the kernel's own TLS. As spec."""
    return loader.ProgramSpec(
        source=Path("sockaccel/ktls.c"),
        functions=dict(zip(KERNEL, ("sock_ops", "sk_msg"), strict=True)),
        service=SERVICE,
        maps={name: MAPS[name] for name in ("tls_ports", "tls_stats", "tls_records")},
        defines=btf.offsets(KERNEL_FIELDS),
    )


def path(instance: Instance, name: str) -> Path:
    """Where a program is pinned."""
    return instance.pin_dir / "prog" / SERVICE / name


async def load(instance: Instance) -> None:
    """Load the programs anew, adopting what maps there are. Raises what loader.load raises."""
    await loader.load([await asyncio.to_thread(spec)], instance.pin_dir)


async def load_kernel(instance: Instance) -> None:
    """As load, those of the kernel's own TLS."""
    await loader.load([await asyncio.to_thread(kernel_spec)], instance.pin_dir)
