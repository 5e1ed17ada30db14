"""A world of two pods and a service that names them; see workloadkit.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from workloadkit import World


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
