"""A service's part of the data path as its process sees it: there, missing with a reason, or being installed.

A restarted process uses what is pinned if it was made from the same sources, and compiles nothing.
Everything it lacks is named, and tried again for as long as the process lives: the rest of the service works
without a data path too.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import features, loader
from services.common.service import ComponentStatus

log = logging.getLogger(__name__)

RETRY_S: Final = 10.0


@dataclass(frozen=True)
class Parts:
    """What a service loads.

    load: compile, load and pin everything anew. complete: whether all pins are there and slots filled; blocks.
    """

    service: str
    load: Callable[[Instance], Awaitable[None]]
    complete: Callable[[Instance], bool]


class Datapath:
    """`use` is called whenever pinned programs are ready to be used (again), `lost` with the reason if they
    are not.
    """

    def __init__(
        self,
        instance: Instance,
        parts: Parts,
        use: Callable[[], Awaitable[None]],
        lost: Callable[[errors.FibrilError], None],
    ) -> None:
        self._instance = instance
        self._parts = parts
        self._use = use
        self._lost = lost
        self._stamp = instance.run_dir / f"{parts.service}.programs"
        self._problem: errors.FibrilError | None = errors.Unavailable("not installed yet")
        self._optional: list[features.Feature] = []

    @property
    def problem(self) -> errors.FibrilError | None:
        """Why there is no data path; None if there is one."""
        return self._problem

    async def install(self) -> bool:
        """Bring it up unless it is; whether it is. Never raises for what the host lacks."""
        try:
            features.ensure_bpffs(self._instance.bpffs)
            probed = features.probe(self._instance.bpffs)
            self._optional = [
                feature for feature in probed.features if not feature.ok and not feature.required
            ]
            probed.require()
            await self._load()
            await self._use()
        except errors.FibrilError as error:
            if self._problem is None or str(error) != str(self._problem):
                log.error("no data path", extra={"cause": str(error)})
            self._problem = error
            self._lost(error)
            return False
        self._problem = None
        return True

    async def keep_trying(self, installed: Callable[[], None]) -> None:
        """Until it is there. `installed` is called if that was not so from the start."""
        while self._problem is not None:
            await asyncio.sleep(RETRY_S)
            if await self.install():
                log.info("data path installed")
                installed()

    async def _load(self) -> None:
        """Compile and load unless what is pinned was made from the very same sources."""
        stamp = await asyncio.to_thread(_digest)
        try:
            present = self._stamp.read_text() == stamp and self._parts.complete(self._instance)
        except OSError:
            present = False
        if present:
            log.info("programs of an earlier process are used")
            return
        self._stamp.unlink(missing_ok=True)
        await self._parts.load(self._instance)
        try:
            self._stamp.write_text(stamp)
        except OSError as error:
            # Whoever comes next loads them again: no reason to go without those there are.
            log.warning("cannot be noted what was loaded", extra={"path": self._stamp, "cause": str(error)})

    def status(self) -> list[ComponentStatus]:
        """One component for the whole, one for each optional feature that is missing."""
        if self._problem is not None:
            return [ComponentStatus("datapath", "failed", str(self._problem))]
        return [
            self._pins(),
            *(ComponentStatus(f"kernel.{feature.name}", "ok", feature.message) for feature in self._optional),
        ]

    def _pins(self) -> ComponentStatus:
        try:
            complete = self._parts.complete(self._instance)
        except (OSError, errors.FibrilError):
            complete = False
        if complete:
            return ComponentStatus("datapath", "ok", "programs are loaded")
        return ComponentStatus(
            "datapath",
            "degraded",
            f"pins below {self._instance.pin_dir} have been removed: packets flow on, what is new cannot be "
            "connected; restart the service, which makes them anew",
        )


def _digest() -> str:
    """Of all sources the programs are made from."""
    digest = hashlib.sha256()
    root = loader.bpf_root()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".c", ".h"):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
