from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.common.etcd.embedded import EmbeddedEtcd
from tests.interop.etcd.conftest import client, etcd, place
from tests.interop.identity.identityrig import Nodes, running

__all__ = ["client", "etcd", "place"]


@pytest.fixture
async def nodes(etcd: EmbeddedEtcd, place: Path) -> AsyncIterator[Nodes]:
    async with running(etcd, place) as made:
        yield made
