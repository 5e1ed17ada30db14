"""A node with its ipam service as a process, pods, a world beyond the node, and traffic between them.

world 203.0.113.1, 2001:db8:ffff::1                 (no route back to pods)
  | 192.0.2.2, 2001:db8:8::2
  | 192.0.2.1, 2001:db8:8::1
node (namespace, instance of its own)
  |            |
pod          pod    …  a namespace each
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc

from fibril.endpoint.v1 import endpoint_pb2 as ep
from fibril.endpoint.v1.endpoint_pb2_grpc import EndpointServiceStub
from fibril.ipam.v1 import ipam_pb2
from fibril.ipam.v1.ipam_pb2_grpc import IpamServiceStub
from fibril.monitor.v1.monitor_pb2_grpc import MonitorServiceStub
from fibril.status.v1 import status_pb2
from fibril.status.v1.status_pb2_grpc import StatusServiceStub
from services.common.etcd.embedded import EmbeddedEtcd
from services.common.instance import Instance
from services.common.kernel.maps import BpfMap
from services.common.kernel.netns import NetNs
from services.common.pipeline import abi
from tests import session

T = TypeVar("T")
ROOT = Path(__file__).parents[3]
NODE = {4: "192.0.2.1", 6: "2001:db8:8::1"}
WORLD = {4: "203.0.113.1", 6: "2001:db8:ffff::1"}
LINK = {4: "192.0.2.2", 6: "2001:db8:8::2"}


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def ip_json(*words: str) -> Any:
    return json.loads(ip("-j", *words) or "[]")


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    """Poll until the condition gives something true, and give that."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)
    return value


