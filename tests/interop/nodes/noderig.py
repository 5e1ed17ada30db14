"""The node parts of several nodes on one etcd, in one process. The underlay is told by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path

from services.common.etcd.client import EtcdClient
from services.common.instance import Instance
from services.common.network import NetworkConfig
from services.common.underlay import Facts
from services.identity.db import open_db
from services.identity.lease import NodeLease
from services.identity.nodes.directory import Directory
from services.identity.nodes.index import NodeIndex
from services.identity.nodes.registry import Registry
from tests.interop.etcd.etcdrig import WAIT_S

CLUSTER = "test"


class Underlay:
    """What network.underlay.Underlay tells of an interface."""

    def __init__(self, ipv4: str, ipv6: str) -> None:
        address6 = IPv6Address(ipv6) if ipv6 else None
        self.facts = Facts("eth0", 2, 1500, IPv4Address(ipv4), address6, (ip_network("192.168.0.0/24"),))
        self._callbacks: list[Callable[[], None]] = []

    def on_change(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def move(self, address: str) -> None:
        self.facts = replace(self.facts, ipv4=IPv4Address(address))
        for callback in self._callbacks:
            callback()


class Member:
    """One node's part; `place` tells machines apart."""

    def __init__(
        self, url: str, name: str, root: Path, ipv4: str, ttl_s: int = 20, place: str = "", ipv6: str = ""
    ) -> None:
        self.home = home = root / (place or name)
        self.name = name
        self.etcd = EtcdClient([url], timeout_s=3.0)
        self.db = open_db(home / "identity.db")
        self.underlay = Underlay(ipv4, ipv6)
        self.lease = NodeLease(self.etcd, self.db, ttl_s, name)
        self.directory = Directory(self.etcd, CLUSTER, name, NodeIndex(self.db))
        self.registry = Registry(
            self.etcd, CLUSTER, name, Instance(state_root=home, run_root=home), NetworkConfig(),
            self.underlay, self.lease, self.directory,  # type: ignore[arg-type]
        )  # fmt: skip
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> Member:
        await self.directory.start()
        await self.registry.start()
        self._keeping = asyncio.create_task(self.lease.run())
        return self

    async def stop(self) -> None:
        """As when the process is killed: nothing is taken back."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await self.registry.stop()
        await self.directory.stop()
        await self.etcd.close()
        self.db.close()


async def until(condition: Callable[[], object]) -> None:
    """Wait until it holds. TimeoutError after a while."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
