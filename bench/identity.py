"""Identities: new ones a second from one node and from eight, against bare etcd transactions; lookups through the service.

Nodes are allocators with clients and databases of their own, all in this process. A new identity is three keys under three
conditions, recorded in the node's database and seen by every node; the baseline is two keys under two conditions, through
the same clients and at the same concurrency, which nobody looks at.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import count
from pathlib import Path

from bench.common import Bench, interleave_async, log, median, paired, quick
from fibril.identity.v1 import identity_pb2, identity_pb2_grpc
from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from services.common.rpc.client import channel
from services.common.rpc.server import RpcConfig, RpcServer
from services.common.telemetry import TelemetryConfig, setup
from services.identity.db import open_db
from services.identity.identities.allocator import Allocator
from services.identity.identities.api import IdentityApi
from services.identity.identities.config import IdentitiesConfig
from services.identity.lease import NodeLease

NODES = 8
AT_ONCE = 16
"""Requests under way on each node."""
SECONDS = quick(1.0, 3.0)
ROUNDS = quick(3, 7)
CALLS = quick(1_000, 5_000)

_serial = count()


class Node:
    """What a node needs to give identities."""

    def __init__(self, etcd: EmbeddedEtcd, root: Path, name: str) -> None:
        self.etcd = EtcdClient([etcd.endpoint])
        self._db: sqlite3.Connection = open_db(root / f"{name}.db")
        cfg = IdentitiesConfig()
        self._lease = NodeLease(self.etcd, self._db, cfg.lease_s)
        self.allocator = Allocator(self.etcd, "bench", 1, name, self._lease, self._db, cfg)
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.allocator.start()
        self._keeping = asyncio.create_task(self._lease.run())
        await self.allocator.allocate({"app": "first"}, "first")

    async def stop(self) -> None:
        await self.allocator.stop()
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await self.etcd.close()
        self._db.close()

    async def identity(self) -> None:
        """A new one."""
        number = next(_serial)
        labels = {
            "app": f"shop-{number}",
            "tier": "front",
            "io.kubernetes.pod.namespace": "shop",
            "pod-template-hash": f"{number:x}",
        }
        await self.allocator.allocate(labels, f"endpoint/{number:064x}/eth0")

    async def two_keys(self) -> None:
        """What an identity is in etcd at the least."""
        number = next(_serial)
        value = bytes(80)
        await self.etcd.create({f"/bench/id/{number}": value, f"/bench/labels/{number:064x}": value})


async def rate(does: list[Callable[[], Awaitable[None]]]) -> float:
    """How often a second these are done together, over and over."""
    began = time.perf_counter()
    done = 0

    async def work(do: Callable[[], Awaitable[None]]) -> None:
        nonlocal done
        while time.perf_counter() - began < SECONDS:
            await do()
            done += 1

    await asyncio.gather(*(work(do) for do in does))
    return done / (time.perf_counter() - began)


@contextlib.asynccontextmanager
async def nodes(number: int) -> AsyncIterator[list[Node]]:
    """That many nodes, and an etcd."""
    with tempfile.TemporaryDirectory(prefix="fibril-bench-") as scratch:
        root = Path(scratch)
        etcd = EmbeddedEtcd(root / "etcd", root / "etcd-run")
        await etcd.start()
        made = [Node(etcd, root, f"node-{index}") for index in range(number)]
        try:
            for node in made:
                await node.start()
            yield made
        finally:
            for node in made:
                await node.stop()
            await etcd.stop()


async def create(bench: Bench, number: int) -> None:
    """New identities a second from that many nodes at once."""
    async with nodes(number) as made:
        workers = [node for node in made for _ in range(AT_ONCE)]
        rates = await interleave_async(
            {
                "identities": lambda: rate([node.identity for node in workers]),
                "transactions": lambda: rate([node.two_keys for node in workers]),
            },
            ROUNDS,
        )
        for ours, theirs in zip(rates["identities"], rates["transactions"], strict=True):
            log(f"{number} nodes: {ours:.0f} identities a second, {theirs:.0f} two-key transactions a second")
        value, baseline = paired(rates["identities"], rates["transactions"])
        bench.emit(f"identity_create_{number}", "1/s", value, "two-key transactions", baseline)


async def resolve(bench: Bench) -> None:
    """Lookups a second of what is known, one after the other, through the service's socket."""
    async with nodes(1) as (node,):
        with tempfile.TemporaryDirectory(prefix="fibril-bench-") as scratch:
            socket = Path(scratch) / "identity.sock"
            server = RpcServer(socket, RpcConfig(), setup("bench", TelemetryConfig()))
            server.add(identity_pb2_grpc.add_IdentityServiceServicer_to_server, IdentityApi(node.allocator))
            await server.start()
            try:
                bench.emit("identity_resolve", "1/s", median(await _lookups(node, socket)), "target", 1_500)
            finally:
                await server.drain(0)


async def _lookups(node: Node, socket: Path) -> list[float]:
    labels = [{"app": f"shop-{number}", "tier": "front"} for number in range(100)]
    for number, each in enumerate(labels):
        await node.allocator.allocate(each, f"holder/{number}")
    rates = []
    async with channel(f"unix:{socket}") as to_identity:
        stub = identity_pb2_grpc.IdentityServiceStub(to_identity)
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for call in range(CALLS):
                request = identity_pb2.ResolveIdentityRequest(labels=labels[call % len(labels)])
                await stub.ResolveIdentity(request, timeout=5)
            rates.append(CALLS / (time.perf_counter() - began))
            log(f"{rates[-1]:.0f} lookups a second")
    return rates


async def run(bench: Bench) -> None:
    """All figures."""
    await create(bench, 1)
    await create(bench, NODES)
    await resolve(bench)


def main() -> None:
    """Print them."""
    with Bench("identity") as bench:
        asyncio.run(run(bench))


if __name__ == "__main__":
    main()
