"""The node's promise: whichever process dies, pods do not notice, and the node is whole again by itself."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any

from ctlnode import Node, wait_for

from fibril.endpoint.v1 import endpoint_pb2 as ep
from tests.e2e.endpoints.podkit import Pod, Space, tcp_server, udp_server
from tests.e2e.endpoints.probes import PORT, Probes


def pod(node: Node, name: str) -> Pod:
    """A namespace pod made by the command."""
    node.fibril("pod", "add", name)
    (record,) = [e for e in node.json("endpoint", "ls") if e["pod"] == name]
    fields = ("id", "container_id", "ifname", "netns", "ipv4", "ipv6")
    return Pod(Space(record["netns"].rsplit("/", 1)[1], existing=True), ep.Endpoint(**{f: record[f] for f in fields}))


def drops(node: Node) -> dict[str, int]:
    """Dropped packets by reason, without those that kernels send unasked; by the host's to a pod just born, too (MLD)."""
    passed = {"UNSPECIFIED", "MULTICAST", "BROADCAST", "NEIGHBOUR", "POLICY_UNKNOWN"}
    found = node.json("monitor", "--counters")
    return {c["reason"]: c["packets"] for c in found if c["reason"].removeprefix("DROP_REASON_") not in passed}


def refused(node: Node, *pods: Pod) -> list[dict[str, Any]]:
    """What policies dropped at these pods."""
    ours = {address for each in pods for address in (each.endpoint.ipv4, each.endpoint.ipv6)}
    found = node.json("flow", "ls", "--verdict", "dropped")
    return [flow for flow in found if {flow["source"]["address"], flow["destination"]["address"]} & ours]


def test_each_process_of_the_node_can_be_killed_under_load(node: Node) -> None:
    node.fibril("up")
    client, server = pod(node, "client"), pod(node, "server")
    before = drops(node), refused(node, client, server)
    with contextlib.ExitStack() as stack:
        for version in (4, 6):
            stack.enter_context(tcp_server(server.space, version, server.address(version), PORT))
        stack.enter_context(udp_server(server.space, 4, server.address(4), PORT))
        probes = stack.enter_context(Probes(client, server))
        wait_for(lambda: probes.connections > 20, "probes run")
        for victim in ("ipam", "identity", "lb", "etcd", "supervisor"):
            old = node.processes()
            os.kill(old[victim], signal.SIGKILL)
            at, sent = probes.connections, probes.datagrams
            wait_for(
                lambda at=at, sent=sent: probes.connections > at + 20 and probes.datagrams > sent + 50,
                f"probes run after {victim} was killed",
            )
            if victim == "supervisor":
                node.fibril("up")  # nobody watches the supervisor but who starts it
            wait_for(lambda v=victim, o=old: node.processes().get(v, o[v]) != o[v], f"a new {victim}", 20)
            wait_for(lambda: node.fibril("status", code=None).returncode == 0, "a healthy node", 20)
            # The node works, not only its data path.
            node.fibril("pod", "add", f"after-{victim}")
            node.fibril("pod", "rm", f"after-{victim}")
    assert probes.failures == []
    assert (drops(node), refused(node, client, server)) == before
