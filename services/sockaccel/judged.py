"""Under which identities pairs have been judged, and whether something changed that they have not been judged under.

Policies ask for identities, and none of them has to be written when one changes: then every pair goes back to TCP once. What
counts is the identity that programs know (ep_addr), which may change a while after the endpoint does, or with this service
dead. So it is remembered in the run directory, which lives as long as the kernel's side. That there is none says that a
process ended between two changes of the tables.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path


class Judged:
    """For one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, int] | None = None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._known = {str(pod): int(identity) for pod, identity in json.loads(path.read_text()).items()}

    def is_under(self, identities: Mapping[str, int]) -> bool:
        """Whether pairs have been judged under all there is now. identities: by address."""
        return self._known == identities

    def begin(self) -> None:
        """Before anything changes."""
        self._known = None
        self._path.unlink(missing_ok=True)

    def done(self, identities: Mapping[str, int]) -> None:
        """All are judged with their next send. identities: what they were before that was said."""
        self._known = dict(identities)
        # Without it the next process has them judged once more.
        with contextlib.suppress(OSError):
            fresh = self._path.with_name(self._path.name + "~")
            fresh.write_text(json.dumps(self._known))
            os.replace(fresh, self._path)
