"""Policy on the way of real packets: sockets of pods and of the node's host, in namespaces of the test's own."""

from __future__ import annotations

import contextlib
import errno
import socket
import subprocess
from collections.abc import Iterator

import pytest

from services.common.instance import Instance
from services.common.pipeline import abi as pipeline
from services.policy import abi
from tests.datapath import policykit as kit
from tests.datapath.policykit import ALL, KEEP, NONE, REJECT, Rig, only, refuse
from tests.datapath.test_live import GATEWAYS, Live

BOTH = pytest.mark.parametrize("family", [4, 6])
REFUSED = refuse(kit.DENY | REJECT)
TOLD = {4: errno.EHOSTUNREACH, 6: errno.EACCES}


@pytest.fixture
def live(instance: Instance, rig: Rig) -> Iterator[Live]:
    with contextlib.ExitStack() as stack:
        made = Live(instance, stack)
        rig.dp.watch(drops=0, forward=0)
        rig.policy(made.pods["a"], ALL, ALL)
        rig.policy(made.pods["b"], ALL, ALL)
        rig.know(0)
        yield made
        for table in made.tables:
            for key, _ in list(table.items()):
                table.delete(key)


def sockets(
    live: Live, client: str, server: str, family: int, kind: int, port: int = 80
) -> tuple[socket.socket, socket.socket]:
    """A client that has not connected yet, and a server."""
    listening = live.socket(server, family, kind)
    listening.bind(("", port))
    if kind == socket.SOCK_STREAM:
        listening.listen()
    return live.socket(client, family, kind), listening


@BOTH
def test_a_connection_between_pods(rig: Rig, live: Live, family: int) -> None:
    """Both ends by name of what each may do; then it is revoked."""
    rig.policy(live.pods["a"], NONE, only((6, 80, 80)))
    rig.policy(live.pods["b"], only((6, 80, 80)), NONE)
    client, server = sockets(live, "a", "b", family, socket.SOCK_STREAM)
    with client, server:
        client.connect((live.address("b", family), 80))
        accepted, _ = server.accept()
        with accepted:
            for _ in range(3):
                client.sendall(bytes(100_000))
                left = 100_000
                while left:
                    left -= len(accepted.recv(left))
                accepted.sendall(b"thanks")
                assert client.recv(6) == b"thanks"
            assert rig.stat(abi.Stat.ESTABLISHED)
            rig.policy(live.pods["b"], refuse(kit.DENY | REJECT | KEEP), NONE)
            client.sendall(b"more")
            assert accepted.recv(4) == b"more"
            rig.policy(live.pods["b"], REFUSED, NONE)
            client.sendall(b"more")
            with pytest.raises(ConnectionResetError):
                client.recv(1)


@BOTH
@pytest.mark.parametrize("side", ["egress", "ingress"])
def test_a_pod_that_is_refused_hears_of_it(rig: Rig, live: Live, family: int, side: str) -> None:
    rig.one(side, live.pods["a" if side == "egress" else "b"], REFUSED)
    client, server = sockets(live, "a", "b", family, socket.SOCK_STREAM)
    with client, server, pytest.raises(ConnectionRefusedError):
        client.connect((live.address("b", family), 80))
    client, server = sockets(live, "a", "b", family, socket.SOCK_DGRAM)
    with client, server:
        client.connect((live.address("b", family), 80))
        client.send(b"?")
        with pytest.raises(OSError) as told:
            client.recv(1)
        assert told.value.errno == TOLD[family]


@BOTH
def test_the_host_that_is_refused_hears_of_it(rig: Rig, live: Live, family: int) -> None:
    """By way of the pod's link: the pod may open nothing either."""
    rig.policy(live.pods["a"], REFUSED, NONE)
    client, server = sockets(live, "node", "a", family, socket.SOCK_STREAM)
    with client, server, pytest.raises(ConnectionRefusedError):
        client.connect((live.address("a", family), 80))
    client, server = sockets(live, "node", "a", family, socket.SOCK_DGRAM)
    with client, server:
        client.connect((live.address("a", family), 80))
        client.send(b"?")
        with pytest.raises(OSError) as told:
            client.recv(1)
        assert told.value.errno == TOLD[family]


@BOTH
def test_a_pod_and_the_host(rig: Rig, live: Live, family: int) -> None:
    rig.policy(live.pods["a"], NONE, only((6, 80, 80)))
    client, server = sockets(live, "a", "node", family, socket.SOCK_STREAM)
    with client, server:
        client.connect((GATEWAYS[family == 6], 80))
        accepted, _ = server.accept()
        with accepted:
            client.sendall(b"hello")
            assert accepted.recv(5) == b"hello"
            accepted.sendall(b"hello")
            assert client.recv(5) == b"hello"


@BOTH
def test_through_a_queue(rig: Rig, live: Live, family: int) -> None:
    """A shaped pod is reached by its host side's queue, and policy is asked there, once."""
    pod = live.pods["b"]
    pod.flags = pipeline.EndpointFlag.SHAPED_IN
    live.put(pod)
    rig.policy(live.pods["a"], NONE, only((6, 80, 80)))
    rig.policy(pod, only((6, 80, 80)), NONE)
    client, server = sockets(live, "a", "b", family, socket.SOCK_STREAM)
    with client, server:
        client.connect((live.address("b", family), 80))
        accepted, _ = server.accept()
        with accepted:
            client.sendall(b"hello")
            assert accepted.recv(5) == b"hello"
    rig.policy(pod, REFUSED, NONE)
    client, server = sockets(live, "a", "b", family, socket.SOCK_STREAM, 81)
    rig.policy(live.pods["a"], NONE, ALL)
    with client, server, pytest.raises(ConnectionRefusedError):
        client.connect((live.address("b", family), 81))


@BOTH
def test_a_big_echo_and_a_big_datagram(rig: Rig, live: Live, family: int) -> None:
    """In fragments, which are not put together before they are asked about. A's link takes more than B's: the first
    packet of each kind is answered by an error, which passes.
    """
    request, proto = (8 if family == 4 else 128), kit.ICMP[family]
    rig.policy(live.pods["a"], NONE, only((proto, request, request), (17, 53, 53)))
    rig.policy(live.pods["b"], only((proto, request, request), (17, 53, 53)), NONE)
    client, server = sockets(live, "a", "b", family, socket.SOCK_DGRAM, 53)
    with client, server:
        server.settimeout(0.5)
        client.sendto(bytes(5000), (live.address("b", family), 53))
        with pytest.raises(TimeoutError):
            server.recv(9000)
        server.settimeout(5)
        client.sendto(bytes(5000), (live.address("b", family), 53))
        data, peer = server.recvfrom(9000)
        assert len(data) == 5000
        server.sendto(bytes(5000), peer)
        assert len(client.recv(9000)) == 5000
    with live.spaces["a"].entered():
        done = subprocess.run(
            ["ping", "-c2", "-i0.2", "-W5", "-s", "5000", live.address("b", family)],
            capture_output=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout
