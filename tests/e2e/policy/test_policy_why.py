"""`why`, `trace` and packets agree where the host is an end, and where switches overrule what policies say."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.modes.modelab import ModeLab, lab, wait_for

PORT = 7070
_SERVER = f"""
import socket
with socket.create_server(("::", {PORT}), family=socket.AF_INET6, dualstack_ipv6=True) as server:
    while True:
        server.accept()[0].close()
"""
_CLIENT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3])).close()
    print("reached")
except OSError as error:
    print(type(error).__name__)
"""
HOST_DENIES = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: host}
spec: {nodeSelector: {}, ingress: [{fromEntities: [remote-node]}]}
"""
POD_DENIES = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: back}
spec: {podSelector: {matchLabels: {app: back}}}
"""


@pytest.fixture(scope="module")
def node() -> Iterator[ModeLab]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with lab("--nodes", "1", "--pods", "2") as made:
        run(made, "endpoint", "label", "p2", "app=back")
        wait_for(lambda: any(each["labels"].get("app") for each in made.json("c1n1", "identity", "ls")), "an identity")
        pod = ("fibril", "pod", "exec", "p2", "--", sys.executable, "-c", _SERVER)
        with made.started("c1n1", sys.executable, "-c", _SERVER), made.started("c1n1", *pod):
            for address in (*host(made).values(), made.pod("c1n1", "p2")["ipv4"]):
                wait_for(lambda address=address: reaches(made, address), "servers to listen")
            yield made


@pytest.fixture(autouse=True)
def nothing_left(node: ModeLab) -> Iterator[None]:
    yield
    for number in (0, node.pod("c1n1", "p2")["id"]):
        run(node, "policy", "set", str(number), "--no-audit", "--no-lockdown")
    for key in ("ccnp/host", "np/default/back"):
        node.command("-i", node.instance("c1n1").name, "policy", "rm", key, code=None)
    run(node, "policy", "wait")


def run(made: ModeLab, *words: str) -> None:
    made.command("-i", made.instance("c1n1").name, *words)


def apply(made: ModeLab, text: str, directory: Path) -> None:
    (directory / "policy.yaml").write_text(text)
    run(made, "policy", "apply", "-f", str(directory / "policy.yaml"), "--wait")


def host(made: ModeLab) -> dict[int, str]:
    four, six = made.node("c1n1").addresses
    return {4: four, 6: six}


def reaches(made: ModeLab, address: str, seconds: float = 0.7) -> bool:
    return "reached" in made.pod_exec("c1n1", "p1", sys.executable, "-c", _CLIENT, address, str(PORT), str(seconds))


PATIENTLY = 10.0
"""Seconds for who is to reach somebody."""


def why(made: ModeLab, address: str) -> Any:
    own = made.pod("c1n1", "p1")["ipv6" if ":" in address else "ipv4"]
    own, there = (f"[{each}]" if ":" in each else each for each in (own, address))
    return made.json("c1n1", "policy", "why", f"{own}:1", f"{there}:{PORT}")


def trace(made: ModeLab, address: str) -> bool:
    words = ("policy", "trace", "--from", "p1", "--to", address, "--port", str(PORT))
    return bool(made.json("c1n1", *words).get("allowed", False))


@pytest.mark.parametrize("family", [4, 6])
def test_the_hosts_policy_is_asked_as_well(node: ModeLab, family: int, tmp_path: Path) -> None:
    address = host(node)[family]
    assert why(node, address)["allowed"] and trace(node, address) and reaches(node, address, PATIENTLY)
    apply(node, HOST_DENIES, tmp_path)
    assert not reaches(node, address) and not trace(node, address)
    answer = why(node, address)
    assert not answer.get("allowed", False)
    assert answer["ingress"]["drop_reason"] == "DROP_REASON_POLICY_DEFAULT"


def test_what_is_only_audited_passes(node: ModeLab, tmp_path: Path) -> None:
    address = node.pod("c1n1", "p2")["ipv4"]
    apply(node, POD_DENIES, tmp_path)
    assert not why(node, address).get("allowed", False) and not reaches(node, address)
    run(node, "policy", "set", str(node.pod("c1n1", "p2")["id"]), "--audit")
    answer = why(node, address)
    assert answer["allowed"] and reaches(node, address, PATIENTLY)
    assert "audited" in answer["ingress"]["decision"]["reason"] and not answer["ingress"]["decision"].get("allowed", False)


