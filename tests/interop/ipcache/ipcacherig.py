"""The ipcache parts of several nodes on one etcd, in one process. BPF maps only for those that are given some."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import traceback
from collections.abc import AsyncIterator, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path

from fibril.ipam.v1 import ipam_pb2
from fibril.ipcache.v1 import ipcache_pb2 as pb
from fibril.node.v1 import node_pb2
from services.common.etcd.client import EtcdClient
from services.common.instance import Instance
from services.common.kernel import bpf, features
from services.common.kernel.maps import BpfMap
from services.common.kernel.netlink import Netlink
from services.common.pipeline import abi
from services.identity.db import open_db
from services.identity.ipcache.ipcache import Ipcache
from services.identity.ipcache.model import Entry, Source, address_of
from services.identity.ipcache.publisher import Publisher
from services.identity.lease import NodeLease
from services.identity.nodes.directory import Directory
from services.identity.nodes.index import NodeIndex
from tests import session

CLUSTER = "test"
PREFIX = f"/fibril/v1/{CLUSTER}/ip/"


class Member:
    """One node's part; made by `member`."""

    def __init__(self, url: str, name: str, root: Path, instance: Instance, netlink: Netlink) -> None:
        self.name = name
        self.instance = instance
        self.etcd = EtcdClient([url], timeout_s=3.0)
        self.db = open_db(root / name / "identity.db")
        self.index = NodeIndex(self.db)
        self.directory = Directory(self.etcd, CLUSTER, name, self.index)
        self.lease = NodeLease(self.etcd, self.db, 20, name)
        self.ipcache = Ipcache(
            self.etcd, CLUSTER, name, self.index, self.directory, instance, self.db, netlink
        )
        self.publisher = Publisher(self.etcd, CLUSTER, name, self.lease, self.ipcache)
        self._keeping: asyncio.Task[None] | None = None

    async def start(self, lease: bool = True) -> None:
        if self.instance.pin_dir.exists():
            await self.ipcache.use_maps()
        await self.directory.start()
        await self.ipcache.start()
        await self.publisher.start()
        for task in (*self.ipcache.tasks(), *self.publisher.tasks()):
            task.add_done_callback(self._ended)
        if lease:
            self._keeping = asyncio.create_task(self.lease.run())

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            traceback.print_exception(error)

    async def stop(self) -> None:
        """As when the process is killed: nothing is taken back."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await self.publisher.stop()
        await self.ipcache.stop()
        await self.directory.stop()
        await self.etcd.close()
        self.db.close()

    async def lose_lease(self) -> None:
        """End it, as etcd does when it is not renewed. Raises Unavailable."""
        await self.etcd.revoke(self.lease.lease)
        self.lease.suspect()

    def pods(self) -> dict[str, tuple[int, str]]:
        """What this node knows of pods: address -> (identity, node)."""
        return {
            str(address_of(entry.key)): (entry.identity, entry.node)
            for entry in self.ipcache.entries()
            if entry.source is Source.POD
        }

    def entry(self, address: str) -> Entry | None:
        return self.ipcache.lookup(ip_address(address))


async def put_node(etcd: EtcdClient, name: str, ipv4: str = "", ipv6: str = "") -> None:
    """Register a node."""
    record = node_pb2.StoredNode(name=name, ipv4=ipv4, ipv6=ipv6, mode=node_pb2.NETWORK_MODE_OVERLAY)
    await etcd.put(f"/fibril/v1/{CLUSTER}/nodes/{name}", record.SerializeToString())


async def put_block(etcd: EtcdClient, name: str, cidr: str, gateway: str) -> None:
    """Give a node a block of addresses."""
    block = ipam_pb2.Block(cidr=cidr, pool="default", node=name, gateway=gateway)
    key = f"/fibril/v1/{CLUSTER}/blocks/default/{cidr.replace('/', '_')}"
    await etcd.put(key, block.SerializeToString())


@contextlib.asynccontextmanager
async def member(
    url: str, name: str, root: Path, instance: Instance | None = None, start: bool = True, lease: bool = True
) -> AsyncIterator[Member]:
    async with Netlink() as netlink:
        nowhere = Instance(f"t-{session.name()}", root / "run", root / "state")
        made = Member(url, name, root, instance or nowhere, netlink)
        try:
            if start:
                await made.start(lease)
            yield made
        finally:
            await made.stop()


async def stored(etcd: EtcdClient) -> Mapping[str, tuple[int, str]]:
    """What etcd has: address -> (identity, node)."""
    found = {}
    for kv in (await etcd.get_prefix(PREFIX)).kvs:
        value = pb.StoredAddress.FromString(kv.value)
        found[kv.key.removeprefix(PREFIX)] = (value.identity, value.node)
    return found


def stored_address(address: str, identity: int, node: str, previous: int = 0, pod: str = "") -> bytes:
    return pb.StoredAddress(
        address=address, identity=identity, node=node, previous_identity=previous, pod=pod
    ).SerializeToString()


@contextlib.contextmanager
def pinned_maps(root: Path, singles: int = 1024, prefixes: int = 128) -> Iterator[Instance]:
    """An instance that has the ipcache's maps, and nothing else."""
    features.ensure_bpffs()
    instance = Instance(f"t-{session.name()}", root / "run", root / "state")
    place = (instance.pin_dir / abi.MAPS["ipc_addr"]).parent
    place.mkdir(parents=True)
    try:
        with BpfMap.create("hash", abi.FibAddr, abi.IpcacheEntry, singles, 1, "ipc_addr") as made:
            bpf.pin(made.fd, str(place / "ipc_addr"))
        with BpfMap.create(
            "lpm_trie", abi.IpcachePrefix, abi.IpcacheEntry, prefixes, 1, "ipc_prefix"
        ) as made:
            bpf.pin(made.fd, str(place / "ipc_prefix"))
        yield instance
    finally:
        shutil.rmtree(instance.pin_dir)
