"""A lease that is kept alive, and replaced when it is lost all the same."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from services.common.errors import FibrilError, InvalidArgument
from services.common.etcd.client import EtcdClient

log = logging.getLogger(__name__)


class LeaseKeeper:
    """Holds one lease for as long as `run` runs.

    A lease is renewed every third of its time. One that ended (etcd out of reach for longer, or its data
    gone) took its keys along: another is granted, and `on_grant` must write the keys anew under it. It is
    called for every lease, the first included, and again with the same one when it raised a FibrilError.
    """

    def __init__(self, client: EtcdClient, ttl_s: int, on_grant: Callable[[int], Awaitable[None]]) -> None:
        """ttl_s: seconds, at least 2. Raises InvalidArgument below."""
        if ttl_s < 2:
            raise InvalidArgument(
                f"a lease of {ttl_s} s cannot be kept alive", field="ttl", fix="use 2 s or more"
            )
        self._client = client
        self._ttl_s = ttl_s
        self._on_grant = on_grant
        self._lease = 0
        self._told = False
        self._ends = 0.0

    @property
    def lease(self) -> int:
        """The lease's id; 0 when there is none that `on_grant` has dealt with."""
        return self._lease if self._told else 0

    @property
    def valid(self) -> bool:
        """Whether etcd must still have the lease, by our own clock: counted from before the last renewal was
        asked for, so never too long.
        """
        return self._told and time.monotonic() < self._ends

    async def run(self) -> None:
        """Until cancelled. The lease is left to end by itself then; `revoke` ends it at once."""
        retry_s = min(1.0, self._ttl_s / 10)
        while True:
            try:
                await self._step()
                pause = self._ttl_s / 3
            except FibrilError as error:
                log.warning("cannot keep a lease", extra={"lease": f"{self._lease:x}", "error": str(error)})
                pause = retry_s
            await asyncio.sleep(pause)

    async def revoke(self) -> None:
        """End the lease and with it its keys. Raises Unavailable; the lease ends by itself then."""
        lease, self._lease, self._told = self._lease, 0, False
        if lease:
            await self._client.revoke(lease)

    async def _step(self) -> None:
        asked = time.monotonic()
        if self._lease:
            left_s = await self._client.renew(self._lease)
            if left_s:
                self._ends = asked + left_s
            else:
                log.warning("a lease was lost, its keys with it", extra={"lease": f"{self._lease:x}"})
                self._lease, self._told = 0, False
        if not self._lease:
            asked = time.monotonic()
            self._lease = await self._client.grant(self._ttl_s)
            self._ends = asked + self._ttl_s
        if not self._told:
            await self._on_grant(self._lease)
            self._told = True
