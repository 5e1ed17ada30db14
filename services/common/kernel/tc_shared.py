"""Programs on interfaces that are not ours alone: an uplink, that other instances and other software may filter at, too.

A filter of a clsact qdisc, with a priority that says whose it is; tcx where an `ingress` qdisc is in the way. What others have
there is left alone. Functions want the interface in the calling thread's network namespace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from services.common import errors
from services.common.kernel import attach, tc_classic
from services.common.kernel.tc_classic import Direction

# The kernel keeps so much of a program's name.
_NAME_MAX: Final = 15


@dataclass(frozen=True)
class Filter:
    """A program's place. name: the program's, in full; priority: of the filter, smaller ones run first."""

    direction: Direction
    name: str
    priority: int


def ensure(ifindex: int, place: Filter, fd: int, ident: int) -> bool:
    """Have the program (its descriptor and id) there, in place of an older one; whether it had to be put there.

    NotFound if the interface is gone; FailedPrecondition if an `ingress` qdisc is where clsact would go and the kernel has
    no tcx, which can do without.
    """
    if tc_classic.attached(ifindex, place.direction, place.priority) == [ident]:
        return False
    taken = tc_classic.taken_by(ifindex)
    if not taken:
        tc_classic.attach(ifindex, {place.direction: fd}, place.priority)
        return True
    # Looked at first: to try and fail would be news, by which this is tried again.
    if any(entry.prog_id == ident for entry in attach.attached(ifindex, place.direction)):
        return False
    if not attach.has_tcx():
        raise errors.FailedPrecondition(
            f"has a qdisc of kind {taken} where clsact would go",
            fix="replace it by clsact, which takes the same filters",
        )
    attach.attach_tc(ifindex, place.direction, fd, via="tcx")
    return True


def detach(ifindex: int, place: Filter) -> bool:
    """Take the program off, and a clsact qdisc that nobody uses any more; whether it was there. NotFound: as `ensure`."""
    if tc_classic.detach(ifindex, place.direction, place.priority):
        tc_classic.remove_unused(ifindex)
        return True
    return attach.detach_tc(ifindex, place.direction, place.name[:_NAME_MAX])
