"""A new pod waits for its policy: until that is in the kernel, everything it sends or should receive is dropped.

The kernel says whether policy is asked at all (the slot is filled) and for which interface it has one, so no service needs to
be asked.
"""

from __future__ import annotations

import asyncio
import ctypes as ct
import time
from typing import Final

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import progs
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi

WAIT_S: Final = 10.0
_POLL_S: Final = 0.001
_POLL_MOST_S: Final = 0.02


class PolicyGate:
    """Of one instance."""

    def __init__(self, instance: Instance) -> None:
        self._eps = instance.pin_dir / abi.POLICY_EPS
        self._slots = instance.pin_dir / abi.MAPS[abi.SLOTS_MAP]

    async def wait(self, number: int, ifindex: int) -> None:
        """Return once the endpoint has a policy, or at once on a node without any. Unavailable after WAIT_S."""
        if not self._eps.exists() or int(abi.Slot.POLICY_INGRESS) not in progs.slots(self._slots):
            return
        until, pause = time.monotonic() + WAIT_S, _POLL_S
        with BpfMap.open(self._eps, ct.c_uint32, abi.PolicyEp) as eps:
            while True:
                ep = eps.lookup(number)
                if ep is not None and ep.policy and ep.owner == ifindex:
                    return
                if time.monotonic() >= until:
                    raise errors.Unavailable(
                        f"the policy of endpoint {number} is not in the kernel after {WAIT_S:g} s",
                        fix="see fibril status: the policy service must run",
                    )
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, _POLL_MOST_S)
