"""Real connections through XDP, with nothing else of the balancer there: what it leaves to others is lost.

    client .2 ---+                +--- server .10   VIP on lo, takes the outer header off
                 +--- bridge -----+--- server .11   (decap.c)
    node .1 -----+                       10.50.0.0/24, fd50::/64; the VIPs are routed to the node
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from services.common.instance import Instance
from services.common.kernel import features, loader, netns, progs, xdp
from services.common.kernel import netlink as nl
from services.common.kernel.netlink import Netlink, Rtnl
from services.common.kernel.netns import NetNs
from services.common.kernel.xdp import Mode
from services.lb import abi
from services.lb.xdp.xdp import Xdp
from tests import session
from tests.datapath.lbtables import LbTables

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
HOSTS = {"node": 1, "client": 2, "s0": 10, "s1": 11}
VIP = {4: "198.51.100.1", 6: "2001:db8:5::1"}
DIRECT, TRANSLATED = 80, 81
BOTH = pytest.mark.parametrize("family", [4, 6])


def mac(number: int) -> str:
    return f"02:00:00:00:50:{number:02x}"


def address(host: str, family: int) -> str:
    return f"10.50.0.{HOSTS[host]}" if family == 4 else f"fd50::{HOSTS[host]:x}"


class Fabric:
    """The namespaces, each with eth0 on the bridge, every neighbour known."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        prefix = session.name()
        self.spaces: dict[str, NetNs] = {}
        for name in ("bridge", *HOSTS):
            path = Path(f"/run/netns/{prefix}-{name}")
            netns.add(path)
            stack.callback(netns.remove, path)
            self.spaces[name] = stack.enter_context(NetNs.open(path))
        self._sh("bridge", "ip link add br0 type bridge mcast_snooping 0", "ip link set br0 up")
        for name, number in HOSTS.items():
            with Rtnl(self.spaces["bridge"]) as bridge:
                bridge.create_veth(f"to-{name}", mac(number + 100), "eth0", mac(number), 1500, self.spaces[name])
            self._sh("bridge", f"ip link set to-{name} master br0", f"ip link set to-{name} up")
            self._host(name)
        # Frames from XDP need it. Elsewhere it would make packets for the node that only tc and the stack can take.
        self._sh("bridge", "ethtool -K to-node gro on")

    def _host(self, name: str) -> None:
        # XDP leaves checksums that a device is to compute to tc; between machines there are none.
        self._sh(name, "ip link set lo up", "ethtool -K eth0 tx off")
        with Rtnl(self.spaces[name]) as host:
            index = host.ifindex("eth0")
            messages = [nl.no_link_local(index), nl.link_up(index)]
            for family, length in ((4, 24), (6, 64)):
                messages.append(nl.address_add(index, ip_address(address(name, family)), length))
                messages += [nl.neighbour_put(index, ip_address(address(other, family)), mac(number))
                             for other, number in HOSTS.items() if other != name]
                if name == "client":
                    messages.append(nl.route_put(ip_network(VIP[family]), index, ip_address(address("node", family))))
                elif name != "node":
                    messages.append(nl.address_add(1, ip_address(VIP[family])))
            host.apply(messages)
        if name == "node":
            # Among 65,536 packets XDP leaves one to tc for how its checksum looks. The stack would end its connection.
            self._sh(
                name,
                "nft add table inet lost",
                "nft add chain inet lost passed { type filter hook prerouting priority raw; policy drop; }",
            )
            with self.spaces[name].entered():
                for option in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
                    Path("/proc/sys/net", option).write_text("1")

    def _sh(self, name: str, *lines: str) -> None:
        with self.spaces[name].entered():
            for line in lines:
                subprocess.run(line.split(), check=True, capture_output=True)


class Server:
    """Says its name, and whom it has spoken with, then echoes."""

    def __init__(self, space: NetNs, name: str, where: tuple[str, int], kind: int) -> None:
        self._name, self._kind = name, kind
        self.sock = space.socket(socket.AF_INET6 if ":" in where[0] else socket.AF_INET, kind)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.sock.bind(where)
        if kind == socket.SOCK_STREAM:
            self.sock.listen(64)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                if self._kind == socket.SOCK_DGRAM:
                    data, peer = self.sock.recvfrom(2048)
                    if peer is None:  # shut down
                        return
                    self.sock.sendto(f"{self._name} {peer[0]} ".encode() + data, peer)
                else:
                    threading.Thread(target=self._talk, args=self.sock.accept(), daemon=True).start()

    def _talk(self, talk: socket.socket, peer: tuple[str, int]) -> None:
        with talk, contextlib.suppress(OSError):
            talk.sendall(f"{self._name} {peer[0]}\n".encode())
            while data := talk.recv(1 << 16):
                talk.sendall(data)

    def close(self) -> None:
        # Wakes accept.
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


