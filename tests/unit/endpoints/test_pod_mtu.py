"""How large the packets of pods that ask for nothing may be."""

from __future__ import annotations

import ipaddress
from types import SimpleNamespace
from typing import Any

import pytest

from services.common.network import Mode, NetworkConfig, Underlay
from services.ipam.endpoints.node import pod_mtu


class Host:
    """Uplinks 2 and 3 with MTU and addresses, and default routes through some of them."""

    def __init__(self, mtus: tuple[int, ...], addresses: tuple[str, ...], default: tuple[int, ...]) -> None:
        self._mtus, self._addresses, self._default = mtus, addresses, default

    def links(self, prefix: str = "") -> list[Any]:
        found = [SimpleNamespace(ifindex=2 + n, name=f"eth{n}", mtu=m) for n, m in enumerate(self._mtus)]
        return [link for link in found if link.name.startswith(prefix)]

    def addresses(self, ifindex: int) -> list[Any]:
        return [SimpleNamespace(address=ipaddress.ip_address(a)) for a in self._addresses]

    def routes(self, **_: object) -> list[Any]:
        zero = ipaddress.ip_network("0.0.0.0/0")
        return [SimpleNamespace(ifindex=index, destination=zero) for index in self._default]


@pytest.mark.parametrize(
    ("host", "network", "mtu"),
    [
        (Host((), (), ()), NetworkConfig(), 1450),
        (Host((1500,), ("192.0.2.1", "2001:db8::1"), (2,)), NetworkConfig(), 1450),
        (Host((1500,), ("2001:db8::1",), (2,)), NetworkConfig(), 1430),
        (Host((1500,), ("2001:db8::1",), (2,)), NetworkConfig(ipv4="192.0.2.1"), 1450),
        (Host((1500,), ("192.0.2.1",), (2,)), NetworkConfig(underlay=Underlay.IPV6), 1430),
        (Host((9000,), ("192.0.2.1",), (2,)), NetworkConfig(mode=Mode.ROUTED), 9000),
        (Host((9000,), ("192.0.2.1",), (2,)), NetworkConfig(mode=Mode.CLOUD), 9000),
        (Host((9000,), ("192.0.2.1",), (2,)), NetworkConfig(mode=Mode.AUTO), 8950),
        (Host((9000, 1500), ("192.0.2.1",), (2, 3)), NetworkConfig(), 1450),
        (Host((9000, 1500), ("192.0.2.1",), (2, 3)), NetworkConfig(device="eth0"), 8950),
        (Host((1280,), ("192.0.2.1",), (2,)), NetworkConfig(), 1280),
    ],
)  # fmt: skip
def test_pods_packets_fit_through_the_uplink(host: Any, network: NetworkConfig, mtu: int) -> None:
    assert pod_mtu(host, network) == mtu
