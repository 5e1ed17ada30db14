"""The service on a node with pods: classes declared by the command, policies that forbid, processes that are killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.ctl import procs
from services.sockaccel.tables import BEAT_S
from tests.e2e.lb.sockrig import DRIVER
from tests.e2e.modes.modelab import ModeLab, lab, wait_for

NODE = "c1n1"
AGENT = DRIVER.replace("space = dict(globals())", """
def echo(host, port, seconds=None):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    def one(conn):
        try:
            conn.settimeout(seconds)  # without O_NONBLOCK if None
            while data := conn.recv(65536):
                conn.sendall(data)
        except OSError:
            pass
        conn.close()
    def serve():
        while True:
            threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()
    threading.Thread(target=serve, daemon=True).start()

held, tallies = {}, {}
def hold(name, host, port, seconds=5):
    held[name] = socket.create_connection((host, port), seconds)
    held[name].settimeout(seconds)
def talk(name, rounds=30, size=64):
    # Rounds that came back as they were sent.
    for number in range(rounds):
        word = bytes([number & 255]) * size
        held[name].sendall(word)
        got = b""
        while len(got) < size:
            more = held[name].recv(size - len(got))
            assert more, "closed"
            got += more
        assert got == word
    return rounds
def pound(name):
    tally = tallies[name] = {"done": 0, "error": "", "stop": False}
    def run():
        try:
            while not tally["stop"]:
                tally["done"] += talk(name, 10)
        except Exception as error:
            tally["error"] = repr(error)
    thread = tally["thread"] = threading.Thread(target=run, daemon=True)
    thread.start()
def calm(name):
    tally = tallies.pop(name)
    tally["stop"] = True
    tally["thread"].join(10)
    return [tally["done"], tally["error"]]
