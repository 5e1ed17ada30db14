"""What the lb service loads: three units, so that each hook's programs can be loaded and tested alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.common.kernel import loader
from services.common.pipeline import abi as pipeline
from services.lb import abi

if TYPE_CHECKING:
    from services.common.instance import Instance

SERVICE: Final = "lb"
LB: Final = "fib_lb"
UPLINK: Final = "fib_lb_uplink"
SLOTS: Final = {pipeline.Slot.LB: LB}
MAPS: Final = {**pipeline.MAPS, **abi.MAPS}


def packets() -> loader.ProgramSpec:
    """tc: the slot LB, and the entry of packets from outside."""
    return loader.ProgramSpec(
        source=Path("lb/lb.c"),
        service=SERVICE,
        functions=dict.fromkeys((LB, UPLINK), "sched_cls"),
        maps=MAPS,
        slots={pipeline.SLOTS_MAP: {int(slot): name for slot, name in SLOTS.items()}},
    )


def program_path(instance: Instance, name: str) -> Path:
    """Where a program is pinned."""
    return instance.pin_dir / "prog" / SERVICE / name
