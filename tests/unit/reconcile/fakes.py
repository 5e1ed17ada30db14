"""A world of objects whose operations fail on demand, and a clock that stands still."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from services.common.errors import Unavailable
from services.common.reconcile import Reconciler


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class World:
    """Reality: a dict, and what was done to it.

    fail_next[key]: how many of the next operations on it fail; `late` ones fail after they had their effect.
    """

    def __init__(self) -> None:
        self.objects: dict[str, int] = {}
        self.fail_next: Counter[str] = Counter()
        self.late: set[str] = set()
        self.fail_reads = 0
        self.calls: list[tuple[str, str]] = []
        self.reads = 0

    async def actual(self) -> Mapping[str, Any]:
        self.reads += 1
        if self.fail_reads:
            self.fail_reads -= 1
            raise Unavailable("the world cannot be read")
        return dict(self.objects)

    async def update(self, key: str, desired: int) -> None:
        self.calls.append(("update", key))
        failing = self._failing(key)
        if not failing or key in self.late:
            self.objects[key] = desired
        if failing:
            raise Unavailable(f"{key} resists")

    async def delete(self, key: str) -> None:
        self.calls.append(("delete", key))
        failing = self._failing(key)
        if not failing or key in self.late:
            self.objects.pop(key, None)
        if failing:
            raise OSError(f"{key} resists")

    async def same(self, desired: int, actual: Any) -> bool:
        return bool(desired == actual)

    def _failing(self, key: str) -> bool:
        if not self.fail_next[key]:
            return False
        self.fail_next[key] -= 1
        return True


class Setup:
    """A reconciler over a world, what is wanted, and whether that is complete."""

    def __init__(self, resync_s: float = 60.0, backoff: tuple[float, float] = (1.0, 8.0)) -> None:
        self.world = World()
        self.clock = Clock()
        self.wanted: dict[str, int] = {}
        self.synced = True
        self.resync_s = resync_s
        self.backoff = backoff
        self.restart()

    def restart(self) -> None:
        """A new process: everything but the world and what is wanted is forgotten."""
        self.reconciler: Reconciler[str, int] = Reconciler(
            "things",
            lambda: self.wanted,
            self.world,
            lambda: self.synced,
            self.resync_s,
            self.backoff,
            clock=self.clock,
            jitter=lambda: 1.0,
        )

    def want(self, key: str, value: int) -> None:
        self.wanted[key] = value
        self.reconciler.wake(key)

    def drop(self, key: str) -> None:
        self.wanted.pop(key, None)
        self.reconciler.wake(key)
