"""Hosts on a routed underlay, each with the network part of the identity service running in it.

        fabric (namespace: a bridge a subnet, forwards between them)
    172.29.1.254, fd29:1::ff        172.29.2.254, fd29:2::ff
      |             |                 |
    host 1        host 2            host 3            eth0: 172.29.<subnet>.<number>, fd29:<subnet>::<number>

A host has a namespace, an instance of its own, and a thread in the namespace on which its event loop runs. Which
nodes there are is told to each by hand (`know`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Coroutine, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, TypeVar

from services.common.instance import Instance
from services.common.kernel import netns
from services.common.kernel.maps import BpfMap
from services.common.kernel.netlink import IPNetwork, Netlink
from services.common.kernel.netns import NetNs
from services.common.network import Mode, NetworkConfig
from services.common.pipeline import abi
from services.common.underlay import Underlay
from services.identity.network.network import Network
from services.identity.nodes.model import Node, NodeState
from services.ipam.endpoints.node import NodeNet, NodeSetup
from tests import session

T = TypeVar("T")
libc = ctypes.CDLL(None, use_errno=True)


class Space:
    """A namespace; commands run in it with the mounts of outside."""

    def __init__(self) -> None:
        self.name = session.name()
        self.path = Path("/run/netns") / self.name
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        self.sh("ip link set lo up")

    def sh(self, line: str, check: bool = True) -> str:
        done = subprocess.run(
            ["nsenter", f"--net={self.path}", "sh", "-ec", line], capture_output=True, text=True, timeout=30
        )
        assert not check or done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    def json(self, line: str) -> Any:
        return json.loads(self.sh(line) or "[]")

    def delete(self) -> None:
        netns.remove(self.path)


class Fabric(Space):
    """What connects hosts."""

    def __init__(self) -> None:
        super().__init__()
        self._subnets: set[int] = set()
        self._numbers = itertools.count(1)
        self.sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")

    def subnet(self, number: int) -> None:
        if number not in self._subnets:
            self._subnets.add(number)
            self.sh(
                f"ip link add br{number} type bridge forward_delay 0; ip link set br{number} up;"
                f"ip addr add 172.29.{number}.254/24 dev br{number};"
                f"ip addr add fd29:{number}::ff/64 dev br{number} nodad"
            )

    def connect(self, host: Space, number: int, subnet: int, device: str = "eth0", mtu: int = 1500) -> None:
        self.subnet(subnet)
        far = f"v{next(self._numbers)}"
        self.sh(
            f"ip link add {far} type veth peer name {device} netns {host.name};"
            f"ip link set {far} master br{subnet} mtu {mtu} up"
        )
        host.sh(
            f"ip link set {device} mtu {mtu} addrgenmode none; ip link set {device} up;"
            f"ip addr add 172.29.{subnet}.{number}/24 dev {device};"
            f"ip addr add fd29:{subnet}::{number:x}/64 dev {device} nodad"
        )


class Directory:
    """The nodes a test tells of."""

    def __init__(self) -> None:
        self.synced = asyncio.Event()
        self._nodes: dict[str, Node] = {}
        self._callbacks: list[Callable[[str], None]] = []

    def nodes(self) -> dict[str, Node]:
        return self._nodes

    def get(self, name: str) -> Node | None:
        return self._nodes.get(name)

    @property
    def local(self) -> Node | None:
        return next((node for node in self._nodes.values() if node.local), None)

    def on_change(self, callback: Callable[[str], None]) -> None:
        self._callbacks.append(callback)

    def set(self, name: str, node: Node | None) -> None:
        if node is None:
            self._nodes.pop(name, None)
        else:
            self._nodes[name] = node
        for callback in self._callbacks:
            callback(name)


class Host(Space):
    """A node's namespace and the objects that run in it."""

    def __init__(self, cfg: NetworkConfig | None = None, within: Host | None = None) -> None:
        """within: a host whose namespace it shares."""
        self._shared = within is not None
        if within is None:
            super().__init__()
        else:
            self.name, self.path = within.name, within.path
        self.cfg = cfg or NetworkConfig()
        self.root = Path(tempfile.mkdtemp(prefix=self.name))
        self.instance = Instance(session.name(), self.root / "run", self.root / "state")
        self.instance.run_dir.mkdir(parents=True)
        self.host_device, self.vxlan = self.instance.node_ifname, f"fb{self.instance.tag}vx"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        self.netlink = Netlink()
        self.run(self.netlink.__aenter__())

    def _live(self) -> None:
        with NetNs.open(self.path) as space:
            assert libc.setns(space.fd, netns.CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def run(self, work: Coroutine[Any, Any, T], seconds: float = 60) -> T:
        """Run a coroutine on the host's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    def on_loop(self, function: Callable[..., T], *args: Any) -> T:
        async def call() -> T:
            return function(*args)

        return self.run(call())

    def ipam(self, *blocks: str) -> None:
        """What the ipam service does on a node that has these blocks."""
        networks = frozenset(map(ip_network, blocks))
        gateways = frozenset(network[1] for network in networks)
        cluster = frozenset({ip_network("10.9.0.0/16"), ip_network("fd09::/32")})
        setup = NodeSetup(self.instance, self.netlink, self.cfg)
        self.run(setup.apply(NodeNet(networks, gateways, cluster)))

    def start(self, synced: bool = True, knowing: Mapping[str, Node] | None = None) -> None:
        """knowing: nodes that are known, and all there are, before the network is started."""
        self.run(self._start(synced, knowing or {}))

    async def _start(self, synced: bool, knowing: Mapping[str, Node]) -> None:
        self.directory = Directory()
        self.underlay = Underlay(self.cfg, self.instance, self.netlink)
        self.network = Network(self.instance, self.netlink, self.cfg, self.underlay, self.directory)
        await self.underlay.start()
        for name, known in knowing.items():
            self.directory.set(name, known)
        if knowing:
            self.directory.synced.set()
        await self.network.start()
        if synced:
            self.directory.synced.set()

    def stop(self) -> None:
        self.run(self._stop())

    async def _stop(self) -> None:
        await self.network.stop()
        await self.underlay.stop()

    def know(self, name: str, node: Node | None) -> None:
        """Tell of a node, or that it is gone."""
        self.on_loop(self.directory.set, name, node)

    def settle(self) -> None:
        self.run(self.network.settled())

    def entries(self) -> dict[int, abi.NodeEntry]:
        """Node entries that are not empty."""
        with BpfMap.open(
            self.instance.pin_dir / abi.MAPS["nd_nodes"], ctypes.c_uint32, abi.NodeEntry
        ) as nodes:
            return {key.value: value for key, value in nodes.items() if any(bytes(value))}

    def mode(self, index: int) -> int:
        """Mode of a node's entry, 0 without one."""
        entry = self.entries().get(index)
        return entry.mode if entry is not None else 0

    def devices(self) -> abi.NetworkDevices:
        with BpfMap.open(
            self.instance.pin_dir / abi.MAPS["nd_config"], ctypes.c_uint32, abi.NetworkDevices
        ) as config:
            found = config.lookup(0)
            assert found is not None
            return found

    def routes(self) -> dict[str, dict[str, Any]]:
        """Our routes to other nodes' pods, by destination."""
        metric = 0x0100_0000 | int(self.instance.tag, 16)
        found = self.json("ip -j -4 route show proto 241") + self.json("ip -j -6 route show proto 241")
        return {route["dst"]: route for route in found if route.get("metric") == metric}

    def filters(self, device: str, hook: str) -> list[str]:
        """Names of the programs in tc filters, as far as the kernel keeps them (15 characters)."""
        return [
            item["options"]["bpf_name"].split(":")[0]
            for item in self.json(f"tc -j filter show dev {device} {hook}")
            if "bpf_name" in item.get("options", {})
        ]

    def ifindex(self, device: str) -> int:
        found = self.sh(f"ip -j link show {device}", check=False)
        return next((item["ifindex"] for item in json.loads(found or "[]") if item), 0)

    def mac(self, device: str) -> str:
        return str(self.json(f"ip -j link show {device}")[0]["address"])

    def parts(self) -> dict[str, tuple[str, str]]:
        """State and message of each part of the status."""
        return {part.name: (part.state, part.message) for part in self.on_loop(self.network.status)}

    def teardown(self, module: str = "services.identity.network.teardown") -> None:
        """What `fibril down` does."""
        script = (
            "import asyncio, sys\nfrom pathlib import Path\nfrom services.common.instance import Instance\n"
            f"from {module} import remove\n"
            "asyncio.run(remove(Instance(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))"
        )
        roots = (str(self.instance.run_root), str(self.instance.state_root))
        subprocess.run(
            ["nsenter", f"--net={self.path}", sys.executable, "-c", script, self.instance.name, *roots],
            cwd=Path(__file__).parents[3],
            check=True,
        )

    def close(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(self._close).result()

    def _close(self) -> None:
        if hasattr(self, "network"):
            self.stop()
        self.run(self.netlink.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        if not self._shared:
            self.delete()
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.rmtree(self.instance.pin_dir, ignore_errors=True)


def node(
    number: int,
    *blocks: str,
    subnet: int = 1,
    mode: Mode = Mode.OVERLAY,
    local: bool = False,
    ipv4: bool = True,
    ipv6: bool = True,
    port: int = 8472,
    mtu: int = 1500,
) -> Node:
    """What etcd would say of host `number`."""
    networks: list[IPNetwork] = [ip_network(f"172.29.{subnet}.0/24")] if ipv4 else []
    networks += [ip_network(f"fd29:{subnet}::/64")] if ipv6 else []
    return Node(
        name=f"h{number}",
        index=number,
        local=local,
        ipv4=IPv4Address(f"172.29.{subnet}.{number}") if ipv4 else None,
        ipv6=IPv6Address(f"fd29:{subnet}::{number:x}") if ipv6 else None,
        configured_mode=mode,
        overlay_port=port,
        probe_port=4240,
        uplink_mtu=mtu,
        underlay_networks=tuple(networks),
        version="test",
        state=NodeState.ALIVE,
        blocks=frozenset(map(ip_network, blocks)),
        gateways=frozenset(ip_address(str(ip_network(block)[1])) for block in blocks),
    )
