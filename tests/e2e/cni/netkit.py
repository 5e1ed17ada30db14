"""Namespaces, traffic and a node's belongings, for the CNI end-to-end tests."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from bench.node import Node
from fibril.endpoint.v1.endpoint_pb2 import Endpoint, ListEndpointsRequest
from fibril.endpoint.v1.endpoint_pb2_grpc import EndpointServiceStub
from fibril.ipam.v1.ipam_pb2 import ListAllocationsRequest
from fibril.ipam.v1.ipam_pb2_grpc import IpamServiceStub
from fibril.types.v1.types_pb2 import PageRequest
from lab.cniruntime import CniRuntime, enter_netns
from services.common.instance import Instance
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi
from services.ipam.cni.install import Installed, install

T = TypeVar("T")
PLUGINS = Path("/usr/lib/cni")
# The plugin talks to ipam; tests/interop has containers on a node with all services.
UP = ("up", "--services", "ipam,identity")


def netns_path(name: str) -> Path:
    return Path("/run/netns") / name


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def ip_json(*words: str) -> Any:
    done = subprocess.run(["ip", "-j", *words], check=True, capture_output=True, text=True)
    return json.loads(done.stdout or "[]")


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Poll; AssertionError names what did not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s"
        time.sleep(0.02)


def inside(netns: str, work: Callable[[], T]) -> T:
    """Run a function in a thread that lives in a network namespace."""
    with ThreadPoolExecutor(1, initializer=lambda: enter_netns(netns_path(netns))) as thread:
        return thread.submit(work).result()


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@contextlib.contextmanager
def echo_server(netns: str, address: str, port: int = 7) -> Iterator[None]:
    """A TCP server in a namespace that sends back what it gets until the client has finished sending."""

    def listen() -> socket.socket:
        listener = socket.socket(_family(address), socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(64)
        return listener

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(ConnectionError):
                    while part := connection.recv(65536):
                        connection.sendall(part)

    listener = inside(netns, listen)
    thread = threading.Thread(target=serve, args=(listener,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def echo(netns: str, address: str, port: int = 7, size: int = 1000) -> float:
    """Send `size` bytes to an echo server and take them back; seconds it took. OSError: no answer."""

    def talk() -> float:
        began = time.monotonic()
        with socket.socket(_family(address), socket.SOCK_STREAM) as client:
            client.settimeout(20)
            client.connect((address, port))
            sender = threading.Thread(target=client.sendall, args=(b"x" * size,))
            sender.start()
            left = size
            while left:
                left -= len(client.recv(min(left, 65536))) or left + 1
            sender.join()
        return time.monotonic() - began

    return inside(netns, talk)


@dataclass(frozen=True)
class Belongings:
    """What a node holds for its pods, everywhere it could leak."""

    links: int
    routes: int
    neighbours: int
    map_entries: dict[str, int]
    endpoints: int
    allocations: int


class Fibril:
    """A running node with its CNI plugin installed, and the pods' namespaces a test makes."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.instance = Instance(node.name, node.root / "run", node.root / "state")
        self.installed: Installed = install(self.instance, node.root / "bin", node.root / "net.d", chained=())
        self.plugin = self.installed.plugin.name
        self._names: list[str] = []
        self._numbers = itertools.count(1)

    def network(self, *chained: dict[str, Any], version: str = "1.1.0", **ours: Any) -> CniRuntime:
        """A CNI network on this node: ours with extra fields, then chained plugins."""
        first = {"type": self.plugin, "capabilities": {"ips": True, "bandwidth": True}, **ours}
        conflist = {"cniVersion": version, "name": "test", "plugins": [first, *chained]}
        return CniRuntime(
            conflist, [self.installed.plugin.parent, PLUGINS], netns_path(self.node.name), workers=20
        )

    def namespace(self) -> str:
        """A new pod's namespace."""
        name = f"{self.node.name}-{next(self._numbers)}"
        ip("netns", "add", name)
        self._names.append(name)
        ip("-n", name, "link", "set", "lo", "up")
        return name

    def drop(self, name: str) -> None:
        """Delete a namespace."""
        self._names.remove(name)
        ip("netns", "del", name)

    def close(self) -> None:
        """Delete the namespaces that are left."""
        for name in list(self._names):
            self.drop(name)

    def endpoints(self) -> list[Endpoint]:
        """What the service says it has."""
        with grpc.insecure_channel(f"unix:{self.instance.socket('ipam')}") as channel:
            request = ListEndpointsRequest(page=PageRequest(size=1000))
            return list(
                EndpointServiceStub(channel).ListEndpoints(request, timeout=10, wait_for_ready=True).endpoints
            )

    def pid(self) -> int:
        """The ipam process."""
        return int(self.instance.pidfile("ipam").read_text().split()[0])

    def supervisor_pid(self) -> int:
        """The process that starts the others."""
        return int(json.loads((self.instance.run_dir / "supervisor.json").read_text())["pid"])

    def flags(self, container: str) -> abi.EndpointFlag:
        """What the data path knows of an endpoint."""
        ifindex = next(entry.host_ifindex for entry in self.endpoints() if entry.container_id == container)
        path = self.instance.pin_dir / abi.MAPS["ep_iface"]
        with BpfMap.open(path, ctypes.c_uint32, abi.Endpoint) as opened:
            found = opened.lookup(ifindex)
        assert found is not None
        return abi.EndpointFlag(found.flags)

    def belongings(self) -> Belongings:
        """Count everything."""
        with grpc.insecure_channel(f"unix:{self.instance.socket('ipam')}") as channel:
            allocations = IpamServiceStub(channel).ListAllocations(
                ListAllocationsRequest(page=PageRequest(size=1000)), timeout=10, wait_for_ready=True
            )
        name = self.node.name
        prefix = f"fb{self.instance.tag}"
        entries = {}
        for map_name, key in (("ep_iface", ctypes.c_uint32), ("ep_addr", abi.FibAddr)):
            with BpfMap.open(self.instance.pin_dir / abi.MAPS[map_name], key, abi.Endpoint) as opened:
                entries[map_name] = opened.count()
        with BpfMap.open(
            self.instance.pin_dir / abi.MAPS["ep_netns"], ctypes.c_uint64, ctypes.c_uint32
        ) as cookies:
            entries["ep_netns"] = cookies.count()
        return Belongings(
            links=sum(link["ifname"].startswith(prefix) for link in ip_json("-n", name, "link")),
            # Blocks the node has taken in have routes too, and stay.
            routes=sum(
                route.get("dev", "").startswith(prefix) and "/" not in route["dst"]
                for family in ("-4", "-6")
                for route in ip_json("-n", name, family, "route")
            ),
            neighbours=len(ip_json("-n", name, "neigh", "show", "nud", "permanent")),
            map_entries=entries,
            endpoints=len(self.endpoints()),
            allocations=len(allocations.allocations),
        )
