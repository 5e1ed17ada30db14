"""Remove what socket acceleration leaves in the kernel outside the instance's own pins, with the service dead."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final

from services.common import errors
from services.common.instance import Instance
from services.common.kernel.namespaces import Namespaces
from services.sockaccel import hooks, release
from services.sockaccel.tables import Tables, Wanted

DRAIN_S: Final = 5.0
"""What has been handed over and not read yet is lost with the tables: readers get so long."""
_SETTLE_S: Final = 0.1
"""A send() that is at it hands over still."""


async def remove(instance: Instance) -> list[str]:
    """Before the instance's pins go. What there was; again is harmless. Whatever of the pins is left is enough.

    Connections that would lose something all the same are ended: who reads gets an error instead of a stream with a hole in it;
    where the other end has closed, which the kernel then tells him first, that is missing before the end.
    """
    ended = 0
    with contextlib.ExitStack() as stack:
        tables = None
        with contextlib.suppress(errors.FibrilError):
            tables = stack.enter_context(Tables(instance))
            tables.write(Wanted())
        groups = hooks.detach_all(instance)
        if tables is not None:
            ended = await asyncio.to_thread(_drain, instance, tables)
    told = [f"socket acceleration on {group}" for group in groups]
    return [*told, f"{ended} connections with something unread"] if ended else told


def _drain(instance: Instance, tables: Tables) -> int:
    """How many connections had to be ended. Blocks."""
    pairs = {int(pair.ends[0].cookie): pair for pair in tables.all_pairs()}
    if not pairs:
        return 0
    time.sleep(_SETTLE_S)
    until = time.monotonic() + DRAIN_S
    try:
        while (left := hooks.waits(instance, pairs)) and time.monotonic() < until:
            time.sleep(_SETTLE_S)
    except errors.NotFound:
        # Nobody can tell any more.
        time.sleep(DRAIN_S)
        return 0
    namespaces = Namespaces()
    for cookie in left:
        with contextlib.suppress(errors.FibrilError, OSError):
            release.end(namespaces, pairs[cookie])
    return len(left)
