"""Which devices XDP goes to, and how: the pure part."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

import pytest

from services.common.kernel.netlink import TABLE_MAIN, UNICAST, UNREACHABLE, Link, Route
from services.common.kernel.xdp import Feature, Mode
from services.common.pipeline.uplinks import uplinks
from services.lb.xdp.abi import MACS, Own, mac_word
from services.lb.xdp.hooks import wanted_mode

ETH0 = Link(2, "eth0", True, True, 0, 1500, "02:00:00:00:00:01", "", 0, None)
ETH1, POD, VETH = replace(ETH0, ifindex=3, name="eth1"), replace(ETH0, ifindex=4, name="fb1a2b0"), replace(ETH0, kind="veth")
LINKS = [ETH0, ETH1, POD]
ALL = Feature.BASIC | Feature.REDIRECT | Feature.TRANSMIT


def default(version: int, ifindex: int, metric: int = 0, kind: int = UNICAST) -> Route:
    return Route(ip_network("0.0.0.0/0" if version == 4 else "::/0"), None, ifindex, None, kind, 0, 3, TABLE_MAIN, metric)


def names(*routes: Route, wanted: tuple[str, ...] = ()) -> list[str]:
    return [link.name for link in uplinks(wanted, "fb1a2b", LINKS, routes)]


def test_named_devices_are_taken_whatever_the_routes_say() -> None:
    assert names(default(4, 2), wanted=("eth1", "eth9")) == ["eth1"]


def test_the_best_default_route_of_each_family_counts() -> None:
    assert names(default(4, 3, 100), default(4, 2, 50), default(6, 2, 1024)) == ["eth0"]
    assert names(default(4, 2), default(6, 3)) == ["eth0", "eth1"]


def test_no_default_route_no_device() -> None:
    other = replace(default(4, 2), destination=ip_network("10.0.0.0/8"))
    assert names(default(4, 2, kind=UNREACHABLE), default(4, 4), other) == []


@pytest.mark.parametrize(
    ("link", "configured", "can", "mode"),
    [
        (ETH0, "auto", ALL, Mode.NATIVE),
        (ETH0, "auto", Feature.BASIC, Mode.NATIVE),
        (ETH0, "auto", Feature(0), Mode.GENERIC),
        (ETH0, "auto", None, Mode.NATIVE),  # an old kernel: found out by trying
        (ETH0, "generic", ALL, Mode.GENERIC),
        (VETH, "auto", ALL, Mode.NATIVE),
        (VETH, "auto", Feature.BASIC | Feature.REDIRECT, Mode.GENERIC),
        (VETH, "auto", None, Mode.GENERIC),
    ],
)
def test_native_where_nothing_would_be_lost(link: Link, configured: str, can: Feature | None, mode: Mode) -> None:
    found, note = wanted_mode(link, configured, can)
    assert found is mode
    # Who is told "generic" without having asked for it is told why.
    assert bool(note) == (mode is Mode.GENERIC and configured == "auto")


def test_macs_have_their_first_byte_lowest() -> None:
    assert mac_word("02:00:00:00:00:01") == 0x0100_0000_0002
    own = Own.of(["02:00:00:00:00:01"], redirect=True)
    assert list(own.macs) == [0x0100_0000_0002] + [0] * (MACS - 1) and own.redirect == 1
