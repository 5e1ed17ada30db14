"""Services under traffic while backends change a thousand times a second, processes die, and somebody floods a neighbour.

FIBRIL_SOAK_S: how long the churn goes on, seconds; by default a few.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import secrets
import sys
import time
from collections.abc import Iterator

import pytest

from fibril.lb.v1 import lb_pb2 as pb
from fibril.lb.v1 import lb_pb2_grpc
from tests.e2e.lb.servicelab import Client, client, server, stub
from tests.e2e.modes.modelab import ModeLab, lab, wait_for

SECONDS = float(os.environ.get("FIBRIL_SOAK_S", "5"))
VIP, OTHER = "10.96.0.20", "10.96.0.21"
PORT, OTHER_PORT = 30120, 30121
CHANGES_A_SECOND = 1000
GHOSTS = 100

# SYNs from all over the place, as fast as they go, for so many seconds; prints how many.
_FLOOD = """
import random, socket, struct, sys, time
target, port, seconds = socket.inet_aton(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
def summed(data):
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    total = (total & 0xffff) + (total >> 16)
    return ~(total + (total >> 16)) & 0xffff
frames = []
for _ in range(20000):
    source = bytes((198, 18, random.randrange(256), random.randrange(1, 255)))
    tcp = struct.pack("!HHIIBBHHH", random.randrange(1024, 65536), port, 1, 0, 0x50, 2, 1024, 0, 0)
    check = summed(source + target + struct.pack("!HH", 6, 20) + tcp)
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, 6, 0) + source + target
    frames.append(ip + tcp[:16] + struct.pack("!H", check) + tcp[18:])
for at in range(0, len(frames), 200):
    for frame in frames[at:at + 200]:
        raw.sendto(frame, (sys.argv[1], 0))
    time.sleep(seconds * 200 / len(frames))
print(len(frames), flush=True)
"""


@pytest.fixture(scope="module")
def landscape() -> Iterator[ModeLab]:
    """Two nodes with three pods each: clients p1, servers p2 and p3."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with lab("--nodes", "2", "--pods", "3") as made:
        yield made


@pytest.fixture(scope="module")
def served(landscape: ModeLab) -> Iterator[tuple[lb_pb2_grpc.LbServiceStub, dict[str, dict[str, str]]]]:
    """Two services with servers of their own on both nodes: the lb service, and their servers' addresses by name."""
    with contextlib.ExitStack() as stack:
        found: dict[str, dict[str, str]] = {"live": {}, "other": {}}
        for node, (name, pod) in itertools.product(("c1n1", "c1n2"), (("live", "p2"), ("other", "p3"))):
            found[name][f"{name}-{node}"] = stack.enter_context(
                server(landscape, node, pod, f"{name}-{node}")
            )
        api = stack.enter_context(stub(landscape, "c1n1"))
        for name, vip, port in (("live", VIP, PORT), ("other", OTHER, OTHER_PORT)):
            service = pb.Service(name=name, algorithm=pb.ALGORITHM_RANDOM)
            service.frontends.add(address=vip, port=80)
            service.frontends.add(type=pb.FRONTEND_TYPE_NODE_PORT, address="0.0.0.0", port=port)
            service.backends.extend(
                pb.Backend(address=address, port=8080) for address in found[name].values()
            )
            api.UpsertService(pb.UpsertServiceRequest(service=service))
        for node in ("c1n1", "c1n2"):
            with stub(landscape, node) as each:
                wait_for(lambda: served_here(each), f"both services on {node}")
        yield api, found


def served_here(api: lb_pb2_grpc.LbServiceStub) -> bool:
    services = api.ListServices(pb.ListServicesRequest()).services
    return len(services) == 2 and all(s.status.programmed and s.status.outside == 2 for s in services)


@contextlib.contextmanager
def outside(landscape: ModeLab) -> Iterator[Client]:
    with client(landscape, "world") as made:
        yield made


