"""What the lb service loads: three units, so that each hook's programs can be loaded and tested alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.common.kernel import features, loader
from services.common.pipeline import abi as pipeline
from services.lb import abi
from services.lb.prefilter import abi as prefilter_abi
from services.lb.xdp import abi as xdp_abi

if TYPE_CHECKING:
    from services.common.instance import Instance

SERVICE: Final = "lb"
LB: Final = "fib_lb"
UPLINK: Final = "fib_lb_uplink"
UPLINK_OUT: Final = "fib_lb_uplink_out"
TABLES: Final = "fib_lb_maps"
XDP: Final = "fib_lb_xdp"
XDP_TAILS: Final = ("fib_lb_xdp4", "fib_lb_xdp6")
"""What it goes on to, in order of enum lb_xdp_tail."""
SOCKETS: Final = {
    "fib_connect4": "cgroup_inet4_connect",
    "fib_connect6": "cgroup_inet6_connect",
    "fib_sendmsg4": "cgroup_udp4_sendmsg",
    "fib_sendmsg6": "cgroup_udp6_sendmsg",
    "fib_recvmsg4": "cgroup_udp4_recvmsg",
    "fib_recvmsg6": "cgroup_udp6_recvmsg",
    "fib_peername4": "cgroup_inet4_getpeername",
    "fib_peername6": "cgroup_inet6_getpeername",
    "fib_release": "cgroup_inet_sock_release",
}
"""Program -> where it hangs; what removes a socket's entries comes last."""
SOCK_RELEASE: Final = "fib_release"
LB_ANSWER: Final = "fib_lb_answer"
SLOTS: Final = {pipeline.Slot.LB: LB, pipeline.Slot.LB_ANSWER: LB_ANSWER}
TAILS_MAP: Final = "lb_tails"
WORKS_MAP: Final = "lb_works"
"""What programs leave to each other: pinned, for those of two versions go on to each other while they are replaced."""
TAILS: Final = (UPLINK, "fib_lb_search", "fib_lb_reject", "fib_lb_icmp", "fib_lb_decap")
"""Programs that others go on to, in order of enum lb_tail."""
MAPS: Final = {**pipeline.MAPS, **abi.MAPS}
XDP_MAPS: Final = {
    **abi.MAPS, **xdp_abi.MAPS, **prefilter_abi.MAPS, "pl_counters": pipeline.MAPS["pl_counters"],
}  # fmt: skip
# Sockets have no packets.
_PACKET_FAMILIES: Final = (pipeline.PIPELINE_FAMILY, pipeline.NODE_FAMILY)


def tables() -> loader.ProgramSpec:
    """The maps alone."""
    return loader.ProgramSpec(
        source=Path("lb/maps.c"), service=SERVICE, functions={TABLES: "xdp"}, maps=dict(abi.MAPS)
    )


def tables_complete(instance: Instance) -> bool:
    """Whether all maps are pinned."""
    return all((instance.pin_dir / path).exists() for path in abi.MAPS.values())


async def install_tables(instance: Instance) -> None:
    """Make the maps, adopting what there are. Raises what loader.load raises."""
    await loader.load([tables()], instance.pin_dir)


def packets() -> loader.ProgramSpec:
    """tc: the slot LB, and the entry of packets from outside."""
    return loader.ProgramSpec(
        source=Path("lb/lb.c"),
        service=SERVICE,
        functions=dict.fromkeys((*SLOTS.values(), UPLINK_OUT, *TAILS), "sched_cls"),
        maps={**MAPS, **{name: f"{abi.FAMILY}/{name}" for name in (TAILS_MAP, WORKS_MAP)}},
        slots={
            pipeline.SLOTS_MAP: {int(slot): name for slot, name in SLOTS.items()},
            TAILS_MAP: dict(enumerate(TAILS)),
        },
    )


async def install_packets(instance: Instance) -> None:
    """Load tc's programs anew, adopting what maps there are. Raises what loader.load raises."""
    await loader.load([packets()], instance.pin_dir)


def xdp() -> loader.ProgramSpec:
    """XDP: the fast path of the uplinks. It shares no slots with tc."""
    return loader.ProgramSpec(
        source=Path("lb/xdp.c"),
        service=SERVICE,
        functions=dict.fromkeys((XDP, *XDP_TAILS), "xdp"),
        maps=XDP_MAPS,
        slots={xdp_abi.TAILS_MAP: dict(enumerate(XDP_TAILS))},
    )


async def install_xdp(instance: Instance) -> None:
    """Load the fast path anew, adopting what maps there are. Raises what loader.load raises."""
    await loader.load([xdp()], instance.pin_dir)


def sockets() -> loader.ProgramSpec:
    """Hooks of control groups: where processes name their destinations."""
    kinds = dict.fromkeys(SOCKETS, "cgroup_sock_addr") | {SOCK_RELEASE: "cgroup_sock"}
    return loader.ProgramSpec(
        source=Path("lb/sock.c"),
        service=SERVICE,
        functions={name: f"{kinds[name]}/{hook}" for name, hook in SOCKETS.items()},
        maps={name: path for name, path in MAPS.items() if not path.startswith(_PACKET_FAMILIES)},
        defines={"SOCK_RETVAL": int(features.has_set_retval())},
    )


async def install_sockets(instance: Instance) -> None:
    """Load the hooks anew, adopting what maps there are; idempotent. Raises what loader.load raises."""
    await loader.load([sockets()], instance.pin_dir)


def program_path(instance: Instance, name: str) -> Path:
    """Where a program is pinned."""
    return instance.pin_dir / "prog" / SERVICE / name
