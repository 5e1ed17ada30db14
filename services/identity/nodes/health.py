"""Which nodes answer: each node probes a few others (ring.py) and tells etcd what has changed.

    /fibril/v1/<cluster>/health/<node>/<prober>   fibril.node.v1.StoredReachability, under the prober's lease

Two questions are asked of a node, in each address family both have: one to its address on the underlay, one to a gateway
address of its, which goes the way pods' packets go. MISSES silent rounds make it unreachable, one answer makes it
reachable. The cost of a node is constant: PEERS nodes, one round each INTERVAL_S, a write only when something changes.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from fibril.node.v1 import node_pb2 as pb
from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.etcd.watch import Delete, Put, Snapshot, watch_prefix
from services.common.kernel.netlink import IPAddress
from services.common.telemetry import Counter, Histogram, metrics
from services.identity.lease import NodeLease
from services.identity.nodes.directory import Directory, root_of
from services.identity.nodes.model import Node, NodeState
from services.identity.nodes.probe import Prober
from services.identity.nodes.ring import successors

log = logging.getLogger(__name__)

PEERS: Final = 4
INTERVAL_S: Final = 5.0
TIMEOUT_S: Final = 2.0
MISSES: Final = 3
RETRY_S: Final = 1.0


@dataclass(frozen=True)
class View:
    """What one prober knows of one node. since: Unix time of the last change; rtt_us 0: no answer, or not ours to know."""

    underlay: bool
    pod_network: bool
    since: float
    rtt_us: int = 0


@dataclass
class _Path:
    """One of the two questions to one node."""

    up: bool = True
    misses: int = 0

    def heard(self, answered: bool) -> None:
        self.misses = 0 if answered else self.misses + 1
        if answered or self.misses >= MISSES:
            self.up = answered


@dataclass
class _Peer:
    underlay: _Path
    pod_network: _Path
    view: View | None = None


class Health:
    """Used from one event loop."""

    def __init__(
        self, etcd: EtcdClient, cluster: str, own: str, port: int, lease: NodeLease, directory: Directory,
        interval_s: float = INTERVAL_S,
    ) -> None:  # fmt: skip
        """interval_s: seconds between two rounds."""
        self._etcd = etcd
        self._own = own
        self._prefix = root_of(cluster) + "health/"
        self._lease = lease
        self._directory = directory
        self._interval_s = interval_s
        self._prober = Prober(port)
        self._peers: dict[str, _Peer] = {}
        self._told: dict[str, dict[str, View]] = {}
        self._unwritten: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._write = asyncio.Event()
        self._probes, self._rtt = Counter(), Histogram()

    # -- life

    async def start(self) -> None:
        """Answer probes, and begin to probe when the nodes are known."""
        metrics().gauge(
            "fibril.node.reachable", self._gauge, description="1: a probed node answers on both ways"
        )
        await self._prober.open()
        self._lease.on_grant(self._write_all)
        for name, coro in (("probe", self._run()), ("health", self._follow()), ("report", self._report())):
            self._tasks.append(asyncio.create_task(coro, name=f"nodes.{name}"))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._prober.close()

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Endless; one that ends is a failure."""
        return tuple(self._tasks)

    @property
    def problem(self) -> str:
        """One sentence; empty when probes can be answered and every probed node answers that is alive: one that is
        not is no fault of this node's.
        """
        silent = sorted(
            name
            for name, peer in self._peers.items()
            if peer.view and not _well(peer.view) and self._is_alive(name)
        )
        if self._prober.problem or not silent:
            return self._prober.problem
        return f"no answer from {', '.join(silent[:5])}{' and others' if len(silent) > 5 else ''}; see: fibril node ls"

    def of(self, name: str) -> Mapping[str, View]:
        """What is known of a node, by prober; our own view is the newest."""
        views = dict(self._told.get(name, {}))
        peer = self._peers.get(name)
        if peer is not None and peer.view is not None:
            views[self._own] = peer.view
        return views

    def _is_alive(self, name: str) -> bool:
        node = self._directory.get(name)
        return node is not None and node.state is NodeState.ALIVE

    # -- probing

    async def _run(self) -> None:
        await self._directory.synced.wait()
        while True:
            await self._prober.open()
            chosen = successors(self._own, self._directory.nodes(), PEERS)
            # Also what an earlier process has told under the same lease.
            told = {name for name, views in self._told.items() if self._own in views}
            for gone in (self._peers.keys() | told) - set(chosen):
                self._peers.pop(gone, None)
                self._changed(gone)
            # Spread over the interval, so that not all nodes ask at once.
            await asyncio.gather(
                *(self._probe(name, random.uniform(0, self._interval_s / 2)) for name in chosen),
                asyncio.sleep(self._interval_s),
            )

    async def _probe(self, name: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        node, own = self._directory.get(name), self._directory.local
        if node is None or own is None:
            return
        direct = [address for family in (4, 6) if own.address(family) and (address := node.address(family))]
        inner = _gateways(own, node)
        limit_s = min(TIMEOUT_S, self._interval_s / 2)
        times = await asyncio.gather(
            *(self._prober.ask(address, node.probe_port, limit_s) for address in (*direct, *inner))
        )
        self._heard(name, times[: len(direct)], times[len(direct) :])

    def _heard(self, name: str, direct: list[float | None], inner: list[float | None]) -> None:
        peer = self._peers.setdefault(name, _Peer(_Path(), _Path()))
        for path, times in (("underlay", direct), ("pod_network", inner)):
            for seconds in times:
                self._probes.add(path=path, result="lost" if seconds is None else "answered")
                if seconds is not None:
                    self._rtt.record(seconds, path=path)
        peer.underlay.heard(bool(direct) and None not in direct)
        # A node without addresses for pods yet has no other way to be asked.
        peer.pod_network.heard(None not in inner if inner else bool(direct) and None not in direct)
        before = peer.view
        answers = [seconds for seconds in direct if seconds is not None]
        now = View(
            peer.underlay.up,
            peer.pod_network.up,
            before.since if before is not None and _same(before, peer) else time.time(),
            max(1, round(min(answers) * 1e6)) if answers else 0,
        )
        peer.view = now
        if before is None or not _same(before, peer):
            if not _well(now):
                log.warning("a node does not answer", extra={
                    "node": name, "underlay": now.underlay, "pod_network": now.pod_network})  # fmt: skip
            elif before is not None:
                log.info("a node answers again", extra={"node": name})
            self._changed(name)

    def _changed(self, name: str) -> None:
        self._unwritten.add(name)
        self._write.set()

    # -- telling and hearing

    async def _report(self) -> None:
        """Write what has changed, as soon as etcd takes it."""
        while True:
            await self._write.wait()
            self._write.clear()
            lease = self._lease.lease
            while lease and self._unwritten:  # without one: `_write_all` goes on
                # Before it is written: it may change meanwhile.
                name = self._unwritten.pop()
                try:
                    await self._write_one(name, lease)
                except errors.FibrilError as error:
                    self._unwritten.add(name)
                    self._write.set()
                    if isinstance(error, errors.NotFound):
                        self._lease.suspect()
                    await asyncio.sleep(RETRY_S)
                    break

    async def _write_one(self, name: str, lease: int) -> None:
        key = f"{self._prefix}{name}/{self._own}"
        peer = self._peers.get(name)
        if peer is None or peer.view is None:
            await self._etcd.delete(key)
            return
        view = peer.view
        stored = pb.StoredReachability(
            underlay=view.underlay, pod_network=view.pod_network, since_unix_seconds=view.since
        )
        await self._etcd.put(key, stored.SerializeToString(), lease=lease)

    async def _write_all(self, lease: int) -> None:
        for name in self._peers:
            self._changed(name)
        self._write.set()

    async def _follow(self) -> None:
        async with aclosing(watch_prefix(self._etcd, self._prefix)) as events:
            async for event in events:
                match event:
                    case Snapshot(kvs):
                        for kv in kvs:
                            self._told_of(kv.key, kv.value)
                    case Put(key, value):
                        self._told_of(key, value)
                    case Delete(key):
                        self._told_of(key, None)

    def _told_of(self, key: str, value: bytes | None) -> None:
        name, _, prober = key.removeprefix(self._prefix).rpartition("/")
        views = self._told.setdefault(name, {})
        views.pop(prober, None)
        if value is not None:
            try:
                stored = pb.StoredReachability.FromString(value)
                views[prober] = View(stored.underlay, stored.pod_network, stored.since_unix_seconds)
            except DecodeError as error:
                log.warning("a key of nodes' health is not usable", extra={"key": key, "error": str(error)})
        if not views:
            del self._told[name]

    def _gauge(self) -> Iterable[tuple[float, dict[str, str]]]:
        return [
            (float(_well(peer.view)), {"node": name})
            for name, peer in list(self._peers.items())
            if peer.view is not None
        ]


def _well(view: View) -> bool:
    return view.underlay and view.pod_network


def _same(view: View, peer: _Peer) -> bool:
    return (view.underlay, view.pod_network) == (peer.underlay.up, peer.pod_network.up)


def _gateways(own: Node, node: Node) -> list[IPAddress]:
    """One gateway of each family that both have addresses of for pods."""
    families = {gateway.version for gateway in own.gateways}
    chosen: dict[int, IPAddress] = {}
    for gateway in sorted(node.gateways, key=str):
        if gateway.version in families:
            chosen.setdefault(gateway.version, gateway)
    return list(chosen.values())
