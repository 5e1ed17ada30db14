"""Real connections to services through the attached programs, in namespaces of the test's own.

    client 192.0.2.1 ---- up0 [node: fib_lb_uplink, _out] up1 ---- server 192.168.7.40
    2001:db8:1::1           |  pods A and B as in test_live  |     fd77::40

The kernel's own senders leave checksums to the device and segments of 64 KiB to be cut: the programs must keep both right.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from scapy.layers.inet import UDP
from scapy.layers.l2 import Dot1Q, Ether

from services.common.instance import Instance
from services.common.kernel import netlink as nl
from services.common.kernel import netns, progs, tc_classic
from services.common.kernel.netlink import Rtnl
from services.common.kernel.netns import NetNs
from services.lb import abi, install
from tests import session
from tests.datapath.lbkit import CLIENT, NODE, SERVER, VIP
from tests.datapath.lbtables import LbTables
from tests.datapath.policykit import header
from tests.datapath.test_live import Live

BOTH = pytest.mark.parametrize("family", [4, 6])
SIZE = 1 << 20
PODS = {4: "10.1.0.0/24", 6: "fd00:1::/64"}
NEAR = {4: ("192.0.2.254", 24), 6: ("2001:db8:1::fe", 64)}
"""The node's address towards clients."""


class Outside(Live):
    """The pods of a Live, clients and a server around their node."""

    def __init__(self, instance: Instance, exit_stack: contextlib.ExitStack) -> None:
        super().__init__(instance, exit_stack)
        prefix = session.name()
        for name in ("client", "server"):
            path = Path(f"/run/netns/{prefix}-{name}")
            netns.add(path)
            exit_stack.callback(netns.remove, path)
            self.spaces[name] = exit_stack.enter_context(NetNs.open(path))
        near = {family: NEAR[family] for family in (4, 6)}
        beside = {4: (NODE[4], 24), 6: (NODE[6], 64)}
        self._join("client", "up0", CLIENT, near)
        self._join("server", "up1", SERVER, beside)
        self.tables_ = LbTables(instance.pin_dir)
        exit_stack.callback(self.tables_.close)
        self.tables_.snat(*NODE.values())

    def _join(self, name: str, device: str, there: dict[int, str], here: dict[int, tuple[str, int]]) -> None:
        """A veth between the node and another namespace, which routes everything to the node."""
        with self.spaces["node"].entered(), Rtnl() as node:
            macs = f"02:00:00:00:02:{ord(device[2]):02x}", f"02:00:00:00:03:{ord(device[2]):02x}"
            index = node.create_veth(device, macs[0], f"{device}x", macs[1], 1500, self.spaces[name])
            node.apply(
                [
                    nl.no_link_local(index),
                    nl.link_up(index),
                    *(
                        nl.address_add(index, ip_address(address), length)
                        for address, length in here.values()
                    ),
                ]
            )
            for direction, program in (("ingress", install.UPLINK), ("egress", install.UPLINK_OUT)):
                with progs.opened(install.program_path(self.instance, program)) as fd:
                    tc_classic.attach(index, {direction: fd})
        with self.spaces[name].entered(), Rtnl() as other:
            index = other.ifindex(f"{device}x")
            messages = [nl.no_link_local(index), nl.link_up(1), nl.link_up(index)]
            for family, (address, length) in here.items():
                messages += [
                    nl.address_add(index, ip_address(there[family]), length),
                    nl.route_put(
                        ip_network("0.0.0.0/0" if family == 4 else "::/0"), index, ip_address(address)
                    ),
                ]
            other.apply(messages)

    def serve(self, family: int, port: int, backend: str, flags: int = 0) -> None:
        self.tables_.service([(VIP[family], port)], {(backend, 8080): flags})

    def talk(self, family: int, client: str, port: int, server: str) -> tuple[str, str]:
        """A megabyte each way; whom the server saw, and whom the client."""
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        data = os.urandom(SIZE)
        seen: list[str] = []
        with self.spaces[server].socket(kind, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", 8080))
            listener.listen()

            def echo() -> None:
                conn, peer = listener.accept()
                seen.append(peer[0])
                with conn:
                    conn.settimeout(10)
                    conn.sendall(receive(conn))

            thread = threading.Thread(target=echo)
            thread.start()
            with self.socket(client, family, socket.SOCK_STREAM) as conn:
                conn.settimeout(10)
                conn.connect((VIP[family], port))
                conn.sendall(data)
                assert receive(conn) == data
                peer = conn.getpeername()[0]
            thread.join(10)
        return seen[0], peer


def receive(conn: socket.socket) -> bytes:
    got = bytearray()
    while len(got) < SIZE:
        more = conn.recv(1 << 16)
        if not more:
            break
        got += more
    return bytes(got)


@pytest.fixture(scope="module")
def net(with_lb: None, instance: Instance) -> Iterator[Outside]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with contextlib.ExitStack() as exit_stack:
        made = Outside(instance, exit_stack)
        yield made
        for table in made.tables:
            for key, _ in list(table.items()):
                table.delete(key)


@BOTH
def test_a_client_outside_and_a_pod(net: Outside, family: int) -> None:
    net.serve(family, 80, net.address("b", family))
    assert net.talk(family, "client", 80, "b") == (CLIENT[family], VIP[family])


@BOTH
def test_a_client_outside_and_a_server(net: Outside, family: int) -> None:
    net.serve(family, 81, SERVER[family])
    assert net.talk(family, "client", 81, "server") == (NODE[family], VIP[family])


@BOTH
def test_a_client_outside_and_the_host(net: Outside, family: int) -> None:
    net.serve(family, 82, NODE[family], abi.BackendFlag.LOCAL)
    assert net.talk(family, "client", 82, "node") == (CLIENT[family], VIP[family])


@BOTH
def test_a_pod_and_another(net: Outside, family: int) -> None:
    net.serve(family, 83, net.address("b", family))
    assert net.talk(family, "a", 83, "b") == (net.address("a", family), VIP[family])


@BOTH
def test_a_pod_and_itself(net: Outside, family: int) -> None:
    net.serve(family, 84, net.address("a", family))
    seen, peer = net.talk(family, "a", 84, "a")
    assert seen in ("169.254.42.1", "fd00:fb:42::1") and peer == VIP[family]


@BOTH
def test_a_pod_and_a_server(net: Outside, family: int) -> None:
    """There by the stack; back by to_pod."""
    net.serve(family, 85, SERVER[family])
    assert net.talk(family, "a", 85, "server") == (net.address("a", family), VIP[family])


@BOTH
@pytest.mark.parametrize("tags", [1, 3])
def test_a_frame_with_a_priority_is_balanced_as_any(net: Outside, family: int, tags: int) -> None:
    """A tag of VLAN 0 is no more than that to the stack."""
    net.tables_.service([(VIP[family], 87)], {(net.address("b", family), 8087): 0}, 17)
    frame = Ether(src="02:00:00:00:03:30", dst="02:00:00:00:02:30")
    for _ in range(tags):
        frame /= Dot1Q(vlan=0, prio=5)
    frame /= header(CLIENT[family], VIP[family]) / UDP(sport=4000, dport=87) / b"hello"
    with net.socket("b", family, socket.SOCK_DGRAM) as server, net.spaces["client"].socket(
        socket.AF_PACKET, socket.SOCK_RAW
    ) as raw:
        server.bind(("", 8087))
        server.settimeout(5)
        raw.bind(("up0x", 0))
        raw.send(bytes(frame))
        data, peer = server.recvfrom(10)
    assert (data, peer[:2]) == (b"hello", (CLIENT[family], 4000))


@BOTH
@pytest.mark.parametrize("client", ["client", "a"])
def test_nobody_there(net: Outside, family: int, client: str) -> None:
    net.tables_.service([(VIP[family], 86)], [])
    net.tables_.service([(VIP[family], 86)], [], 17)
    with net.socket(client, family, socket.SOCK_STREAM) as conn, pytest.raises(ConnectionRefusedError):
        conn.connect((VIP[family], 86))
    with net.socket(client, family, socket.SOCK_DGRAM) as sock, pytest.raises(ConnectionRefusedError):
        sock.connect((VIP[family], 86))
        sock.send(b"abc")
        sock.recv(10)
