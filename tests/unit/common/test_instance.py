"""Names of a node: valid, short enough for the kernel, different for different nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidArgument
from services.common.instance import ENDPOINT_ID_MAX, Instance

NAMES = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", fullmatch=True)


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a.b", "a/b", "a" * 41, "node\n"])
def test_an_invalid_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Instance(name)
    assert caught.value.field == "instance"


@given(NAMES, st.integers(1, ENDPOINT_ID_MAX))
def test_every_name_fits_the_kernel(name: str, endpoint: int) -> None:
    instance = Instance(name)
    assert len(instance.host_ifname(endpoint)) <= 15
    assert len(instance.node_ifname) <= 15
    assert len(instance.node_peer_ifname) <= 15
    assert len(str(instance.socket("sockaccel"))) <= 107


@pytest.mark.parametrize("endpoint", [0, -1, ENDPOINT_ID_MAX + 1])
def test_an_endpoint_id_out_of_range_is_refused(endpoint: int) -> None:
    with pytest.raises(InvalidArgument):
        Instance().host_ifname(endpoint)


def test_paths_derive_from_name_and_roots() -> None:
    instance = Instance.from_env(
        "a", {"FIBRIL_RUN_ROOT": "/t/r", "FIBRIL_STATE_ROOT": "/t/s", "FIBRIL_BPFFS": "/t/b"}
    )
    assert instance.socket("ipam") == Path("/t/r/a/ipam.sock")
    assert instance.cni_socket == Path("/t/r/a/cni.sock")
    assert instance.pidfile("etcd") == Path("/t/r/a/etcd.pid")
    assert instance.state_dir == Path("/t/s/a")
    assert instance.pin_dir == Path("/t/b/fibril/a")
    assert (instance.cgroup, instance.nft_table) == ("fibril/a", "fibril-a")


def test_defaults_hold_without_environment() -> None:
    assert Instance.from_env(env={}) == Instance()
    assert Instance().run_dir == Path("/run/fibril/node")


def test_two_nodes_share_no_device_name() -> None:
    one, two = Instance("a"), Instance("b")
    assert one.tag != two.tag
    assert one.host_ifname(1) != two.host_ifname(1)


def test_a_run_root_too_long_for_sockets_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="too long"):
        Instance("a", run_root=Path("/" + "x" * 100))


def test_a_relative_root_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="absolute"):
        Instance("a", state_root=Path("state"))
