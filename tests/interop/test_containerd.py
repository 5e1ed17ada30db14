"""containerd's CRI plugin, driven over gRPC as a kubelet does, runs pods on Fibril.

world 192.0.2.2 ── 192.0.2.1 node ─┬─ web (port 80, host port 18081)
2001:db8:7::2   2001:db8:7::1      └─ client
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import session
from tests.interop import containers
from tests.interop.containers import (
    GREETING,
    NODE4,
    NODE6,
    SLEEP,
    WEB_SERVER,
    WORLD4,
    WORLD6,
    CniNode,
    Containerd,
)

HOST_PORT = 18081

reason = containers.missing_tools(*Containerd.NEEDS)
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)


@dataclass(frozen=True)
class Pods:
    """The daemon and its two pods; `web` are its addresses, `client` a container id."""

    runtime: Containerd
    web: list[str]
    client: str

    def fetch(self, address: str, port: int = containers.WEB_PORT) -> str:
        """What a web server says to `client`."""
        return self.runtime.execute(self.client, *containers.fetching(address, port))[1]


@pytest.fixture(scope="module")
def fibril() -> Iterator[CniNode]:
    with containers.cni_node() as made:
        yield made


@pytest.fixture(scope="module")
def pods(fibril: CniNode) -> Iterator[Pods]:
    scratch = Path(tempfile.mkdtemp(prefix=session.name()))
    runtime = Containerd(scratch / scratch.name, fibril)
    try:
        containers.build_image(scratch / "image.tar")
        runtime.ctr("images", "import", str(scratch / "image.tar"))
        web, _ = runtime.run_pod("web", WEB_SERVER, [(HOST_PORT, 80)])
        _, client = runtime.run_pod("client", SLEEP)
        pods = Pods(runtime, runtime.addresses(web), client)
        containers.wait_until(lambda: pods.fetch(pods.web[0]) == GREETING, "the web server's start")
        yield pods
    finally:
        runtime.close()
        (scratch / "image.tar").unlink(missing_ok=True)
        scratch.rmdir()


def test_the_network_is_ready(pods: Pods) -> None:
    conditions = pods.runtime.runtime.Status(
        pods.runtime.messages.StatusRequest(), timeout=10
    ).status.conditions
    assert {entry.type: entry.status for entry in conditions} == {"RuntimeReady": True, "NetworkReady": True}


def test_pods_are_known_by_name_and_address(pods: Pods, fibril: CniNode) -> None:
    known = {entry.pod: [entry.ipv4, entry.ipv6] for entry in fibril.endpoints()}
    assert set(known) == {"interop/web", "interop/client"}
    assert known["interop/web"] == pods.web


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_pods_talk_to_each_other(pods: Pods, family: int) -> None:
    assert pods.fetch(pods.web[family]) == GREETING


@pytest.mark.parametrize("address", [NODE4, NODE6], ids=["v4", "v6"])
def test_a_host_port_is_reached_from_the_world(pods: Pods, fibril: CniNode, address: str) -> None:
    assert containers.fetch(fibril.world, address, HOST_PORT) == GREETING


@pytest.mark.parametrize("address", [WORLD4, WORLD6], ids=["v4", "v6"])
def test_a_pod_reaches_the_world_masqueraded(
    pods: Pods, fibril: CniNode, address: str, tmp_path: Path
) -> None:
    with containers.web_server(fibril.world, tmp_path):
        assert pods.fetch(address) == GREETING


def test_a_removed_pod_leaves_nothing(pods: Pods, fibril: CniNode) -> None:
    before = len(fibril.endpoints())
    sandbox, _ = pods.runtime.run_pod("short", SLEEP)
    assert len(fibril.endpoints()) == before + 1
    pods.runtime.remove(sandbox)
    assert len(fibril.endpoints()) == before
