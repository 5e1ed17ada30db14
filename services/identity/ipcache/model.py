"""One line of the ipcache. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from services.common.kernel.netlink import IPNetwork


class Source(enum.IntEnum):
    """As in fibril.ipcache.v1.EntrySource: of several entries for one prefix the lowest counts."""

    NODE = 1
    POD = 2
    LOCAL = 3
    BLOCK = 4


@dataclass(frozen=True)
class Entry:
    """node: name, "" when it is no node's. previous_identity: what packets under way may still carry, 0: none.

    revision: etcd's at its last change; 0 for local declarations.
    """

    prefix: IPNetwork
    identity: int
    node: str
    source: Source
    pod: str = ""
    previous_identity: int = 0
    revision: int = 0
