"""Remove what socket acceleration leaves in the kernel outside the instance's own pins, with the service dead."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from services.common import errors
from services.common.instance import Instance
from services.sockaccel import hooks
from services.sockaccel.tables import Tables, Wanted

DRAIN_S: Final = 0.5
"""What has been handed over and not read yet is lost with the tables: readers get so long."""


async def remove(instance: Instance) -> list[str]:
    """Before the instance's pins go. What there was; again is harmless. Whatever of the pins is left is enough."""
    found = 0
    with contextlib.suppress(errors.FibrilError), Tables(instance) as tables:
        tables.write(Wanted())
        found = len(tables.all_pairs())
    groups = hooks.detach_all(instance)
    if found:
        await asyncio.sleep(DRAIN_S)
    return [f"socket acceleration on {group}" for group in groups]