class Space:
    """A network namespace and a thread that lives in it."""

    def __init__(self, name: str, existing: bool = False) -> None:
        self.name = name
        self.path = f"/run/netns/{name}"
        if not existing:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        self._thread: ThreadPoolExecutor | None = None

    def run(self, work: Callable[..., T], *args: Any) -> T:
        """Call a function on the namespace's thread. Sockets it makes stay in the namespace."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, initializer=self._enter)
        return self._thread.submit(work, *args).result()

    def _enter(self) -> None:
        with NetNs.open(self.path) as space:
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.setns(space.fd, 0x40000000) == 0, os.strerror(ctypes.get_errno())

    def command(self, *argv: str, check: bool = True) -> str:
        """Run a program inside, with the mounts of outside."""
        done = subprocess.run(
            ["nsenter", f"--net={self.path}", *argv], capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def socket(self, version: int, kind: int) -> socket.socket:
        made = self.run(socket.socket, socket.AF_INET if version == 4 else socket.AF_INET6, kind)
        made.settimeout(5)
        return made

    def delete(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)


class Pod:
    """A namespace with an endpoint."""

    def __init__(self, space: Space, endpoint: ep.Endpoint) -> None:
        self.space = space
        self.endpoint = endpoint

    def address(self, version: int) -> str:
        return self.endpoint.ipv4 if version == 4 else self.endpoint.ipv6


class Node:
    """The namespace of a node, its etcd and its ipam process."""

    def __init__(
        self,
        settings: dict[str, str] | None = None,
        wrapper: tuple[str, ...] = (),
        world: bool = True,
        run: bool = True,
        wait: bool = True,
    ) -> None:
        self.name = session.name()
        self.root = Path(tempfile.mkdtemp(prefix=self.name))
        self.instance = Instance(self.name, self.root / "run", self.root / "state")
        self.space = Space(self.name)
        self.etcd = EmbeddedEtcd(self.root / "etcd-data", self.instance.run_dir / "etcd")
        self._settings = settings or {}
        self._wrapper = wrapper
        self._process: subprocess.Popen[bytes] | None = None
        self._etcd_process: subprocess.Popen[bytes] | None = None
        self._spaces: list[Space] = [self.space]
        self._numbers = itertools.count(1)
        self.channel = grpc.insecure_channel(
            f"unix:{self.instance.socket('ipam')}",
            options=[("grpc.initial_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 50)],
        )
        self.endpoints = EndpointServiceStub(self.channel)
        self.ipam = IpamServiceStub(self.channel)
        self.monitor = MonitorServiceStub(self.channel)
        try:
            if world:
                self._make_world()
            if run:
                self.begin(wait)
        except BaseException:
            self.close()
            raise

    def begin(self, wait: bool = True) -> None:
        """Start etcd and the service."""
        self.instance.run_dir.mkdir(parents=True)
        self.start_etcd()
        self.start(wait)

    def _make_world(self) -> None:
        self.world = Space(f"{self.name}w")
        self._spaces.append(self.world)
        ip(
            "-n",
            self.name,
            "link",
            "add",
            "uplink",
            "type",
            "veth",
            "peer",
            "name",
            "node0",
            "netns",
            self.world.name,
        )
        for space, device, own in ((self.space, "uplink", NODE), (self.world, "node0", LINK)):
            ip("-n", space.name, "link", "set", device, "addrgenmode", "none")
            ip("-n", space.name, "addr", "add", f"{own[4]}/24", "dev", device)
            ip("-n", space.name, "addr", "add", f"{own[6]}/64", "dev", device, "nodad")
            ip("-n", space.name, "link", "set", device, "up")
        for version in (4, 6):
            ip("-n", self.world.name, "addr", "add", WORLD[version], "dev", "lo")
            ip("-n", self.name, f"-{version}", "route", "add", "default", "via", LINK[version])

    def start_etcd(self) -> None:
        self.etcd.prepare()
        with open(self.root / "etcd.log", "ab") as log:
            self._etcd_process = subprocess.Popen(
                self.etcd.argv, env={**os.environ, **self.etcd.env}, cwd=self.etcd.cwd, stdout=log, stderr=log
            )

    def kill_etcd(self) -> None:
        if self._etcd_process is not None:
            self._etcd_process.kill()
            self._etcd_process.wait()
            self._etcd_process = None

    # ---- the process ------------------------------------------------------------------------------------
    def start(self, wait: bool = True) -> None:
        env = {
            **os.environ,
            "FIBRIL_RUN_ROOT": str(self.instance.run_root),
            "FIBRIL_STATE_ROOT": str(self.instance.state_root),
            "PYTHONPATH": str(ROOT),
        }
        options = [word for key, value in self._settings.items() for word in ("--set", f"{key}={value}")]
        with open(self.root / "log", "ab") as log:
            self._process = subprocess.Popen(
                [
                    "nsenter",
                    f"--net={self.space.path}",
                    *self._wrapper,
                    sys.executable,
                    "-m",
                    "services.ipam",
                    "--instance",
                    self.name,
                    "--etcd",
                    self.etcd.endpoint,
                    *options,
                ],
                env=env,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if wait:
            wait_until(self.healthy, f"service not healthy: {self.log()[-2000:]}", 30)

    def healthy(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self.log()[-3000:]
        components = self.status()
        return bool(components) and all(part.health == 1 for part in components.values())

    def status(self) -> dict[str, status_pb2.Component]:
        """Components by name; empty while nobody answers."""
        # gRPC, refused once, tries again only five seconds later.
        if not self.instance.socket("ipam").exists():
            return {}
        try:
            answer = StatusServiceStub(self.channel).GetStatus(status_pb2.GetStatusRequest(), timeout=2)
        except grpc.RpcError:
            return {}
        return {part.name: part for part in answer.components}

    def health(self, component: str) -> int:
        """Of a component; 0 while nobody answers."""
        part = self.status().get(component)
        return part.health if part is not None else 0

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process = None

    def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(20) == 0, self.log()[-2000:]
        self._process = None

    def log(self) -> str:
        return (self.root / "log").read_text(errors="replace")

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self.channel.close()
        self.kill_etcd()
        done = self._run_teardown()
        for space in reversed(self._spaces):
            space.delete()
        shutil.rmtree(self.root, ignore_errors=True)
        assert done.returncode == 0, done.stderr

    def teardown(self) -> None:
        """What `fibril down` removes outside processes and files."""
        done = self._run_teardown()
        assert done.returncode == 0, done.stderr

    def _run_teardown(self) -> subprocess.CompletedProcess[str]:
        script = (
            "import asyncio, sys\nfrom pathlib import Path\nfrom services.common.instance import Instance\n"
            "from services.ipam.endpoints import teardown\n"
            "asyncio.run(teardown.remove(Instance(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))"
        )
        roots = (str(self.instance.run_root), str(self.instance.state_root))
        return subprocess.run(
            ["nsenter", f"--net={self.space.path}", sys.executable, "-c", script, self.name, *roots],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    # ---- pods -------------------------------------------------------------------------------------------
    def namespace(self) -> Space:
        space = Space(f"{self.name}-{next(self._numbers)}")
        self._spaces.append(space)
        return space

    def create(self, space: Space, **options: Any) -> ep.Endpoint:
        request = ep.CreateEndpointRequest(
            **{"container_id": space.name, "netns": space.path, "pod": f"test/{space.name}", **options}
        )
        return self.endpoints.CreateEndpoint(request, timeout=20, wait_for_ready=True).endpoint

    def pod(self, **options: Any) -> Pod:
        space = self.namespace()
        return Pod(space, self.create(space, **options))

    def delete(self, pod: Pod) -> int:
        done: int = self.endpoints.DeleteEndpoint(
            ep.DeleteEndpointRequest(container_id=pod.endpoint.container_id), timeout=20, wait_for_ready=True
        ).deleted
        return done

    def remove(self, *pods: Pod) -> None:
        """Endpoint and namespace."""
        for pod in pods:
            self.delete(pod)
            pod.space.delete()
            self._spaces.remove(pod.space)

    def get(self, pod: Pod) -> ep.Endpoint | None:
        try:
            return self.endpoints.GetEndpoint(ep.GetEndpointRequest(id=pod.endpoint.id), timeout=5).endpoint
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.NOT_FOUND
            return None

    def differences(self, pod: Pod) -> list[str]:
        key = ep.EndpointKey(container_id=pod.endpoint.container_id, ifname=pod.endpoint.ifname)
        return list(self.endpoints.CheckEndpoint(ep.CheckEndpointRequest(key=key), timeout=5).differences)

    def allocations(self) -> list[str]:
        """Addresses endpoints hold."""
        found = self.ipam.ListAllocations(ipam_pb2.ListAllocationsRequest(), timeout=5).allocations
        return sorted(a.address for a in found if a.owner.startswith("endpoint/"))

    def links(self) -> list[str]:
        """Host sides of pods' veth pairs."""
        prefix = f"fb{self.instance.tag}"
        names = [link["ifname"] for link in ip_json("-n", self.name, "link")]
        return sorted(n for n in names if n.startswith(prefix) and not n.endswith(("host", "peer")))

    def map_value(self, pod: Pod) -> abi.Endpoint | None:
        """What ep_iface holds for a pod."""
        with BpfMap.open(
            self.instance.pin_dir / abi.MAPS["ep_iface"], ctypes.c_uint32, abi.Endpoint
        ) as opened:
            return opened.lookup(pod.endpoint.host_ifindex)

    def leftovers(self) -> dict[str, int]:
        """How many things exist for pods, everywhere one could leak. All zero without pods."""
        found = {"links": len(self.links()), "allocations": len(self.allocations())}
        for name, key, value in (
            ("ep_iface", ctypes.c_uint32, abi.Endpoint),
            ("ep_addr", abi.FibAddr, abi.Endpoint),
            ("ep_netns", ctypes.c_uint64, ctypes.c_uint32),
        ):
            with BpfMap.open(self.instance.pin_dir / abi.MAPS[name], key, value) as opened:
                found[name] = opened.count()
        near = self.instance.pin_dir / abi.MAPS["ep_near"]
        with BpfMap.open(near, ctypes.c_uint32, abi.Endpoint) as opened:
            found["ep_near"] = sum(1 for _, value in opened.items() if value.id)
        found["endpoints"] = len(self.endpoints.ListEndpoints(ep.ListEndpointsRequest(), timeout=5).endpoints)
        found["neighbours"] = len(ip_json("-n", self.name, "neigh", "show", "nud", "permanent"))
        pods = f"fb{self.instance.tag}"
        found["routes"] = sum(
            route.get("dev", "").startswith(pods) and route["dev"] != self.instance.node_ifname
            for family in ("-4", "-6")
            for route in ip_json("-n", self.name, family, "route")
        )
        return found


