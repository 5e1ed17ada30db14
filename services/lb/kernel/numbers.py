"""Ids of backends: the index of a line and a generation."""

from __future__ import annotations

from typing import Final

GENERATION: Final = 20
"""Bits of an id below the generation."""
_GENERATIONS: Final = 1 << 12


def next_id(index: int, before: int) -> int:
    """The id of a line's next backend, of another generation than that of the one before (0: none). Never 0."""
    return ((before >> GENERATION) + 1) % _GENERATIONS << GENERATION | index
