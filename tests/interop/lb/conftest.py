from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from services.common.etcd.embedded import EmbeddedEtcd
from tests.interop.etcd.conftest import client, etcd, place
from tests.interop.lb.lbrig import Node

__all__ = ["client", "etcd", "place"]


@pytest.fixture
async def nodes(etcd: EmbeddedEtcd) -> AsyncIterator[list[Node]]:
    """Three."""
    made = [await Node(etcd.endpoint).start() for _ in range(3)]
    try:
        yield made
    finally:
        for node in made:
            await node.stop()
