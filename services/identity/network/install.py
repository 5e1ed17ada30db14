"""What the identity service loads into an instance's pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.common.kernel import loader
from services.common.pipeline import abi

if TYPE_CHECKING:
    from services.common.instance import Instance

SERVICE: Final = "identity"
REMOTE: Final = "fib_remote"
FROM_OVERLAY: Final = "fib_from_overlay"
FROM_UPLINK: Final = "fib_from_uplink"
FROM_HOST: Final = "fib_from_host"
SLOTS: Final = {abi.Slot.REMOTE: REMOTE, abi.Slot.FROM_OVERLAY: "fib_overlay_in"}
PROGRAMS: Final = (FROM_OVERLAY, FROM_UPLINK, FROM_HOST, *SLOTS.values())


def spec() -> loader.ProgramSpec:
    """Programs, maps and slots."""
    return loader.ProgramSpec(
        source=Path("identity/identity.c"),
        service=SERVICE,
        functions=dict.fromkeys(PROGRAMS, "sched_cls"),
        maps=dict(abi.MAPS),
        slots={abi.SLOTS_MAP: {int(slot): name for slot, name in SLOTS.items()}},
    )


def program_path(instance: Instance, name: str) -> Path:
    """Where a program is pinned."""
    return instance.pin_dir / "prog" / SERVICE / name


async def install(instance: Instance) -> None:
    """Load everything anew, adopting what maps there are; idempotent. Raises what loader.load raises."""
    await loader.load([spec()], instance.pin_dir)
