"""The ipcache with 100,000 pods: from a cold start to the last entry in the kernel, and what one change costs then.

An etcd holds the addresses of 100,000 pods on 400 nodes, and the nodes' records and blocks. A process of its own
(interpreter and imports included) reads them and fills empty maps of the real size; then single pods come, go and
change their identity, and writes to the maps are counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from bench.common import Bench, log, median, quick
from fibril.ipam.v1 import ipam_pb2
from fibril.ipcache.v1 import ipcache_pb2
from fibril.node.v1 import node_pb2
from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from services.common.instance import Instance
from services.common.kernel import bpf, features
from services.common.kernel.maps import BpfMap
from services.common.kernel.netlink import Netlink
from services.common.pipeline import abi
from services.identity.db import open_db
from services.identity.ipcache.ipcache import Ipcache
from services.identity.nodes.directory import Directory
from services.identity.nodes.index import NodeIndex

PODS: Final = 100_000
PODS_A_NODE: Final = 250
ROUNDS: Final = quick(2, 7)
CHANGES: Final = quick(60, 300)
ROOT: Final = "/fibril/v1/bench/"
FIRST: Final = int(ip_address("10.0.0.0"))


def pod_address(number: int) -> str:
    """Pods of a node are in one /24 of it, from the third address on."""
    node, place = divmod(number, PODS_A_NODE)
    return str(ip_address(FIRST + (node << 8) + 2 + place))


def pod_record(address: str, identity: int, node: str, pod: str) -> tuple[str, bytes]:
    """Key and value in etcd."""
    record = ipcache_pb2.StoredAddress(address=address, identity=identity, node=node, pod=pod)
    return f"{ROOT}ip/{address}", record.SerializeToString()


def content() -> Iterator[tuple[str, bytes]]:
    """All keys."""
    for number in range(PODS // PODS_A_NODE):
        name, low = f"node-{number}", FIRST + (number << 8)
        record = node_pb2.StoredNode(name=name, ipv4=str(ip_address(int(ip_address("198.18.0.1")) + number)))
        yield f"{ROOT}nodes/{name}", record.SerializeToString()
        cidr = f"{ip_address(low)}/24"
        block = ipam_pb2.Block(cidr=cidr, pool="default", node=name, gateway=str(ip_address(low + 1)))
        yield f"{ROOT}blocks/default/{cidr.replace('/', '_')}", block.SerializeToString()
    for number in range(PODS):
        # Five thousand workloads of twenty pods each.
        identity = 1 << 20 | 1 + number % 5000
        yield pod_record(
            pod_address(number), identity, f"node-{number // PODS_A_NODE}", f"team-{number % 50}/pod-{number}"
        )


async def fill(endpoint: str) -> None:
    """Write all keys, a hundred a transaction."""
    async with EtcdClient([endpoint]) as etcd:
        some = asyncio.Semaphore(8)

        async def put(batch: dict[str, bytes]) -> None:
            async with some:
                await etcd.transact({}, put=batch)

        keys = list(content())
        await asyncio.gather(*(put(dict(keys[at : at + 100])) for at in range(0, len(keys), 100)))


@contextlib.contextmanager
def empty_maps(instance: Instance) -> Iterator[None]:
    """The maps of bpf/abi/ipcache.h, pinned where the programs' would be."""
    place = (instance.pin_dir / abi.MAPS["ipc_addr"]).parent
    place.mkdir(parents=True)
    try:
        for name, kind, key, size in (
            ("ipc_addr", "hash", abi.FibAddr, abi.IPC_ADDR_MAX),
            ("ipc_prefix", "lpm_trie", abi.IpcachePrefix, abi.IPC_PREFIX_MAX),
        ):
            with BpfMap.create(kind, key, abi.IpcacheEntry, size, 1, name) as made:
                bpf.pin(made.fd, str(place / name))
        yield
    finally:
        shutil.rmtree(instance.pin_dir)


def entries(instance: Instance) -> int:
    """How many single addresses the kernel has."""
    with BpfMap.open(instance.pin_dir / abi.MAPS["ipc_addr"], abi.FibAddr, abi.IpcacheEntry) as opened:
        return opened.count()


async def serve(endpoint: str, instance: Instance) -> None:
    """The other process: fill the maps, say so; then make changes and say what they cost."""
    db = open_db(instance.state_dir / "identity.db")
    async with EtcdClient([endpoint]) as etcd, Netlink() as netlink:
        index = NodeIndex(db)
        directory = Directory(etcd, "bench", "bench", index)
        ipcache = Ipcache(etcd, "bench", "bench", index, directory, instance, db, netlink)
        await directory.start()
        await ipcache.start()
        await ipcache.use_maps()
        await ipcache.synced.wait()
        await ipcache.settled()
        print("done", flush=True)
        print(json.dumps({"writes": await changes(etcd, ipcache)}), flush=True)
        await ipcache.stop()
        await directory.stop()
    db.close()


async def changes(etcd: EtcdClient, ipcache: Ipcache) -> list[int]:
    """Writes of each of some changes: pods that change their identity, go and come."""
    found = []
    told = ipcache.feed.watch(ipcache.feed.revision)
    for number in range(CHANGES):
        address = pod_address(number // 3 * 331 % PODS)
        before = ipcache.writes
        if number % 3 == 1:
            await etcd.delete(f"{ROOT}ip/{address}")
        else:
            identity = time.monotonic_ns() & 0xFFFFF  # another than before
            await etcd.put(*pod_record(address, identity, "node-1", "team-1/new"))
        async with asyncio.timeout(10):
            await anext(told)
        found.append(ipcache.writes - before)
    return found


def cold(endpoint: str, root: Path, number: int) -> tuple[float, list[int]]:
    """Seconds from the start of a process to the last entry in the kernel; writes of each change after that."""
    instance = Instance(f"bench-{os.getpid()}-{number}", root / "run", root / "state")
    with empty_maps(instance):
        begin = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-m", "bench.ipcache", endpoint, instance.name, str(root)], stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            line = child.stdout.readline()
            taken = time.perf_counter() - begin
            present = entries(instance)
            rest = child.stdout.read()
        if line != b"done\n" or child.returncode or present < PODS:
            raise RuntimeError(f"the ipcache did not come up: {line!r}, exit {child.returncode}, {present} entries")
        return taken, list(json.loads(rest)["writes"])


def main() -> None:
    """Print both figures."""
    features.ensure_bpffs()
    with Bench("identity") as bench, tempfile.TemporaryDirectory(prefix="fibril-bench-") as made:
        root = Path(made)
        etcd = EmbeddedEtcd(root / "etcd", root / "etcd-run")
        asyncio.run(etcd.start())
        try:
            asyncio.run(fill(etcd.endpoint))
            seconds, writes = [], []
            for number in range(ROUNDS):
                taken, each = cold(etcd.endpoint, root, number)
                seconds.append(taken)
                writes += each
                log(f"round {number + 1}: {taken:.2f} s, {sum(each)} writes for {len(each)} changes")
            bench.emit("ipcache_cold_100k", "s", median(seconds), "target", 3)
            bench.emit("ipcache_one_change_writes", "writes", max(writes), "target", 1)
        finally:
            asyncio.run(etcd.stop())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(serve(sys.argv[1], Instance(sys.argv[2], Path(sys.argv[3]) / "run", Path(sys.argv[3]) / "state")))
    else:
        main()
