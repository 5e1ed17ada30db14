"""Take the programs off a node's control groups with every service dead."""

from __future__ import annotations

import asyncio

from services.common.instance import Instance
from services.lb.sockets import hooks


async def remove(instance: Instance) -> list[str]:
    """Before the instance's pins go: by them its programs are told from another's. What there was. Again is harmless.

    Connections made through services go on.
    """
    return [f"programs on cgroup {path}" for path in await asyncio.to_thread(hooks.remove, instance)]
