"""Whether clients outside reach anything on this node: only then programs hang on its uplinks."""

from __future__ import annotations

from collections.abc import Callable


class Outside:
    """Nobody is told "no" before all services have been looked at: an earlier process has left the programs, and they serve."""

    def __init__(self, tell: Callable[[bool], None]) -> None:
        self._tell = tell
        self._names: set[str] = set()
        self._complete = False

    def planned(self, name: str, reached: bool) -> None:
        """A service is in the kernel as it is now, or is gone."""
        if reached:
            self._names.add(name)
        else:
            self._names.discard(name)
        if self._names or self._complete:
            self._tell(bool(self._names))

    def complete(self) -> None:
        """All there are have been planned once."""
        self._complete = True
        self._tell(bool(self._names))
