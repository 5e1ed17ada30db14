"""Keeps the kernel's tables as services are declared: what has changed at once, everything from time to time.

    Services (etcd) ─┐
    health ──────────┼─▶ mark ─▶ plan ─▶ Program ─▶ kernel
    locality ────────┘

Nothing is taken away before all services are known, so a restarted process, or one without etcd, changes nothing that
works. Work is done in steps of a few milliseconds on the event loop: most of it is stores into memory.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from services.common import errors
from services.common.instance import Instance
from services.common.keeping import keeping
from services.common.pipeline.abi import IPAddress
from services.common.service import ComponentStatus
from services.common.telemetry import metrics
from services.lb import abi
from services.lb.kernel.flows import Flows, Limits
from services.lb.kernel.program import Held, Name, Program, RemovedBackend
from services.lb.kernel.tables import FRONT_MAX, Tables
from services.lb.locality import Locality
from services.lb.model import BackendKey, Backends, Spec
from services.lb.plan import Defaults, FamilyPlan, Verdict, plan

log = logging.getLogger(__name__)

STEP_S: Final = 0.008
MANY: Final = 256
"""Services to be done at which tables are made as large as all need."""
RESYNC_S: Final = 60.0
REST_S: Final = 5.0


class Services(Protocol):
    """What is declared (services.lb.services)."""

    @property
    def specs(self) -> Mapping[str, Spec]: ...

    @property
    def backends(self) -> Mapping[str, Backends]: ...

    @property
    def unread(self) -> frozenset[str]: ...

    @property
    def synced(self) -> asyncio.Event: ...

    def on_change(self, callback: Callable[[str, frozenset[BackendKey] | None], None]) -> None: ...


@dataclass(frozen=True)
class ServiceState:
    """A service as this node serves it."""

    programmed: bool
    problem: str = ""
    inside: int = 0
    """Backends that clients in the cluster get."""
    outside: int = 0
    connections: int = 0


@dataclass(frozen=True)
class Usage:
    """A table of the kernel: entries used, held as it is, and at most."""

    name: str
    used: int
    size: int
    limit: int


@dataclass(frozen=True)
class Exhaustion:
    """A backend towards which ports ran out, and for how many connections."""

    address: IPAddress
    port: int
    proto: int
    times: int


class Plane:
    """Used from one event loop. Before `use_maps` it only collects what is to be done."""

    def __init__(
        self,
        instance: Instance,
        services: Services,
        verdict: Verdict,
        here: Callable[[], Locality],
        defaults: Defaults | None = None,
        limits: Limits | None = None,
        cluster: str = "",
    ) -> None:
        """here: asked at each plan. cluster: its name, from which the common hash is seeded."""
        self._instance, self._services = instance, services
        self._verdict, self._here = verdict, here
        self._defaults, self._limits = defaults or Defaults(), limits or Limits()
        self._cluster = cluster
        self.tables: Tables | None = None
        self.program: Program | None = None
        self.flows: Flows | None = None
        self._plans: dict[str, dict[int, FamilyPlan]] = {}
        self._problems: dict[str, str] = {}
        # In a dict the first one is looked for behind all that have been taken out.
        self._dirty: OrderedDict[str, None] = OrderedDict()
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._pruned = False
        self._addresses: frozenset[IPAddress] = frozenset()
        self._settings: dict[str, Any] = {}
        self._removed: list[RemovedBackend] = []
        self._on_removed: list[Callable[[list[RemovedBackend]], None]] = []
        self._on_planned: list[Callable[[str], None]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._growth: asyncio.Task[None] | None = None
        self.mended = 0
        """Services and elements that somebody else had changed."""

    # ---- life -----------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Begin to follow."""
        self._services.on_change(self.mark)
        for name in self._services.specs:
            self._dirty[name] = None
        self._tasks = [
            asyncio.create_task(self._run(), name="lb.tables"),
            asyncio.create_task(self._resync(), name="lb.tables.resync"),
            asyncio.create_task(self._when_synced(), name="lb.tables.synced"),
        ]
        meter = metrics()
        meter.sum(
            "fibril.lb.events",
            lambda: [(count, {"event": name}) for name, count in self.counters().items()],
            description="connections of services, by what became of them",
        )
        meter.gauge(
            "fibril.lb.table.used",
            lambda: [(usage.used, {"table": usage.name}) for usage in self.usage()],
            description="entries of the kernel's tables",
        )

    async def stop(self) -> None:
        """Everything in the kernel stays."""
        tasks = [*self._tasks, *([self._growth] if self._growth else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks, self._growth = [], None
        if self.tables is not None:
            self.tables.close()
            self.tables = self.program = self.flows = None

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Tasks that run until `stop`; the end of one is a failure."""
        return tuple(self._tasks)

    async def use_maps(self) -> None:
        """Use the pinned maps: at the start, and again after they were made anew. NotFound, ResourceExhausted."""
        if self._growth is not None:
            self._growth.cancel()
            await asyncio.gather(self._growth, return_exceptions=True)
        if self.tables is not None:
            self.tables.close()
        self.tables = Tables(self._instance)
        self.flows = Flows(self.tables, self._cluster, self._limits)
        self.program = Program(self.tables, self._removed.append)
        self._pruned = False
        for name, value in self._settings.items():
            setattr(self.tables.config, name, value)
        if self._addresses:
            self.program.set_addresses(self._addresses)
        self._growth = asyncio.create_task(self.flows.run(), name="lb.flows")
        self.mark_all()

    # ---- what others say ------------------------------------------------------------------------------------
    def on_removed(self, callback: Callable[[list[RemovedBackend]], None]) -> None:
        """Tell of backends that are no more, once the kernel has forgotten them."""
        self._on_removed.append(callback)

    def on_planned(self, callback: Callable[[str], None]) -> None:
        """Tell of services that have been put into the kernel as they are now, or are gone."""
        self._on_planned.append(callback)

    def mark(self, name: str, keys: frozenset[BackendKey] | None = None) -> None:
        """A service, or some of its backends, are other than before."""
        self._dirty[name] = None
        self._idle.clear()
        self._news.set()

    def mark_all(self) -> None:
        """Where this node is, or something else that concerns all services, has changed."""
        for name in (*self._services.specs, *self._plans):
            self._dirty[name] = None
        self._idle.clear()
        self._news.set()

    def set_addresses(self, addresses: frozenset[IPAddress]) -> None:
        """This node's own, where its node ports are; not empty. Until they are told, those of before stay."""
        self._addresses = addresses
        if self.program is not None:
            self.program.set_addresses(addresses)

    def configure(self, **fields: Any) -> None:
        """Set fields of lb_config that are not this object's own (host_netns, flags, snat_*, uplink_*)."""
        self._settings.update(fields)
        if self.tables is not None:
            for name, value in fields.items():
                setattr(self.tables.config, name, value)

    def set_next_hop(self, ident: int, ifindex: int, mac: bytes, mtu: int) -> None:
        """Where packets to a backend go next."""
        if self.program is not None:
            self.program.set_next_hop(ident, ifindex, mac, mtu)

    def clear_next_hop(self, ident: int) -> None:
        """Programs must find the way by themselves."""
        self.set_next_hop(ident, 0, bytes(6), 0)

    # ---- what others ask ------------------------------------------------------------------------------------
    @property
    def plans(self) -> Mapping[str, Mapping[int, FamilyPlan]]:
        """What is in the kernel, by service and family."""
        return self._plans

    @property
    def problems(self) -> Mapping[str, str]:
        """Why services are not, or not as they should be."""
        return self._problems

    def held(self, name: str, family: int) -> Held | None:
        """The kernel's part of a service."""
        return self.program.held.get((name, family)) if self.program is not None else None

    def name_of(self, index: int) -> str:
        """The service whose line that is, "" if nobody's."""
        if self.program is not None:
            for (name, _), held in self.program.held.items():
                if held.index == index:
                    return name
        return ""

    def service_state(self, name: str) -> ServiceState:
        """A service as it is here."""
        problem = self._problems.get(name, "")
        plans = self._plans.get(name)
        if plans is None or self.program is None or self.tables is None:
            return ServiceState(False, problem or "not in the kernel yet")
        connections = 0
        for family in plans:
            held = self.program.held.get((name, family))
            if held is not None:
                connections += self.tables.services.at(held.index, abi.Service).connections
        return ServiceState(
            not problem and name not in self._dirty,
            problem,
            sum(len(set(each.inside.slots)) for each in plans.values()),
            sum(len(set(each.outside.slots)) for each in plans.values()),
            connections,
        )

    def effective_state(self, name: str, key: BackendKey) -> abi.BackendState | None:
        """A backend's state here; None: not in the kernel."""
        each = self._plans.get(name, {}).get(key.address.version)
        return each.states.get(key) if each is not None else None

    def quarantined(self, name: str, key: BackendKey) -> bool:
        """Whether the kernel has a backend so, as an earlier process may have left it."""
        if self.program is None:
            return False
        return self.program.state_of((name, key.address.version), key) is abi.BackendState.QUARANTINED

    def local_backends(self, name: str) -> int:
        """Active backends of a service on this node."""
        return sum(
            each.states[key] is abi.BackendState.ACTIVE
            for each in self._plans.get(name, {}).values()
            for key in each.local
        )

    def counters(self) -> dict[str, int]:
        """lb_stats by name."""
        if self.tables is None:
            return {}
        return {stat.name.lower(): self.tables.stat(stat) for stat in abi.Stat}

    def usage(self) -> list[Usage]:
        """Tables by name."""
        tables, program, flows = self.tables, self.program, self.flows
        if tables is None or program is None or flows is None:
            return []
        services, backends = program.used
        ways = abi.FLOWS_A_LINE
        return [
            Usage("backends", backends, tables.backends.size - 1, tables.backends.limit - 1),
            Usage("flows", flows.flows, flows.lines.size * ways, flows.lines.limit * ways),
            Usage("frontends", len(tables.fronts.held), tables.fronts.size, FRONT_MAX),
            Usage("nats", flows.nats, flows.nats_size, self._limits.nats),
            Usage("ranges", len(tables.ranges.held), *[tables.ranges.table.info.max_entries] * 2),
            Usage("services", services, tables.services.size - 1, tables.services.limit - 1),
            Usage("slots", program.room.used, *(n * abi.SLOTS_A_LINE for n in (tables.slots.size, tables.slots.limit))),
            Usage("sources", len(tables.sources.held), *[tables.sources.table.info.max_entries] * 2),
        ]  # fmt: skip

    def exhausted(self) -> list[Exhaustion]:
        """Backends towards which ports ran out."""
        found = []
        for key, value in self.tables.exhausted.items() if self.tables is not None else ():
            address = key.addr.ip()
            if address is not None:
                found.append(
                    Exhaustion(
                        address, int.from_bytes(key.port.to_bytes(2, "little"), "big"), key.proto, value.times
                    )
                )
        return found

    def status(self) -> list[ComponentStatus]:
        if self.program is None:
            return [ComponentStatus("tables", "degraded", "waiting for the kernel's maps")]
        if self._problems:
            name, problem = next(iter(sorted(self._problems.items())))
            more = f", and {len(self._problems) - 1} more services" if len(self._problems) > 1 else ""
            return [ComponentStatus("tables", "degraded", f"{name}: {problem}{more}")]
        if self.flows is not None and self.flows.problem:
            text = f"tables of connections cannot grow: {self.flows.problem}; it is tried again"
            return [ComponentStatus("tables", "degraded", text)]
        waiting = f", {len(self._dirty)} being changed" if self._dirty else ""
        return [ComponentStatus("tables", "ok", f"{len(self._plans)} services{waiting}")]

    async def settled(self) -> None:
        """Wait until all that is to be done now is done."""
        await self._idle.wait()

    # ---- the work -------------------------------------------------------------------------------------------
    async def _run(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            if self.program is None:
                continue
            if len(self._dirty) > MANY:
                self._expect()
                with keeping():
                    await self._work_off()
            else:
                await self._work_off()
            self._prune()
            self._idle.set()

    async def _work_off(self) -> None:
        until = time.monotonic() + STEP_S
        while self._dirty:
            name, _ = self._dirty.popitem(last=False)
            self._do(name)
            if time.monotonic() >= until:
                self._tell_removed()
                await asyncio.sleep(0)
                until = time.monotonic() + STEP_S
        self._tell_removed()

    def _expect(self) -> None:
        """Much is about to be written."""
        assert self.program is not None
        specs, backends = self._services.specs, self._services.backends
        fronts = [spec.frontends for spec in specs.values()]
        families = sum(len({front.address.version for front in each}) for each in fronts)
        self.program.expect(families, sum(map(len, backends.values())), sum(map(len, fronts)))

    def _do(self, name: str) -> None:
        assert self.program is not None
        spec = self._services.specs.get(name)
        plans: dict[int, FamilyPlan] = {}
        failed: dict[int, Exception] = {}
        if spec is not None:
            backends = self._services.backends.get(name, {})
            plans = plan(spec, backends, self._verdict, self._here(), self._defaults)
        for family in (4, 6):
            # What there is no room for in one family is no reason to leave the other as it was.
            try:
                if spec is not None and family in plans:
                    # A service with source ranges of the other family only admits nobody of this one.
                    sources = tuple(p for p in spec.sources if p.version == family)
                    self.program.apply((name, family), plans[family], sources)
                elif spec is not None or self._services.synced.is_set():
                    self.program.remove((name, family))
            except (errors.FibrilError, OSError) as error:
                failed[family] = error
        if failed:
            problem = str(next(iter(failed.values())))
            if self._problems.get(name) != problem:
                log.error(
                    "a service is not in the kernel as it should be",
                    extra={"service": name, "error": problem},
                )
            self._problems[name] = problem
            # The other family's frontends are there all the same.
            before = self._plans.get(name, {})
            now = before | {family: each for family, each in plans.items() if family not in failed}
            if now != before:
                self._plans[name] = now
                self._tell_planned(name)
            return
        self._problems.pop(name, None)
        if spec is not None:
            self._plans[name] = plans
        elif self._services.synced.is_set():
            self._plans.pop(name, None)
        self._tell_planned(name)

    def _tell_planned(self, name: str) -> None:
        for callback in self._on_planned:
            callback(name)

    def _tell_removed(self) -> None:
        if self._removed:
            gone, self._removed[:] = list(self._removed), []
            for callback in self._on_removed:
                callback(gone)

    def _prune(self) -> None:
        if self._pruned or not self._services.synced.is_set() or self.program is None or self._dirty:
            return
        if not self._addresses:
            return
        self._pruned = True
        count = self.program.prune(self._services.unread)
        self.mended += self.program.hints.sweep()
        self._tell_removed()
        if count:
            log.info("services that are no longer declared were removed", extra={"services": count})

    async def _when_synced(self) -> None:
        await self._services.synced.wait()
        self.mark_all()
        await asyncio.Event().wait()

    async def _resync(self) -> None:
        """What fails is tried again; what somebody else has changed is mended."""
        due = time.monotonic() + RESYNC_S
        while True:
            await asyncio.sleep(REST_S)
            if self._growth is not None and self._growth.done() and not self._growth.cancelled():
                self._growth.result()  # a mistake: it ends with the process, or not at all
            if self.program is None:
                continue
            self.program.rest()
            for name in tuple(self._problems):
                self.mark(name)
            if time.monotonic() >= due:
                try:
                    await self.compare()
                except (errors.FibrilError, OSError) as error:
                    log.warning("tables of the kernel cannot be compared", extra={"cause": str(error)})
                due = time.monotonic() + RESYNC_S

    async def compare(self) -> int:
        """Look at all there is in the kernel; how much was not as it should be, and now is."""
        program, tables = self.program, self.tables
        if program is None or tables is None or not self._pruned:
            return 0
        found = sum(known.compare() for known in (tables.fronts, tables.ranges, tables.sources))
        found += program.hints.sweep()
        until = time.monotonic() + STEP_S
        for name, held in list(program.held.items()):
            if program.held.get(name) is held and program.damaged(name, held):
                program.mend(name, held)
                found += 1
            if time.monotonic() >= until:
                await asyncio.sleep(0)
                until = time.monotonic() + STEP_S
                if self.program is not program:
                    return found
        if found:
            log.warning("tables of the kernel had been changed by somebody else", extra={"places": found})
        self.mended += found
        return found


__all__ = ["Exhaustion", "Held", "Name", "Plane", "RemovedBackend", "ServiceState", "Services", "Usage"]
