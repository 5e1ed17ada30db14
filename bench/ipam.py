"""Allocation: a second through the service's socket by one client, and a second in the allocator itself."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from ipaddress import ip_address, ip_network
from pathlib import Path

from bench.common import Bench, cpus, log, median, pinned, quick
from fibril.ipam.v1 import ipam_pb2, ipam_pb2_grpc
from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from services.common.rpc.client import channel
from services.common.rpc.server import RpcConfig, RpcServer
from services.common.telemetry import TelemetryConfig, setup
from services.ipam.db import open_db
from services.ipam.pools.api import IpamApi
from services.ipam.pools.book import AddressBook
from services.ipam.pools.holdings import Holdings
from services.ipam.pools.store import PoolStore
from services.ipam.pools.types import Family, checked_pool

CALLS = quick(1_000, 5_000)
ROUNDS = quick(3, 7)


def model_rate() -> float:
    """Allocations a second in process: is the owner known, which address is next, what is the answer; no disk."""
    with tempfile.TemporaryDirectory(prefix="fibril-bench-") as root:
        held = Holdings(open_db(Path(root) / "ipam.db"))
        pool = checked_pool("default", 0, ["10.0.0.0/16"], [], 16, 0)
        held.set_pool(pool)
        held.add_block(pool, ip_network("10.0.0.0/16"), ip_address("10.0.0.1"))
        shelf = held.shelf(pool.name, Family.IPV4)
        owners = [f"owner/{number}" for number in range(60_000)]
        start = time.perf_counter()
        for owner in owners:
            if held.find(owner, pool.name, Family.IPV4) is None and (taken := shelf.take(0.0)) is not None:
                held.make(*taken, pool.name, owner, 0.0, 0.0)
        return len(owners) / (time.perf_counter() - start)


@contextlib.asynccontextmanager
async def service(root: Path) -> AsyncIterator[Path]:
    """IpamService as the ipam process hosts it, with a database, an etcd and a socket of its own."""
    etcd = EmbeddedEtcd(root / "etcd", root / "etcd-run")
    await etcd.start()
    client = EtcdClient([etcd.endpoint])
    pool = checked_pool("default", 0, ["10.0.0.0/8"], [], 16, 0)
    book = AddressBook(Holdings(open_db(root / "ipam.db")), client, PoolStore(client, "bench"), "node", pool)
    server = RpcServer(root / "ipam.sock", RpcConfig(), setup("bench", TelemetryConfig()))
    server.add(ipam_pb2_grpc.add_IpamServiceServicer_to_server, IpamApi(book))
    try:
        await book.start()
        await server.start()
        while not book.synced:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)
        yield root / "ipam.sock"
    finally:
        await server.drain(0)
        await book.stop()
        await client.close()
        await etcd.stop()


async def rpc_rates(socket: Path) -> list[float]:
    """Allocations a second, one call after the other, each for a new owner; one rate a round."""
    rates = []
    async with channel(f"unix:{socket}") as to_ipam:
        stub = ipam_pb2_grpc.IpamServiceStub(to_ipam)
        for number in range(ROUNDS):
            start = time.perf_counter()
            for call in range(CALLS):
                await stub.Allocate(ipam_pb2.AllocateRequest(owner=f"o{number}/{call}"), timeout=5)
            rates.append(CALLS / (time.perf_counter() - start))
            log(f"round {number + 1}: {rates[-1]:.0f} allocations a second")
    return rates


def main() -> None:
    """Print both rates."""
    with Bench("ipam") as bench, pinned(cpus()[-1]):
        bench.emit(
            "ipam_alloc_model", "1/s", median([model_rate() for _ in range(ROUNDS)]), "target", 300_000
        )
        with tempfile.TemporaryDirectory(prefix="fibril-bench-") as root:
            bench.emit("ipam_alloc_rpc", "1/s", asyncio.run(served(Path(root))), "target", 1_500)


async def served(root: Path) -> float:
    """Median allocations a second through the socket; service and client share one CPU and one process."""
    async with service(root) as socket:
        return median(await rpc_rates(socket))


if __name__ == "__main__":
    main()
