"""Creating and deleting endpoints: errors, races, storms, and what is left afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import random
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from fibril.endpoint.v1 import endpoint_pb2 as ep
from fibril.ipam.v1 import ipam_pb2
from fibril.types.v1 import types_pb2
from services.common.kernel import cgroup
from services.common.kernel.maps import BpfMap
from services.common.kernel.netlink import Rtnl
from services.common.pipeline import abi
from tests.e2e.endpoints.podkit import NODE, Node, Pod, Space, ip, ip_json, wait_until

NOTHING = dict.fromkeys(
    (
        "links",
        "allocations",
        "ep_iface",
        "ep_addr",
        "ep_near",
        "ep_netns",
        "endpoints",
        "neighbours",
        "routes",
    ),
    0,
)


@pytest.fixture(autouse=True)
def nothing_left(node: Node) -> None:
    """Every test begins, and so the one before it ended, without a trace of a pod."""
    assert node.leftovers() == NOTHING


def code(call: pytest.ExceptionInfo[grpc.RpcError]) -> tuple[str, str]:
    return call.value.code().name, call.value.details()


def takes_in(address: str) -> bool:
    """Whether packets to an address are taken in where the caller is: later than the address is there."""
    with Rtnl() as here:
        return here.is_local(ipaddress.ip_address(address))


def test_an_endpoint_is_complete_when_create_returns(node: Node) -> None:
    pod = node.pod(labels={"app": "cart"})
    made = pod.endpoint
    assert made.state == ep.ENDPOINT_STATE_READY
    assert made.labels == {"app": "cart"}
    assert made.host_ifname in node.links()
    assert node.differences(pod) == []
    for by in (
        {"id": made.id},
        {"address": made.ipv4},
        {"address": made.ipv6},
        {"netns_cookie": made.netns_cookie},
        {"key": ep.EndpointKey(container_id=made.container_id, ifname="eth0")},
    ):
        assert node.endpoints.GetEndpoint(ep.GetEndpointRequest(**by), timeout=5).endpoint == made
    value = node.map_value(pod)
    assert value is not None
    assert (value.id, str(value.ipv4), str(value.ipv6), value.mtu) == (made.id, made.ipv4, made.ipv6, 1450)
    for address in (made.ipv4, made.ipv6):
        assert pod.space.run(takes_in, address) and not node.space.run(takes_in, address)
    # Again is the same one.
    assert node.create(pod.space, labels={"app": "cart"}) == made
    node.remove(pod)


def test_the_pods_cgroup_is_known(node: Node) -> None:
    name = f"fibril-test/{node.name}"
    path = cgroup.create(name)
    try:
        pod = node.pod(cgroup_path=f"/{name}")
        number = path.stat().st_ino
        assert pod.endpoint.cgroup_id == number
        found = node.endpoints.GetEndpoint(ep.GetEndpointRequest(cgroup_id=number), timeout=5).endpoint
        assert found == pod.endpoint
        groups = node.instance.pin_dir / abi.MAPS["ep_cgroup"]
        with BpfMap.open(groups, ctypes.c_uint64, ctypes.c_uint32) as opened:
            assert opened.lookup(number).value == pod.endpoint.id
            node.remove(pod)
            assert opened.lookup(number) is None
        with pytest.raises(grpc.RpcError) as missing:
            node.create(node.namespace(), cgroup_path=f"/{name}/none")
        assert code(missing)[0] == "FAILED_PRECONDITION"
    finally:
        path.rmdir()
        with contextlib.suppress(OSError):
            path.parent.rmdir()


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ({"container_id": "-x"}, "INVALID_ARGUMENT", "container id"),
        ({"ifname": "a/b"}, "INVALID_ARGUMENT", "interface name"),
        ({"netns": "relative"}, "INVALID_ARGUMENT", "absolute path"),
        ({"netns": "/etc/passwd"}, "INVALID_ARGUMENT", "not a network namespace"),
        ({"netns": "/proc/self/ns/pid"}, "INVALID_ARGUMENT", "not a network namespace"),
        ({"netns": "/run/netns/there-is-none"}, "FAILED_PRECONDITION", "is gone"),
        ({"mtu": 100}, "INVALID_ARGUMENT", "MTU"),
        ({"ipv4": "10.244.0"}, "INVALID_ARGUMENT", "not an IPv4 address"),
        ({"ipv4": "203.0.113.9"}, "INVALID_ARGUMENT", "outside pool"),
        ({"pool": "none"}, "NOT_FOUND", "pool"),
        ({"cgroup_path": "../x"}, "INVALID_ARGUMENT", "cgroup path"),
        ({"labels": {"k" * 300: "v"}}, "INVALID_ARGUMENT", "label"),
    ],
)
def test_a_wrong_request_leaves_nothing(
    node: Node, options: dict[str, object], status: str, words: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        node.create(node.namespace(), **options)
    assert code(refused)[0] == status
    assert words in code(refused)[1]


def test_the_nodes_own_namespace_is_refused(node: Node) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        node.create(node.space)
    assert code(refused)[0] == "INVALID_ARGUMENT"


def test_a_name_taken_in_the_pod_is_refused_and_undone(node: Node) -> None:
    space = node.namespace()
    ip("-n", space.name, "link", "add", "eth0", "type", "bridge")
    with pytest.raises(grpc.RpcError) as refused:
        node.create(space)
    assert code(refused)[0] == "ALREADY_EXISTS"


def test_other_options_for_one_key_are_refused(node: Node) -> None:
    pod = node.pod()
    for options in ({"mtu": 1400}, {"pod": "test/other"}, {"netns": node.namespace().path}):
        with pytest.raises(grpc.RpcError) as refused:
            node.create(pod.space, **options)
        assert code(refused)[0] == "ALREADY_EXISTS", options
    node.remove(pod)


def test_a_new_namespace_under_the_old_name_gets_a_new_endpoint(node: Node) -> None:
    pod = node.pod()
    name = pod.space.name
    ip("netns", "del", name)
    ip("netns", "add", name)
    made = node.create(pod.space)
    assert made.netns_cookie != pod.endpoint.netns_cookie
    node.remove(Pod(pod.space, made))


def test_a_specific_address_is_given_once(node: Node) -> None:
    pod = node.pod()
    node.delete(pod)
    again = node.create(pod.space, ipv4=pod.endpoint.ipv4)
    assert again.ipv4 == pod.endpoint.ipv4 and again.ipv6
    with pytest.raises(grpc.RpcError) as refused:
        node.create(node.namespace(), ipv4=pod.endpoint.ipv4)
    assert code(refused)[0] == "ALREADY_EXISTS"
    node.remove(Pod(pod.space, again))


def test_two_interfaces_in_one_pod(node: Node) -> None:
    space = node.namespace()
    first, second = node.create(space), node.create(space, ifname="net1")
    cookies = node.instance.pin_dir / abi.MAPS["ep_netns"]
    with BpfMap.open(cookies, ctypes.c_uint64, ctypes.c_uint32) as opened:
        assert opened.lookup(first.netns_cookie).value == first.id
        deleted = node.endpoints.DeleteEndpoint(
            ep.DeleteEndpointRequest(container_id=space.name, ifname="eth0"), timeout=10
        ).deleted
        assert deleted == 1
        assert opened.lookup(first.netns_cookie).value == second.id
    assert node.delete(Pod(space, second)) == 1


def test_deleting_the_unknown_succeeds(node: Node) -> None:
    request = ep.DeleteEndpointRequest(container_id="nobody")
    assert node.endpoints.DeleteEndpoint(request, timeout=5).deleted == 0


def test_creations_of_one_key_at_once_give_one_endpoint(node: Node) -> None:
    space = node.namespace()
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: node.create(space), range(8)))
    assert len({endpoint.id for endpoint in made}) == 1
    assert len(node.links()) == 1
    node.remove(Pod(space, made[0]))


def test_a_caller_that_gives_up_leaves_a_whole_endpoint_or_none(node: Node) -> None:
    request = ep.CreateEndpointRequest(container_id="impatient", netns=node.namespace().path)
    for delay in (0.001, 0.003, 0.006, 0.01, 0.02):
        with contextlib.suppress(grpc.RpcError):
            node.endpoints.CreateEndpoint(request, timeout=delay)
        # Waits for what is under way.
        node.endpoints.DeleteEndpoint(ep.DeleteEndpointRequest(container_id="impatient"), timeout=10)
        assert node.leftovers() == NOTHING


def test_a_namespace_that_vanishes_meanwhile_leaves_nothing(node: Node) -> None:
    outcomes = set()
    for _ in range(25):
        space = node.namespace()
        timer = threading.Timer(
            random.uniform(0, 0.012), subprocess.run, [["ip", "netns", "del", space.name]], {"check": True}
        )
        timer.start()
        try:
            made = node.create(space)
            outcomes.add("OK")
            assert made.state == ep.ENDPOINT_STATE_READY
        except grpc.RpcError as error:
            outcomes.add(error.code().name)
        timer.join()
    assert outcomes <= {"OK", "FAILED_PRECONDITION"}
    # Endpoints that were complete go when the kernel says that their link is gone.
    wait_until(lambda: node.leftovers() == NOTHING, f"nothing is left: {node.leftovers()}")


def test_an_endpoint_goes_with_its_namespace(node: Node) -> None:
    pod = node.pod()
    pod.space.delete()
    wait_until(lambda: node.get(pod) is None, "the endpoint is gone")
    wait_until(lambda: node.leftovers() == NOTHING, "nothing is left")


def test_a_storm_leaves_nothing(node: Node) -> None:
    spaces = [node.namespace() for _ in range(20)]

    def life(space: Space) -> None:
        for _ in range(5):
            made = node.create(space)
            assert made.state == ep.ENDPOINT_STATE_READY
            assert node.delete(Pod(space, made)) == 1

    with ThreadPoolExecutor(20) as threads:
        list(threads.map(life, spaces))


def test_a_watch_tells_every_change(node: Node) -> None:
    pod = node.pod()
    stream = node.endpoints.WatchEndpoints(ep.WatchEndpointsRequest(), timeout=30)
    first, mark = next(stream), next(stream)
    assert (first.kind, first.endpoint.id) == (types_pb2.WATCH_KIND_PUT, pod.endpoint.id)
    assert mark.kind == types_pb2.WATCH_KIND_SYNCED
    node.remove(pod)
    seen = [next(stream)]
    while seen[-1].kind != types_pb2.WATCH_KIND_DELETE:
        seen.append(next(stream))
    assert {message.endpoint.state for message in seen[:-1]} == {ep.ENDPOINT_STATE_DELETING}
    assert (seen[-1].endpoint.id, seen[-1].endpoint.ipv4) == (pod.endpoint.id, "")
    stream.cancel()
    # Resumed behind the deletion's predecessor, it tells the deletion only.
    resumed = node.endpoints.WatchEndpoints(
        ep.WatchEndpointsRequest(after_revision=seen[-1].revision - 1), timeout=30
    )
    assert next(resumed).kind == types_pb2.WATCH_KIND_DELETE
    resumed.cancel()


def test_lists_are_paged(node: Node) -> None:
    made = [node.pod() for _ in range(5)]
    pages, token = [], ""
    while not pages or token:
        request = ep.ListEndpointsRequest(page=types_pb2.PageRequest(size=2, token=token))
        answer = node.endpoints.ListEndpoints(request, timeout=5)
        pages.append([endpoint.id for endpoint in answer.endpoints])
        token = answer.next_token
    assert [len(page) for page in pages] == [2, 2, 1]
    assert sorted(number for page in pages for number in page) == sorted(pod.endpoint.id for pod in made)
    node.remove(*made)


def test_addresses_of_a_provider_work_without_a_block(node: Node) -> None:
    pool = ipam_pb2.Pool(name="cloud", mode=ipam_pb2.POOL_MODE_CLOUD, cidrs=["10.99.0.0/24", "fd99::/64"])
    node.ipam.PutPool(ipam_pb2.PutPoolRequest(pool=pool), timeout=5)
    given = ["10.99.0.7", "fd99::7", "10.99.0.8", "fd99::8"]
    added = node.ipam.AddAddresses(ipam_pb2.AddAddressesRequest(pool="cloud", addresses=given), timeout=5)
    assert [result.code for result in added.results] == [0] * 4
    one, two, other = node.pod(pool="cloud"), node.pod(pool="cloud"), node.pod()
    assert sorted(a for pod in (one, two) for a in (pod.endpoint.ipv4, pod.endpoint.ipv6)) == sorted(given)
    for version in (4, 6):
        for target in (two.address(version), other.address(version), NODE[version]):
            assert "1 received" in one.space.command("ping", "-c1", "-W5", target)
    with pytest.raises(grpc.RpcError) as refused:
        node.create(node.namespace(), pool="cloud")
    assert code(refused)[0] == "RESOURCE_EXHAUSTED"
    node.remove(one, two, other)


# ---- repair: somebody breaks it by hand -------------------------------------------------------------------
def test_a_deleted_link_is_made_again(node: Node) -> None:
    pod = node.pod()
    ip("-n", node.name, "link", "del", pod.endpoint.host_ifname)

    def mended() -> bool:
        found = node.get(pod)
        return (
            found is not None
            and found.host_ifindex != pod.endpoint.host_ifindex
            and not node.differences(pod)
        )

    wait_until(mended, "the link is there again")
    assert "1 received" in pod.space.command("ping", "-c1", "-W5", pod.endpoint.ipv4_gateway)
    now = node.get(pod)
    assert now is not None and (now.ipv4, now.mac) == (pod.endpoint.ipv4, pod.endpoint.mac)
    node.remove(pod)


def test_a_link_set_down_comes_up_with_its_routes(node: Node) -> None:
    pod = node.pod()
    ip("-n", node.name, "link", "set", pod.endpoint.host_ifname, "down")
    wait_until(lambda: not node.differences(pod), "the link is as it was")
    node.remove(pod)


def test_differences_are_told(node: Node) -> None:
    pod = node.pod()
    ip("-n", node.name, "route", "del", pod.endpoint.ipv4)
    ip("-n", pod.space.name, "addr", "del", f"{pod.endpoint.ipv6}/128", "dev", "eth0")
    told = " ".join(node.differences(pod))
    assert f"route to {pod.endpoint.ipv4}" in told and pod.endpoint.ipv6 in told
    node.remove(pod)


def test_shaping_is_seen_and_unseen(node: Node) -> None:
    pod = node.pod()
    device = pod.endpoint.host_ifname

    def flags() -> int:
        value = node.map_value(pod)
        return -1 if value is None else int(value.flags)

    node.space.command(
        "tc",
        "qdisc",
        "add",
        "dev",
        device,
        "root",
        "tbf",
        "rate",
        "10mbit",
        "burst",
        "32k",
        "latency",
        "50ms",
    )
    wait_until(lambda: flags() == abi.EndpointFlag.SHAPED_IN, "the flag is set")
    node.space.command("tc", "qdisc", "del", "dev", device, "root")
    wait_until(lambda: flags() == 0, "the flag is cleared")
    node.remove(pod)


def test_the_gateway_device_is_made_again(node: Node) -> None:
    pod = node.pod()
    ip("-n", node.name, "link", "del", node.instance.node_ifname)

    def back() -> bool:
        devices = [link["ifname"] for link in ip_json("-n", node.name, "link")]
        return node.instance.node_ifname in devices and not node.differences(pod)

    wait_until(back, "the gateway is there and the pod's routes with it")
    assert "1 received" in pod.space.command("ping", "-c1", "-W5", pod.endpoint.ipv4_gateway)
    node.remove(pod)


def test_the_file_a_namespace_was_mounted_on_counts_as_gone(node: Node, tmp_path: Path) -> None:
    leftover = tmp_path / "gone"
    leftover.touch()
    with pytest.raises(grpc.RpcError) as refused:
        node.create(node.namespace(), netns=str(leftover))
    assert code(refused)[0] == "FAILED_PRECONDITION"


def test_ipv6_switched_off_by_default_in_the_pod(node: Node) -> None:
    space = node.namespace()
    space.run(Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text, "1")
    pod = Pod(space, node.create(space))
    with node.space.socket(6, socket.SOCK_DGRAM):
        assert "1 received" in space.command("ping", "-c1", "-W5", pod.endpoint.ipv6_gateway)
    node.remove(pod)
