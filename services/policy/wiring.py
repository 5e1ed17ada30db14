"""The policy service put together. The only file that knows every object.

The maps come first, then what policies say, and only then the programs that ask: a node that begins with policies cuts
nobody off whom they allow. A restarted process finds programs at work, and writes its policies beside those in force.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from fibril.flow.v1 import flow_pb2_grpc
from fibril.policy.v1 import policy_pb2_grpc
from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.instance import Instance
from services.common.kernel.beats import beat_shift
from services.common.kernel.netlink import Netlink
from services.common.pipeline.datapath import Datapath, Parts
from services.common.service import ComponentStatus, HostContext
from services.policy import abi, install
from services.policy.answers import Answers
from services.policy.api import PolicyApi
from services.policy.config import PolicyConfig
from services.policy.diff import Differ
from services.policy.enforcer import Enforcer
from services.policy.explain import Explainer
from services.policy.flows.part import FlowsPart
from services.policy.host import HostHooks
from services.policy.kernel.connections import Connections
from services.policy.kernel.tables import Tables
from services.policy.kernel.writer import Writer
from services.policy.model import HOSTNAME
from services.policy.named import NamedPorts
from services.policy.resolve.numbers import RuleNumbers
from services.policy.resolve.world import World
from services.policy.sources import Sources
from services.policy.store import Store

log = logging.getLogger(__name__)

LOOK_S: Final = 0.05


class PolicyService:
    """Policies of the cluster, enforced on one node."""

    name = "policy"

    def __init__(self, instance: Instance, cfg: PolicyConfig) -> None:
        """Connects to nothing."""
        self._instance, self._cfg = instance, cfg
        self._etcd = EtcdClient(cfg.etcd.endpoints, tls=cfg.etcd.tls(), timeout_s=cfg.etcd.timeout_s)
        self._node = cfg.etcd.node_name(instance)
        self._numbers = RuleNumbers()
        self._world = World()
        self._enforcer = Enforcer(self._world, self._numbers, {HOSTNAME: self._node})
        self._store = Store(self._etcd, cfg.etcd.cluster, self._enforcer.set_policy, self._enforcer.note)
        self._named = NamedPorts(self._etcd, cfg.etcd.cluster, self._node, self._enforcer)
        self._sources = Sources(instance, self._enforcer)
        self._sources.name_ports(self._named.of)
        self._tables: Tables | None = None
        self._adopted = False
        self._maps = Datapath(
            instance,
            Parts("policy-tables", install.install_tables, install.tables_complete),
            self._use_maps,
            self._lost,
        )
        self._programs = Datapath(
            instance,
            Parts("policy-programs", install.install_programs, install.programs_complete),
            self._use_programs,
            self._refused,
        )
        self._refusal: errors.FibrilError | None = None
        self._netlink = Netlink()
        self._host = HostHooks(instance, self._netlink, cfg.policy.devices or _devices(cfg))
        self._enforcer.contents.on_host(self._host.need)
        self._waiting = "everything"
        self._connections = Connections(lambda: self._tables, cfg.policy.connections)
        self._explainer = Explainer(self._enforcer, cfg.policy.allow_local_host)
        self._answers = Answers(instance, self._enforcer, self._explainer, self._connections, lambda: self._tables)
        self._known = asyncio.Event()
        """What numbers stand for."""
        self._flows = FlowsPart(instance, cfg.policy.flows, self._node, self, self._known, self._stat)
        self._differ = Differ(self._enforcer, self._explainer, self._answers, self._flows.allowed)

    async def start(self, ctx: HostContext) -> None:
        """Adopt what there is; what the host or etcd lacks now is tried again in the background."""
        await self._maps.install()
        await self._host.start()
        for task in self._host.tasks():
            ctx.tasks.adopt(task)
        for source in self._sources.all:
            ctx.tasks.spawn(f"policy.{source.name}", source.run())
        ctx.tasks.spawn("policy.maps.install", self._maps.keep_trying(lambda: None))
        ctx.tasks.spawn("policy.store", self._store.run())
        ctx.tasks.spawn("policy.ports", self._named.run())
        ctx.tasks.spawn("policy.ports.tidy", self._named.tidy())
        ctx.tasks.spawn("policy.enforcer", self._enforcer.run())
        ctx.tasks.spawn("policy.connections", self._connections.run())
        ctx.tasks.spawn("policy.flows", self._flows.run())
        ctx.tasks.spawn("policy.begin", self._begin())
        ctx.rpc.add(
            policy_pb2_grpc.add_PolicyServiceServicer_to_server,
            PolicyApi(
                self._store,
                self._enforcer,
                self._sources,
                self._named,
                self._answers,
                self._differ,
                self._connections,
                lambda: self._tables,
                self.asked,
            ),
        )
        ctx.rpc.add(flow_pb2_grpc.add_FlowServiceServicer_to_server, self._flows)

    async def stop(self) -> None:
        """Let what is under way end; the data path and all that is recorded stay."""
        await self._host.stop()
        await self._netlink.close()
        if self._tables is not None:
            self._tables.close()
            self._tables = None
        await self._etcd.close()

    async def _begin(self) -> None:
        """Once all sources are in step, write; once that is written, enforce."""
        while True:
            known = self._store.synced.is_set() and self._named.synced.is_set()
            self._waiting = self._missing() if known else "policies from etcd"
            self._enforcer.waiting = self._waiting and f"waiting for {self._waiting}"
            if not self._waiting and self._tables is not None:
                break
            await asyncio.sleep(LOOK_S)
        self._enforcer.set_ready()
        self._known.set()
        await self._enforcer.wait(0)
        await self._programs.install()
        await self._programs.keep_trying(lambda: None)

    def _missing(self) -> str:
        """What is still needed to begin. A policy that cannot be read is not as good as none: whom it selects would be open.
        But where nothing is asked yet, as after a boot, everybody would be as long as it is waited for.
        """
        if self._store.problem and install.asked(self._instance):
            return f"policies that can be read ({self._store.problem}; remove it, or run the version that wrote it)"
        return self._sources.waiting(self._adopted)

    async def _use_maps(self) -> None:
        self._tables = tables = Tables(self._instance, self._cfg.policy.connections)
        writer = Writer(tables)
        self._adopted = bool(writer.policies_used)
        self._sources.adopt(tables)
        self._configure(tables)
        self._enforcer.use(writer)

    async def _use_programs(self) -> None:
        # The others are reached by the pipeline's slots.
        await self._host.use()
        self._refusal = None

    def _refused(self, reason: errors.FibrilError) -> None:
        self._refusal = reason

    async def asked(self) -> None:
        """Until packets are asked about. FailedPrecondition: the programs cannot be installed."""
        while self._programs.problem is not None:
            if self._refusal is not None:
                raise errors.FailedPrecondition(
                    f"policies are in the tables, but nothing asks them: {self._refusal}", fix="see: fibril status"
                )
            await asyncio.sleep(LOOK_S)
        await self._host.settled()

    def _configure(self, tables: Tables) -> None:
        cfg, config = self._cfg.policy, tables.config
        flags = abi.ConfigFlag(0)
        if cfg.audit:
            flags |= abi.ConfigFlag.AUDIT
        if cfg.allow_local_host:
            flags |= abi.ConfigFlag.HOST
        if cfg.report:
            flags |= abi.ConfigFlag.FLOWS
        config.beat_shift, config.flags = beat_shift(), int(flags)
        config.syn_s, config.close_s = cfg.syn_s, cfg.close_s
        config.tcp_s, config.any_s = cfg.tcp_s, cfg.any_s
        config.probe_port = self._cfg.network.probe_port

    def _lost(self, reason: errors.FibrilError) -> None:
        """What is in the kernel goes on; `status` names the reason."""

    # ---- names for flows ------------------------------------------------------------------------------------
    def labels(self, identity: int) -> Mapping[str, str]:
        """Of an identity."""
        return self._explainer.labels(identity)

    def pod(self, endpoint: int) -> str:
        """Name of this node's pod with that number."""
        found = self._enforcer.endpoints.get(endpoint)
        return found.pod if found is not None and endpoint else ""

    def _stat(self, which: abi.Stat) -> int:
        return self._tables.stat(which) if self._tables is not None else 0

    def rule(self, number: int) -> tuple[str, str]:
        """Policy and rule with that number."""
        return self._explainer.rule_name(number)

    # ---- status ---------------------------------------------------------------------------------------------
    def status(self) -> Sequence[ComponentStatus]:
        away = self._etcd.error
        return [
            _part("etcd", f"{away}; policies in force stay" if away else "", "in step"),
            _part("policies", self._store.problem, f"{len(self._store.policies)} policies"),
            *self._sources.status(),
            *(replace(each, name=f"tables.{each.name}") for each in self._maps.status()),
            self._enforcing(),
            *self._host.status(),
            *self._connections.status(),
            *self._flows.status(),
        ]

    def _enforcing(self) -> ComponentStatus:
        if self._waiting:
            text = f"waiting for {self._waiting}; the kernel enforces what it has, new pods wait"
            return ComponentStatus("enforcement", "degraded", text)
        if self._programs.problem is not None:
            return ComponentStatus("enforcement", "failed", f"nothing is enforced: {self._programs.problem}")
        problems = self._enforcer.contents.problems()
        if problems:
            return ComponentStatus("enforcement", "failed", f"not in force as declared: {problems[0]}")
        audit = ", audited only" if self._cfg.policy.audit else ""
        return ComponentStatus(
            "enforcement",
            "degraded" if audit else "ok",
            f"{len(self._enforcer.endpoints) - 1} endpoints, {len(self._enforcer.contents)} different policies{audit}",
        )


def _devices(cfg: PolicyConfig) -> tuple[str, ...]:
    return (cfg.network.device,) if cfg.network.device else ()


def _part(name: str, problem: str, well: str) -> ComponentStatus:
    return ComponentStatus(name, "degraded" if problem else "ok", problem or well)
