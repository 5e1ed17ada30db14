"""What pods can send to whom, over IPv4 and IPv6 (see podkit for the topology)."""

from __future__ import annotations

import ctypes
import socket
import struct

import pytest

from fibril.monitor.v1 import monitor_pb2
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi
from tests.e2e.endpoints.podkit import (
    NODE,
    WORLD,
    Node,
    Pod,
    tcp_echo,
    tcp_server,
    udp_echo,
    udp_server,
    wait_until,
)

PORT = 4711
both = pytest.mark.parametrize("version", [4, 6])
Pair = tuple[Pod, Pod]


def ping(pod: Pod, target: str, *options: str) -> str:
    return pod.space.command("ping", "-n", "-c1", "-W5", *options, target, check=False)


@both
def test_pods_reach_each_other(pods: Pair, version: int) -> None:
    client, server = pods
    target = server.address(version)
    assert "1 received" in ping(client, target)
    with tcp_server(server.space, version, target, PORT) as peers:
        data = bytes(range(256)) * 4000
        assert tcp_echo(client.space, version, target, PORT, data) == data
        assert peers == [client.address(version)]
    with udp_server(server.space, version, target, PORT):
        assert udp_echo(client.space, version, target, PORT) == b"hello"


@both
def test_pod_and_host_reach_each_other(node: Node, pods: Pair, version: int) -> None:
    pod = pods[0]
    gateway = pod.endpoint.ipv4_gateway if version == 4 else pod.endpoint.ipv6_gateway
    for place, target, server, seen in (
        (pod.space, gateway, node.space, pod.address(version)),
        (pod.space, NODE[version], node.space, pod.address(version)),
        (node.space, pod.address(version), pod.space, gateway),
    ):
        with tcp_server(server, version, target, PORT) as peers:
            assert tcp_echo(place, version, target, PORT) == b"hello"
            assert peers == [seen]


@both
def test_the_world_sees_the_nodes_address(node: Node, pods: Pair, version: int) -> None:
    with tcp_server(node.world, version, WORLD[version], PORT) as peers:
        assert tcp_echo(pods[0].space, version, WORLD[version], PORT) == b"hello"
        assert peers == [NODE[version]]
    with udp_server(node.world, version, WORLD[version], PORT):
        assert udp_echo(pods[0].space, version, WORLD[version], PORT) == b"hello"
    assert "1 received" in ping(pods[0], WORLD[version])


@both
def test_a_used_up_hop_count_is_answered(pods: Pair, version: int) -> None:
    told = ping(pods[0], pods[1].address(version), "-t1")
    assert "Time to live exceeded" in told or "Hop limit" in told, told


@both
def test_an_address_nobody_has_is_unreachable(pods: Pair, version: int) -> None:
    own = pods[0].address(version)
    told = ping(
        pods[0], own.rpartition(".")[0] + ".250" if version == 4 else own.rpartition(":")[0] + ":fffe"
    )
    assert "nreachable" in told or "No route" in told, told


@both
def test_path_mtu_is_learnt_from_a_smaller_pod(node: Node, pods: Pair, version: int) -> None:
    small = node.pod(mtu=1300)
    target = small.address(version)
    told = ping(pods[0], target, "-M", "do", "-s", "1352")
    assert "mtu = 1300" in told or "mtu=1300" in told, told
    # Learnt: the next one does not leave the pod any more, and TCP fits its segments.
    assert "message too long" in ping(pods[0], target, "-M", "do", "-s", "1352").lower()
    with tcp_server(small.space, version, target, PORT):
        data = b"x" * 300_000
        assert tcp_echo(pods[0].space, version, target, PORT, data) == data
    node.remove(small)


@both
def test_fragments_arrive(node: Node, pods: Pair, version: int) -> None:
    data = bytes(range(256)) * 36
    server = pods[1]
    with udp_server(server.space, version, server.address(version), PORT):
        assert udp_echo(pods[0].space, version, server.address(version), PORT, data) == data
    with udp_server(node.space, version, NODE[version], PORT):
        assert udp_echo(pods[0].space, version, NODE[version], PORT, data) == data


