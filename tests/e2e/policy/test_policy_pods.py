"""Policies on real pods of two nodes: who reaches whom, what a restart changes (nothing), what a change revokes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.modes.modelab import ROOT, ModeLab, lab, wait_for

PODS = [(node, pod) for node in ("c1n1", "c1n2") for pod in ("p1", "p2")]
APPS = {("c1n1", "p1"): "front", ("c1n1", "p2"): "back", ("c1n2", "p1"): "front", ("c1n2", "p2"): "back"}
PORTS = (8080, 8081)

# Echoes on two ports; answers commands on standard input: try to connect, keep connections, talk over them.
_AGENT = """
import json, socket, struct, sys, threading, time
def serve(conn):
    with conn:
        try:
            while data := conn.recv(65536):
                conn.sendall(data)
        except OSError:
            pass
def accept(listener):
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
def echo(port):
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", port))
    while True:
        data, peer = sock.recvfrom(2048)
        sock.sendto(data, peer)
for port in (8080, 8081):
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
    threading.Thread(target=accept, args=(listener,), daemon=True).start()
    threading.Thread(target=echo, args=(port,), daemon=True).start()
held, tallies = {}, {}
def reach(address, port, seconds):
    try:
        with socket.create_connection((address, port), seconds) as conn:
            # tcpi_total_retrans: the first packet, sent again after a second.
            if struct.unpack_from("I", conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 100)[0]:
                return "lost"
            conn.settimeout(seconds)
            conn.sendall(b"x")
            return conn.recv(1) == b"x"
    except OSError as error:
        return type(error).__name__
def hold(address, port):
    held[address, port] = socket.create_connection((address, port), 10)
    return talk(address, port, 10)
def talk(address, port, seconds=1):
    conn = held[address, port]
    conn.settimeout(seconds)
    try:
        conn.sendall(b"x")
        return conn.recv(1) == b"x"
    except OSError as error:
        return type(error).__name__
def pound(address, port):
    tally = tallies[address, port] = {"sent": 0, "back": 0, "stop": False}
    def run():
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect((address, port))
        while not tally["stop"]:
            tally["sent"] += 1
            try:
                sock.send(b"x")
                sock.recv(10, socket.MSG_DONTWAIT)
                tally["back"] += 1
            except OSError:
                pass
            time.sleep(0.005)
    tally["thread"] = threading.Thread(target=run, daemon=True)
    tally["thread"].start()
def meet(address, port):
    # Always new connections: each is asked about.
    tally = tallies[address, port] = {"sent": 0, "back": 0, "stop": False}
    def run():
        while not tally["stop"]:
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.settimeout(5)
                sock.connect((address, port))
                tally["sent"] += 1
                sock.send(b"x")
                try:
                    tally["back"] += sock.recv(10) == b"x"
                except OSError:
                    pass
            time.sleep(0.002)
    tally["thread"] = threading.Thread(target=run, daemon=True)
    tally["thread"].start()
def tally(address, port):
    found = tallies[address, port]
    found["stop"] = True
    found["thread"].join()
    return [found["sent"], found["back"]]
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    op, *args = json.loads(line)
    print(json.dumps(globals()[op](*args)), flush=True)
"""


class Agent:
    """In a pod."""

    def __init__(self, running: subprocess.Popen[str], addresses: dict[int, str]) -> None:
        self._running, self.addresses = running, addresses
        assert self._answer() == "ready"

    def __call__(self, op: str, *args: Any) -> Any:
        self.ask(op, *args)
        return self._answer()

    def ask(self, op: str, *args: Any) -> None:
        assert self._running.stdin is not None
        self._running.stdin.write(json.dumps([op, *args]) + "\n")
        self._running.stdin.flush()

    def _answer(self) -> Any:
        assert self._running.stdout is not None
        return json.loads(self._running.stdout.readline())

    answer = _answer


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of the landscape's programs."""
    return Path(shutil.copytree(ROOT / "bpf", tmp_path_factory.mktemp("source") / "bpf"))


@pytest.fixture(scope="module")
def landscape(programs: Path) -> Iterator[ModeLab]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with lab("--nodes", "2", "--pods", "2", "--mode", "overlay", FIBRIL_BPF_SOURCE=str(programs)) as made:
        for (node, pod), app in APPS.items():
            made.command("-i", made.instance(node).name, "endpoint", "label", pod, f"app={app}", f"node={node}")
        wait_for(lambda: len(labelled(made)) >= 4, "identities of the labels on both nodes")
        yield made


def labelled(made: ModeLab) -> set[str]:
    found = [{json.dumps(each["labels"]) for each in made.json(node, "identity", "ls")} for node in ("c1n1", "c1n2")]
    return {each for each in found[0] & found[1] if "app" in each}


