"""The host's addresses, followed in a network namespace."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from services.common.hostaddrs import HostAddresses
from services.common.kernel import netns
from services.common.kernel.netlink import Netlink
from services.common.kernel.netns import NetNs
from tests import session
from tests.interop.etcd.etcdrig import until


@pytest.fixture
def space() -> Iterator[Path]:
    path = Path(f"/run/netns/{session.name()}")
    netns.add(path)
    try:
        yield path
    finally:
        netns.remove(path)


async def test_addresses_that_others_can_send_to_are_followed(space: Path) -> None:
    def ip(*words: str) -> None:
        subprocess.run(["ip", "-n", space.name, *words], check=True)

    ip("link", "set", "lo", "up")
    ip("link", "add", "eth0", "up", "type", "veth", "peer", "name", "other")
    ip("address", "add", "198.18.5.1/24", "dev", "eth0")
    with NetNs.open(space) as inside, inside.entered():
        async with Netlink() as netlink:
            told: list[frozenset[str]] = []
            host = HostAddresses(netlink, lambda: told.append(frozenset(map(str, host.addresses))))
            await host.start()
            following = asyncio.create_task(host.run())
            assert told == [frozenset({"198.18.5.1"})]
            # Also on loopback: a service's address, for example.
            ip("address", "add", "198.18.5.9/32", "dev", "lo")
            ip("address", "add", "2001:db8:5::1/64", "dev", "eth0", "nodad")
            wanted = {ip_address(text) for text in ("198.18.5.1", "198.18.5.9", "2001:db8:5::1")}
            await until(lambda: host.addresses == wanted, "both new ones")
            ip("address", "del", "198.18.5.1/24", "dev", "eth0")
            await until(lambda: ip_address("198.18.5.1") not in host.addresses, "the one that went")
            ip("address", "del", "198.18.5.9/32", "dev", "lo")
            # What the stack keeps besides: whoever sends to it reaches this host.
            ip("address", "add", "198.18.6.1/24", "dev", "eth0")
            ip("address", "add", "169.254.20.10/32", "dev", "lo")
            ip("address", "add", "198.18.7.1/32", "dev", "lo", "scope", "host")
            ip("address", "add", "198.18.8.2/31", "dev", "eth0")
            texts = ("2001:db8:5::1", "2001:db8:5::", "198.18.6.1", "198.18.6.255", "169.254.20.10", "198.18.7.1", "198.18.8.2")
            await until(lambda: host.taken == {ip_address(text) for text in texts}, "all that it takes")
            assert host.addresses == {ip_address(text) for text in ("2001:db8:5::1", "198.18.6.1", "198.18.8.2")}
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            host.close()
