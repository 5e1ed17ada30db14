"""The tracing programs: loaded when they are first wanted, attached while somebody holds them.

exec      raw tracepoint sched_process_exec, arguments included, from the memory of the process
connect   the connect hooks of the root cgroup and, for the source port, its sock_ops hook

Attachments are descriptors, so a killed service leaves none. Programs and maps stay pinned below the instance, where
they cost nothing; each start of the service loads the programs anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import btf, cgroup, held, loader, progs
from services.identity.workload.abi import MAPS, Kind

SERVICE: Final = "identity"

FIELDS: Final = {
    "AT_TASK_LEADER": "task_struct.group_leader",
    "AT_TASK_PARENT": "task_struct.real_parent",
    "AT_TASK_PID": "task_struct.thread_pid",
    "AT_TASK_NSPROXY": "task_struct.nsproxy",
    "AT_TASK_MM": "task_struct.mm",
    "AT_PID_LEVEL": "pid.level",
    "AT_PID_NUMBERS": "pid.numbers",
    "AT_UPID_NR": "upid.nr",
    "AT_UPID_NS": "upid.ns",
    "AT_PIDNS_INUM": "pid_namespace.ns.inum",
    "AT_NSPROXY_NET": "nsproxy.net_ns",
    "AT_NET_COOKIE": "net.net_cookie",
    "AT_MM_ARG_START": "mm_struct.arg_start",
    "AT_MM_ARG_END": "mm_struct.arg_end",
    "AT_BINPRM_FILENAME": "linux_binprm.filename",
}
"""What the programs read of the kernel's own structures; all there since Linux 5.12."""

_FUNCTIONS: Final = {
    Kind.EXEC: {"tr_exec": "raw_tracepoint"},
    Kind.CONNECT: {
        "tr_connect4": "cgroup_sock_addr/cgroup_inet4_connect",
        "tr_connect6": "cgroup_sock_addr/cgroup_inet6_connect",
        "tr_tcp_connect": "sock_ops",
    },
}
_HOOKS: Final[dict[Kind, dict[str, Callable[[int], int]]]] = {
    Kind.EXEC: {"tr_exec": lambda fd: held.raw_tracepoint("sched_process_exec", fd)},
    Kind.CONNECT: {
        # The source comes first: a connection seen by the others is completed by this one.
        "tr_tcp_connect": lambda fd: held.cgroup(cgroup.mount_point(), "cgroup_sock_ops", fd),
        "tr_connect4": lambda fd: held.cgroup(cgroup.mount_point(), "cgroup_inet4_connect", fd),
        "tr_connect6": lambda fd: held.cgroup(cgroup.mount_point(), "cgroup_inet6_connect", fd),
    },
}
_NEEDS: Final = {
    Kind.EXEC: "Linux 5.12 or newer with CONFIG_BPF_EVENTS and CONFIG_DEBUG_INFO_BTF",
    Kind.CONNECT: "Linux 6.1 or newer with CONFIG_CGROUP_BPF and CONFIG_DEBUG_INFO_BTF",
}


def spec(kind: Kind) -> loader.ProgramSpec:
    """What tracing of one kind loads. Blocks for some 20 ms; FailedPrecondition if the kernel lacks a field."""
    defines: dict[str, str | int] = {**btf.offsets(FIELDS, [("SIZE_UPID", "upid")])}
    return loader.ProgramSpec(
        source=Path("identity/trace.c"),
        functions=_FUNCTIONS[kind],
        service=SERVICE,
        maps=MAPS,
        defines={**defines, "PIDNS": os.stat("/proc/self/ns/pid").st_ino},
    )


def program_path(instance: Instance, name: str) -> Path:
    """Where a program is pinned."""
    return instance.pin_dir / "prog" / SERVICE / name


def pins(instance: Instance, kind: Kind) -> list[Path]:
    """Where what tracing of one kind needs is pinned."""
    names = ("tr_events", "tr_wanted", "tr_lost")
    return [
        *(program_path(instance, name) for name in _FUNCTIONS[kind]),
        *(map_path(instance, name) for name in names),
    ]


def map_path(instance: Instance, name: str) -> Path:
    """Where a map is pinned. KeyError for a name that is not one of trace.c's."""
    return instance.pin_dir / MAPS[name]


async def load(instance: Instance, kind: Kind) -> None:
    """Load the programs of one kind; idempotent. FailedPrecondition says what is missing."""
    with _explained(kind):
        await loader.load([await asyncio.to_thread(spec, kind)], instance.pin_dir)


def attach(instance: Instance, kind: Kind) -> list[int]:
    """Attach the loaded programs of one kind; closing the descriptors takes them off.

    NotFound if they are not loaded (any more), FailedPrecondition if the kernel refuses one: then none is attached.
    """
    descriptors: list[int] = []
    try:
        with _explained(kind):
            for name, hook in _HOOKS[kind].items():
                with progs.opened(program_path(instance, name)) as fd:
                    descriptors.append(hook(fd))
    except errors.FibrilError:
        for fd in descriptors:
            os.close(fd)
        raise
    return descriptors


@contextlib.contextmanager
def _explained(kind: Kind) -> Iterator[None]:
    """Say what could not be done and what it needs. What this process may not do is no fault of the caller's rights."""
    try:
        yield
    except (errors.FailedPrecondition, errors.PermissionDenied) as error:
        raise errors.FailedPrecondition(
            f"cannot trace {_name(kind)}: {error.message}", fix=error.fix or f"this needs {_NEEDS[kind]}"
        ) from None


def _name(kind: Kind) -> str:
    return {Kind.EXEC: "executions", Kind.CONNECT: "connections"}[kind]
