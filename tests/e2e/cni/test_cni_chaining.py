"""Debian's portmap and bandwidth plugins behind fibril-cni.

world 192.0.2.2 ── 192.0.2.1 node ─┬─ server (port 7, host port 18007)
2001:db8:8::2   2001:db8:8::1      └─ client
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from services.common.pipeline.abi import EndpointFlag
from tests.e2e.cni.netkit import PLUGINS, Fibril, echo, echo_server, ip, netns_path, wait_until

HOST_PORT = 18007
NODE = ("192.0.2.1", "2001:db8:8::1")
WORLD = ("192.0.2.2", "2001:db8:8::2")
PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
BANDWIDTH = {"type": "bandwidth", "capabilities": {"bandwidth": True}}
MAPPING = {"portMappings": [{"hostPort": HOST_PORT, "containerPort": 7, "protocol": "tcp"}]}
# 16 Mbit/s and a bucket of 64 KiB: 1 MB takes at least 0.46 s, and no longer than a few times that.
RATE = 16_000_000
SIZE = 1_000_000
LIMITED = (SIZE - 65_536) * 8 / RATE * 0.9

missing = [name for name in ("portmap", "bandwidth") if not (PLUGINS / name).exists()]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"not installed in {PLUGINS}: {', '.join(missing)}")


@pytest.fixture(scope="module")
def world(fibril: Fibril) -> Iterator[str]:
    """A namespace one veth away from the node, without a route to the pods."""
    node, name = fibril.node.name, fibril.namespace()
    ip("-n", node, "link", "add", "uplink", "type", "veth", "peer", "name", "node0", "netns", name)
    for namespace, device, own in ((node, "uplink", NODE), (name, "node0", WORLD)):
        ip("-n", namespace, "addr", "add", f"{own[0]}/24", "dev", device)
        ip("-n", namespace, "addr", "add", f"{own[1]}/64", "dev", device, "nodad")
        ip("-n", namespace, "link", "set", device, "up")
    yield name
    ip("-n", node, "link", "del", "uplink")


def nat_rules(fibril: Fibril) -> int:
    """Rules of the node's nat tables that name the host port."""
    count = 0
    for tool in ("iptables", "ip6tables"):
        words = ["nsenter", f"--net={netns_path(fibril.node.name)}", tool, "-t", "nat", "-S"]
        rules = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        count += rules.count(str(HOST_PORT))
    return count


def test_a_host_port_leads_to_the_pod_and_goes_with_it(fibril: Fibril, world: str) -> None:
    server, client = fibril.namespace(), fibril.namespace()
    with fibril.network(PORTMAP, version="1.0.0") as network:
        network.add(client, netns_path(client))
        result = network.add(server, netns_path(server), runtime_config=MAPPING)
        for family, entry in enumerate(result["ips"]):
            with echo_server(server, entry["address"].split("/")[0]):
                for place in (world, client, server, fibril.node.name):
                    echo(place, NODE[family], HOST_PORT)
        network.delete(server, netns_path(server), runtime_config=MAPPING)
        network.delete(client, netns_path(client))
    assert nat_rules(fibril) == 0


@pytest.mark.parametrize(
    "limit, flag", [("ingressRate", EndpointFlag.SHAPED_IN), ("egressRate", EndpointFlag.SHAPED_OUT)]
)
def test_bandwidth_holds_between_pods(fibril: Fibril, limit: str, flag: EndpointFlag) -> None:
    shaped = {"bandwidth": {limit: RATE, limit.replace("Rate", "Burst"): 65_536 * 8}}
    server, client = fibril.namespace(), fibril.namespace()
    with fibril.network(BANDWIDTH, version="1.0.0") as network:
        network.add(client, netns_path(client))
        result = network.add(server, netns_path(server), runtime_config=shaped)
        # The plugin comes after us; the kernel tells the service of its qdisc.
        wait_until(lambda: bool(fibril.flags(server) & flag), "the notice of the limit")
        for entry in result["ips"]:
            address = entry["address"].split("/")[0]
            with echo_server(server, address):
                assert echo(client, address, size=SIZE) >= LIMITED
        network.delete(server, netns_path(server), runtime_config=shaped)
        network.delete(client, netns_path(client))


def test_without_a_limit_it_is_fast(fibril: Fibril) -> None:
    # The counterpart of the test above: what it measures is the limit, not the machine.
    server, client = fibril.namespace(), fibril.namespace()
    with fibril.network(BANDWIDTH, version="1.0.0") as network:
        network.add(client, netns_path(client))
        address = network.add(server, netns_path(server))["ips"][0]["address"].split("/")[0]
        with echo_server(server, address):
            assert min(echo(client, address, size=SIZE) for _ in range(5)) < LIMITED / 2
        for pod in (server, client):
            network.delete(pod, netns_path(pod))
