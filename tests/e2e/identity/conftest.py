"""A node to test identities on; see identitynode.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.ctl.ctlnode import wait_for
from tests.e2e.identity.identitynode import IdentityNode


@pytest.fixture(scope="module")
def shared() -> Iterator[IdentityNode]:
    made = IdentityNode()
    try:
        made.up()
        yield made
    finally:
        made.close()


@pytest.fixture
def node(shared: IdentityNode) -> Iterator[IdentityNode]:
    """A healthy node with both services and no pods, which is what a test must leave."""
    shared.up()
    yield shared
    shared.up()
    for name in shared.all():
        shared.remove(name)
    wait_for(lambda: not shared.published(), "nothing is published any more")
    wait_for(lambda: not shared.keys("identities/refs/"), "nothing is held any more")
    assert shared.in_maps() == {}
