"""Services on real nodes: declared at one, served by all, and alive when their process is not."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import grpc
import pytest

from fibril.lb.v1 import lb_pb2 as pb
from fibril.lb.v1 import lb_pb2_grpc
from fibril.status.v1 import status_pb2, status_pb2_grpc
from fibril.types.v1 import types_pb2
from services.common.kernel import attach, cgroup
from tests.e2e.lb.servicelab import Client, client, server, stub
from tests.e2e.modes.modelab import ModeLab, lab, wait_for

NODES = ("c1n1", "c1n2")
VIP = "10.96.0.10"


@pytest.fixture(scope="module")
def landscape() -> Iterator[ModeLab]:
    """Two nodes with two pods each: clients p1, servers p2."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with lab("--nodes", "2", "--pods", "2") as made:
        yield made


@pytest.fixture
def stubs(landscape: ModeLab) -> Iterator[list[lb_pb2_grpc.LbServiceStub]]:
    """The lb services of both nodes; no service is left behind."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(stub(landscape, node)) for node in NODES]
        yield found
        for each in found[0].ListServices(pb.ListServicesRequest()).services:
            found[0].DeleteService(pb.DeleteServiceRequest(name=each.name))
        # The next test's has the same name.
        wait_for(lambda: all(get(each) is None for each in found), "no service on either node")


@pytest.fixture(scope="module")
def servers(landscape: ModeLab) -> Iterator[dict[str, str]]:
    """Server -> address, one on each node."""
    with contextlib.ExitStack() as stack:
        yield {node: stack.enter_context(server(landscape, node, "p2", node)) for node in NODES}


@pytest.fixture
def clients(landscape: ModeLab) -> Iterator[dict[str, Client]]:
    with contextlib.ExitStack() as stack:
        yield {
            "pod": stack.enter_context(client(landscape, "c1n1", "p1")),
            "host": stack.enter_context(client(landscape, "c1n1")),
            "other": stack.enter_context(client(landscape, "c1n2")),
        }


def web(lab: ModeLab, addresses: dict[str, str], **more: object) -> pb.Service:
    return pb.Service(
        name="default/web:http",
        frontends=[pb.Frontend(address=VIP, port=80)],
        backends=[
            pb.Backend(address=address, port=8080, node=lab.instance(node).name)
            for node, address in addresses.items()
        ],
        **more,  # type: ignore[arg-type]
    )


def get(which: lb_pb2_grpc.LbServiceStub) -> pb.Service | None:
    try:
        return which.GetService(pb.GetServiceRequest(name="default/web:http")).service
    except grpc.RpcError:
        return None


def served(stubs: list[lb_pb2_grpc.LbServiceStub], inside: int) -> None:
    """Wait until both nodes have it in their kernels, with so many backends."""

    def ready() -> bool:
        found = [get(each) for each in stubs]
        return all(s is not None and s.status.programmed and s.status.inside == inside for s in found)

    wait_for(ready, f"{inside} backends on both nodes", 60)


def test_a_service_is_served_changed_and_deleted(
    landscape: ModeLab,
    stubs: list[lb_pb2_grpc.LbServiceStub],
    servers: dict[str, str],
    clients: dict[str, Client],
) -> None:
    created = stubs[0].UpsertService(pb.UpsertServiceRequest(service=web(landscape, servers)))
    assert created.created and created.service.revision
    served(stubs, 2)
    for each in clients.values():
        assert each.names(VIP) == set(NODES)
        # It believes to talk to the service.
        assert each("ask", VIP, 80)[1] == VIP
    # A backend on its way out keeps what it has; one that is gone does not.
    number, name = clients["host"]("hold", VIP, 80)
    (other,) = set(NODES) - {name}
    key = pb.BackendKey(address=servers[name], port=8080)
    state = pb.SetBackendStateRequest(backends=[key], state=pb.BACKEND_STATE_MAINTENANCE)
    assert stubs[1].SetBackendState(state).changed == 1
    served(stubs, 1)
    for each in clients.values():
        assert each.names(VIP) == {other}
    assert clients["host"]("echo", number) == "x"
    gone = stubs[1].RemoveBackends(pb.RemoveBackendsRequest(service="default/web:http", backends=[key]))
    assert gone.removed == 1
    wait_for(lambda: clients["host"]("echo", number) != "x", "the connection's end")
    stubs[1].DeleteService(pb.DeleteServiceRequest(name="default/web:http"))
    wait_for(lambda: all(get(each) is None for each in stubs), "no service")
    wait_for(lambda: "error" in clients["host"]("ask", VIP, 80, 2), "no service in the kernel")


def test_traffic_goes_on_when_the_service_is_killed(
    landscape: ModeLab,
    stubs: list[lb_pb2_grpc.LbServiceStub],
    servers: dict[str, str],
    clients: dict[str, Client],
) -> None:
    first = {"c1n1": servers["c1n1"]}
    stubs[0].UpsertService(pb.UpsertServiceRequest(service=web(landscape, first)))
    served(stubs, 1)
    held = clients["host"]("hold", VIP, 80)[0]
    for each in clients.values():
        each("stress", VIP, 80)
    wait_for(lambda: all(each("count")["ok"] > 20 for each in clients.values()), "connections")
    (before,) = landscape.processes("c1n1", "lb")
    landscape.kill("c1n1", "lb")
    # Changed while nobody looks.
    second = pb.Backend(address=servers["c1n2"], port=8080)
    add = pb.AddBackendsRequest(service="default/web:http", backends=[second])
    assert stubs[1].AddBackends(add).added == 1
    wait_for(lambda: landscape.processes("c1n1", "lb") not in ([], [before]), "a new process")
    served(stubs, 2)
    at = {name: each("count")["ok"] for name, each in clients.items()}
    wait_for(lambda: all(each("count")["ok"] > at[n] + 20 for n, each in clients.items()), "connections")
    assert all(each("count")["failures"] == [] for each in clients.values())
    assert all(each.names(VIP) == set(NODES) for each in clients.values())
    assert clients["host"]("echo", held) == "x"


def test_a_port_of_all_nodes_is_reached_from_outside(
    landscape: ModeLab, stubs: list[lb_pb2_grpc.LbServiceStub], servers: dict[str, str]
) -> None:
    port = pb.Frontend(type=pb.FRONTEND_TYPE_NODE_PORT, port=30080)
    service = web(landscape, servers, external_traffic_policy=pb.TRAFFIC_POLICY_LOCAL)
    service.frontends.append(port)
    addresses = {
        node: [address for address, _ in landscape.lab.underlay_of(landscape.node(node))] for node in NODES
    }
    stubs[0].UpsertService(pb.UpsertServiceRequest(service=service))
    served(stubs, 2)
    with client(landscape, "world") as world:
        for node, (four, *_) in addresses.items():
            wait_for(lambda four=four: "error" not in world("ask", four, 30080, 2), f"the port of {node}")
            # Each node to its own.
            assert world.names(four, 8, 30080) == {node}
        service.external_traffic_policy = pb.TRAFFIC_POLICY_CLUSTER
        stubs[0].UpsertService(pb.UpsertServiceRequest(service=service))
        for node, (four, *_) in addresses.items():
            wait_for(lambda four=four: world.names(four, 8, 30080) == set(NODES), f"all at {node}")
        world("stress", addresses["c1n2"][0], 30080)
        landscape.kill("c1n2", "lb")
        wait_for(lambda: world("count")["ok"] > 100, "connections")
        assert world("count")["failures"] == []
    wait_for(lambda: get(stubs[1]) is not None, "the lb service again", 60)


def test_watchers_see_what_the_node_serves(
    landscape: ModeLab, stubs: list[lb_pb2_grpc.LbServiceStub], servers: dict[str, str]
) -> None:
    watch = stubs[1].WatchServices(pb.WatchServicesRequest(), timeout=60)
    assert next(watch).kind == types_pb2.WATCH_KIND_SYNCED
    stubs[0].UpsertService(pb.UpsertServiceRequest(service=web(landscape, servers)))
    seen = next(each for each in watch if each.service.status.programmed)
    assert {backend.effective_state for backend in seen.service.backends} == {pb.BACKEND_STATE_ACTIVE}
    stubs[0].DeleteService(pb.DeleteServiceRequest(name="default/web:http"))
    last = next(each for each in watch if each.kind == types_pb2.WATCH_KIND_DELETE)
    assert last.service.name == "default/web:http"
    watch.cancel()
    usage = stubs[0].GetUsage(pb.GetUsageRequest())
    assert all(table.used <= table.size <= table.limit for table in usage.tables)
    assert {table.name for table in usage.tables} and "sock" in usage.counters


def test_a_backend_that_is_not_well_gets_no_connections(
    landscape: ModeLab, stubs: list[lb_pb2_grpc.LbServiceStub], servers: dict[str, str]
) -> None:
    # One that is well and is asked late does not fail five times in a row.
    check = pb.HealthCheck(tcp=pb.HealthCheck.Tcp(), interval_ms=300, unhealthy_after=5, healthy_after=1)
    service = web(landscape, servers, health_check=check)
    # Nobody listens there.
    service.backends.add(address=servers["c1n2"], port=8081)
    stubs[0].UpsertService(pb.UpsertServiceRequest(service=service))
    served(stubs, 2)
    for each in stubs:
        found = get(each)
        assert found is not None
        (sick,) = [b for b in found.backends if b.effective_state == pb.BACKEND_STATE_QUARANTINED]
        assert sick.port == 8081 and sick.state == pb.BACKEND_STATE_ACTIVE and sick.health
    with client(landscape, "c1n2") as host:
        assert host.names(VIP) == set(NODES)
        with server(landscape, "c1n2", "p2", "late", 8081):
            served(stubs, 3)
            assert "late" in host.names(VIP, 64)


def test_a_node_of_a_lab_keeps_to_its_own_sockets(landscape: ModeLab) -> None:
    for node in NODES:
        own = landscape.instance(node).cgroup
        with grpc.insecure_channel(f"unix:{landscape.instance(node).socket('lb')}") as channel:
            asked = status_pb2_grpc.StatusServiceStub(channel)

            def well(asked: status_pb2_grpc.StatusServiceStub = asked) -> status_pb2.GetStatusResponse | None:
                status = asked.GetStatus(status_pb2.GetStatusRequest())
                return status if status.health == types_pb2.HEALTH_OK else None

            status = wait_for(well, f"{node} to be well")
        (hooks,) = [part.message for part in status.components if part.name == "sockets"]
        assert own in hooks
        for kind in ("cgroup_inet4_connect", "cgroup_inet6_connect"):
            assert attach.attached_cgroup(cgroup.path_of(own), kind)


def test_what_cannot_be_is_refused_with_a_remedy(stubs: list[lb_pb2_grpc.LbServiceStub]) -> None:
    begun = time.monotonic()
    wrong = pb.Service(name="x", frontends=[pb.Frontend(address=VIP)])
    with pytest.raises(grpc.RpcError) as caught:
        stubs[0].UpsertService(pb.UpsertServiceRequest(service=wrong))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as caught:
        stubs[0].DeleteService(pb.DeleteServiceRequest(name="x"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert time.monotonic() - begun < 5


def test_nothing_is_left_of_a_node_that_served(
    landscape: ModeLab, stubs: list[lb_pb2_grpc.LbServiceStub]
) -> None:
    """The last: there is one node less afterwards."""
    front = pb.Frontend(type=pb.FRONTEND_TYPE_NODE_PORT, port=30080)
    service = pb.Service(name="default/web:http", frontends=[front])
    stubs[0].UpsertService(pb.UpsertServiceRequest(service=service))

    def hooks() -> str:
        return landscape.exec("c1n2", "tc", "filter", "show", "dev", "eth0", "ingress").stdout

    wait_for(lambda: "fib_lb_uplink" in hooks(), "programs at the uplink")
    link = landscape.exec("c1n2", "ip", "-d", "link", "show", "dev", "eth0")
    instance = landscape.instance("c1n2")
    # By a process of the node's own control group, which outlives it.
    done = landscape.exec("c1n2", "sh", "-c", "fibril down && echo alive")
    assert "alive" in done.stdout, done
    assert not cgroup.path_of(instance.cgroup).exists() or not cgroup.processes(
        cgroup.path_of(instance.cgroup)
    )
    assert "fib_" not in hooks()
    after = landscape.exec("c1n2", "ip", "-d", "link", "show", "dev", "eth0").stdout
    assert "xdp" not in after, (link.stdout, after)
    assert not instance.pin_dir.exists()
