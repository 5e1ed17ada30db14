"""Which addresses are this node's: its own, and those of its pods, as the kernel has them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from services.common.errors import FibrilError, NotFound
from services.common.instance import Instance
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi
from services.common.pipeline.abi import IPAddress

log = logging.getLogger(__name__)

LOOK_S: Final = 2.0


class LocalAddresses:
    """`changed` gets the addresses that have come or gone. Without an ipam service there are no pods."""

    def __init__(self, instance: Instance, changed: Callable[[frozenset[IPAddress]], None]) -> None:
        self._path = instance.pin_dir / abi.MAPS["ep_addr"]
        self._changed = changed
        self.host: frozenset[IPAddress] = frozenset()
        self._pods: frozenset[IPAddress] = frozenset()
        self.all: frozenset[IPAddress] = frozenset()
        """Both."""
        self._problem = ""

    def look(self) -> None:
        """Read the pods anew."""
        try:
            with BpfMap.open(self._path, abi.FibAddr, abi.Endpoint) as table:
                pods = frozenset(address for key, _ in table.items() if (address := key.ip()) is not None)
        except NotFound:
            pods = frozenset()
        except (FibrilError, OSError) as error:
            # Those of before stay: without them, whoever serves locally would serve nobody.
            if str(error) != self._problem:
                self._problem = str(error)
                log.warning("the node's pods cannot be read", extra={"cause": self._problem})
            return
        self._problem = ""
        changed, self._pods = pods ^ self._pods, pods
        self._tell(changed)

    def set_host(self, addresses: frozenset[IPAddress]) -> None:
        """The node's own are others."""
        changed, self.host = addresses ^ self.host, addresses
        self._tell(changed)

    def _tell(self, changed: frozenset[IPAddress]) -> None:
        if changed:
            self.all = self.host | self._pods
            self._changed(changed)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)
