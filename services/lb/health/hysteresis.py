"""How many answers it takes to change a mind. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Hysteresis:
    """Well until it has failed `unhealthy_after` times in a row, then unwell until it has succeeded `healthy_after`
    times in a row. A backend that nobody has asked yet counts as well: it was declared as serving.
    """

    unhealthy_after: int
    healthy_after: int
    well: bool = True
    _streak: int = 0
    """Answers in a row that speak against what is believed."""

    def heard(self, success: bool) -> bool:
        """Take an answer in; whether the verdict has changed by it."""
        if success == self.well:
            self._streak = 0
            return False
        self._streak += 1
        if self._streak < (self.healthy_after if success else self.unhealthy_after):
            return False
        self.well, self._streak = success, 0
        return True
