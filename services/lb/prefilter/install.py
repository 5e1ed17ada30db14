"""The prefilter's maps: made before anything is declared, filled before a program uses them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from services.common.kernel import loader
from services.lb.prefilter import abi

if TYPE_CHECKING:
    from services.common.instance import Instance


def spec() -> loader.ProgramSpec:
    """All maps, no program."""
    return loader.ProgramSpec(source=Path("lb/prefilter.c"), service="lb", functions={}, maps=abi.MAPS)


def complete(instance: Instance) -> bool:
    """Whether all maps are pinned."""
    return all((instance.pin_dir / path).exists() for path in abi.MAPS.values())


async def install(instance: Instance) -> None:
    """Make what maps there are not. Raises what loader.load raises."""
    if not complete(instance):
        await loader.load([spec()], instance.pin_dir)
