"""Install the ipam service's programs into an instance's pipeline, and take them out.

Pinned maps are adopted, programs are replaced one by one and atomically: packets keep flowing through the old
or the new one. Programs attached to pods' interfaces stay as they are until they are attached anew.
Slots of other services are left alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.common.kernel import loader, progs
from services.common.pipeline import abi

if TYPE_CHECKING:
    from services.common.instance import Instance

SERVICE: Final = "ipam"
FROM_POD: Final = "fib_from_pod"
TO_POD: Final = "fib_to_pod"
SLOTS: Final = {
    abi.Slot.FORWARD: "fib_forward", abi.Slot.DELIVER: "fib_deliver", abi.Slot.NEIGHBOUR: "fib_neighbour",
}
PROGRAMS: Final = (FROM_POD, TO_POD, *SLOTS.values())
MAPS: Final = {name: path for name, path in abi.MAPS.items() if not path.startswith(abi.NODE_FAMILY)}


def spec() -> loader.ProgramSpec:
    """What the ipam service loads."""
    return loader.ProgramSpec(
        source=Path("ipam/ipam.c"), service=SERVICE, functions=dict.fromkeys(PROGRAMS, "sched_cls"),
        maps=MAPS, slots={abi.SLOTS_MAP: {int(slot): name for slot, name in SLOTS.items()}})


def program_path(instance: Instance, name: str) -> Path:
    """Where the program of that name (FROM_POD, TO_POD, …) is pinned."""
    return instance.pin_dir / "prog" / SERVICE / name


def map_path(instance: Instance, name: str) -> Path:
    """Where a map of the pipeline is pinned. KeyError for another name."""
    return instance.pin_dir / abi.MAPS[name]


async def install(instance: Instance) -> None:
    """Load everything anew, adopting what maps there are; idempotent.

    Raises what loader.load raises: FailedPrecondition for a pinned map of another shape or a program the
    kernel refuses, PermissionDenied, DeadlineExceeded. A failure changes nothing.
    """
    await loader.load([spec()], instance.pin_dir)


async def uninstall(instance: Instance) -> None:
    """Empty our slots, remove our pins, and the maps unless another service's programs use them. Idempotent.

    Programs attached to interfaces live on with the interface: remove those first.
    """
    await asyncio.to_thread(_uninstall, instance)


def _uninstall(instance: Instance) -> None:
    array = map_path(instance, abi.SLOTS_MAP)
    others = False
    if array.exists():
        for slot in SLOTS:
            progs.clear_slot(array, int(slot))
        others = bool(progs.slots(array))
    # "~": what a loader that was killed half-way leaves behind.
    paths = [program_path(instance, name + end) for name in PROGRAMS for end in ("", "~")]
    if not others:
        paths += [map_path(instance, name) for name in MAPS]
    for path in paths:
        path.unlink(missing_ok=True)
    for path in paths:
        _remove_empty(path.parent, instance.pin_dir)


def _remove_empty(directory: Path, top: Path) -> None:
    """Remove `directory` and those above it, up to and including `top`, as far as they are empty."""
    with contextlib.suppress(OSError):
        while directory.is_relative_to(top):
            os.rmdir(directory)
            directory = directory.parent