class Scene:
    """All of it, with services on both VIPs: direct return on port 80, translation on 81."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        features.ensure_bpffs()
        self.fabric = Fabric(stack)
        self.instance = Instance.from_env(f"t-lbt-{session.name()}")
        self.instance.run_dir.mkdir(parents=True, exist_ok=True)
        for path in (self.instance.pin_dir, self.instance.run_dir):
            stack.callback(shutil.rmtree, path, ignore_errors=True)
        source = Path(__file__).with_name("decap.c")
        asyncio.run(loader.load([loader.ProgramSpec(source, {"fbt_decap": "xdp"}, "test")], self.instance.pin_dir))
        with progs.opened(self.instance.pin_dir / "prog/test/fbt_decap") as fd:
            for name in ("s0", "s1"):
                with Rtnl(self.fabric.spaces[name]) as host:
                    xdp.put(host, host.ifindex("eth0"), Mode.GENERIC, fd)
        for family in (4, 6):
            for name in ("s0", "s1"):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    for where in ((VIP[family], DIRECT), (address(name, family), TRANSLATED)):
                        server = Server(self.fabric.spaces[name], name, where, kind)
                        stack.callback(server.close)
        self.tables: LbTables

    def attach(self, mode: str) -> None:
        """Have the program on the node's device, as the service does it."""

        async def work() -> None:
            async with Netlink() as netlink:
                made = Xdp(self.instance, netlink, mode, ["eth0"], ())
                await made.start()
                await made.stop()
                assert [hook.mode.name.lower() for hook in made.attached()] == [mode], made.status()

        with self.fabric.spaces["node"].entered():
            asyncio.run(work())

    def fill(self, stack: contextlib.ExitStack) -> None:
        self.tables = LbTables(self.instance.pin_dir)
        stack.callback(self.tables.close)
        self.tables.snat(address("node", 4), address("node", 6))
        for family in (4, 6):
            for proto, flag in ((6, abi.ServiceFlag.DSR), (17, abi.ServiceFlag.DSR_UDP)):
                servers = [address(name, family) for name in ("s0", "s1")]
                self.tables.service([(VIP[family], DIRECT)], [(each, DIRECT) for each in servers], proto, flag)
                self.tables.service([(VIP[family], TRANSLATED)], [(each, TRANSLATED) for each in servers], proto)

    def call(self, family: int, port: int, payload: bytes = b"") -> tuple[str, str]:
        """Connects and has the payload echoed: the server's name, and the client as it sees it."""
        with self.fabric.spaces["client"].socket(_af(family), socket.SOCK_STREAM) as sock:
            sock.settimeout(30)
            sock.connect((VIP[family], port))
            stream = sock.makefile("rwb")
            name, peer = stream.readline().decode().split()
            if payload:
                threading.Thread(target=sock.sendall, args=(payload,), daemon=True).start()
                assert stream.read(len(payload)) == payload
            return name, peer

    def ask(self, family: int, port: int) -> tuple[str, str]:
        with self.fabric.spaces["client"].socket(_af(family), socket.SOCK_DGRAM) as sock:
            sock.settimeout(2)
            sock.connect((VIP[family], port))
            said = ["hello", "hello again", "and again", "for the last time"]
            for word in said:
                sock.send(word.encode())
                with contextlib.suppress(TimeoutError):
                    name, peer, heard = sock.recv(2048).decode().split(" ", 2)
                    assert heard in said  # or a late answer to an earlier one
                    return name, peer
            raise TimeoutError(f"no answer from {VIP[family]} {port}")


def _af(family: int) -> int:
    return socket.AF_INET if family == 4 else socket.AF_INET6


@pytest.fixture(scope="module", params=["native", "generic"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        made = Scene(stack)
        made.attach(request.param)
        made.fill(stack)
        yield made


@BOTH
@pytest.mark.parametrize("port", [DIRECT, TRANSLATED])
def test_connections_reach_both_servers(scene: Scene, family: int, port: int) -> None:
    seen = {scene.call(family, port) for _ in range(24)}
    client = address("client" if port == DIRECT else "node", family)
    assert seen == {("s0", client), ("s1", client)}


@BOTH
@pytest.mark.parametrize("port", [DIRECT, TRANSLATED])
def test_datagrams_reach_both_servers(scene: Scene, family: int, port: int) -> None:
    seen = {scene.ask(family, port) for _ in range(24)}
    client = address("client" if port == DIRECT else "node", family)
    assert seen == {("s0", client), ("s1", client)}


@BOTH
def test_a_stream_comes_back_whole(scene: Scene, family: int) -> None:
    before = scene.tables.stats()
    scene.call(family, TRANSLATED, os.urandom(1 << 20))
    after = scene.tables.stats()
    assert after[abi.Stat.XDP_TX] - before[abi.Stat.XDP_TX] > 700
    assert after[abi.Stat.REVERSED] - before[abi.Stat.REVERSED] > 300


@BOTH
def test_an_established_connection_outlives_its_backend_going_away_slowly(scene: Scene, family: int) -> None:
    """Terminating: what is there goes on, nothing new comes."""
    lines = [scene.tables.line(abi.Table.BACKENDS, ident, abi.Backend) for ident in range(1, 20)]
    with scene.fabric.spaces["client"].socket(_af(family), socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect((VIP[family], TRANSLATED))
        stream = sock.makefile("rwb")
        name = stream.readline().decode().split()[0]
        mine = [line for line in lines if line.id and line.addr.ip() == ip_address(address(name, family))]
        try:
            for line in mine:
                line.state = abi.BackendState.TERMINATING
            for text in (b"one\n", b"two\n"):
                stream.write(text)
                stream.flush()
                assert stream.readline() == text
        finally:
            for line in mine:
                line.state = abi.BackendState.ACTIVE
