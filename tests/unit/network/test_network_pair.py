"""How two nodes decide to travel."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.network import Mode, Underlay
from services.common.pipeline import abi
from services.identity.network.pair import Side, decide

OVERLAY, ROUTED, STACK, NONE = (
    abi.NodeMode.OVERLAY, abi.NodeMode.ROUTED, abi.NodeMode.STACK, abi.NodeMode.NONE,
)  # fmt: skip


def side(
    number: int = 1, subnet: int = 1, mode: Mode = Mode.OVERLAY, families: str = "46", **more: Any
) -> Side:
    values = dict(
        mode=mode,
        ipv4=IPv4Address(f"172.29.{subnet}.{number}") if "4" in families else None,
        ipv6=IPv6Address(f"fd29:{subnet}::{number}") if "6" in families else None,
        networks=tuple(
            ip_network(text)
            for family, text in (("4", f"172.29.{subnet}.0/24"), ("6", f"fd29:{subnet}::/64"))
            if family in families
        ),
        mtu=1500,
        overlay_port=8472,
        pods=frozenset({4, 6}),
    )
    return Side(**{**values, **more})


# Modes of two nodes -> (on one network, on two): mode used, whether there is something to complain about.
TABLE = {
    (Mode.OVERLAY, Mode.OVERLAY): ((OVERLAY, False), (OVERLAY, False)),
    (Mode.ROUTED, Mode.ROUTED): ((ROUTED, False), (STACK, True)),
    (Mode.CLOUD, Mode.CLOUD): ((STACK, False), (STACK, False)),
    (Mode.AUTO, Mode.AUTO): ((ROUTED, False), (OVERLAY, False)),
    (Mode.OVERLAY, Mode.AUTO): ((OVERLAY, False), (OVERLAY, False)),
    (Mode.ROUTED, Mode.AUTO): ((ROUTED, False), (OVERLAY, True)),
    (Mode.OVERLAY, Mode.ROUTED): ((OVERLAY, True), (OVERLAY, True)),
    (Mode.OVERLAY, Mode.CLOUD): ((OVERLAY, True), (OVERLAY, True)),
    (Mode.AUTO, Mode.CLOUD): ((OVERLAY, True), (OVERLAY, True)),
    (Mode.ROUTED, Mode.CLOUD): ((STACK, True), (STACK, True)),
}


@pytest.mark.parametrize("modes", TABLE, ids=lambda modes: "+".join(mode.value for mode in modes))
def test_every_combination_of_modes(modes: tuple[Mode, Mode]) -> None:
    for subnet, (mode, wrong) in zip((1, 2), TABLE[modes], strict=True):
        for first, second in (modes, modes[::-1]):
            pair = decide(side(1, 1, first), side(2, subnet, second))
            assert (pair.mode, bool(pair.problem)) == (mode, wrong), (subnet, pair)


@pytest.mark.parametrize(
    ("own", "peer", "underlay", "family", "mtu"),
    [
        ("46", "46", Underlay.AUTO, 4, 1450),
        ("46", "6", Underlay.AUTO, 6, 1430),
        ("4", "46", Underlay.AUTO, 4, 1450),
        ("46", "46", Underlay.IPV6, 6, 1430),
    ],
)
def test_overlay_packets_travel_in_the_family_both_have(
    own: str, peer: str, underlay: Underlay, family: int, mtu: int
) -> None:
    pair = decide(side(1, families=own), side(2, families=peer), underlay)
    assert (pair.mode, pair.tunnel, pair.mtu, pair.problem) == (OVERLAY, family, mtu, "")


@pytest.mark.parametrize(
    ("own", "peer", "underlay", "words"),
    [
        (side(1), side(2, overlay_port=4789), Underlay.AUTO, "overlay ports differ: 8472 and 4789"),
        (side(1, families="4"), side(2, families="6"), Underlay.AUTO, "no address family is common"),
        (side(1, families="4"), side(2), Underlay.IPV6, "network.underlay is ipv6"),
        (side(1, families=""), side(2), Underlay.AUTO, "this node has no address"),
        (side(1), side(2, families=""), Underlay.AUTO, "has published no address"),
    ],
)
def test_what_cannot_be_says_why(own: Side, peer: Side, underlay: Underlay, words: str) -> None:
    pair = decide(own, peer, underlay)
    assert pair.mode is NONE
    assert words in pair.problem


def test_the_smaller_uplink_counts() -> None:
    assert decide(side(1, mtu=9000), side(2, mtu=1500)).mtu == 1450
    assert decide(side(1, mode=Mode.ROUTED, mtu=9000), side(2, mode=Mode.ROUTED)).mtu == 1500
    assert "1280" in decide(side(1, mtu=1300), side(2)).problem


def test_auto_routes_only_if_all_pods_can_be_routed() -> None:
    narrow = [side(number, mode=Mode.AUTO, families="4") for number in (1, 2)]
    assert decide(*narrow).mode is OVERLAY
    ipv4_only = [side(number, mode=Mode.AUTO, families="4", pods=frozenset({4})) for number in (1, 2)]
    assert decide(*ipv4_only).mode is ROUTED
    # IPv4 packets can be handed to a node's IPv6 address.
    modern = [side(number, mode=Mode.AUTO, families="6") for number in (1, 2)]
    assert decide(*modern).mode is ROUTED
    assert decide(*modern).hops == {(4, 6), (6, 6)}
    told = [side(number, mode=Mode.ROUTED, families="4") for number in (1, 2)]
    assert decide(*told).mode is ROUTED
    assert "IPv6 pods cannot be routed" in decide(*told).problem


sides = st.builds(
    side,
    number=st.integers(1, 3),
    subnet=st.integers(1, 2),
    mode=st.sampled_from(Mode),
    families=st.sampled_from(["", "4", "6", "46"]),
    mtu=st.sampled_from([0, 1300, 1500, 9000]),
    overlay_port=st.sampled_from([8472, 4789]),
    pods=st.frozensets(st.sampled_from([4, 6])),
    networks=st.lists(
        st.sampled_from([*map(ip_network, ("172.29.1.0/24", "172.29.0.0/16", "fd29:1::/64", "fd29::/16"))]),
        unique=True,
    ).map(tuple),
)


@given(sides, sides, st.sampled_from(Underlay))
def test_both_sides_decide_alike(own: Side, peer: Side, underlay: Underlay) -> None:
    here, there = decide(own, peer, underlay), decide(peer, own, underlay)
    assert (here.mode, here.tunnel, here.mtu, here.hops) == (there.mode, there.tunnel, there.mtu, there.hops)
    assert (bool(here.problem), here.direct) == (bool(there.problem), there.direct)
    assert not here.direct or (here.mode is OVERLAY and here.tunnel == 4)
    # What cannot be sent is explained, and what is sent has what it needs.
    assert here.problem or here.mode is not NONE
    if here.mode is OVERLAY:
        assert own.address(here.tunnel) and peer.address(here.tunnel)
    if here.mode is ROUTED:
        assert here.hops
        assert all(own.address(family) and peer.address(family) for _, family in here.hops)