def test_pods_are_asked_about_by_name_and_services_lead_to_their_backends(node: ModeLab, tmp_path: Path) -> None:
    def told(*words: str, code: int = 0) -> str:
        done = node.command("-i", node.instance("c1n1").name, *words, code=code)
        return done.stdout if code == 0 else done.stderr

    first, second = node.pod("c1n1", "p1"), node.pod("c1n1", "p2")
    apply(node, POD_DENIES, tmp_path)
    by_name = told("policy", "why", "p1:1", f"p2:{PORT}")
    assert by_name.startswith("denied")
    assert by_name == told("policy", "why", f"{first['ipv4']}:1", f"{second['ipv4']}:{PORT}")
    assert told("policy", "why", first["ipv6"], f"p2:{PORT}").startswith("denied")
    assert "there is no endpoint 'p9'" in told("policy", "why", "p9", "p2", code=1)
    assert "no addresses of one IP version" in told("policy", "why", "192.0.2.1", second["ipv6"], code=1)
    assert "'p1:x' is no place" in told("policy", "why", "p1:x", "p2", code=2)
    run(node, "service", "add", "back", "--vip", f"10.96.0.77:{PORT}", "--backend", f"{second['ipv4']}:{PORT}")
    try:
        note = f"is a frontend of back: policy is asked about its backends instead, such as {second['ipv4']}:{PORT}"
        trace = ("trace", "--from", "p1", "--to", "10.96.0.77", "--port", str(PORT))
        for words in (trace, ("why", "p1", f"10.96.0.77:{PORT}")):
            wait_for(lambda words=words: note in told("policy", *words), "the frontend to be known")
        assert "frontend" not in told("policy", "why", "p1", "10.96.0.77:1")
    finally:
        run(node, "service", "rm", "back")


def test_lockdown_of_a_host_without_a_policy(node: ModeLab) -> None:
    address = host(node)[4]
    run(node, "policy", "set", "0", "--lockdown")
    assert not reaches(node, address) and not why(node, address).get("allowed", False)
    run(node, "policy", "set", "0", "--no-lockdown")
    assert reaches(node, address, PATIENTLY) and why(node, address)["allowed"]


_SPOIL = """
import asyncio, sys
from services.common.etcd.client import EtcdClient
from services.common.instance import Instance
from services.ctl.children import embedded_etcd

async def spoil():
    async with EtcdClient([embedded_etcd(Instance.from_env(sys.argv[1])).endpoint]) as etcd:
        listing = await etcd.get_prefix("/fibril/v1/")
        (found,) = [each.key for each in listing.kvs if each.key.endswith("/policies/4/default/back")]
        await etcd.put(found, b"of another version")

asyncio.run(spoil())
"""


def test_a_restart_does_not_open_what_a_policy_closes_that_cannot_be_read(node: ModeLab, tmp_path: Path) -> None:
    name, pod = node.instance("c1n1").name, node.pod("c1n1", "p2")
    apply(node, POD_DENIES, tmp_path)
    assert not reaches(node, pod["ipv4"])
    node.exec("c1n1", sys.executable, "-c", _SPOIL, name)
    before = node.processes("c1n1", "policy")
    node.kill("c1n1", "policy")
    wait_for(lambda: node.processes("c1n1", "policy") not in ([], before), "another process")

    def said() -> str:
        return node.command("-i", name, "status", code=None).stdout

    wait_for(lambda: "policies that can be read" in said() and "/policies/4/default/back is not usable" in said(), "its words")
    assert not reaches(node, pod["ipv4"]) and not reaches(node, pod["ipv6"])
    run(node, "policy", "rm", "np/default/back")
    wait_for(lambda: node.command("-i", name, "policy", "wait", code=None).returncode == 0, "it to enforce", 60)
    assert reaches(node, pod["ipv4"], PATIENTLY)


@pytest.mark.parametrize("who", ["host", "pod"])
def test_lockdown_outlives_the_process(node: ModeLab, who: str) -> None:
    pod = node.pod("c1n1", "p2")
    number, address = (0, host(node)[4]) if who == "host" else (pod["id"], pod["ipv4"])
    run(node, "policy", "set", str(number), "--lockdown")
    assert not reaches(node, address)
    before = node.processes("c1n1", "policy")
    node.kill("c1n1", "policy")
    wait_for(lambda: node.processes("c1n1", "policy") not in ([], before), "another process")
    again = ("-i", node.instance("c1n1").name, "policy", "wait")
    wait_for(lambda: node.command(*again, code=None).returncode == 0, "it to enforce", 60)
    assert not reaches(node, address)
    shown = {each.get("endpoint", 0): each for each in node.json("c1n1", "policy", "endpoints")}
    assert shown[number]["lockdown"]


def test_a_file_that_is_no_text_is_refused_by_its_name(node: ModeLab, tmp_path: Path) -> None:
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG")
    done = node.command("-i", node.instance("c1n1").name, "policy", "apply", "-f", str(tmp_path / "picture.yaml"), code=1)
    assert "picture.yaml" in done.stderr and "UTF-8" in done.stderr