print(json.dumps("ready"), flush=True)
space = dict(globals())""")


class Agent:
    """Does in a pod what it is told."""

    def __init__(self, running: subprocess.Popen[str], endpoint: dict[str, Any]) -> None:
        self._running, self.ipv4, self.ipv6 = running, endpoint["ipv4"], endpoint["ipv6"]
        assert self._answer() == "ready"

    def __call__(self, give: str) -> Any:
        assert self._running.stdin is not None
        self._running.stdin.write(json.dumps({"do": "", "give": give}) + "\n")
        self._running.stdin.flush()
        answer = self._answer()
        if "errno" in answer:
            raise OSError(answer["errno"], answer["text"])
        return answer["value"]

    def _answer(self) -> Any:
        assert self._running.stdout is not None
        return json.loads(self._running.stdout.readline())


@pytest.fixture(scope="module")
def landscape() -> Iterator[ModeLab]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with lab("--nodes", "1", "--pods", "2", "--services", "ipam,identity,lb,policy,sockaccel") as made:
        yield made


@pytest.fixture
def pods(landscape: ModeLab) -> Iterator[tuple[Agent, Agent]]:
    with contextlib.ExitStack() as stack:
        found = []
        for pod in ("p1", "p2"):
            argv = ["fibril", "pod", "exec", pod, "--", sys.executable, "-u", "-c", AGENT]
            running = stack.enter_context(landscape.started(NODE, *argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            found.append(Agent(running, landscape.pod(NODE, pod)))
        yield found[0], found[1]


def fibril(made: ModeLab, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    return made.command("-i", f"{made.name}-{NODE}", *words, code=code)


def pairs(made: ModeLab, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = made.json(NODE, "sockaccel", "pairs", *words)
    return found


@pytest.fixture
def declared(landscape: ModeLab) -> Iterator[ModeLab]:
    """With a class for connections between pods to port 7700."""
    fibril(landscape, "sockaccel", "class", "set", "between", "--scope", "pods", "--port", "7700")
    try:
        yield landscape
    finally:
        fibril(landscape, "sockaccel", "class", "rm", "between")
        wait_for(lambda: not pairs(landscape), "the end of all pairs")


def shortened(record: dict[str, Any]) -> int:
    return int(record["client"]["short_sends"]) + int(record["server"]["short_sends"])


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_pods_of_a_declared_class_are_shortened_and_shown(
    declared: ModeLab, pods: tuple[Agent, Agent], family: str
) -> None:
    client, server = pods
    address = getattr(server, family)
    server(f"echo({address!r}, 7700)")
    server(f"echo({address!r}, 7701)")
    client(f"hold('a', {address!r}, 7700)")
    client(f"hold('b', {address!r}, 7701)")
    assert client("talk('a')") == client("talk('b')") == 30
    (record,) = pairs(declared)
    assert (record["client"]["pod"], record["server"]["pod"], record["server"]["port"]) == ("p1", "p2", 7700)
    assert record["state"] == "PAIR_STATE_SHORTENED" and record["class_name"] == "between"
    assert shortened(record) > 40 and not record["redirected"]
    assert pairs(declared, "--pod", "p2", "--port", "7700") and not pairs(declared, "--state", "ended")
    client("pound('a')")
    look = declared.json(NODE, "sockaccel", "top", "--count", "1", "--interval", "0.5")
    assert look["pairs"][0]["rate"]["short_sends"] > 100 and look["pairs"][0]["rate"]["tcp_sends"] == 0
    assert client("calm('a')")[1] == ""
    usage = declared.json(NODE, "sockaccel", "usage")
    assert usage["enabled"] and usage["pairs"] == 1 and usage["short_sends"] > 40
    assert "1 pairs" in fibril(declared, "sockaccel", "top", "--count", "1", "--interval", "0.2").stdout


def test_watchers_see_pairs_come_and_go(declared: ModeLab, pods: tuple[Agent, Agent]) -> None:
    client, server = pods
    server(f"echo({server.ipv4!r}, 7700)")
    words = ["-i", f"{declared.name}-{NODE}", "-o", "json", "sockaccel", "watch"]
    watching = subprocess.Popen(
        [sys.executable, "-m", "services.ctl.main", *words], env=declared.env, stdout=subprocess.PIPE, text=True
    )
    try:
        # It is watching for sure once a pair has been told.
        assert watching.stdout is not None
        client(f"hold('a', {server.ipv4!r}, 7700)")
        first = json.loads(watching.stdout.readline())
        client("talk('a')")
        client("held.pop('a').close()")
        last = first
        while not last["kind"].endswith("DELETE"):
            last = json.loads(watching.stdout.readline())
        assert last["pair"]["id"] == first["pair"]["id"] and last["pair"]["end_reason"] == "END_REASON_CLOSED"
        assert shortened(last["pair"]) > 20
    finally:
        watching.kill()
        watching.wait()
        assert watching.stdout is not None
        watching.stdout.close()


def test_what_a_policy_forbids_is_stopped_at_once_and_comes_back(
    declared: ModeLab, pods: tuple[Agent, Agent], tmp_path: Path
) -> None:
    client, server = pods
    deny = tmp_path / "deny.yaml"
    deny.write_text(
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: forbid, namespace: default}\n"
        "spec:\n  endpointSelector: {matchLabels: {app: p2}}\n"
        "  ingressDeny: [{fromEndpoints: [{matchLabels: {app: p1}}]}]\n"
    )
    server(f"echo({server.ipv4!r}, 7700)")
    client(f"hold('a', {server.ipv4!r}, 7700)")
    client("talk('a')")
    before = shortened(pairs(declared)[0])
    assert before > 40
    fibril(declared, "policy", "apply", "-f", str(deny), "--wait")
    try:
        client("held['a'].settimeout(1)")
        with pytest.raises(OSError, match="timed out"):
            client("talk('a', 1)")
        record = pairs(declared)[0]
        assert shortened(record) == before and record["state"] == "PAIR_STATE_PROVING"
    finally:
        fibril(declared, "policy", "rm", "-f", str(deny))
    # What was sent meanwhile is sent again by TCP.
    client("held['a'].settimeout(60)")  # TCP doubles its pauses
    assert client("len(held['a'].recv(64))") == 64
    assert client("talk('a')") == 30
    assert shortened(pairs(declared)[0]) > before + 20


def judged(made: ModeLab) -> int:
    """The identity by which policies judge p1."""
    number = made.pod(NODE, "p1")["id"]
    found = {each["endpoint"]: each for each in made.json(NODE, "policy", "endpoints")}
    return int(found[number]["identity"])


def test_another_identity_is_judged_anew(declared: ModeLab, pods: tuple[Agent, Agent]) -> None:
    client, server = pods
    server(f"echo({server.ipv4!r}, 7700)")
    client(f"hold('a', {server.ipv4!r}, 7700)")
    client("talk('a')")
    before, plain = pairs(declared)[0], judged(declared)
    fibril(declared, "endpoint", "label", "p1", "color=blue")

    def again() -> bool:
        client("talk('a')")
        now = pairs(declared)[0]
        return int(now["client"]["tcp_sends"]) > int(before["client"]["tcp_sends"])

    wait_for(again, "words by TCP after a change of identity")
    wait_for(lambda: judged(declared) != plain, "the new identity")
    blue = judged(declared)
    fibril(declared, "endpoint", "label", "p1", "color-")
    # The next test counts what goes by TCP.
    wait_for(lambda: judged(declared) != blue, "the identity there was")
    fibril(declared, "policy", "wait")


def test_the_service_killed_again_and_again_loses_nothing(declared: ModeLab, pods: tuple[Agent, Agent]) -> None:
    client, server = pods
    server(f"echo({server.ipv4!r}, 7700)")
    began = time.monotonic()
    for name in "abc":
        client(f"hold({name!r}, {server.ipv4!r}, 7700)")
        client(f"pound({name!r})")
    wait_for(lambda: len(pairs(declared, "--state", "shortened")) == 3, "three shortened pairs")
    tcp = {record["id"]: record["client"]["tcp_sends"] for record in pairs(declared)}
    instance = declared.instance(NODE)
    for _ in range(3):
        process = wait_for(lambda: running(instance), "the service")
        process.signal(signal.SIGKILL)
        process.close()
        # With the service dead, new connections are shortened as before.
        name = f"dead{time.monotonic_ns()}"
        client(f"hold({name!r}, {server.ipv4!r}, 7700)")
        assert client(f"talk({name!r})") == 30
        wait_for(lambda: fibril(declared, "sockaccel", "usage", code=None).returncode == 0, "the service to be back", 60)
        time.sleep(0.3)
    for name in "abc":
        done, error = client(f"calm({name!r})")
        assert error == "" and done > 100
    found = pairs(declared)
    assert len(found) == 6 and all(shortened(record) > 20 for record in found)
    # Restarts send nobody back to TCP, but for the word that goes there every half minute anyway.
    beats = int((time.monotonic() - began) / BEAT_S)
    more = [int(record["client"]["tcp_sends"]) - int(tcp[record["id"]]) for record in found if record["id"] in tcp]
    assert len(more) == 3 and all(0 <= count <= beats for count in more), (more, beats)


def running(instance: Any) -> Any:
    try:
        pid = int((instance.run_dir / "sockaccel.pid").read_text().split()[0])
    except (FileNotFoundError, ValueError, IndexError):
        return None
    return next((each for each in procs.find(instance.run_dir) if each.pid == pid), None)


def test_switches_work_live(declared: ModeLab, pods: tuple[Agent, Agent]) -> None:
    client, server = pods
    server(f"echo({server.ipv4!r}, 7700)")
    client(f"hold('a', {server.ipv4!r}, 7700)")
    client("talk('a')")
    number = str(pairs(declared)[0]["id"])
    for words in (["--all"], ["--class", "between"], ["--pair", number]):
        fibril(declared, "sockaccel", "off", *words)
        before = shortened(pairs(declared)[0])
        client("talk('a')")
        record = pairs(declared)[0]
        assert shortened(record) == before and record["state"] == "PAIR_STATE_OFF", words
        fibril(declared, "sockaccel", "on", *words)
        client("talk('a')")
        assert shortened(pairs(declared)[0]) > before + 20, words


def test_pairs_of_a_deleted_class_are_nobody_elses(declared: ModeLab, pods: tuple[Agent, Agent]) -> None:
    client, server = pods
    server(f"echo({server.ipv4!r}, 7700)")
    client(f"hold('a', {server.ipv4!r}, 7700)")
    client("talk('a')")
    fibril(declared, "sockaccel", "class", "rm", "between")
    fibril(declared, "sockaccel", "class", "set", "between", "--scope", "pods", "--port", "7700")
    before = shortened(pairs(declared)[0])
    client("talk('a')")
    assert shortened(pairs(declared)[0]) == before
    client(f"hold('b', {server.ipv4!r}, 7700)")
    client("talk('b')")
    assert sum(shortened(record) for record in pairs(declared)) > before + 20


@pytest.mark.parametrize(("family", "vip"), [("ipv4", "10.96.0.7"), ("ipv6", "fd96::7")])
def test_connections_to_a_service_are_shortened_as_those_to_its_backend(
    declared: ModeLab, pods: tuple[Agent, Agent], family: str, vip: str
) -> None:
    client, server = pods
    address = getattr(server, family)
    front, backend = (f"[{host}]" if ":" in host else host for host in (vip, address))
    server(f"echo({address!r}, 7700)")
    fibril(declared, "service", "add", "between", "--vip", f"{front}:80", "--backend", f"{backend}:7700")
    try:
        wait_for(lambda: declared.json(NODE, "service", "get", "between")["status"]["programmed"], "the service")
        client(f"hold('s', {vip!r}, 80)")
        assert client("talk('s')") == 30
        assert client("held['s'].getpeername()[:2]") == [vip, 80]
        (record,) = pairs(declared)
        assert (record["client"]["pod"], record["server"]["pod"], record["server"]["port"]) == ("p1", "p2", 7700)
        assert record["class_name"] == "between" and shortened(record) > 40
    finally:
        fibril(declared, "service", "rm", "between")


def test_an_application_and_its_proxy_are_shortened_by_default(landscape: ModeLab, pods: tuple[Agent, Agent]) -> None:
    """The proxy listens on a port of proxies; what the application connects to is redirected to it."""
    client, _ = pods
    nft = (
        "table ip side { chain out { type nat hook output priority -100; "
        "ip daddr 198.51.100.0/24 tcp dport 80 redirect to :15001; }; }"
    )
    landscape.pod_exec(NODE, "p1", "nft", nft)
    try:
        client("echo('0.0.0.0', 15001, 60)")
        client("echo('127.0.0.1', 8080, 60)")
        for round in range(2):  # a proxy at work is noticed with the first connection, or when it begins to listen
            client(f"hold('r{round}', '198.51.100.7', 80)")
            client(f"talk('r{round}')")
        client("hold('plain', '127.0.0.1', 8080)")
        client("talk('plain')")
        found = pairs(landscape)
        assert found and all(record["class_name"] == "local-proxies" for record in found)
        redirected = [record for record in found if record["redirected"]]
        assert redirected and all(record["server"]["port"] == 15001 for record in redirected)
        mine = client("held['r1'].getsockname()[1]")
        (last,) = [record for record in redirected if record["client"]["port"] == mine]
        assert shortened(last) > 40
        assert all(record["server"]["port"] != 8080 for record in found), "no proxy is at either end"
        # Whoever waits in recv() is left alone, unless somebody asks for him.
        for seconds in (None, 5):
            client(f"hold('waits', '198.51.100.7', 80, {seconds})")
            client("talk('waits')")
            mine = client("held['waits'].getsockname()[1]")

            def as_told(mine: int = mine, told: bool = seconds is not None) -> bool:
                return (mine in {record["client"]["port"] for record in pairs(landscape)}) == told

            wait_for(as_told, f"what becomes of one with {seconds}")
    finally:
        landscape.pod_exec(NODE, "p1", "nft", "delete table ip side")


def test_what_is_wrong_is_named_and_changes_nothing(landscape: ModeLab) -> None:
    before = landscape.json(NODE, "sockaccel", "class", "ls")
    for words, said in (
        (["class", "set", "a b", "--scope", "pod"], "no name of a class"),
        (["class", "set", "a", "--scope", "pod", "--port", "0"], "no port"),
        (["class", "set", "a", "--scope", "pod", "--port", "9-8"], "does not end behind its beginning"),
        (["class", "set", "a", "--scope", "pod", "--port", "1-5000"], "the limit is 4096"),
        (["class", "set", "a", "--scope", "pod", "--cgroup", "../x"], "no path of a control group"),
        (["class", "rm", "nobody"], "no class"),
        (["off", "--class", "nobody"], "no class"),
        (["off", "--pair", "18446744073709551615"], "no pair"),
        (["off"], "say what"),
    ):
        done = fibril(landscape, "sockaccel", *words, code=None)
        assert done.returncode != 0 and said in done.stderr, (words, done.stderr)
    assert landscape.json(NODE, "sockaccel", "class", "ls") == before


def test_status_names_a_control_group_that_is_not_there(landscape: ModeLab) -> None:
    fibril(landscape, "sockaccel", "class", "set", "gone", "--scope", "host", "--cgroup", "not/there")
    try:
        found = landscape.json(NODE, "sockaccel", "class", "ls")
        assert "not/there" in next(each for each in found if each["name"] == "gone")["message"]
        assert "not/there" in fibril(landscape, "status", code=None).stdout
    finally:
        fibril(landscape, "sockaccel", "class", "rm", "gone")
