"""Ends connections whose reader cannot go on: its process splices, and what was handed to it before cannot be spliced.

The programs tell of one when it happens (SA_EVENT_STUCK). A process that falls back to recv() is free again; one that does not
would wait for ever, and one that has taken bytes in the wrong order must not go on. Both ends of such a connection are
ended, as `ss -K` does: an error that everybody sees, once in the life of a process, since nothing is handed to it any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable
from typing import Final

from services.common import errors
from services.common.kernel.namespaces import Namespaces
from services.common.kernel.sockdiag import SockDiag
from services.sockaccel import abi
from services.sockaccel.tables import Tables

log = logging.getLogger(__name__)

GRACE_S: Final = 2.0
"""So long it may stay stuck."""
MISSED_S: Final = 10.0
"""Reports may be lost, and what is tried may fail: all pairs are looked at so often."""
_LOOK_S: Final = 0.1
_TCP: Final = 6


class Releaser:
    """Used from one event loop."""

    def __init__(self, tables: Callable[[], Tables]) -> None:
        """tables: raises Unavailable while there are none."""
        self._tables = tables
        self._namespaces = Namespaces()
        self._due: dict[int, float] = {}
        self._told = asyncio.Event()

    def stuck(self, pair: abi.Pair) -> None:
        """One of its ends is."""
        overtaken = any(end.stuck == abi.Stuck.OVERTAKEN for end in pair.ends)
        self._due[pair.ends[0].cookie] = time.monotonic() + (0.0 if overtaken else GRACE_S)
        self._told.set()

    async def run(self) -> None:
        """Until cancelled."""
        look_all = time.monotonic() + MISSED_S
        while True:
            if not self._due:
                self._told.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, look_all - time.monotonic())):
                        await self._told.wait()
            await asyncio.sleep(_LOOK_S)
            now = time.monotonic()
            # Without tables there is nobody to end.
            with contextlib.suppress(errors.FibrilError):
                if now >= look_all:
                    look_all = now + MISSED_S
                    for pair in await asyncio.to_thread(self._tables().all_pairs):
                        if _is_stuck(pair) and pair.ends[0].cookie not in self._due:
                            self.stuck(pair)
                for cookie in [cookie for cookie, at in self._due.items() if at <= now]:
                    del self._due[cookie]
                    found = self._tables().pairs.lookup(cookie)
                    if found is not None and _is_stuck(found):
                        await self._end(found)

    async def _end(self, pair: abi.Pair) -> None:
        about = {"pair": pair.ends[0].cookie}
        try:
            await asyncio.to_thread(end, self._namespaces, pair)
        except (errors.FibrilError, OSError) as error:
            log.warning("a connection that cannot go on is not ended yet", extra={**about, "cause": str(error)})
        else:
            log.warning("a connection was ended whose process splices and could not go on", extra=about)


def _is_stuck(pair: abi.Pair) -> bool:
    # One that is closed waits for nothing; the other may have something of it to read yet.
    return any(end.sock and end.stuck in (abi.Stuck.STUCK, abi.Stuck.OVERTAKEN) for end in pair.ends)


def end(namespaces: Namespaces, pair: abi.Pair) -> None:
    """End both ends of a connection: whoever uses it next gets ECONNABORTED or ECONNRESET. Blocks."""
    cookies = {int(each.cookie) for each in pair.ends}
    for _, space in namespaces.open({int(each.netns) for each in pair.ends}):
        with SockDiag(space) as diag:
            for family in (socket.AF_INET, socket.AF_INET6):
                diag.destroy(_TCP, family, {at: what for at, what in diag.connected(_TCP, family) if at in cookies})
