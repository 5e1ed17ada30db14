"""The prefilter as the lb process has it.

    part = PrefilterPart(instance, lambda: [hook.device for hook in xdp.attached()])
    part.on_active(lambda active: xdp.need("prefilter", active))
    await part.start()
    part.protect(addresses)      # this node's and its etcd's; again whenever they change

What is declared is in force as long as XDP programs hang on devices, whatever becomes of this process: only expiry waits
for it. Nothing is made in the kernel before something is declared.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Concatenate, Final, ParamSpec, TypeVar

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import features
from services.common.pipeline.abi import IPAddress
from services.common.service import ComponentStatus
from services.common.telemetry import metrics
from services.lb.prefilter import abi, install, peers
from services.lb.prefilter.state import State

log = logging.getLogger(__name__)

RETRY_S: Final = 10.0
SOURCES: Final = 65536
_BUNCH_S: Final = 0.5
P = ParamSpec("P")
T = TypeVar("T")


class PrefilterPart:
    """Used from one event loop; what takes long is done in a thread of its own."""

    def __init__(
        self, instance: Instance, devices: Callable[[], Sequence[str]], sources: int = SOURCES
    ) -> None:
        """devices: where the XDP program hangs now. sources: whose rates are kept at the same time."""
        self._instance = instance
        self._devices = devices
        self._sources = sources
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefilter")
        self._state: State | None = None
        self._problem = "not started yet"
        self._behind = ""
        self._protected: frozenset[IPAddress] = frozenset()
        self._wake = asyncio.Event()
        self._told: bool | None = None
        self._callbacks: list[Callable[[bool], None]] = []
        self._tasks: list[asyncio.Task[None]] = []

    # -- life

    async def start(self) -> None:
        """Adopt what there is. What was declared and cannot be read stays in force, is named in status and tried again."""
        gauge = metrics().gauge
        gauge("fibril.prefilter.prefixes", self._entries, description="prefixes of a set")
        metrics().sum(
            "fibril.prefilter.packets", self._packets, description="packets the prefilter decided about"
        )
        await self._install()
        self._tasks = [asyncio.create_task(self._keep(), name="prefilter.keep")]

    async def stop(self) -> None:
        """What is in the kernel stays."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._state is not None:
            await self._run(self._state.close)
        self._thread.shutdown()

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Tasks that run until `stop`; the end of one is a failure."""
        return tuple(self._tasks)

    def on_active(self, callback: Callable[[bool], None]) -> None:
        """Tell whether there is anything to be enforced: as soon as it is known, and whenever it changes."""
        self._callbacks.append(callback)

    def protect(self, addresses: Iterable[IPAddress]) -> None:
        """The cluster's own addresses, which are always allowed: this node's and its etcd's. Other nodes are known."""
        wanted = frozenset(addresses)
        if wanted != self._protected:
            self._protected = wanted
            self._wake.set()

    @property
    def active(self) -> bool:
        """Whether anything is declared."""
        return self._state is not None and self._state.declared

    # -- for the API

    @property
    def state(self) -> State:
        """Unavailable before `start`, and while what was declared cannot be read."""
        if self._state is None:
            raise errors.Unavailable(f"the prefilter: {self._problem}", fix="see: fibril status")
        return self._state

    async def change(self, call: Callable[Concatenate[State, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run one of State's methods, after those that came before."""
        state = self.state
        if not state.ready:
            await self._install(wanted=True)
        try:
            return await self._run(call, state, *args, **kwargs)
        finally:
            self._tell()
            self._wake.set()

    async def read(self, call: Callable[[State], T]) -> T:
        """What `call` makes of the state; not while it is being changed."""
        return await self._run(call, self.state)

    @property
    def devices(self) -> Sequence[str]:
        return self._devices() if self.active else ()

    @property
    def problem(self) -> str:
        """Why what is declared is not in force; empty if it is."""
        if self._problem:
            return self._problem
        if self.active and not self._devices():
            return "no XDP program is attached; see lb.xdp and `fibril status`"
        return ""

    def status(self) -> list[ComponentStatus]:
        if self.problem:
            return [ComponentStatus("prefilter", "degraded", self.problem)]
        if self._behind:
            text = f"what has expired, or whom the cluster allows, is not as it should be: {self._behind}; it is tried again"
            return [ComponentStatus("prefilter", "degraded", text)]
        if not self.active:
            return [ComponentStatus("prefilter", "ok", "nothing declared")]
        prefixes = sum(map(len, self.state.own.values()))
        return [ComponentStatus("prefilter", "ok", f"{prefixes} prefixes, {len(self.state.limits)} limits")]

    # -- work

    async def _run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        # A change that has begun is ended, whoever has gone meanwhile.
        return await asyncio.shield(loop.run_in_executor(self._thread, lambda: call(*args, **kwargs)))

    def _protect(self) -> None:
        state = self.state
        # What was protected by an earlier process stays until it is known who is to be.
        if self._protected and (state.declared or not len(state.cluster)):
            try:
                others = peers.addresses(self._instance)
            except (errors.FibrilError, OSError) as error:
                # Who is protected stays so: other nodes may come under what is denied.
                log.warning("other nodes' addresses cannot be read", extra={"cause": str(error)})
                state.protect(self._protected, keep=True)
                return
            state.protect(self._protected | others)

    async def _install(self, wanted: bool = False) -> None:
        """Have the maps, if there is anything for them. wanted: also if there is nothing yet."""
        try:
            if self._state is None:
                self._state = await self._run(State, self._instance, self._sources)
            state = self._state
            if wanted or state.declared or install.complete(self._instance):
                features.ensure_bpffs(self._instance.bpffs)
                await install.install(self._instance)
                await self._run(state.use_maps)
            problem = ""
        except (errors.FibrilError, OSError) as error:
            problem = str(error)
            if problem != self._problem:
                log.warning("no prefilter", extra={"cause": problem})
        self._problem = problem
        if not problem:
            self._tell()

    def _tell(self) -> None:
        if self.active is not self._told:
            self._told = self.active
            for callback in self._callbacks:
                callback(self.active)

    async def _keep(self) -> None:
        """Removes what has expired, follows the cluster's addresses, tries again what failed."""
        while True:
            self._wake.clear()
            wait = RETRY_S
            try:
                if self._problem:
                    await self._install()
                if self._state is not None:
                    await self._run(self._state.mend)
                    await self._run(self._protect)
                    next_expiry = await self._run(self._state.expire)
                    if next_expiry:
                        wait = min(wait, max(_BUNCH_S, next_expiry - time.time()))
                    self._tell()
                self._behind = ""
            except (errors.FibrilError, OSError) as error:
                if str(error) != self._behind:
                    log.warning("the prefilter is behind", extra={"cause": str(error)})
                self._behind = str(error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()
                # Changes come in bunches.
                await asyncio.sleep(_BUNCH_S)

    # -- metrics

    def _entries(self) -> list[tuple[int, dict[str, str]]]:
        if self._state is None:
            return []
        return [(len(each), {"set": name}) for name, each in self._state.own.items()]

    def _packets(self) -> list[tuple[int, dict[str, str]]]:
        state = self._state
        if state is None or not state.ready:
            return []
        found = [
            (state.counters.count(each.ident).packets, {"set": each.name, "limit": ""})
            for each in [*state.own.values(), state.cluster]
        ]
        for limit in state.limits.values():
            dropped = state.counters.count(abi.COUNT_DROPPED + limit.ident).packets
            found.append((dropped, {"set": "", "limit": str(limit.prefix)}))
        return found
