"""A lab: nodes made of network namespaces, with a world beyond them.

world 203.0.113.1 ── underlay ── c1n1 ── pods
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ctlnode import FIBRIL, ROOT, wait_for

from lab import build, topology
from services.common.errors import InvalidArgument
from services.common.instance import Instance
from services.common.kernel import cgroup
from services.ctl import procs
from tests import session

# What is about addresses needs no more.
NETWORK = ("--services", "ipam,identity")


class LabRun:
    """`fibril lab …` with private directories."""

    def __init__(self, root: Path) -> None:
        self.name = session.name()
        self.env = {
            **os.environ,
            "FIBRIL_RUN_ROOT": str(root / "run"),
            "FIBRIL_STATE_ROOT": str(root / "state"),
        }

    def __call__(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        # See ctlnode.Node.fibril.
        patience = ("--timeout", "100") if words[:2] == ("lab", "up") else ()
        done = subprocess.run(
            [*FIBRIL, *patience, *words],
            env=self.env,
            text=True,
            capture_output=True,
            cwd=ROOT,
            timeout=120,
            check=False,
        )
        assert code in (None, done.returncode), f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *words: str) -> Any:
        return json.loads(self("-o", "json", *words).stdout)

    def exec(self, node: str, *argv: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        return self("lab", "exec", "--name", self.name, node, *argv, code=code)


@pytest.fixture
def lab() -> Iterator[LabRun]:
    root = Path(tempfile.mkdtemp(prefix="fibril-"))
    made = LabRun(root)
    try:
        yield made
    finally:
        made("lab", "down", "--name", made.name, code=None)
        build.remove(made.name)
        shutil.rmtree(root, ignore_errors=True)


def test_a_lab_of_one_node_reaches_the_world(lab: LabRun) -> None:
    lab("lab", "up", "--name", lab.name)
    mine = [row for row in lab.json("lab", "ls") if row["lab"] == lab.name]
    assert [(row["node"], row["health"]) for row in mine] == [("c1n1", "HEALTH_OK")]
    for pod in ("a", "b"):
        lab.exec("c1n1", "fibril", "pod", "add", pod)
    # Pods reach each other, the node, and the world, which knows no route to them.
    four, six = topology.WORLD_ADDRESSES
    lab.exec("c1n1", "fibril", "check", "--to", four, "--to", six)
    routes = lab.exec("world", "ip", "route").stdout
    assert "10.101" not in routes
    # Again is harmless.
    lab("lab", "up", "--name", lab.name)
    assert len(json.loads(lab.exec("c1n1", "fibril", "-o", "json", "pod", "ls").stdout)) == 2


def test_two_clusters_have_nodes_and_pools_of_their_own(lab: LabRun) -> None:
    lab("lab", "up", "--name", lab.name, "--clusters", "2", *NETWORK)
    addresses = []
    for node in ("c1n1", "c2n1"):
        lab.exec(node, "fibril", "pod", "add", "a")
        lab.exec(node, "fibril", "check")
        addresses.append(json.loads(lab.exec(node, "fibril", "-o", "json", "pod", "ls").stdout)[0]["ipv4"])
    assert addresses[0].startswith("10.101.")
    assert addresses[1].startswith("10.102.")
    # The underlay joins them.
    lab.exec("c1n1", "ip", "route", "get", "172.30.2.1")
    peer = lab.exec("c1n1", "fibril", "check", "--to", "172.30.2.1")
    assert "172.30.2.1" in peer.stdout


def test_nodes_of_one_cluster_share_its_pool_through_the_first_one_s_etcd(lab: LabRun) -> None:
    lab("lab", "up", "--name", lab.name, "--nodes", "2", *NETWORK)
    blocks = json.loads(lab.exec("c1n2", "fibril", "-o", "json", "ipam", "block", "ls", "--all-nodes").stdout)
    by_node: dict[str, set[str]] = {}
    for block in blocks:
        by_node.setdefault(block["node"], set()).add(block["cidr"])
    assert set(by_node) == {f"{lab.name}-c1n1", f"{lab.name}-c1n2"}
    first, second = by_node.values()
    assert not first & second


def test_lab_down_leaves_nothing(lab: LabRun) -> None:
    lab("lab", "up", "--name", lab.name)
    lab.exec("c1n1", "fibril", "pod", "add", "a")
    instance = Instance.from_env(f"{lab.name}-c1n1", lab.env)
    lab("lab", "down", "--name", lab.name)
    assert not [p for p in Path("/run/netns").iterdir() if lab.name in p.name]
    assert not instance.pin_dir.exists()
    assert not instance.run_dir.exists()
    assert not instance.state_dir.exists()
    assert not cgroup.path_of(instance.cgroup).exists()
    wait_for(lambda: procs.find(instance.run_dir) == [], "the processes' end")
    lab("lab", "down", "--name", lab.name)


def test_exec_tells_what_is_not_there(lab: LabRun) -> None:
    assert f"lab '{lab.name}' has no 'c1n1'" in lab.exec("c1n1", "true", code=1).stderr
    assert not cgroup.path_of(f"fibril/{lab.name}-c1n1").exists()


def test_names_are_never_ambiguous() -> None:
    assert topology.parse_netns(topology.netns("a-b", "c1n1")) == ("a-b", "c1n1")
    assert topology.parse_netns("fib-node_c1n1") is None
    assert topology.parse_netns("fiblab-x") is None
    assert topology.parse_node("x", "world") is None
    nodes = list(topology.Lab("x", 2, 3).nodes())
    assert [n.name for n in nodes] == ["c1n1", "c1n2", "c1n3", "c2n1", "c2n2", "c2n3"]
    assert [topology.parse_node("x", n.name) for n in nodes] == nodes
    assert len({n.addresses for n in nodes}) == 6
    for wrong in ({"name": "A"}, {"name": "x" * 17}, {"clusters": 0}, {"nodes_each": 100}):
        with pytest.raises(InvalidArgument):
            topology.Lab(**wrong)  # type: ignore[arg-type]