# ---- traffic ---------------------------------------------------------------------------------------------
@contextlib.contextmanager
def tcp_server(space: Space, version: int, address: str, port: int) -> Iterator[list[str]]:
    """Echoes; gives the list of addresses that have connected so far."""
    listener = space.socket(version, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(128)
    listener.settimeout(None)
    peers: list[str] = []

    def echo(connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 16):
                connection.sendall(part)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, peer = listener.accept()
                peers.append(peer[0])
                threading.Thread(target=echo, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield peers
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def tcp_echo(space: Space, version: int, address: str, port: int, data: bytes = b"hello") -> bytes:
    """Send, and take the same number of bytes back."""
    with space.socket(version, socket.SOCK_STREAM) as client:
        client.connect((address, port))
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        back = bytearray()
        while len(back) < len(data):
            part = client.recv(1 << 16)
            assert part, "connection closed"
            back += part
        sender.join()
        return bytes(back)


@contextlib.contextmanager
def udp_server(space: Space, version: int, address: str, port: int) -> Iterator[None]:
    """Echoes datagrams."""
    server = space.socket(version, socket.SOCK_DGRAM)
    server.bind((address, port))
    server.settimeout(None)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                data, peer = server.recvfrom(1 << 16)
                if data == b"":
                    return
                server.sendto(data, peer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        with space.socket(version, socket.SOCK_DGRAM) as stopper:
            stopper.sendto(b"", (address, port))
        thread.join(5)
        server.close()


def udp_echo(space: Space, version: int, address: str, port: int, data: bytes = b"hello") -> bytes:
    with space.socket(version, socket.SOCK_DGRAM) as client:
        client.connect((address, port))
        client.send(data)
        return client.recv(1 << 16)
