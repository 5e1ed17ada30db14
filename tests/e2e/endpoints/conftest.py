"""One node for a module's tests; tests that end it make their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.endpoints.podkit import Node, Pod


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    made = Node()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def pods(node: Node) -> Iterator[tuple[Pod, Pod]]:
    pair = node.pod(), node.pod()
    yield pair
    node.remove(*pair)