@pytest.fixture(scope="module")
def agents(landscape: ModeLab) -> Iterator[dict[tuple[str, str], Agent]]:
    with contextlib.ExitStack() as stack:
        found = {}
        for node, pod in PODS:
            argv = ["fibril", "pod", "exec", pod, "--", sys.executable, "-u", "-c", _AGENT]
            running = stack.enter_context(
                landscape.started(node, *argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            endpoint = landscape.pod(node, pod)
            found[node, pod] = Agent(running, {4: endpoint["ipv4"], 6: endpoint["ipv6"]})
        yield found


@pytest.fixture(autouse=True)
def no_policies(landscape: ModeLab) -> Iterator[None]:
    yield
    keys = [shown(each["key"]) for each in landscape.json("c1n1", "policy", "ls")]
    if keys:
        landscape.command("-i", landscape.instance("c1n1").name, "policy", "rm", *keys)
    known(landscape)
    settle(landscape)


def shown(key: dict[str, str]) -> str:
    kinds = {"POLICY_KIND_KUBERNETES": "np", "POLICY_KIND_CILIUM": "cnp", "POLICY_KIND_CILIUM_CLUSTERWIDE": "ccnp"}
    return "/".join(part for part in (kinds[key["kind"]], key.get("namespace", ""), key["name"]) if part)


def known(landscape: ModeLab) -> None:
    """The other node has heard of what this one has been told."""
    policies = landscape.json("c1n1", "policy", "ls")
    wait_for(lambda: landscape.json("c1n2", "policy", "ls") == policies, "the other node to know")


def settle(landscape: ModeLab) -> None:
    """Both nodes enforce what they know of. One that was killed is waited for."""
    for node in ("c1n1", "c1n2"):
        words = ("-i", landscape.instance(node).name, "policy", "wait")
        wait_for(lambda words=words: landscape.command(*words, code=None).returncode == 0, f"{node} to enforce it", 60)


def apply(landscape: ModeLab, text: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    landscape.command("-i", landscape.instance("c1n1").name, "policy", "apply", "-f", str(file), "--wait")
    known(landscape)
    settle(landscape)


def network_policy(name: str, app: str, peers: str, port: int) -> str:
    return f"""
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: {name}}}
spec:
  podSelector: {{matchLabels: {{app: {app}}}}}
  ingress: [{{from: [{{podSelector: {{matchLabels: {{{peers}}}}}}}], ports: [{{port: {port}}}]}}]
---
"""


def matrix(agents: dict[tuple[str, str], Agent], family: int, expected: dict[Any, bool]) -> dict[Any, bool]:
    """Who reaches whom on which port. All clients try side by side; those that should succeed have time."""
    found = {}
    for port in PORTS:
        for shift in range(1, len(PODS)):
            pairs = [(PODS[at], PODS[(at + shift) % len(PODS)]) for at in range(len(PODS))]
            for client, server in pairs:
                seconds = 10.0 if expected[client, server, port] else 0.4
                agents[client].ask("reach", agents[server].addresses[family], port, seconds)
            for client, server in pairs:
                found[client, server, port] = agents[client].answer() is True
    return found


@pytest.mark.parametrize("family", [4, 6])
def test_who_reaches_whom_is_what_policies_say(
    landscape: ModeLab, agents: dict[tuple[str, str], Agent], family: int, tmp_path: Path
) -> None:
    """After each of a sequence of random changes."""
    rand = random.Random(family)
    rules: dict[str, tuple[str, str, str, int]] = {}
    for step in range(6):
        name = f"r{rand.randrange(3)}"
        if name in rules and rand.random() < 0.4:
            del rules[name]
            landscape.command("-i", landscape.instance("c1n1").name, "policy", "rm", f"np/default/{name}")
            known(landscape)
            settle(landscape)
        else:
            key, value = rand.choice([("app", "front"), ("app", "back"), ("node", "c1n1"), ("node", "c1n2")])
            rules[name] = rand.choice(["front", "back"]), key, value, rand.choice(PORTS)
            app, key, value, port = rules[name]
            apply(landscape, network_policy(name, app, f"{key}: {value}", port), tmp_path)
        expected = {}
        for client, server, port in itertools.product(PODS, PODS, PORTS):
            if client == server:
                continue
            about = [rule for rule in rules.values() if rule[0] == APPS[server]]
            labels = {"app": APPS[client], "node": client[0]}
            expected[client, server, port] = not about or any(
                labels[key] == value and allowed == port for _, key, value, allowed in about
            )
        assert matrix(agents, family, expected) == expected, (step, rules)


def test_a_restart_opens_nothing_and_closes_nothing(
    landscape: ModeLab, agents: dict[tuple[str, str], Agent], tmp_path: Path
) -> None:
    """Every packet counts, while the service, and at last all it hears of others by, are killed and policies change."""
    apply(landscape, network_policy("web", "back", "app: front", 8080), tmp_path)
    client, denied = agents["c1n1", "p1"], agents["c1n2", "p2"]
    servers = [agents["c1n1", "p2"], agents["c1n2", "p2"]]
    # UDP is denied by a policy for TCP; what is allowed is held and newly made all the time.
    for server in servers:
        assert client("hold", server.addresses[4], 8080) is True
        client("pound", server.addresses[4], 8080)
    reached: list[Any] = []
    for round in range(3):
        others = ("ipam", "identity") if round == 2 else ()
        for node in ("c1n1", "c1n2"):
            landscape.kill(node, "policy", *others)
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            for server in servers:
                reached.append(client("reach", server.addresses[4], 8080, 5.0))
                reached.append(client("talk", server.addresses[4], 8080, 5.0))
            assert denied("reach", servers[0].addresses[4], 8080, 0.05) is not True
        settle(landscape)
        apply(landscape, network_policy(f"more{round}", "back", "app: front", 9000 + round), tmp_path)
    assert reached and set(reached) == {True}
    for server in servers:
        sent, back = client("tally", server.addresses[4], 8080)
        assert sent > 20 and back == 0


def test_an_upgrade_and_the_way_back_open_nothing_and_close_nothing(
    landscape: ModeLab, agents: dict[tuple[str, str], Agent], programs: Path, tmp_path: Path
) -> None:
    """Every packet counts, most of them the first of a connection, while the service's programs are replaced by others."""
    both = network_policy("tcp", "back", "app: front", 8080)
    both += network_policy("udp", "back", "app: front", 8081).replace("port: 8081", "port: 8081, protocol: UDP")
    apply(landscape, both, tmp_path)
    servers = [agents[node, "p2"].addresses for node in ("c1n1", "c1n2")]
    load = [
        (agents[node, "p1"], server[family])
        for (node, family), server in itertools.product([("c1n1", 4), ("c1n2", 6)], servers)
    ]
    for client, server in load:
        assert client("hold", server, 8080) is True
        client("meet", server, 8081)
        client("pound", server, 8080)
    unit = programs / "policy" / "policy.c"
    original = unit.read_text()
    stamps = [landscape.instance(node).run_dir / "policy-programs.programs" for node in ("c1n1", "c1n2")]
    reached: list[Any] = []
    for text in (original + "\n/* The next version. */\n", original):
        unit.write_text(text)
        before = {stamp: stamp.read_text() for stamp in stamps}
        for node in ("c1n1", "c1n2"):
            landscape.kill(node, "policy")
        deadline = time.monotonic() + 180
        while any(not stamp.exists() or stamp.read_text() in ("", before[stamp]) for stamp in stamps):
            assert time.monotonic() < deadline, "programs of the other version"
            for client, server in load:
                reached.append(client("reach", server, 8080, 5.0))
                reached.append(client("talk", server, 8080, 5.0))
            time.sleep(0.02)
        settle(landscape)
    assert reached and set(reached) == {True}
    for client, server in load:
        sent, back = client("tally", server, 8081)
        assert sent > 100 and back == sent, (sent, back)
        sent, back = client("tally", server, 8080)
        assert sent > 100 and back == 0


def test_a_change_revokes_and_a_new_pod_begins_denied(
    landscape: ModeLab, agents: dict[tuple[str, str], Agent], tmp_path: Path
) -> None:
    client, server = agents["c1n1", "p1"], agents["c1n2", "p2"]
    assert client("hold", server.addresses[4], 8081) is True
    apply(landscape, network_policy("web", "back", "app: front", 8080), tmp_path)
    assert client("talk", server.addresses[4], 8081) == "TimeoutError"

    def revoked() -> bool:
        dropped = landscape.json("c1n2", "flow", "ls", "--verdict", "dropped", "--port", "8081")
        # Behind what other tests have left.
        return bool(dropped) and dropped[-1]["drop_reason"] == "DROP_REASON_POLICY_REVOKED"

    wait_for(revoked, "the flow")
    name = landscape.instance("c1n2").name
    landscape.command("-i", name, "pod", "add", "late", "--label", "app=back")
    try:
        late = landscape.pod("c1n2", "late")

        def enforced() -> bool:
            policies = {each["endpoint"]: each for each in landscape.json("c1n2", "policy", "endpoints")}
            mine = policies.get(late["id"], {})
            return bool(mine.get("ingress_enforced") and mine.get("policy"))

        wait_for(enforced, "its policy")
    finally:
        landscape.command("-i", name, "pod", "rm", "late")


def test_explanations_agree_with_packets(
    landscape: ModeLab, agents: dict[tuple[str, str], Agent], tmp_path: Path
) -> None:
    """`trace` by the rules, `why` by the kernel's tables, and what happens."""
    apply(landscape, network_policy("web", "back", "app: front", 8080), tmp_path)
    for client, port in itertools.product([("c1n1", "p1"), ("c1n1", "p2")], PORTS):
        server = ("c1n2", "p2")
        source, target = agents[client].addresses[4], agents[server].addresses[4]
        why = landscape.json("c1n2", "policy", "why", f"{source}:1", f"{target}:{port}")
        trace = landscape.json("c1n2", "policy", "trace", "--from", source, "--to", target, "--port", str(port))
        happens = agents[client]("reach", target, port, 10.0 if trace.get("allowed", False) else 0.5) is True
        assert (why.get("allowed", False), trace.get("allowed", False)) == (happens, happens)
        rules = [each["ingress"].get("decision", each["ingress"]).get("rule_id", 0) for each in (why, trace)]
        assert rules[0] == rules[1]
