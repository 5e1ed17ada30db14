"""Programs loaded once a module; a fresh control group and processes for each test."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelrig import Rig, at_work, two_spaces

from services.common.instance import Instance
from services.sockaccel import install
from tests.e2e.lb.sockrig import forget, make_instance


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    if os.geteuid():
        pytest.skip("needs root")
    made = make_instance()
    try:
        asyncio.run(install.load(made))
        yield made
    finally:
        forget(made)


@pytest.fixture(scope="module")
def spaces() -> Iterator[tuple[Path, Path]]:
    with two_spaces() as made:
        yield made


@pytest.fixture
def rig(instance: Instance, spaces: tuple[Path, Path]) -> Iterator[Rig]:
    with at_work(instance, f"fibril-test-{instance.name}") as group:
        made = Rig(instance, group, spaces)
        try:
            yield made
        finally:
            made.close()
