"""Pods of a whole node get the identity of their labels, and keep it whatever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from tests.e2e.ctl.ctlnode import wait_for
from tests.e2e.identity.identitynode import INIT, IdentityNode

WEB, DB = {"app": "web"}, {"app": "db", "tier": "back"}


def written(node: IdentityNode) -> dict[str, int]:
    """When each key about identities was written last."""
    about = ("ip/", "identities/id/", "identities/labels/", "identities/refs/")
    return {key: kv.mod_revision for key, kv in node.keys("").items() if key.startswith(about)}


def test_labels_become_identities_everywhere(node: IdentityNode) -> None:
    for name, labels in (("a", WEB), ("b", WEB), ("c", DB), ("d", {})):
        node.pod(name, labels)
    found = node.settle()
    assert found["a"] == found["b"] != found["c"]
    assert found["d"] == INIT and INIT not in (found["a"], found["c"])
    assert all(number >> 20 == 1 for name, number in found.items() if name != "d")
    # As people see it.
    assert node.json("endpoint", "get", "a")["identity"] == found["a"]
    assert {"app": "web"} in [i["labels"] for i in node.json("identity", "ls") if i["number"] == found["a"]]
    # The last pod with these labels goes, and comes back.
    node.remove("c")
    wait_for(lambda: not node.keys(f"identities/refs/{found['c']}/"), "nobody holds it")
    node.settle()
    node.pod("c", DB)
    assert node.settle()["c"] == found["c"]


def test_new_labels_are_a_new_identity(node: IdentityNode) -> None:
    node.pod("a", WEB)
    node.pod("b", WEB)
    before = node.settle()
    node.relabel("a", DB)
    after = node.settle()
    assert after["b"] == before["b"] != after["a"]
    node.relabel("b", DB)
    assert node.settle()["b"] == after["a"]
    # Nobody is left with the old ones.
    wait_for(lambda: not node.keys(f"identities/refs/{before['a']}/"), "the old identity is held by nobody")
    assert node.is_well("endpoints")


def test_killed_services_change_nothing(node: IdentityNode) -> None:
    for name, labels in (("a", WEB), ("b", DB), ("c", {})):
        node.pod(name, labels)
    before = node.settle()
    revisions = written(node)
    for victim in ("identity", "ipam"):
        node.kill(victim)
        assert node.settle() == before
    assert written(node) == revisions
    # What happens while nobody watches is caught up with.
    os.kill(node.processes()["supervisor"], signal.SIGSTOP)
    os.kill(node.processes()["identity"], signal.SIGKILL)
    node.relabel("a", {"app": "new"})
    node.pod("late", DB)
    node.remove("b")
    os.kill(node.processes()["supervisor"], signal.SIGCONT)
    after = node.settle(30)
    assert after["late"] == before["b"] and after["a"] not in before.values() and "b" not in after


def test_without_etcd_what_is_known_goes_on(node: IdentityNode) -> None:
    node.pod("a", WEB)
    before = node.settle()
    os.kill(node.processes()["etcd"], signal.SIGSTOP)
    # Numbers held here are at hand; others have to wait, and that is said.
    node.pod("b", WEB)
    node.pod("c", DB)
    wait_for(lambda: node.all()["b"].identity == before["a"], "an identity that is held here")
    wait_for(lambda: not node.is_well("endpoints"), "the lack is told")
    assert node.all()["c"].identity == INIT
    # A process that starts now serves what this node knows.
    maps, old = node.in_maps(), node.processes()["identity"]
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: node.resolve(WEB) == before["a"], "an answer of the new process", 20)
    assert node.processes()["identity"] != old
    assert not node.is_well("etcd")
    assert node.in_maps() == maps
    os.kill(node.processes()["etcd"], signal.SIGCONT)
    after = node.settle(30)
    assert after["a"] == before["a"]
    wait_for(lambda: node.fibril("status", code=None).returncode == 0, "health", 20)


def test_without_bpf_identities_are_served(node: IdentityNode) -> None:
    node.up("--services", "ipam")
    lacking = "-bpf,-perfmon,-sys_admin"
    weak = node.start(
        "setpriv", f"--bounding-set={lacking}", f"--inh-caps={lacking}",
        sys.executable, "-m", "services.identity", "--instance", node.name, "--etcd", node.etcd,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        node.pod("a", WEB)
        wait_for(lambda: node.all()["a"].identity == node.resolve(WEB) != 0, "an identity", 20)
        assert "CAP_BPF" in node.components("identity")["datapath"].message
    finally:
        weak.terminate()
        assert weak.wait(30) == 0


def test_a_storm_of_labels_ends_in_order(node: IdentityNode) -> None:
    names = [f"p{n}" for n in range(20)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: node.pod(name, {"app": name}), names))
        node.settle(30)
        began = time.monotonic()
        for number in range(10):
            list(threads.map(lambda name, n=number: node.relabel(name, {"app": name, "n": str(n)}), names))
        list(threads.map(lambda name: node.relabel(name, {"app": name, "last": "1"}), names))
        found = node.settle(30)
    assert len(set(found.values())) == len(names)
    print(f"220 label sets: {time.monotonic() - began:.1f} s")
    # What was held in between is let go of.
    wait_for(lambda: len(node.keys("identities/refs/")) == len(names), "only what is in use is held", 20)


def test_both_services_in_one_process(node: IdentityNode) -> None:
    node.pod("a", WEB)
    before = node.settle()
    node.up("--in-process")
    assert not {"ipam", "identity"} & set(node.processes())
    assert node.settle() == before
    node.pod("b", DB)
    node.settle()
    sources = [(part["source"], part["name"]) for part in node.json("status")["parts"]]
    assert len(sources) == len(set(sources)) and {("ipam", "etcd"), ("identity", "etcd")} <= set(sources)


def test_ipam_alone_needs_no_identity_service(node: IdentityNode) -> None:
    node.up("--services", "ipam")
    assert "identity" not in node.processes()
    assert node.pod("a", WEB).identity == INIT
    node.up()
    assert node.settle()["a"] != INIT
