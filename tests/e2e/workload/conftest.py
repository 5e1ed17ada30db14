"""A world of two pods and a service that names them; see workloadkit.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from workloadkit import World

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Programs loaded, service running, pods told."""
    made = World()
    try:
        made.load()
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def bare() -> Iterator[World]:
    """Pods only: nothing loaded, nothing running."""
    made = World()
    try:
        yield made
    finally:
        made.close()
