"""Who probes whom: the nodes stand on a ring in the order of their names' hashes, and each probes the next few.

So each is probed by as many as it probes, and a node that joins or leaves changes no more than that many pairs on either
side (consistent hashing: Karger et al., 1997). Pure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def position(name: str) -> bytes:
    """Where a node stands."""
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def successors(own: str, names: Iterable[str], count: int) -> list[str]:
    """The `count` nodes behind `own`, which need not be among `names`; all others if there are fewer."""
    others = sorted((position(name), name) for name in set(names) - {own})
    start = (position(own), own)
    after = [name for place in others if place > start for name in (place[1],)]
    before = [name for place in others if place < start for name in (place[1],)]
    return (after + before)[:count]
