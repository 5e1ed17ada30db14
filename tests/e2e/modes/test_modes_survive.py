"""A cluster whose nodes and processes die, and whose nodes move."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator

import pytest
from modelab import NETWORK, ModeLab, lab, wait_for

LEASE_S = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[ModeLab]:
    """Two nodes whose loss is noticed soon."""
    with lab("--nodes", "2", "--pods", "1", *NETWORK, FIBRIL_IDENTITIES_LEASE_S=str(LEASE_S)) as made:
        yield made


def test_nothing_is_lost_when_the_identity_service_is_killed_everywhere(cluster: ModeLab) -> None:
    cluster.test("--kind", "icmp")
    # So many, and not for so long: then it waits for the answers to the last ones.
    words = ["fibril", "pod", "exec", "p1", "--", "ping", "-q", "-i", "0.002", "-c", "2500"]
    running = []
    for family in ("ipv4", "ipv6"):
        context = cluster.started("c1n1", *words, cluster.pod("c1n2", "p1")[family], stdout=subprocess.PIPE)
        running.append((context, context.__enter__()))
    for _ in range(3):
        time.sleep(1.0)
        for node in ("c1n1", "c1n2"):
            cluster.kill(node, "identity")
    for context, ping in running:
        out, _ = ping.communicate(timeout=90)
        context.__exit__(None, None, None)
        sent, received = map(int, re.findall(r"(\d+) packets transmitted, (\d+) received", out)[0])
        # The very last one may be under way when ping has waited long enough.
        assert sent == 2500 and sent - received <= 1, out
    for node in ("c1n1", "c1n2"):
        wait_for(lambda: cluster.exec(node, "fibril", "status", code=None).returncode == 0, node)  # noqa: B023


def test_a_node_that_moves_is_found_again_without_restart(cluster: ModeLab) -> None:
    before = {node: cluster.processes(node, "identity") for node in ("c1n1", "c1n2")}
    cluster.exec("c1n2", "sh", "-ec", """
        ip address del 172.30.1.2/16 dev eth0
        ip address add 172.30.1.77/16 dev eth0
        ip route replace default via 172.30.255.254""")  # fmt: skip

    def moved() -> bool:
        nodes = {n["name"]: n for n in cluster.json("c1n1", "node", "ls")}
        return bool(nodes[f"{cluster.name}-c1n2"]["ipv4"] == "172.30.1.77")

    wait_for(moved, "the new address")
    wait_for(lambda: cluster.test("--kind", "icmp", "--wait", "0.3", code=None)["failed"] == 0, "traffic")
    cluster.test()
    entry = cluster.json("c1n1", "ipcache", "get", cluster.pod("c1n2", "p1")["ipv4"])
    assert entry["tunnel_endpoint"] == "172.30.1.77"
    assert {node: cluster.processes(node, "identity") for node in before} == before


def test_pods_of_a_node_whose_processes_died_go_on_and_it_comes_back(cluster: ModeLab) -> None:
    pod = cluster.pod("c1n2", "p1")
    cluster.kill("c1n2", "supervisor", "")
    wait_for(lambda: not cluster.processes("c1n2"), "the end of all of them")
    others = ["--to", pod["ipv4"], "--to", pod["ipv6"]]
    cluster.exec("c1n1", "fibril", "check", *others)

    def state() -> str:
        nodes = {n["name"]: n for n in cluster.json("c1n1", "node", "ls")}
        return str(nodes[f"{cluster.name}-c1n2"]["state"])

    wait_for(lambda: state() == "NODE_STATE_LOST", "its loss to be noticed", 4 * LEASE_S)
    # Its kernel forwards all the same, and so do the others'.
    cluster.exec("c1n1", "fibril", "check", *others)
    cluster.up()
    wait_for(lambda: state() == "NODE_STATE_ALIVE", "its return")
    wait_for(
        lambda: any(e["pod"] == "p1" and not e["local"] for e in cluster.json("c1n1", "ipcache", "ls")),
        "its pod's entry",
    )
    assert cluster.pod("c1n2", "p1")["identity"] == pod["identity"]
    cluster.test()


def test_a_node_that_is_gone_for_good_is_forgotten(cluster: ModeLab) -> None:
    """Without goodbye: its namespace vanishes with all that ran there."""
    cluster.up("--nodes", "3")
    gone = f"{cluster.name}-c1n3"
    pod = cluster.json("c1n3", "pod", "add", "p9")["ipv4"]
    assert wait_for(
        lambda: [e for e in cluster.json("c1n1", "ipcache", "ls") if e["prefix"] == f"{pod}/32"], "its pod"
    )
    cluster.kill("c1n3", "supervisor", "")
    cluster.exec("net", "ip", "link", "delete", "c1n3")
    # Not while it may live.
    refused = cluster.command("-i", f"{cluster.name}-c1n1", "node", "rm", gone, code=None)
    wait_for(
        lambda: cluster.command("-i", f"{cluster.name}-c1n1", "node", "rm", gone, code=None).returncode == 0,
        f"its lease to end ({refused.stderr.strip()})",
        4 * LEASE_S,
    )
    wait_for(lambda: gone not in {n["name"] for n in cluster.json("c1n1", "node", "ls")}, "it to be gone")
    wait_for(
        lambda: gone not in json.dumps(cluster.json("c1n2", "ipcache", "ls")), "its addresses to be gone"
    )
    done = cluster.exec("c1n1", "fibril", "connectivity", "test", code=0)
    assert "c1n3" not in done.stdout
