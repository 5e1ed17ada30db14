"""One installed pipeline a test session, empty maps but for the four pods a test."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator

import pytest

from services.common.instance import Instance
from services.common.kernel import features
from services.common.pipeline import install
from tests.datapath.harness import PODS, Datapath


@pytest.fixture(scope="session")
def instance() -> Iterator[Instance]:
    features.ensure_bpffs()
    made = Instance.from_env(f"t-datapath-{os.getpid()}")
    try:
        asyncio.run(install.install(made))
        yield made
    finally:
        shutil.rmtree(made.pin_dir, ignore_errors=True)


@pytest.fixture
def dp(instance: Instance) -> Iterator[Datapath]:
    datapath = Datapath(instance)
    try:
        for pod in PODS:
            datapath.put(pod)
        datapath.watch(drops=1, forward=1)
        datapath.ring.poll()
        yield datapath
    finally:
        for pod in PODS:
            datapath.remove(pod)
        datapath.watch(drops=0, forward=0)
        datapath.close()
