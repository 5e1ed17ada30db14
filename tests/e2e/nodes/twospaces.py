"""Two namespaces on one cable, each with a node that probes. Node n:

eth0   172.30.0.<n>/24, fd30::<n>/64
lo     10.30.<n>.1, fd30:<n>::1: the gateways, which the other reaches by a route of its own
"""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

from fibril.ipam.v1 import ipam_pb2
from services.common.kernel.netns import NetNs
from services.identity.nodes.directory import root_of
from services.identity.nodes.health import Health
from services.identity.nodes.probe import Prober
from tests.interop.nodes.noderig import CLUSTER, Member

PORT = 4240
INTERVAL_S = 0.3


class Space:
    """A namespace without a name, which ends with the test's process at the latest."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
        self.pid = self._holder.pid
        self.path = Path(f"/proc/{self.pid}/ns/net")
        until = time.monotonic() + 10
        # Before it has become what it shall be, it is in our namespace.
        while self.path.readlink() == Path("/proc/self/ns/net").readlink():
            assert time.monotonic() < until, "no namespace was made"
            time.sleep(0.005)
        self.ns = NetNs.open(self.path)

    def sh(self, line: str) -> None:
        subprocess.run(["nsenter", f"--net={self.path}", "sh", "-ec", line], check=True, timeout=30)

    def close(self) -> None:
        self.ns.close()
        self._holder.communicate(timeout=10)


def connect(a: Space, b: Space) -> None:
    a.sh(f"ip link add eth0 type veth peer name eth0 netns {b.pid}")
    for space, own, other in ((a, 1, 2), (b, 2, 1)):
        space.sh(
            "ip link set lo up; ip link set eth0 addrgenmode none up;"
            f"ip addr add 172.30.0.{own}/24 dev eth0; ip addr add fd30::{own}/64 dev eth0 nodad;"
            f"ip addr add 10.30.{own}.1/32 dev lo; ip addr add fd30:{own}::1/128 dev lo nodad"
        )
        pod_routes(space, other)


def pod_routes(space: Space, other: int, what: str = "add") -> None:
    """The way to the other node's pods."""
    space.sh(
        f"ip route {what} 10.30.{other}.0/24 via 172.30.0.{other}; ip route {what} fd30:{other}::/64 via fd30::{other}"
    )


class _Prober(Prober):
    """Its sockets are in a namespace; all else of the process is outside."""

    def __init__(self, space: Space) -> None:
        super().__init__(PORT)
        self._space = space

    def _bound(self, version: int) -> socket.socket | None:
        with self._space.ns.entered():
            return super()._bound(version)


class Probing(Member):
    """Node n<number>, with blocks in etcd."""

    def __init__(self, url: str, space: Space, number: int, root: Path) -> None:
        super().__init__(url, f"n{number}", root, f"172.30.0.{number}", ipv6=f"fd30::{number}")
        self._number = number
        self.health = Health(self.etcd, CLUSTER, self.name, PORT, self.lease, self.directory, INTERVAL_S)
        self.health._prober = _Prober(space)

    async def start(self) -> Probing:
        for cidr, gateway in (
            (f"10.30.{self._number}.0/24", f"10.30.{self._number}.1"),
            (f"fd30:{self._number}::/64", f"fd30:{self._number}::1"),
        ):
            block = ipam_pb2.Block(cidr=cidr, pool="default", node=self.name, gateway=gateway)
            key = f"{root_of(CLUSTER)}blocks/default/{cidr.replace('/', '_')}"
            await self.etcd.put(key, block.SerializeToString())
        await super().start()
        await self.health.start()
        return self

    async def stop(self) -> None:
        await self.health.stop()
        await super().stop()

    def sees(self, name: str) -> tuple[bool, bool] | None:
        """What it found out itself: underlay, pod network."""
        view = self.health.of(name).get(self.name)
        return (view.underlay, view.pod_network) if view is not None else None
