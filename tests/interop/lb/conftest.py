from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from tests.interop.etcd.etcdrig import workplace
from tests.interop.lb.lbrig import Node


@pytest.fixture
def place() -> Iterator[Path]:
    with workplace() as root:
        yield root


@pytest.fixture
async def etcd(place: Path) -> EmbeddedEtcd:
    """A running server."""
    server = EmbeddedEtcd(place / "data", place / "run")
    await server.start()
    return server


@pytest.fixture
async def client(etcd: EmbeddedEtcd) -> AsyncIterator[EtcdClient]:
    """To look at what is there."""
    async with EtcdClient([etcd.endpoint], timeout_s=2.0) as made:
        yield made


@pytest.fixture
async def nodes(etcd: EmbeddedEtcd) -> AsyncIterator[list[Node]]:
    """Three."""
    made = [await Node(etcd.endpoint).start() for _ in range(3)]
    try:
        yield made
    finally:
        for node in made:
            await node.stop()