def test_nothing_broadcasts(pods: Pair) -> None:
    """No ARP and no neighbour solicitation is ever needed: all entries are permanent."""
    for space in (pods[0].space, pods[1].space):
        entries = space.command("ip", "neigh")
        assert entries.count("PERMANENT") == 2, entries


def frame(pod: Pod, source_mac: str, source: str) -> bytes:
    """A UDP datagram from `source` to the pod's gateway, in a frame from `source_mac`."""
    endpoint = pod.endpoint
    ethernet = bytes.fromhex((endpoint.host_mac + source_mac).replace(":", ""))
    udp = struct.pack("!4H", 1234, PORT, 12, 0) + b"data"
    if ":" in source:
        addresses = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(
            socket.AF_INET6, endpoint.ipv6_gateway
        )
        return ethernet + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(udp), 17, 64) + addresses + udp
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0)
    header += socket.inet_aton(source) + socket.inet_aton(endpoint.ipv4_gateway)
    total = sum(struct.unpack("!10H", header))
    for _ in range(2):  # What is carried may carry once more.
        total = (total & 0xFFFF) + (total >> 16)
    return ethernet + b"\x08\x00" + header[:10] + struct.pack("!H", ~total & 0xFFFF) + header[12:] + udp


@pytest.mark.parametrize(("what", "reason"), [("mac", 2), ("ipv4", 3), ("ipv6", 4)])
def test_a_pod_cannot_speak_for_others(node: Node, pods: Pair, what: str, reason: int) -> None:
    pod, other = pods[0].endpoint, pods[1].endpoint
    sent = {
        "mac": frame(pods[0], "02:00:00:00:00:99", pod.ipv4),
        "ipv4": frame(pods[0], pod.mac, other.ipv4),
        "ipv6": frame(pods[0], pod.mac, other.ipv6),
    }[what]

    def dropped() -> int:
        counters = node.monitor.GetCounters(monitor_pb2.GetCountersRequest(), timeout=5).counters
        return sum(counter.packets for counter in counters if counter.reason == reason)

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind((pod.ifname, 0))
            for _ in range(10):
                raw.send(sent)

    before = dropped()
    stream = node.monitor.WatchEvents(monitor_pb2.WatchEventsRequest(endpoint_id=pod.id), timeout=20)
    # The flags that make programs report are set by the call, which is under way: send until one is seen.
    config = node.instance.pin_dir / "pipeline/v1/pl_config"
    with BpfMap.open(config, ctypes.c_uint32, abi.NodeConfig) as flags:
        wait_until(lambda: flags.lookup(0).watch_drops, "the monitor is watched")
        pods[0].space.run(send)
        event = next(iter(stream)).event
        wait_until(lambda: dropped() >= before + 10, "all of them are dropped")
        stream.cancel()
        wait_until(lambda: not flags.lookup(0).watch_drops, "the monitor is not watched any more")
    assert dropped() == before + 10
    assert (event.reason, event.source_pod, event.source_endpoint) == (reason, pod.pod, pod.id)
    if what != "mac":
        assert event.source == (other.ipv4 if what == "ipv4" else other.ipv6)
        assert (event.source_port, event.destination_port, event.protocol) == (1234, PORT, 17)


def test_a_real_packet_of_the_same_kind_passes(node: Node, pods: Pair) -> None:
    """The counterpart of the test above: its frames are dropped for their source only."""
    pod = pods[0]
    with node.space.socket(4, socket.SOCK_DGRAM) as server:
        server.bind((pod.endpoint.ipv4_gateway, PORT))

        def send() -> None:
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
                raw.bind((pod.endpoint.ifname, 0))
                raw.send(frame(pod, pod.endpoint.mac, pod.endpoint.ipv4))

        # No checksum is a valid checksum in UDP over IPv4.
        pod.space.run(send)
        assert server.recv(100) == b"data"
