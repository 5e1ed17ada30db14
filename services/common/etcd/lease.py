"""A lease that is kept alive, and replaced when it is lost all the same."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable

from services.common.errors import FibrilError, InvalidArgument, NotFound
from services.common.etcd.client import EtcdClient

log = logging.getLogger(__name__)

OnGrant = Callable[[int], Awaitable[None]]
_BACKOFF_S = (0.1, 5.0)


class LeaseKeeper:
    """Holds one lease for as long as `run` runs.

    A lease is renewed every third of its time. One that ended (etcd out of reach for longer, or its data gone) took
    its keys along: another is granted, and everyone who has keys under it writes them anew, in a callback. The same
    where etcd has been put back to an earlier state (restored from a snapshot), which may have the lease and lack keys.
    """

    def __init__(
        self,
        client: EtcdClient,
        ttl_s: int,
        *,
        lease: int = 0,
        remember: Callable[[int], None] | None = None,
    ) -> None:
        """ttl_s: seconds, at least 2; InvalidArgument below. lease: go on with this one, if it has not ended.

        remember: told the id of each lease granted, before anything is attached to it.
        """
        if ttl_s < 2:
            raise InvalidArgument(
                f"a lease of {ttl_s} s cannot be kept alive", field="ttl", fix="use 2 s or more"
            )
        self._client = client
        self._ttl_s = ttl_s
        self._lease = lease
        self._remember = remember
        self._ends = 0.0
        self._error = ""
        self._users: list[_User] = []
        self._news = asyncio.Event()
        self._check = asyncio.Event()
        self._outdated = False
        self._group: asyncio.TaskGroup | None = None

    def on_grant(self, callback: OnGrant) -> None:
        """Have `callback(lease)` called for every lease, the one at the start included, and again with the same one
        after a while when it raised a FibrilError. Callbacks run beside each other and beside the renewals.
        """
        user = _User(callback)
        self._users.append(user)
        if self._group is not None:
            self._group.create_task(self._tell(user))

    @property
    def lease(self) -> int:
        """The lease's id; 0 while there is none."""
        return self._lease if self._ends else 0

    @property
    def valid(self) -> bool:
        """Whether etcd must still have the lease, by our own clock: counted from before the last renewal was
        asked for, so never too long.
        """
        return self._lease != 0 and _now() < self._ends

    @property
    def problem(self) -> str:
        """One sentence; empty while the lease is kept and all that hangs on it is written."""
        return self._error or next((user.error for user in self._users if user.error), "")

    def suspect(self) -> None:
        """Ask etcd at once whether it still has the lease: for whoever was told that it has not."""
        self._check.set()

    def replace(self) -> None:
        """Go on with another lease, under which everyone writes anew what shall be there: for whoever has seen that etcd has
        been put back to an earlier state. What that has under the old lease and nobody writes ends with it.
        """
        self._outdated = True
        self._check.set()

    async def run(self) -> None:
        """Until cancelled. The lease is left to end by itself then; `revoke` ends it at once."""
        async with asyncio.TaskGroup() as self._group:
            for user in self._users:
                self._group.create_task(self._tell(user))
            await self._keep()

    async def revoke(self) -> None:
        """End the lease and with it its keys, after `run`. Raises Unavailable; the lease ends by itself then."""
        lease, self._lease, self._ends = self._lease, 0, 0.0
        if lease:
            await self._client.revoke(lease)

    async def _keep(self) -> None:
        retry_s = min(1.0, self._ttl_s / 10)
        while True:
            self._check.clear()
            try:
                await self._step()
                pause, self._error = self._ttl_s / 3, ""
            except FibrilError as error:
                if not self._error:
                    log.warning(
                        "cannot keep the lease", extra={"lease": f"{self._lease:x}", "error": str(error)}
                    )
                pause, self._error = retry_s, f"the lease of this node cannot be renewed: {error}"
            try:
                async with asyncio.timeout(pause):
                    await self._check.wait()
            except TimeoutError:
                continue

    async def _step(self) -> None:
        asked = _now()
        # Then the lease may be there and some of its keys not, and nobody follows all of them.
        outdated, self._outdated = await self._client.put_back() or self._outdated, False
        if self._lease and not outdated:
            left_s = await self._client.renew(self._lease)
            if left_s:
                first, self._ends = not self._ends, asked + left_s
                if first:
                    self._announce()
                return
            log.warning("a lease has ended, its keys with it", extra={"lease": f"{self._lease:x}"})
            self._lease, self._ends = 0, 0.0
            asked = _now()
        try:
            lease = await self._client.grant(self._ttl_s)
        except FibrilError:
            self._outdated |= outdated
            raise
        if self._remember is not None:
            self._remember(lease)
        self._lease, self._ends = lease, asked + self._ttl_s
        self._announce()

    def _announce(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _tell(self, user: _User) -> None:
        pause = _BACKOFF_S[0]
        while True:
            news, lease = self._news, self.lease
            if lease in (0, user.told):
                await news.wait()
                continue
            try:
                await user.callback(lease)
                user.told, user.error, pause = lease, "", _BACKOFF_S[0]
            except FibrilError as error:
                if isinstance(error, NotFound):
                    self.suspect()
                if user.error != str(error):
                    log.warning("cannot write what hangs on the lease", extra={"error": str(error)})
                user.error = str(error)
                await asyncio.sleep(pause * random.uniform(0.5, 1))
                pause = min(pause * 2, _BACKOFF_S[1])


class _User:
    """A callback, and the lease it has dealt with."""

    def __init__(self, callback: OnGrant) -> None:
        self.callback = callback
        self.told = 0
        self.error = ""


def _now() -> float:
    # Goes on while the machine sleeps, as etcd's clock does.
    return time.clock_gettime(time.CLOCK_BOOTTIME)
