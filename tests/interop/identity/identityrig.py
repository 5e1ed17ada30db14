"""Nodes that give identities, against a real etcd."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fibril.identity.v1 import identity_pb2 as pb
from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from services.identity import numbers
from services.identity.db import open_db
from services.identity.identities.allocator import Allocator
from services.identity.identities.config import IdentitiesConfig
from services.identity.identities.model import Identity
from services.identity.lease import NodeLease
from tests.interop.etcd.etcdrig import until

CLUSTER = "test"
ROOT = f"/fibril/v1/{CLUSTER}/"
IDS = f"{ROOT}identities/id/"
LABELS = f"{ROOT}identities/labels/"
REFS = f"{ROOT}identities/refs/"
# Long, so that no test waits for the end of a lease it did not mean to.
CFG = IdentitiesConfig(lease_s=30, quarantine_s=60)
SHORT = IdentitiesConfig(lease_s=2, quarantine_s=4)


class Node:
    """A process's worth: client, database, lease and allocator. Made again with the same directory it is the same node."""

    def __init__(
        self,
        etcd: EmbeddedEtcd,
        place: Path,
        name: str,
        cfg: IdentitiesConfig = CFG,
        *,
        cluster_id: int = 7,
        space: int = numbers.NUMBERS - 1,
        timeout_s: float = 3.0,
    ) -> None:
        self.name = name
        self.etcd = EtcdClient([etcd.endpoint], timeout_s=timeout_s)
        self._db = open_db(place / f"{name}.db")
        self.lease = NodeLease(self.etcd, self._db, cfg.lease_s, f"{CLUSTER}/{name}")
        self.allocator = Allocator(
            self.etcd, CLUSTER, cluster_id, name, self.lease, self._db, cfg, space=space
        )
        self.moved: list[tuple[str, Identity]] = []
        self.allocator.on_moved(lambda holder, identity: self.moved.append((holder, identity)))
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.allocator.start()
        await self.start_lease()

    async def start_lease(self) -> None:
        self._keeping = asyncio.create_task(self.lease.run())

    async def cut(self) -> None:
        """Stop renewing the lease."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    async def die(self) -> None:
        """As a killed process does: whatever it was about to do is not done."""
        await self.cut()
        await self.etcd.close()
        tasks = [*self.allocator.tasks()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.allocator._claims.stop()
        self._db.close()

    async def stop(self) -> None:
        """In good order; its lease goes on."""
        await self.cut()
        await self.allocator.stop()
        await self.etcd.close()
        self._db.close()

    async def allocate(self, holder: str, **labels: str) -> Identity:
        return await self.allocator.allocate(labels, holder)


class Nodes:
    """Makes nodes, and stops those that still run at the end."""

    def __init__(self, etcd: EmbeddedEtcd, place: Path) -> None:
        self._etcd = etcd
        self._place = place
        self._running: dict[str, Node] = {}

    async def start(
        self, name: str = "one", cfg: IdentitiesConfig = CFG, *, ready: bool = True, **options: Any
    ) -> Node:
        """ready: wait until it may take identities; who asks it before that waits for two seconds only."""
        node = Node(self._etcd, self._place, name, cfg, **options)
        self._running[name] = node
        await node.start()
        if ready:
            await until(lambda: node.allocator._claims.ready, f"{name} to be ready")
        return node

    async def several(self, number: int, cfg: IdentitiesConfig = CFG, **options: Any) -> list[Node]:
        return [await self.start(f"node-{index}", cfg, **options) for index in range(number)]

    async def die(self, node: Node) -> None:
        del self._running[node.name]
        await node.die()

    async def stop(self, node: Node) -> None:
        del self._running[node.name]
        await node.stop()


@contextlib.asynccontextmanager
async def running(etcd: EmbeddedEtcd, place: Path) -> AsyncIterator[Nodes]:
    nodes = Nodes(etcd, place)
    try:
        yield nodes
    finally:
        for node in list(nodes._running.values()):
            await node.stop()


async def keys(client: EtcdClient, prefix: str) -> dict[str, bytes]:
    """What is below a prefix, without it."""
    return {kv.key.removeprefix(prefix): kv.value for kv in (await client.get_prefix(prefix)).kvs}


async def live(client: EtcdClient, prefix: str) -> dict[str, pb.StoredIdentity]:
    """The identities below a prefix that are not retired."""
    found = {key: pb.StoredIdentity.FromString(value) for key, value in (await keys(client, prefix)).items()}
    return {key: stored for key, stored in found.items() if not stored.retired}
