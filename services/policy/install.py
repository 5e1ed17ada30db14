"""What the policy service loads: its maps alone, and the programs of its slots."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.common import errors
from services.common.kernel import loader, progs
from services.common.pipeline import abi as pipeline
from services.policy import abi

if TYPE_CHECKING:
    from services.common.instance import Instance

SERVICE: Final = "policy"
SLOTS: Final = {
    pipeline.Slot.POLICY_EGRESS: "fib_policy_egress",
    pipeline.Slot.POLICY_INGRESS: "fib_policy_ingress",
    pipeline.Slot.POLICY_HOST: "fib_policy_host",
}
TAILS_MAP: Final = "pol_tails"
TAILS: Final = (
    "fib_policy_decide", "fib_policy_related", "fib_policy_reject", "fib_policy_older", "fib_policy_overlay",
)  # fmt: skip
"""Programs that others go on to, in order of enum pol_tail."""
HOST_IN: Final = "fib_policy_host_in"
HOST_OUT: Final = "fib_policy_host_out"
"""At the uplink, for the host's own traffic."""
PROGRAMS: Final = (*SLOTS.values(), *TAILS, HOST_IN, HOST_OUT)
TABLES: Final = "fib_policy_maps"
WORKS_MAP: Final = "pol_works"
"""What programs leave to each other: pinned, for those of two versions go on to each other while they are replaced."""
MAPS: Final = {
    **pipeline.MAPS,
    **abi.MAPS,
    TAILS_MAP: f"{abi.FAMILY}/{TAILS_MAP}",
    WORKS_MAP: f"{abi.FAMILY}/{WORKS_MAP}",
}


def tables() -> loader.ProgramSpec:
    """The maps alone: they can be filled before any packet is asked about."""
    return loader.ProgramSpec(
        source=Path("policy/maps.c"), service=SERVICE, functions={TABLES: "xdp"}, maps=dict(abi.MAPS)
    )


def tables_complete(instance: Instance) -> bool:
    """Whether all maps are pinned."""
    return all((instance.pin_dir / path).exists() for path in abi.MAPS.values())


async def install_tables(instance: Instance) -> None:
    """Make the maps, adopting what there are. Raises what loader.load raises."""
    await loader.load([tables()], instance.pin_dir)


def programs() -> loader.ProgramSpec:
    """The slots."""
    return loader.ProgramSpec(
        source=Path("policy/policy.c"),
        service=SERVICE,
        functions=dict.fromkeys(PROGRAMS, "sched_cls"),
        maps=MAPS,
        slots={
            # Where programs go on to is there before anything comes by.
            TAILS_MAP: dict(enumerate(TAILS)),
            pipeline.SLOTS_MAP: {int(slot): name for slot, name in SLOTS.items()},
        },
    )


def program_path(instance: Instance, name: str) -> Path:
    """Where a program is pinned."""
    return instance.pin_dir / "prog" / SERVICE / name


def programs_complete(instance: Instance) -> bool:
    """Whether the slots are filled and the programs pinned."""
    if not all(program_path(instance, name).exists() for name in PROGRAMS):
        return False
    return set(map(int, SLOTS)) <= set(progs.slots(instance.pin_dir / pipeline.MAPS[pipeline.SLOTS_MAP]))


def asked(instance: Instance) -> bool:
    """Whether packets are asked about, by programs of whatever version."""
    try:
        return int(pipeline.Slot.POLICY_INGRESS) in progs.slots(instance.pin_dir / pipeline.MAPS[pipeline.SLOTS_MAP])
    except errors.FailedPrecondition:
        return False


async def install_programs(instance: Instance) -> None:
    """Load the programs anew, adopting what maps there are. Raises what loader.load raises."""
    await loader.load([programs()], instance.pin_dir)
