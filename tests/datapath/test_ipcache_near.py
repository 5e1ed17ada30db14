"""What a CPU remembers of the ipcache: right, and not for long."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from scapy.layers.inet import UDP

from services.common.instance import Instance
from services.common.pipeline import abi
from services.identity.numbers import Reserved
from tests.datapath.cluster import OVERLAY, Cluster, loaded
from tests.datapath.harness import Datapath
from tests.datapath.packets import ether, ip

IDENTITY = 1 << 20 | 5
PEER = {4: "10.2.0.9", 6: "fd00:2::9"}
SAME_SLOT = {4: "10.2.4.8", 6: "fd00:2::408"}
SOON_S = 0.1
"""A tenth of a second is far more than four jiffies, and less than what an identity is published ahead."""


@pytest.fixture(scope="module")
def with_identity(instance: Instance) -> Iterator[None]:
    with loaded(instance):
        yield


@pytest.fixture
def cluster(with_identity: None, dp: Datapath) -> Iterator[Cluster]:
    made = Cluster(dp)
    yield made
    made.close()


def identity_of(cluster: Cluster, address: str) -> int:
    packet = ether() / ip(address, 6 if ":" in address else 4) / UDP()
    return int(cluster.dp.run(bytes(packet)).event.dst_identity)


def soon(cluster: Cluster, address: str, identity: int) -> None:
    deadline, late = time.monotonic() + SOON_S, False
    while not late:
        # Of a test that was not given the CPU meanwhile the last question is one that began late enough.
        late = time.monotonic() >= deadline
        if identity_of(cluster, address) == identity:
            return
    raise AssertionError(f"{address} is not {identity} after {SOON_S} s")


@pytest.mark.parametrize("family", [4, 6])
def test_changes_are_noticed_soon_without_anybody_telling(cluster: Cluster, family: int) -> None:
    address, single = PEER[family], f"{PEER[family]}/{32 if family == 4 else 128}"
    assert identity_of(cluster, address) == Reserved.WORLD
    for identity in (IDENTITY, IDENTITY + 1, IDENTITY + 2):
        cluster.know(single, identity, OVERLAY, at_once=False)
        soon(cluster, address, identity)
    cluster.addrs.delete(abi.FibAddr.of(address))
    soon(cluster, address, Reserved.WORLD)


@pytest.mark.parametrize("family", [4, 6])
def test_addresses_of_one_place_are_not_taken_for_each_other(cluster: Cluster, family: int) -> None:
    first, second, bits = PEER[family], SAME_SLOT[family], 32 if family == 4 else 128
    assert slot(first) == slot(second)
    cluster.know(f"{first}/{bits}", IDENTITY, OVERLAY)
    cluster.know(f"{second}/{bits}", IDENTITY + 1, OVERLAY)
    for _ in range(20):
        assert (identity_of(cluster, first), identity_of(cluster, second)) == (IDENTITY, IDENTITY + 1)


def slot(address: str) -> int:
    """As in ipcache_lookup() of bpf/abi/ipcache.h."""
    low = int.from_bytes(bytes(abi.FibAddr.of(address))[-4:], "big")
    return (low ^ low >> 10) % abi.IPC_NEAR_SLOTS
