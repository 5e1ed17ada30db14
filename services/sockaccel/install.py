"""What the sockaccel service loads."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.common import errors
from services.common.kernel import btf, loader
from services.common.pipeline import abi as pipeline
from services.sockaccel import abi

if TYPE_CHECKING:
    from services.common.instance import Instance

SERVICE: Final = "sockaccel"
OPS: Final = "fib_sa_ops"
MSG: Final = "fib_sa_msg"
ULP: Final = "fib_sa_ulp"
CALLS: Final = {"fib_sa_recv": "sock_recv_length", "fib_sa_reading": "tcp_rcv_space_adjust"}
"""Programs at tracepoints."""
FIELDS: Final = {
    "AT_TCP_WRITE_SEQ": "tcp_sock.write_seq",
    "AT_TCP_COPIED_SEQ": "tcp_sock.copied_seq",
    "AT_TCP_CB_FLAGS": "tcp_sock.bpf_sock_ops_cb_flags",
    "AT_ULP_OPS": "inet_connection_sock.icsk_ulp_ops",
    "AT_SK_COOKIE": "sock.__sk_common.skc_cookie",
    "AT_SK_RCVLOWAT": "sock.sk_rcvlowat",
    "AT_SK_UID": "sock.sk_uid",
    "AT_SK_CGROUP": "sock.sk_cgrp_data.cgroup",
    "AT_SK_RMEM": "sock.sk_backlog.rmem_alloc",
    "AT_SK_USER_DATA": "sock.sk_user_data",
    "AT_PSOCK_INGRESS": "sk_psock.ingress_msg",
    "AT_CGROUP_KN": "cgroup.kn",
    "AT_KN_ID": "kernfs_node.id",
    "AT_CSS_PARENT": "cgroup_subsys_state.parent",
    "AT_TASK_STACK": "task_struct.stack",
    "AT_TASK_PID": "task_struct.pid",
    "AT_TASK_LEADER": "task_struct.group_leader",
    "AT_TASK_COMM": "task_struct.comm",
    "AT_SK_OWNED": "sock.sk_lock.owned",
    "AT_SK_SOCKET": "sock.sk_socket",
    "AT_SOCKET_FILE": "socket.file",
    "AT_FILE_FLAGS": "file.f_flags",
    "AT_SK_WQ": "sock.sk_wq",
    "AT_SK_PROTO": "sock.__sk_common.skc_prot",
    "AT_PROTO_PRESSURE": "proto.memory_pressure",
    "AT_WQ_HEAD": "socket_wq.wait.head",
    "AT_WAIT_ENTRY": "wait_queue_entry.entry",
    "AT_WAIT_PRIVATE": "wait_queue_entry.private",
    "AT_SOCKOPT_SK": "bpf_sockopt_kern.sk",
}
"""What the programs read of the kernel's own structures; all there since Linux 5.12."""


@dataclass(frozen=True)
class Machine:
    """How a process in a system call is read: where its registers are saved, and which call it is in."""

    registers: Mapping[str, str]
    numbers: Mapping[str, int]


MACHINES: Final = {
    "x86_64": Machine(
        {
            "AT_REGS_CALL": "pt_regs.orig_ax",
            "AT_REGS_THIRD": "pt_regs.dx",
            "AT_REGS_FOURTH": "pt_regs.r10",
            "AT_REGS_MODE": "pt_regs.cs",
        },
        {
            "SA_MODE_MASK": 0xFFFF, "SA_MODE_USER": 0x33, "SA_NR_WRITE": 1, "SA_NR_WRITEV": 20,
            "SA_NR_SENDTO": 44, "SA_NR_SENDMSG": 46, "SA_NR_SENDMMSG": 307, "SA_NR_READ": 0, "SA_NR_READV": 19,
            "SA_NR_RECVFROM": 45, "SA_NR_RECVMSG": 47, "SA_NR_RECVMMSG": 299,
        },
    ),
    "aarch64": Machine(
        {
            "AT_REGS_CALL": "pt_regs.syscallno",
            "AT_REGS_MODE": "pt_regs.pstate",
        },
        {
            "AT_REGS_THIRD": 16, "AT_REGS_FOURTH": 24, "SA_MODE_MASK": 0x1F, "SA_MODE_USER": 0,
            "SA_NR_WRITE": 64, "SA_NR_WRITEV": 66, "SA_NR_SENDTO": 206, "SA_NR_SENDMSG": 211, "SA_NR_SENDMMSG": 269,
            "SA_NR_READ": 63, "SA_NR_READV": 65, "SA_NR_RECVFROM": 207, "SA_NR_RECVMSG": 212, "SA_NR_RECVMMSG": 243,
        },
    ),
}  # fmt: skip
WAITS: Final = "fib_sa_waits"
_ENDPOINTS: Final = ("ep_addr", "ep_near", "ep_netns", "ep_cgroup", "ep_iface")
MAPS: Final = {
    **abi.MAPS,
    **{name: pipeline.MAPS[name] for name in _ENDPOINTS},
    "pol_eps": pipeline.POLICY_EPS,
}


def spec(pairs: int = 0) -> loader.ProgramSpec:
    """All programs. Blocks for some 20 ms. FailedPrecondition: a kernel without a field, or a machine not in MACHINES."""
    machine = MACHINES.get(platform.machine())
    if machine is None:
        raise errors.FailedPrecondition(
            f"connections cannot be shortened on {platform.machine()} machines", fix=f"it takes {' or '.join(MACHINES)}"
        )
    return loader.ProgramSpec(
        source=Path("sockaccel/sockaccel.c"),
        functions={
            OPS: "sock_ops",
            MSG: "sk_msg",
            ULP: "cgroup_sockopt/cgroup_setsockopt",
            WAITS: "raw_tracepoint",
            **{name: f"tp_btf/{where}" for name, where in CALLS.items()},
        },
        service=SERVICE,
        maps=MAPS,
        defines={
            **btf.offsets(FIELDS),
            **btf.offsets(machine.registers),
            **machine.numbers,
            "SA_PAIRS_MAX": pairs or abi.PAIRS_MAX,
        },
    )


def program_path(instance: Instance, name: str) -> Path:
    """Where a program is pinned."""
    return instance.pin_dir / "prog" / SERVICE / name


def complete(instance: Instance) -> bool:
    """Whether all is pinned."""
    pins = [instance.pin_dir / path for path in MAPS.values()]
    pins += [program_path(instance, name) for name in (OPS, MSG, ULP, WAITS, *CALLS)]
    return all(path.exists() for path in pins)


async def load(instance: Instance, pairs: int = 0) -> None:
    """Load the programs anew, adopting what maps there are. Raises what loader.load raises.

    pairs: room for so many, for tests; 0: abi.PAIRS_MAX.
    """
    await loader.load([await asyncio.to_thread(spec, pairs)], instance.pin_dir)
