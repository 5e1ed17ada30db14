"""A node to test on; see ctlnode.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ctlnode import Node, fresh_node


@pytest.fixture
def node() -> Iterator[Node]:
    with fresh_node() as made:
        yield made
