from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from tests.interop.etcd.etcdrig import workplace


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
    """One with more patience than a busy machine may need."""
    async with EtcdClient([etcd.endpoint], timeout_s=10.0) as made:
        yield made


@pytest.fixture
async def hasty(etcd: EmbeddedEtcd) -> AsyncIterator[EtcdClient]:
    """One that soon gives up, for those who wait for that."""
    async with EtcdClient([etcd.endpoint], timeout_s=1.5) as made:
        yield made
