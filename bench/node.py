"""A whole node: seconds from `fibril up` to healthy, and the memory of its largest service with 1,000 endpoints.

Each node is a network namespace of its own with private run, state and pin directories; nothing of it stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.common import Bench, log, median, quick
from fibril.endpoint.v1 import endpoint_pb2, endpoint_pb2_grpc
from services.common.instance import Instance
from services.common.rpc.client import channel

FIBRIL = Path(sys.executable).parent / "fibril"
ENDPOINTS = quick(200, 1000)


class Node:
    """A network namespace with a Fibril instance in it, driven through the command as a user would."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.root = root
        # Sockets of the machine, and of other nodes on it, are none of this one's.
        self.env = {**os.environ, "FIBRIL_RUN_ROOT": str(root / "run"), "FIBRIL_STATE_ROOT": str(root / "state"),
                    "FIBRIL_LB_CGROUP": Instance(name).cgroup, "FIBRIL_SOCKACCEL_CGROUP": Instance(name).cgroup}

    def fibril(self, *words: str) -> None:
        """Run the command inside the namespace (nsenter leaves /sys alone, so bpffs stays in sight)."""
        subprocess.run(["nsenter", f"--net=/run/netns/{self.name}", str(FIBRIL), "--instance", self.name, *words],
                       env=self.env, check=True, stdout=sys.stderr)

    def pss_mb(self) -> dict[str, float]:
        """Proportional set size of every service process of the instance, MB."""
        sizes = {}
        for path in (self.root / "run" / self.name).glob("*.pid"):
            pid = path.read_text().split()[0]
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            sizes[path.stem] = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024
        return sizes


@contextlib.contextmanager
def node(name: str = "") -> Iterator[Node]:
    """A node's namespace with loopback up, of that name or one of its own; the instance in it is taken down at the end."""
    name = name or f"fb{secrets.token_hex(3)}"
    root = Path(tempfile.mkdtemp(prefix=name))
    subprocess.run(["ip", "netns", "add", name], check=True)
    made = Node(name, root)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield made
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            made.fibril("down")
        subprocess.run(["ip", "netns", "del", name], check=False)
        shutil.rmtree(root, ignore_errors=True)


def up_to_healthy() -> float:
    """Seconds from the command to a healthy node, everything installed, nothing running."""
    with node() as fresh:
        start = time.perf_counter()
        fresh.fibril("up")
        return time.perf_counter() - start


async def fill(fresh: Node, names: list[str]) -> None:
    """Give every namespace an endpoint."""
    socket = fresh.root / "run" / fresh.name / "ipam.sock"
    async with channel(f"unix:{socket}") as to_ipam:
        stub = endpoint_pb2_grpc.EndpointServiceStub(to_ipam)
        for number, name in enumerate(names):
            await stub.CreateEndpoint(endpoint_pb2.CreateEndpointRequest(
                container_id=name, netns=f"/run/netns/{name}", pod=f"bench/pod-{number}", labels={"app": "bench"}))
            if number % 100 == 99:
                log(f"{number + 1} endpoints")


def pss_with_endpoints() -> float:
    """MB (PSS) of the largest service process with ENDPOINTS endpoints."""
    with node() as fresh:
        fresh.fibril("up")
        names = [f"{fresh.name}p{number}" for number in range(ENDPOINTS)]
        try:
            for name in names:
                subprocess.run(["ip", "netns", "add", name], check=True)
            asyncio.run(fill(fresh, names))
            sizes = {name: size for name, size in fresh.pss_mb().items() if name != "etcd"}
            log(", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items()))
            return max(sizes.values())
        finally:
            for name in names:
                subprocess.run(["ip", "netns", "del", name], check=False)


def main() -> None:
    """Print the node's figures."""
    with Bench("ipam") as bench:
        bench.emit("up_to_healthy", "s", median([up_to_healthy() for _ in range(quick(3, 7))]), "target", 3.0)
        bench.emit("service_pss_1000", "MB", pss_with_endpoints(), "target", 60.0)


if __name__ == "__main__":
    main()