def test_backends_change_all_the_time_and_nobody_gets_a_wrong_one(
    landscape: ModeLab, served: tuple[lb_pb2_grpc.LbServiceStub, dict[str, dict[str, str]]]
) -> None:
    api, servers = served
    rand = random.Random(secrets.randbits(32))
    with (
        client(landscape, "c1n1", "p1") as pod,
        client(landscape, "c1n2") as host,
        outside(landscape) as world,
    ):
        places = [(pod, VIP, 80), (host, VIP, 80), (world, landscape.node("c1n1").addresses[0], PORT),
                  (world, landscape.node("c1n2").addresses[0], PORT)]  # fmt: skip
        held = [(who, who("hold", address, port)[0]) for who, address, port in places]
        for who, address, port in places:
            who("stress", address, port)
        changes, began, killed = 0, time.monotonic(), 0
        ghosts = [
            pb.Backend(address=f"10.250.0.{i + 1}", port=9, state=pb.BACKEND_STATE_TERMINATING)
            for i in range(GHOSTS)
        ]
        keys = [pb.BackendKey(address=ghost.address, port=9) for ghost in ghosts]
        live = [pb.BackendKey(address=address, port=8080) for address in servers["live"].values()]
        while (elapsed := time.monotonic() - began) < SECONDS:
            if changes > CHANGES_A_SECOND * elapsed:
                time.sleep(0.005)
                continue
            changes += api.AddBackends(pb.AddBackendsRequest(service="live", backends=ghosts)).added
            changes += api.RemoveBackends(pb.RemoveBackendsRequest(service="live", backends=keys)).removed
            for state in (pb.BACKEND_STATE_TERMINATING, pb.BACKEND_STATE_ACTIVE):
                one = pb.SetBackendStateRequest(service="live", backends=[rand.choice(live)], state=state)
                changes += api.SetBackendState(one).changed
            if elapsed > SECONDS * (killed + 1) / 3 and killed < 2:
                # The other node's: this one takes the changes.
                landscape.kill("c1n2", "lb")
                killed += 1
        changes += api.SetBackendState(
            pb.SetBackendStateRequest(service="live", backends=live, state=pb.BACKEND_STATE_ACTIVE)
        ).changed
        print(f"{changes / SECONDS:.0f} changes a second")  # a busy machine makes fewer
        assert changes >= 5 * GHOSTS, "each backend has come and gone several times"
        for who in (pod, host, world):
            counts = who("count")
            assert counts["ok"] > SECONDS and counts["failures"] == [], counts
        # Connections from before go on, and new ones are answered by the service's own servers, all of them.
        for who, number in held:
            assert who("echo", number) == "x"
        for who, address, port in places:
            # A node whose process was killed has to catch up.
            wait_for(lambda: who.names(address, 12, port) == set(servers["live"]), "both servers", 60)  # noqa: B023
        assert pod.names(OTHER) == set(servers["other"])


def test_a_flood_of_syns_against_one_service_leaves_others_alone(
    landscape: ModeLab, served: tuple[lb_pb2_grpc.LbServiceStub, dict[str, dict[str, str]]]
) -> None:
    _, servers = served
    target = landscape.node("c1n1").addresses[0]
    with outside(landscape) as world, client(landscape, "c1n1", "p1") as pod:
        held = [world("hold", target, OTHER_PORT)[0] for _ in range(20)]
        argv = [sys.executable, "-u", "-c", _FLOOD, target, str(PORT), "3"]
        with landscape.started("world", *argv, stdout=-1) as flood:
            names: set[str] = set()
            asked = 0
            # So often that neither is missed by chance, however few there is time for.
            while flood.poll() is None or asked < 24:
                names |= world.names(target, 4, OTHER_PORT)
                asked += 4
                assert pod.names(OTHER, 2) <= set(servers["other"])
            out, _ = flood.communicate()
        assert int(out) == 20_000
        assert names == set(servers["other"])
        assert [world("echo", number) for number in held] == ["x"] * len(held)
        assert world.names(target, 4, PORT) <= set(servers["live"])
