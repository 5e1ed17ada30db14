"""Identities and labels that others set: recorded, in every map, kept by restarts; and how large pods' packets may be."""

from __future__ import annotations

import ctypes
import json
import sqlite3

import grpc
import pytest

from fibril.endpoint.v1 import endpoint_pb2 as ep
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi
from tests.e2e.endpoints.podkit import Node, Pod, ip, wait_until

KEYS = {"ep_iface": ctypes.c_uint32, "ep_addr": abi.FibAddr, "ep_near": ctypes.c_uint32}


def identify(node: Node, pod: Pod, identity: int, container_id: str = "") -> list[int]:
    one = ep.EndpointIdentity(
        id=pod.endpoint.id, container_id=container_id or pod.endpoint.container_id, identity=identity
    )
    request = ep.SetEndpointIdentitiesRequest(identities=[one])
    return list(node.endpoints.SetEndpointIdentities(request, timeout=5).unknown)


def in_maps(node: Node, pod: Pod) -> set[int]:
    """Identities that programs see for a pod; none while an entry of it is just being written."""
    found = []
    for name, key in KEYS.items():
        with BpfMap.open(node.instance.pin_dir / abi.MAPS[name], key, abi.Endpoint) as opened:
            found += [value.identity for _, value in opened.items() if value.id == pod.endpoint.id]
    # Interface and two addresses, each in its hash and near.
    return set(found) if len(found) == 6 else set()


def test_an_identity_reaches_every_map_and_survives() -> None:
    node = Node()
    try:
        pod, other = node.pod(labels={"app": "web"}), node.pod()
        assert pod.endpoint.identity == 5 and in_maps(node, pod) == {5}
        assert identify(node, pod, 0x10_0001) == []
        assert in_maps(node, pod) == {0x10_0001} and in_maps(node, other) == {5}
        assert identify(node, pod, 0x10_0002, "another") == [pod.endpoint.id]
        with pytest.raises(grpc.RpcError) as refused:
            identify(node, pod, 0)
        assert "identities[0].identity" in str(refused.value.details())
        key = ep.EndpointKey(container_id=pod.endpoint.container_id)
        request = ep.SetEndpointLabelsRequest(key=key, labels={"app": "db"})
        answer = node.endpoints.SetEndpointLabels(request, timeout=5).endpoint
        assert (answer.identity, answer.labels) == (0x10_0001, {"app": "db"})
        # The record is what counts, whatever befalls the link.
        node.kill()
        ip("-n", node.name, "link", "del", pod.endpoint.host_ifname)
        node.start()
        wait_until(lambda: not node.differences(pod), "the link is made again")
        answer = node.get(pod)
        assert answer is not None and (answer.identity, answer.labels) == (0x10_0001, {"app": "db"})
        assert in_maps(node, pod) == {0x10_0001}
        # A database of the version that knew no identities.
        node.kill()
        forget_identities(node)
        node.start()
        wait_until(lambda: in_maps(node, pod) == {5}, "programs are told what the record says")
        assert identify(node, pod, 0x10_0003) == [] and in_maps(node, pod) == {0x10_0003}
    finally:
        node.close()


def forget_identities(node: Node) -> None:
    with sqlite3.connect(node.instance.state_dir / "ipam.db") as db:
        for number, data in db.execute("SELECT id, record FROM endpoints").fetchall():
            record = json.loads(data)
            record.pop("identity")
            db.execute("UPDATE endpoints SET record = ? WHERE id = ?", (json.dumps(record).encode(), number))
    db.close()


def test_pods_packets_fit_through_the_device_to_other_nodes() -> None:
    node = Node({"network.device": "small"}, world=False, run=False)
    try:
        ip("-n", node.name, "link", "add", "small", "mtu", "1400", "type", "veth", "peer", "name", "far")
        ip("-n", node.name, "link", "set", "small", "up")
        ip("-n", node.name, "addr", "add", "2001:db8:8::1/64", "dev", "small", "nodad")
        node.begin()
        # Less what an overlay between IPv6 addresses adds.
        assert node.pod().endpoint.mtu == 1330
    finally:
        node.close()
