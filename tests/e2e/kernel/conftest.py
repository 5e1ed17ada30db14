"""What every test here owns: a pin directory, a prefix for names, namespaces; all taken away at the end."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from services.common.kernel import features, netns
from services.common.kernel.netlink import Netlink, Rtnl
from tests import session


@pytest.fixture
def prefix() -> str:
    """Seven characters no other test uses."""
    return session.name()


@pytest.fixture
def pin_dir(prefix: str) -> Iterator[Path]:
    features.ensure_bpffs()
    path = Path("/sys/fs/bpf") / prefix
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
async def netlink(prefix: str) -> AsyncIterator[Netlink]:
    async with Netlink() as adapter:
        yield adapter
        for link in await adapter.call(Rtnl.links, prefix):
            await adapter.call(Rtnl.delete_link, link.name)


@pytest.fixture
async def pod(netlink: Netlink, prefix: str) -> AsyncIterator[Path]:
    """A fresh network namespace."""
    path = Path("/run/netns") / f"{prefix}-pod"
    await netlink.run(netns.add, path)
    yield path
    await netlink.run(netns.remove, path)
