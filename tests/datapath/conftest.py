"""One installed pipeline a test session, empty maps but for the four pods a test."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Iterator

import pytest

from services.common.instance import Instance
from services.common.kernel import features, progs
from services.common.pipeline import abi as pipeline
from services.common.pipeline import install
from tests import session
from tests.datapath import policykit
from tests.datapath.cluster import Cluster
from tests.datapath.harness import PODS, Datapath
from tests.datapath.lbkit import Lab, Uplink, installed
from tests.datapath.planekit import clean, lb_maps  # noqa: F401
from tests.datapath.policykit import Rig, Space
from tests.datapath.xdpkit import XdpRig


@pytest.fixture(scope="session")
def instance() -> Iterator[Instance]:
    features.ensure_bpffs()
    made = Instance.from_env(f"t-datapath-{session.name()}")
    try:
        asyncio.run(install.install(made))
        yield made
    finally:
        shutil.rmtree(made.pin_dir, ignore_errors=True)


@pytest.fixture(scope="session")
def xdp_rig() -> Iterator[XdpRig]:
    with contextlib.ExitStack() as stack:
        yield XdpRig(stack)


@pytest.fixture
def dp(instance: Instance) -> Iterator[Datapath]:
    datapath = Datapath(instance)
    try:
        for pod in PODS:
            datapath.put(pod)
        datapath.watch(drops=1, forward=1)
        while datapath.ring.poll():
            pass  # a flood of a test before
        yield datapath
    finally:
        for pod in PODS:
            datapath.remove(pod)
        datapath.watch(drops=0, forward=0)
        datapath.close()


@pytest.fixture(scope="module")
def with_lb(instance: Instance) -> Iterator[None]:
    with installed(instance):
        yield


@pytest.fixture
def lab(with_lb: None, dp: Datapath) -> Iterator[Lab]:
    """The balancer with empty tables."""
    cluster = Cluster(dp)
    made = Lab(cluster)
    yield made
    made.close()
    cluster.close()


@pytest.fixture(scope="module")
def uplink_space(with_lb: None, instance: Instance) -> Iterator[Uplink]:
    made = Uplink(instance)
    yield made
    made.close()


@pytest.fixture
def uplink(uplink_space: Uplink, lab: Lab) -> Uplink:
    """And what is around its node."""
    uplink_space.lab = lab
    return uplink_space


@pytest.fixture(scope="module")
def network(instance: Instance) -> Iterator[None]:
    """The programs of the identity service and the balancer; the latter's slot stays empty unless a test fills it."""
    with installed(instance):
        progs.clear_slot(instance.pin_dir / pipeline.MAPS[pipeline.SLOTS_MAP], pipeline.Slot.LB)
        yield


@pytest.fixture
def cluster(network: None, dp: Datapath) -> Iterator[Cluster]:
    """What the ipcache knows of other nodes: nothing yet."""
    made = Cluster(dp)
    yield made
    made.close()


@pytest.fixture(scope="module")
def space(instance: Instance) -> Iterator[Space]:
    """Pods' links, and the policy service's programs."""
    with policykit.installed(instance):
        made = Space()
        yield made
        made.close()


@pytest.fixture
def rig(space: Space, dp: Datapath) -> Iterator[Rig]:
    """Pods without policies."""
    made = Rig(dp, space)
    yield made
    made.close()
