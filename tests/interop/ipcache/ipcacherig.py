"""The ipcache parts of several nodes on one etcd, in one process. BPF maps only for those that are given some."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path

from fibril.ipcache.v1 import ipcache_pb2 as pb
from services.common.etcd.client import EtcdClient
from services.common.instance import Instance
from services.common.kernel import bpf, features
from services.common.kernel.maps import BpfMap
from services.common.kernel.netlink import Netlink
from services.common.network import Mode
from services.common.pipeline import abi
from services.identity.db import open_db
from services.identity.ipcache.ipcache import Ipcache
from services.identity.ipcache.model import Entry, Source, address_of
from services.identity.ipcache.publisher import Publisher
from services.identity.lease import NodeLease
from services.identity.nodes.model import Node, NodeState

CLUSTER = "test"
PREFIX = f"/fibril/v1/{CLUSTER}/ip/"


class Roll:
    """The nodes there are, as Directory offers them."""

    def __init__(self) -> None:
        self.known: dict[str, Node] = {}
        self.synced = asyncio.Event()
        self.synced.set()
        self._callbacks: list[Callable[[str], None]] = []

    def nodes(self) -> dict[str, Node]:
        return self.known

    def get(self, name: str) -> Node | None:
        return self.known.get(name)

    def on_change(self, callback: Callable[[str], None]) -> None:
        self._callbacks.append(callback)

    def put(self, node: Node) -> None:
        self.known[node.name] = node
        self._tell(node.name)

    def remove(self, name: str) -> None:
        del self.known[name]
        self._tell(name)

    def _tell(self, name: str) -> None:
        for callback in self._callbacks:
            callback(name)


def node(name: str, ipv4: str = "", revision: int = 1, **more: object) -> Node:
    return Node(
        name=name, index=0, local=False, ipv4=ip_address(ipv4) if ipv4 else None, ipv6=None,  # type: ignore[arg-type]
        configured_mode=Mode.OVERLAY, overlay_port=8472, probe_port=4240, uplink_mtu=1500,
        underlay_networks=(), version="", state=NodeState.ALIVE, revision=revision, **more,  # type: ignore[arg-type]
    )  # fmt: skip


class Indexes(dict[str, int]):
    def of(self, name: str) -> int:
        return self.setdefault(name, len(self) + 1)


class Member:
    """One node's part; made by `member`."""

    def __init__(self, url: str, name: str, root: Path, instance: Instance, netlink: Netlink) -> None:
        self.name = name
        self.instance = instance
        self.etcd = EtcdClient([url], timeout_s=2.0)
        self.db = open_db(root / name / "identity.db")
        self.roll = Roll()
        self.indexes = Indexes()
        self.lease = NodeLease(self.etcd, self.db, 20, name)
        self.ipcache = Ipcache(self.etcd, CLUSTER, name, self.indexes, self.roll, instance, self.db, netlink)
        self.publisher = Publisher(self.etcd, CLUSTER, name, self.lease, self.ipcache)
        self._keeping: asyncio.Task[None] | None = None

    async def start(self, lease: bool = True) -> None:
        if self.instance.pin_dir.exists():
            await self.ipcache.use_maps()
        await self.ipcache.start()
        await self.publisher.start()
        if lease:
            self._keeping = asyncio.create_task(self.lease.run())

    async def stop(self) -> None:
        """As when the process is killed: nothing is taken back."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await self.publisher.stop()
        await self.ipcache.stop()
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


@contextlib.asynccontextmanager
async def member(
    url: str, name: str, root: Path, instance: Instance | None = None, start: bool = True, lease: bool = True
) -> AsyncIterator[Member]:
    async with Netlink() as netlink:
        nowhere = Instance(f"t-{secrets.token_hex(4)}", root / "run", root / "state")
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
    instance = Instance(f"t-{os.getpid()}-{secrets.token_hex(3)}", root / "run", root / "state")
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
        shutil.rmtree(instance.pin_dir, ignore_errors=True)
