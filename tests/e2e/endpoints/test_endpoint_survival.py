"""Deaths, restarts, missing features, neighbours on the same kernel, and the end of a node."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from fibril.endpoint.v1 import endpoint_pb2 as ep
from fibril.ipam.v1 import ipam_pb2
from fibril.monitor.v1 import monitor_pb2
from tests.e2e.endpoints.podkit import Node, Pod, ip, ip_json, tcp_server, udp_server, wait_until
from tests.e2e.endpoints.probes import PORT, Probes


@pytest.fixture
def own() -> Iterator[Node]:
    """A node for one test."""
    made = Node()
    try:
        yield made
    finally:
        made.close()


def drops(node: Node) -> dict[int, int]:
    """Dropped packets by reason, without those that pods' kernels send unasked (neighbour, broadcast,
    multicast).
    """
    counters = node.monitor.GetCounters(monitor_pb2.GetCountersRequest(), timeout=5).counters
    return {c.reason: c.packets for c in counters if c.reason not in (0, 11, 12, 13)}


def test_a_killed_service_costs_no_packet(own: Node) -> None:
    client, server = own.pod(), own.pod()
    before = drops(own)
    with contextlib.ExitStack() as stack:
        for version in (4, 6):
            stack.enter_context(tcp_server(server.space, version, server.address(version), PORT))
        stack.enter_context(udp_server(server.space, 4, server.address(4), PORT))
        iperf = ["nsenter", f"--net={server.space.path}", "iperf3", "-s", "-1", "-p", "5201"]
        listener = stack.enter_context(subprocess.Popen(iperf, stdout=subprocess.DEVNULL))
        stack.callback(listener.kill)
        wait_until(lambda: "5201" in server.space.command("ss", "-ltn"), "iperf3 listens")
        stream = stack.enter_context(
            subprocess.Popen(
                [
                    "nsenter",
                    f"--net={client.space.path}",
                    "iperf3",
                    "-c",
                    server.address(6),
                    "-p",
                    "5201",
                    "-t",
                    "6",
                    "-J",
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(stream.kill)
        with Probes(client, server) as probes:
            wait_until(lambda: probes.connections > 20, "probes run")
            for _ in range(2):
                own.kill()
                at, sent = probes.connections, probes.datagrams
                wait_until(
                    lambda at=at, sent=sent: probes.connections > at + 10 and probes.datagrams > sent + 50,
                    "probes run without the service",
                )
                own.start()
                # The restarted service works, not only the data path.
                own.remove(own.pod())
            wait_until(lambda: stream.poll() is not None, "iperf3 ends", 60)
        assert stream.stdout is not None
        result = json.loads(stream.stdout.read())
    assert probes.failures == []
    assert result["end"]["sum_received"]["bytes"] > 1_000_000
    assert min(interval["sum"]["bytes"] for interval in result["intervals"]) > 0
    assert drops(own) == before
    assert own.differences(client) == own.differences(server) == []
    assert [e.id for e in own.endpoints.ListEndpoints(ep.ListEndpointsRequest(), timeout=5).endpoints] == [
        client.endpoint.id,
        server.endpoint.id,
    ]


def test_a_restart_finds_what_changed_meanwhile(own: Node) -> None:
    broken, gone, whole = own.pod(), own.pod(), own.pod()
    own.kill()
    ip("-n", own.name, "route", "del", broken.endpoint.ipv4)
    ip("-n", own.name, "link", "set", broken.endpoint.host_ifname, "mtu", "1400")
    gone.space.delete()
    stranger = own.instance.host_ifname(0xABC)
    ip("-n", own.name, "link", "add", stranger, "type", "veth", "peer", "name", "stranger")
    wait_until(lambda: gone.endpoint.host_ifname not in own.links(), "the kernel removes the link")
    own.start()
    wait_until(lambda: not own.differences(broken), "what differed is repaired")
    wait_until(lambda: own.get(gone) is None, "the endpoint without a namespace is gone")
    wait_until(lambda: stranger not in own.links(), "the link without an endpoint is gone")
    assert own.get(whole) == whole.endpoint
    assert own.allocations() == sorted(
        address for pod in (broken, whole) for address in (pod.endpoint.ipv4, pod.endpoint.ipv6)
    )


def test_a_kill_at_any_moment_leaves_whole_endpoints_or_none(own: Node) -> None:
    spaces = [own.namespace() for _ in range(4)]

    def churn(space: object, stop: threading.Event) -> None:
        while not stop.is_set():
            for call in (
                lambda: own.create(space),
                lambda: own.delete(Pod(space, ep.Endpoint(container_id=space.name))),
            ):
                with contextlib.suppress(grpc.RpcError):
                    call()

    for _ in range(6):
        stop = threading.Event()
        with ThreadPoolExecutor(len(spaces)) as threads:
            for space in spaces:
                threads.submit(churn, space, stop)
            time.sleep(random.uniform(0.05, 0.4))
            own.kill()
            own.start()
            stop.set()
        listed = own.endpoints.ListEndpoints(ep.ListEndpointsRequest(), timeout=5).endpoints
        assert {endpoint.state for endpoint in listed} <= {ep.ENDPOINT_STATE_READY}
        assert own.links() == sorted(endpoint.host_ifname for endpoint in listed)
        assert own.allocations() == sorted(a for endpoint in listed for a in (endpoint.ipv4, endpoint.ipv6))
        for space in spaces:
            own.delete(Pod(space, ep.Endpoint(container_id=space.name)))
        wait_until(lambda: not any(own.leftovers().values()), f"nothing is left: {own.leftovers()}")


def test_a_reboot_is_survived(own: Node) -> None:
    """Links, pins and the run directory are gone, the state directory is not."""
    pod = own.pod()
    own.kill()
    pod.space.delete()
    subprocess.run(["rm", "-r", str(own.instance.pin_dir)], check=True)
    (own.instance.run_dir / "ipam.programs").unlink()
    ip("-n", own.name, "link", "del", own.instance.node_ifname)
    own.start()
    wait_until(lambda: not any(own.leftovers().values()), "the endpoint of before is gone")
    fresh = own.pod()
    assert "1 received" in fresh.space.command("ping", "-c1", "-W5", fresh.endpoint.ipv4_gateway)


def test_without_etcd_the_nodes_blocks_serve(own: Node) -> None:
    own.kill_etcd()
    wait_until(lambda: own.health("etcd") == 2, "the status says so")
    own.remove(own.pod())
    own.kill()
    own.start(wait=False)
    wait_until(own.status, "the service answers")
    pod = own.pod()
    assert own.differences(pod) == []
    own.start_etcd()
    wait_until(own.healthy, "etcd is back")


def test_without_capabilities_addresses_are_served_and_the_lack_is_named() -> None:
    node = Node(
        wrapper=("setpriv", "--bounding-set=-bpf,-perfmon,-sys_admin", "--inh-caps=-bpf,-perfmon,-sys_admin"),
        world=False,
        wait=False,
    )
    try:
        wait_until(lambda: node.health("etcd") == 1, "the service answers")
        given = node.ipam.Allocate(ipam_pb2.AllocateRequest(owner="someone"), timeout=5).allocations
        assert len(given) == 2
        with pytest.raises(grpc.RpcError) as refused:
            node.create(node.namespace())
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "CAP_BPF" in refused.value.details()
        part = wait_until(lambda: node.status().get("datapath"), "it says what it lacks")
        assert part.health == 3 and "CAP_BPF" in part.message
        with pytest.raises(grpc.RpcError) as blind:
            node.monitor.GetCounters(monitor_pb2.GetCountersRequest(), timeout=5)
        assert blind.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    finally:
        node.close()


def test_two_nodes_on_one_kernel_do_not_meet(own: Node) -> None:
    other = Node(world=False)
    try:
        # Equal pools, so equal addresses are likely: each is found in its own node only.
        here, there = own.pod(), other.pod(ipv4="")
        for pod in (here, there):
            assert "1 received" in pod.space.command("ping", "-c1", "-W5", pod.endpoint.ipv4_gateway)
    finally:
        other.close()
    assert own.differences(here) == []
    assert "1 received" in here.space.command("ping", "-c1", "-W5", here.endpoint.ipv6_gateway)


def traces(node: Node) -> dict[str, object]:
    """What a node may leave in its namespace and on the bpffs."""

    def setting(name: str) -> str:
        return node.space.run(Path(f"/proc/sys/net/{name}").read_text)

    return {
        "links": sorted(link["ifname"] for link in ip_json("-n", node.name, "link")),
        "routes": [ip("-n", node.name, family, "route", "show", "table", "all") for family in ("-4", "-6")],
        "rules": [ip("-n", node.name, family, "rule") for family in ("-4", "-6")],
        "nft": node.space.command("nft", "list", "tables"),
        "forwarding": [setting("ipv4/ip_forward"), setting("ipv6/conf/all/forwarding")],
        "pins": node.instance.pin_dir.exists(),
    }


def test_teardown_leaves_nothing_even_without_the_database() -> None:
    node = Node(run=False)
    try:
        before = traces(node)
        node.begin()
        node.pod()
        assert traces(node) != before
        node.kill()
        for file in node.instance.state_dir.glob("ipam.db*"):
            file.unlink()
        node.teardown()
        node.teardown()
        assert traces(node) == before
    finally:
        node.close()
