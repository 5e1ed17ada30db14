"""What the sockaccel service loads."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.common.kernel import btf, loader
from services.common.pipeline import abi as pipeline
from services.sockaccel import abi

if TYPE_CHECKING:
    from services.common.instance import Instance

SERVICE: Final = "sockaccel"
OPS: Final = "fib_sa_ops"
MSG: Final = "fib_sa_msg"
CALLS: Final = {"fib_sa_recv": "sock_recv_length", "fib_sa_send": "sock_send_length"}
"""Programs at tracepoints."""
FIELDS: Final = {
    "AT_TCP_WRITE_SEQ": "tcp_sock.write_seq",
    "AT_TCP_COPIED_SEQ": "tcp_sock.copied_seq",
    "AT_ULP_OPS": "inet_connection_sock.icsk_ulp_ops",
    "AT_SK_COOKIE": "sock.__sk_common.skc_cookie",
    "AT_SK_RCVLOWAT": "sock.sk_rcvlowat",
    "AT_SK_FLAGS": "sock.__sk_common.skc_flags",
    "AT_SK_UID": "sock.sk_uid",
    "AT_SK_CGROUP": "sock.sk_cgrp_data.cgroup",
    "AT_SK_RMEM": "sock.sk_backlog.rmem_alloc",
    "AT_SK_USER_DATA": "sock.sk_user_data",
    "AT_PSOCK_INGRESS": "sk_psock.ingress_msg",
    "AT_CGROUP_KN": "cgroup.kn",
    "AT_KN_ID": "kernfs_node.id",
    "AT_CSS_PARENT": "cgroup_subsys_state.parent",
}
"""What the programs read of the kernel's own structures; all there since Linux 5.12."""
_ENDPOINTS: Final = ("ep_addr", "ep_near", "ep_netns", "ep_cgroup", "ep_iface")
MAPS: Final = {
    **abi.MAPS,
    **{name: pipeline.MAPS[name] for name in _ENDPOINTS},
    "pol_eps": pipeline.POLICY_EPS,
}


def spec(pairs: int = 0) -> loader.ProgramSpec:
    """All programs. Blocks for some 20 ms; FailedPrecondition if the kernel lacks a field."""
    return loader.ProgramSpec(
        source=Path("sockaccel/sockaccel.c"),
        functions={OPS: "sock_ops", MSG: "sk_msg", **{name: f"tp_btf/{where}" for name, where in CALLS.items()}},
        service=SERVICE,
        maps=MAPS,
        defines={
            **btf.offsets(FIELDS, enumerators=[("SOCK_ZEROCOPY", "sock_flags.SOCK_ZEROCOPY")]),
            "SA_PAIRS_MAX": pairs or abi.PAIRS_MAX,
        },
    )


def program_path(instance: Instance, name: str) -> Path:
    """Where a program is pinned."""
    return instance.pin_dir / "prog" / SERVICE / name


def complete(instance: Instance) -> bool:
    """Whether all is pinned."""
    pins = [instance.pin_dir / path for path in MAPS.values()]
    pins += [program_path(instance, name) for name in (OPS, MSG, *CALLS)]
    return all(path.exists() for path in pins)


async def load(instance: Instance, pairs: int = 0) -> None:
    """Load the programs anew, adopting what maps there are. Raises what loader.load raises.

    pairs: room for so many, for tests; 0: abi.PAIRS_MAX.
    """
    await loader.load([await asyncio.to_thread(spec, pairs)], instance.pin_dir)
