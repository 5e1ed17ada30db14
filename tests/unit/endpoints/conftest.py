"""A manager to test; see endpointworld.py."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator

import pytest
from endpointworld import World, started

from services.ipam.endpoints.manager import EndpointManager


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def db() -> sqlite3.Connection:
    made = sqlite3.connect(":memory:")
    made.execute(
        "CREATE TABLE endpoints (id INTEGER PRIMARY KEY, container_id TEXT, ifname TEXT, record BLOB, state TEXT)"
    )
    return made


@pytest.fixture
async def manager(db: sqlite3.Connection, world: World) -> AsyncIterator[EndpointManager]:
    yield await started(db, world)
