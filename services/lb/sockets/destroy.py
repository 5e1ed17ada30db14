"""Ends sockets connected to backends that are no more: their processes learn it at once, not by a time-out.

lb_socks says which sockets those are and in which network namespaces, the kernel ends them there one by one by their
cookie: nothing else is hit, also not who is connected to the same address by its own name. Backends that terminate keep
what they have. Functions block and enter namespaces: one thread of their own.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
from collections import defaultdict
from collections.abc import Iterable
from typing import Final

from services.common import errors
from services.common.instance import Instance
from services.common.kernel.namespaces import Namespaces
from services.common.kernel.netns import NetNs
from services.common.kernel.sockdiag import Remote, SockDiag
from services.lb.model import TCP, UDP
from services.lb.sockets.entries import Connected, Entries, gone

log = logging.getLogger(__name__)

# Looking for sockets walks all of a protocol, whoever they are connected to: up to so many backends they are asked
# for one by one.
_ASK_FOR: Final = 8
_ENDED: Final = frozenset({0, errno.ENOENT})


class Destroyer:
    """Used by one thread."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._namespaces = Namespaces()
        self._ended: set[tuple[int, int]] = set()
        self.destroyed = 0
        """Sockets ended so far."""
        self.problem = ""
        """Why some could not be, last time; empty: none."""

    def destroy(self, backends: Iterable[int]) -> int:
        """End what is connected to backends with these ids, which must be gone; how many there were.

        A socket that is about to connect may not be there yet: ask again a moment later.
        """
        with contextlib.closing(Entries(self._instance)) as entries:
            return self._end(entries.connected(frozenset(backends)))

    def sweep(self) -> int:
        """The same for all that is connected to a backend that is gone, whoever removed it; and remove entries that
        closed sockets have left. How many of both.
        """
        with contextlib.closing(Entries(self._instance)) as entries:
            dead = gone(self._instance, entries.backends())
            stuck = entries.connected(dead) if dead else []
            # A process may keep an ended socket, and its entry stays as long.
            self._ended &= {(each.cookie, each.backend) for each in stuck}
            new = [each for each in stuck if (each.cookie, each.backend) not in self._ended]
            return self._end(new) + entries.sweep()

    def forget_closed(self) -> int:
        """Remove entries of sockets that no longer are; how many. There are none unless sockets were closed while the
        programs were not there to see it, or by the kernel itself (subflows of MPTCP).
        """
        with contextlib.closing(Entries(self._instance)) as entries:
            owners = entries.owners()
            dead: set[int] = set()
            # A namespace that is not found may be one that cannot be seen.
            for netns, space in self._namespaces.open(set(owners)):
                dead |= owners[netns] - _living(space)
            return entries.forget(dead)

    def _end(self, stuck: list[Connected]) -> int:
        self.problem = ""
        where: defaultdict[int, list[Connected]] = defaultdict(list)
        for each in stuck:
            where[each.netns].append(each)
        count = 0
        for cookie, netns in self._namespaces.open(set(where)):
            try:
                with SockDiag(netns) as diag:
                    count += self._end_here(diag, where[cookie])
            except (errors.FibrilError, OSError) as error:
                self.problem = f"{len(where[cookie])} sockets in {netns.path} are left to time out: {error}"
                log.warning("sockets were not ended", extra={"netns": netns.path, "cause": str(error)})
        self.destroyed += count
        if count:
            log.info("sockets of backends that are gone were ended", extra={"sockets": count})
        return count

    def _end_here(self, diag: SockDiag, stuck: list[Connected]) -> int:
        count = 0
        for proto in (TCP, UDP):
            mine = {each.cookie: each for each in stuck if each.proto == proto}
            if not mine:
                continue
            remotes: set[Remote] = {each.remote for each in mine.values()}
            v4 = any(address.version == 4 for address, _ in remotes)
            for family in (socket.AF_INET, socket.AF_INET6) if v4 else (socket.AF_INET6,):
                found: dict[int, bytes] = {}
                for remote in remotes if len(remotes) <= _ASK_FOR else (None,):
                    found.update(
                        (cookie, name)
                        for cookie, name in diag.connected(proto, family, remote)
                        if cookie in mine
                    )
                for cookie, answer in diag.destroy(proto, family, found).items():
                    if answer in _ENDED:
                        self._ended.add((cookie, mine[cookie].backend))
                        count += answer == 0
                    else:
                        raise OSError(
                            answer, f"socket to {mine[cookie].remote[0]}: {errno.errorcode[answer]}"
                        )
        return count


def _living(netns: NetNs) -> set[int]:
    """Cookies of a namespace's sockets."""
    with SockDiag(netns) as diag:
        return {
            cookie
            for proto in (TCP, UDP)
            for family in (socket.AF_INET, socket.AF_INET6)
            for cookie in diag.cookies(proto, family)
        }
