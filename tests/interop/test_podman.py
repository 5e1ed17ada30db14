"""podman with its CNI backend and runc runs containers on Fibril.

world 192.0.2.2 ── 192.0.2.1 node ─┬─ web (port 80, published as 18080)
2001:db8:7::2   2001:db8:7::1      └─ client
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import session
from tests.interop import containers
from tests.interop.containers import GREETING, NODE4, NODE6, WEB_SERVER, WORLD4, WORLD6, CniNode, Podman

PUBLISHED = 18080

reason = containers.missing_tools(*Podman.NEEDS)
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)


@pytest.fixture(scope="module")
def fibril() -> Iterator[CniNode]:
    with containers.cni_node() as made:
        yield made


@pytest.fixture(scope="module")
def podman(fibril: CniNode) -> Iterator[Podman]:
    """podman with two containers on the network: `web`, published on the node, and `client`."""
    scratch = Path(tempfile.mkdtemp(prefix=session.name()))
    runtime = Podman(scratch / scratch.name, fibril)
    try:
        containers.build_image(scratch / "image.tar")
        runtime("load", "-i", str(scratch / "image.tar"))
        runtime.start("web", "-p", f"{PUBLISHED}:80", command=WEB_SERVER)
        runtime.start("client")
        address = runtime.addresses("web")[0]
        containers.wait_until(lambda: runtime.fetch("client", address) == GREETING, "the web server's start")
        yield runtime
    finally:
        runtime.close()
        (scratch / "image.tar").unlink(missing_ok=True)
        scratch.rmdir()


def test_both_families_are_reported(podman: Podman, fibril: CniNode) -> None:
    known = {(entry.ipv4, entry.ipv6) for entry in fibril.endpoints()}
    assert {tuple(podman.addresses(name)) for name in ("web", "client")} == known


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_containers_talk_to_each_other(podman: Podman, family: int) -> None:
    assert podman.fetch("client", podman.addresses("web")[family]) == GREETING


@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_the_node_reaches_a_container(podman: Podman, fibril: CniNode, family: int) -> None:
    assert containers.fetch(fibril.name, podman.addresses("web")[family]) == GREETING


@pytest.mark.parametrize("address", [NODE4, NODE6], ids=["v4", "v6"])
def test_a_published_port_is_reached_from_the_world(podman: Podman, fibril: CniNode, address: str) -> None:
    assert containers.fetch(fibril.world, address, PUBLISHED) == GREETING


@pytest.mark.parametrize("address", [NODE4, NODE6], ids=["v4", "v6"])
def test_a_published_port_is_reached_from_a_container(podman: Podman, address: str) -> None:
    assert podman.fetch("client", address, PUBLISHED) == GREETING


@pytest.mark.parametrize("address", [WORLD4, WORLD6], ids=["v4", "v6"])
def test_a_container_reaches_the_world_masqueraded(
    podman: Podman, fibril: CniNode, address: str, tmp_path: Path
) -> None:
    # The world has no route to the pods: it can answer the node's own address only.
    with containers.web_server(fibril.world, tmp_path):
        assert podman.fetch("client", address) == GREETING


def test_a_restarted_container_is_attached_again(podman: Podman) -> None:
    podman("restart", "--time", "0", "web")
    for address in podman.addresses("web"):
        containers.wait_until(
            lambda to=address: podman.fetch("client", to) == GREETING, f"an answer of {address}"
        )  # type: ignore[misc]


def test_a_removed_container_leaves_nothing(podman: Podman, fibril: CniNode) -> None:
    before = len(fibril.endpoints())
    podman.start("short")
    assert len(fibril.endpoints()) == before + 1
    podman("rm", "--force", "--time", "0", "short")
    assert len(fibril.endpoints()) == before
