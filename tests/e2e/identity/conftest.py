"""Nodes to test identities on; see identitynode.py."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.e2e.identity.identitynode import IdentityNode


@pytest.fixture
def node() -> Iterator[IdentityNode]:
    """A healthy node with both services."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    made = IdentityNode()
    try:
        made.up()
        yield made
    finally:
        made.close()
