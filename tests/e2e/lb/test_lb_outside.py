"""Clients outside the cluster, on real nodes in an overlay: node ports and external addresses, to pods here and elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from fibril.lb.v1 import lb_pb2 as pb
from fibril.lb.v1 import lb_pb2_grpc
from tests.e2e.lb.servicelab import stub
from tests.e2e.modes.modelab import ModeLab, lab, wait_for

NODES = ("c1n1", "c1n2")
NODE = {4: "172.30.1.1", 6: "fd30::1:1"}
WORLD = {4: "203.0.113.1", 6: "2001:db8:ffff::1"}
VIP = {4: "198.51.100.9", 6: "2001:db8:96::9"}
BOTH = pytest.mark.parametrize("family", [4, 6])

# Whom servers see, and a megabyte there and back: much of it in packets that are cut into segments on their way.
_SERVER = """
import socket, sys, threading
def serve(conn, peer):
    with conn:
        conn.sendall((sys.argv[1] + " " + peer[0].removeprefix("::ffff:") + "\\n").encode())
        while data := conn.recv(65536):
            conn.sendall(data)
listener = socket.create_server(("::", 8080), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
print("ready", flush=True)
while True:
    conn, peer = listener.accept()
    threading.Thread(target=serve, args=(conn, peer), daemon=True).start()
"""
_CLIENT = """
import json, os, socket, sys, threading
answers = []
# Until both have been met, which is a matter of chance.
while len(answers) < 8 or len({name for name, *_ in answers}) < 2 and len(answers) < 40:
    # Its patience is for the whole megabyte.
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), 30, (sys.argv[3], 0)) as conn:
        said = b""
        while not said.endswith(b"\\n"):
            said += conn.recv(100)
        name, seen = said.decode().split()
        data, got = os.urandom(1 << 20), b""
        def send():
            conn.sendall(data)
            conn.shutdown(socket.SHUT_WR)
        sender = threading.Thread(target=send)
        sender.start()
        while more := conn.recv(65536):
            got += more
        sender.join()
        answers.append([name, seen, got == data])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def landscape() -> Iterator[ModeLab]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with lab("--nodes", "2", "--pods", "1", "--mode", "overlay") as made:
        for family in (4, 6):
            made.exec("world", "ip", f"-{family}", "route", "add", VIP[family], "via", NODE[family])
        yield made


@pytest.fixture(scope="module")
def servers(landscape: ModeLab) -> Iterator[dict[int, list[pb.Backend]]]:
    """One on each node, by family."""
    with contextlib.ExitStack() as stack:
        found: dict[int, list[pb.Backend]] = {4: [], 6: []}
        for node in NODES:
            argv = ["fibril", "pod", "exec", "p1", "--", sys.executable, "-u", "-c", _SERVER, node]
            running = stack.enter_context(landscape.started(node, *argv, stdout=subprocess.PIPE))
            assert running.stdout is not None and running.stdout.readline() == "ready\n"
            pod = landscape.pod(node, "p1")
            for family in (4, 6):
                found[family].append(
                    pb.Backend(address=pod[f"ipv{family}"], port=8080, node=landscape.instance(node).name)
                )
        yield found


@pytest.fixture(scope="module")
def service(landscape: ModeLab) -> Iterator[lb_pb2_grpc.LbServiceStub]:
    with stub(landscape, NODES[0]) as found:
        yield found


def ask(landscape: ModeLab, address: str, port: int) -> list[list[str]]:
    """Who answers a client outside, whom it saw, and whether all came back."""
    answers: list[list[str]] = json.loads(
        landscape.exec(
            "world", sys.executable, "-c", _CLIENT, address, str(port), WORLD[6 if ":" in address else 4]
        ).stdout
    )
    assert all(whole for *_, whole in answers)
    return answers


def declare(
    service: lb_pb2_grpc.LbServiceStub, family: int, backends: list[pb.Backend], forwarding: int
) -> None:
    any_address = "0.0.0.0" if family == 4 else "::"
    service.UpsertService(
        pb.UpsertServiceRequest(
            service=pb.Service(
                name=f"default/outside{family}",
                frontends=[
                    pb.Frontend(type=pb.FRONTEND_TYPE_NODE_PORT, address=any_address, port=30080),
                    pb.Frontend(type=pb.FRONTEND_TYPE_EXTERNAL_IP, address=VIP[family], port=80),
                ],
                backends=backends,
                forwarding=forwarding,  # type: ignore[arg-type]
            )
        )
    )

    def ready() -> bool:
        found = service.GetService(pb.GetServiceRequest(name=f"default/outside{family}")).service
        return found.status.programmed and found.status.outside == len(backends)

    wait_for(ready, "the service in the kernel")


@BOTH
@pytest.mark.parametrize("forwarding", ["SNAT", "DSR"])
def test_a_client_outside_reaches_all_backends(
    landscape: ModeLab,
    servers: dict[int, list[pb.Backend]],
    service: lb_pb2_grpc.LbServiceStub,
    family: int,
    forwarding: str,
) -> None:
    declare(service, family, servers[family], pb.Forwarding.Value(f"FORWARDING_{forwarding}"))
    for address, port in ((NODE[family], 30080), (VIP[family], 80)):
        answers = ask(landscape, address, port)
        assert {name for name, *_ in answers} == set(NODES)
        seen = {name: {who for other, who, _ in answers if other == name} for name in NODES}
        assert seen[NODES[0]] == {WORLD[family]}
        assert seen[NODES[1]] == {WORLD[family] if forwarding == "DSR" else NODE[family]}
