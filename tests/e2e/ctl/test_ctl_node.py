"""A node through the command: up, status, pods, check, restart of everything, errors."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ctlnode import FIBRIL, ROOT, Node, fresh_node, wait_for

from services.ctl import procs

# What is about nodes as such needs no more.
UP = ("up", "--services", "ipam,identity")


@pytest.fixture(scope="module")
def started() -> Iterator[Node]:
    with fresh_node() as made:
        made.fibril(*UP)
        yield made


@pytest.fixture
def shared(started: Node) -> Iterator[Node]:
    """A node that runs, without pods, which is what a test must leave but for these."""
    yield started
    names = [pod["name"] for pod in started.json("pod", "ls")]
    if names:
        started.fibril("pod", "rm", *names)


def test_up_status_pods_check(node: Node) -> None:
    status = node.fibril("status", code=1)
    assert "not running" in status.stdout
    node.fibril("up")
    told = node.json("status")
    assert told["health"] == "HEALTH_OK"
    assert {p["source"] for p in told["parts"]} >= {"process", "ipam", "identity"}
    assert node.instance.run_dir.stat().st_mode & 0o777 == 0o750
    one = node.json("pod", "add", "one")
    two = node.json("pod", "add", "two")
    assert one["ipv4"] and one["ipv6"] and one["state"] == "ENDPOINT_STATE_READY"
    # Again gives the same pod.
    assert node.json("pod", "add", "one")["ipv4"] == one["ipv4"]
    results = node.json("check")
    asked = {(r["from"], r["to"], r["address"]) for r in results}
    assert ("one", "two", two["ipv4"]) in asked
    assert ("two", "one", one["ipv6"]) in asked
    assert ("host", "one", one["ipv4"]) in asked
    assert ("one", "host", one["ipv4_gateway"]) in asked
    assert {r["result"] for r in results} == {"ok"}
    node.fibril("pod", "rm", "one", "never-was")
    assert [p["name"] for p in node.json("pod", "ls")] == ["two"]
    assert node.fibril("check", "--to", one["ipv4"], code=1).returncode == 1


def test_up_again_is_harmless_and_repairs(node: Node) -> None:
    node.fibril(*UP)
    before = node.processes()
    node.fibril(*UP)
    assert node.processes() == before
    os.kill(before["supervisor"], signal.SIGKILL)
    node.fibril(*UP)
    after = node.processes()
    assert after.pop("supervisor") != before.pop("supervisor")
    assert after == before


def test_up_mends_a_node_whose_run_directory_was_removed(node: Node) -> None:
    node.fibril(*UP)
    node.fibril("pod", "add", "a")
    before = node.processes()
    shutil.rmtree(node.instance.run_dir)
    node.fibril(*UP)
    after = node.processes()
    assert not set(before.values()) & set(after.values())
    node.fibril("check")


def test_two_ups_at_once_make_one_node(node: Node) -> None:
    running = [node.start(*FIBRIL, *UP, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [popen.wait(60) for popen in running] == [0, 0, 0], node.logs()
    wanted = ["etcd", "identity", "ipam", "supervisor"]
    # What they start for a moment has their names.
    wait_for(lambda: sorted(p.name for p in _held(node)) == wanted, "one of each")


def _held(node: Node) -> list[procs.Process]:
    found = procs.find(node.instance.run_dir)
    for process in found:
        process.close()
    return found


def test_a_node_is_not_touched_from_another_namespace(shared: Node) -> None:
    before = shared.processes()
    for word in ("up", "down"):
        done = subprocess.run(
            [*FIBRIL, word], env=shared.env, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert "another network namespace" in done.stderr
        assert "nsenter" in done.stderr
    assert shared.processes() == before


def test_configuration_reaches_the_services(node: Node, tmp_path: Path) -> None:
    file = tmp_path / "fibril.yaml"
    file.write_text("endpoints: {mtu: 1357}\n")
    node.fibril("--config", str(file), *UP)
    node.fibril("pod", "add", "a")
    assert node.json("endpoint", "get", "a")["mtu"] == 1357


def test_a_wrong_configuration_is_said_by_up(node: Node, tmp_path: Path) -> None:
    file = tmp_path / "fibril.yaml"
    file.write_text("endpoints: {mtuu: 1357}\n")
    failed = node.fibril("--config", str(file), "up", code=1)
    assert "mtuu" in failed.stderr
    assert "hint:" in failed.stderr
    assert "there is no service nope" in node.fibril("up", "--services", "nope", code=1).stderr


def test_a_killed_service_comes_back_and_pods_stay_reachable(node: Node) -> None:
    node.fibril(*UP)
    node.fibril("pod", "add", "a")
    node.fibril("pod", "add", "b")
    before = node.processes()
    os.kill(before["ipam"], signal.SIGKILL)
    wait_for(lambda: node.processes().get("ipam", before["ipam"]) != before["ipam"], "a new ipam")
    wait_for(lambda: node.fibril("status", code=None).returncode == 0, "health")
    assert len(node.json("pod", "ls")) == 2
    node.fibril("check")


def test_up_with_other_options_changes_how_it_runs(node: Node) -> None:
    node.fibril(*UP)
    node.fibril("pod", "add", "a")
    before = node.processes()
    node.fibril(*UP, "--in-process")
    after = node.processes()
    assert after["supervisor"] != before["supervisor"]
    assert not {"ipam", "identity"} & set(after)
    node.fibril("check")


def test_exec_runs_in_the_pod_with_terminal_and_exit_code(shared: Node) -> None:
    pod = shared.json("pod", "add", "a")
    done = shared.fibril("pod", "exec", "a", "--", "sh", "-c", "ip -o -4 address show eth0; exit 7", code=7)
    assert pod["ipv4"] in done.stdout
    leader, follower = pty.openpty()
    terminal = shared.start(*FIBRIL, "pod", "exec", "a", "--", "sh", "-c", "test -t 0 && test -t 1 && tty",
                         stdin=follower, stdout=follower, stderr=follower)  # fmt: skip
    os.close(follower)
    assert terminal.wait(20) == 0
    assert os.read(leader, 1000).startswith(b"/dev/pts/")
    os.close(leader)
    missing = shared.fibril("pod", "exec", "nope", "--", "true", code=1)
    assert "there is no pod 'nope'" in missing.stderr


def test_a_pod_that_cannot_be_wired_leaves_nothing(shared: Node) -> None:
    failed = shared.fibril("pod", "add", "a", "--pool", "no-such-pool", code=1)
    assert "no-such-pool" in failed.stderr
    assert not Path(f"/run/netns/fib-{shared.name}_a").exists()
    assert shared.json("pod", "ls") == []
    wrong = shared.fibril("pod", "add", "Not/Good", code=1)
    assert "hint:" in wrong.stderr


def test_bpf_shows_what_is_there_with_every_process_dead(node: Node) -> None:
    node.fibril(*UP)
    node.fibril("pod", "add", "a")
    node.kill_all()
    found = node.json("bpf")
    assert {m["name"] for m in found["maps"]} >= {"ep_iface", "ep_addr", "pl_slots"}
    by_name = {m["name"]: m for m in found["maps"]}
    assert by_name["ep_iface"]["used"] == 1
    assert by_name["ep_addr"]["used"] == 2
    assert found["programs"]
    assert {a["hook"] for a in found["attached"]} == {"ingress", "egress"}


def test_ipam_through_the_command(shared: Node) -> None:
    shared.fibril(
        "ipam", "pool", "put", "blue", "--cidr", "10.77.0.0/24", "--block-v4", "26", "--exclude", "10.77.0.2"
    )
    assert "blue" in {p["pool"]["name"] for p in shared.json("ipam", "pool", "ls")}
    held = shared.json("ipam", "allocate", "job", "--pool", "blue", "--ttl", "600")
    assert held[0]["address"].startswith("10.77.0.")
    assert shared.json("ipam", "get", held[0]["address"])["owner"] == "job"
    assert shared.json("ipam", "block", "ls", "--pool", "blue")[0]["cidr"].endswith("/26")
    assert shared.json("ipam", "renew", "job", "--ttl", "0")[0]["expires_unix_seconds"] == 0
    assert shared.json("ipam", "release", "job") == [{"released": held[0]["address"]}]
    refused = shared.fibril("ipam", "pool", "put", "red", "--cidr", "10.77.0.0/16", code=1)
    assert "blue" in refused.stderr or "10.77" in refused.stderr
    shared.fibril("ipam", "pool", "rm", "blue")


def test_monitor_names_a_drop_as_it_happens(shared: Node, tmp_path: Path) -> None:
    pod = shared.json("pod", "add", "a")
    shared.fibril("pod", "exec", "a", "--", "ip", "address", "add", "192.0.2.9/32", "dev", "lo")
    # From an address that is not the pod's: refused by anti-spoofing.
    spoof = (
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); "
        f"s.bind(('192.0.2.9', 0)); s.sendto(b'x', ('{pod['ipv4_gateway']}', 9))"
    )

    def spoofed_and_seen() -> dict[str, Any] | None:
        shared.fibril("pod", "exec", "a", "--", "python3", "-c", spoof)
        events = map(json.loads, shown.read_text().splitlines())
        return next((e for e in events if e["source"] == "192.0.2.9"), None)

    shown = tmp_path / "events"
    with shown.open("w") as output:
        # As from a terminal: what a shell has put into the background, as perhaps this run, ignores SIGINT with all it starts.
        terminal = ("env", "--default-signal=INT")
        watching = shared.start(*terminal, *FIBRIL, "-o", "json", "monitor", "--endpoint", "a", stdout=output)
    try:
        # Until the watch is on, nothing is reported; so packets are sent until something is.
        event = wait_for(spoofed_and_seen, "the event")
        watching.send_signal(signal.SIGINT)
        assert watching.wait(30) == 130
    finally:
        watching.kill()
        watching.wait()
    assert (event["verdict"], event["source_pod"]) == ("VERDICT_DROPPED", "a")
    assert event["direction"] == "DIRECTION_FROM_POD"
    assert event["reason"] != "DROP_REASON_UNSPECIFIED"
    counters = shared.json("monitor", "--counters")
    assert event["reason"] in {c["reason"] for c in counters}


def test_endpoint_check_compares_with_the_kernel(shared: Node) -> None:
    shared.fibril("pod", "add", "a")
    assert shared.fibril("endpoint", "check").stdout.strip() == "1 checked, no difference"
    assert shared.json("endpoint", "get", "a")["pod"] == "a"


@pytest.mark.parametrize("missing", ["etcd"])
def test_a_missing_program_is_named(node: Node, missing: str, tmp_path: Path) -> None:
    """PATH without etcd: what is missing is said, and how to get it."""
    for name in ("ip", "nft", "sh"):
        (tmp_path / name).symlink_to(Path("/usr/sbin") / name if name != "sh" else Path("/bin/sh"))
    node.env["PATH"] = str(tmp_path)
    failed = node.fibril("up", code=1)
    assert missing in failed.stderr
    assert "hint:" in failed.stderr
    assert ROOT.exists()
