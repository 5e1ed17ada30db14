from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from services.common.network import NetworkConfig
from tests.e2e.network.meshkit import Fabric, Host


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    made = Fabric()
    yield made
    made.delete()


@pytest.fixture
def make_host(fabric: Fabric) -> Iterator[Callable[..., Host]]:
    """Makes a host with a number, on a subnet, with a default route; options are its NetworkConfig's."""
    with contextlib.ExitStack() as stack:

        def make(number: int = 1, subnet: int = 1, mtu: int = 1500, **options: Any) -> Host:
            host = Host(NetworkConfig(**options))
            stack.callback(host.close)
            fabric.connect(host, number, subnet, mtu=mtu)
            host.sh(
                f"ip route add default via 172.29.{subnet}.254; ip route add default via fd29:{subnet}::ff"
            )
            return host

        yield make


@pytest.fixture
def host(make_host: Callable[..., Host]) -> Host:
    """Number 1 on subnet 1, ipam set up, network started."""
    made = make_host()
    made.ipam("10.9.1.0/24", "fd09:0:0:1::/64")
    made.start()
    return made
