"""`fibril down` removes every trace, whatever state the node is in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from ctlnode import Node, wait_for

from services.common.kernel import cgroup, netns
from services.ctl import procs

# Values the kernel changes by itself.
VOLATILE = {"netfilter/nf_conntrack_count", "ipv4/tcp_fastopen_key"}


def snapshot(node: Node) -> dict[str, Any]:
    """Everything of the namespace, and everything elsewhere that has the instance's name."""
    seen: dict[str, Any] = {}
    for what, *argv in (
        ("links", "ip", "-d", "link"), ("addresses", "ip", "address"), ("neighbours", "ip", "neighbour"),
        ("routes", "ip", "route", "show", "table", "all"),
        ("routes6", "ip", "-6", "route", "show", "table", "all"),
        ("rules", "ip", "rule"), ("rules6", "ip", "-6", "rule"), ("qdiscs", "tc", "qdisc"),
        ("nft", "nft", "list", "ruleset"),
    ):  # fmt: skip
        seen[what] = sorted(node.run(*argv).stdout.splitlines())
    with netns.NetNs.open(node.netns) as space, space.entered():
        seen["sysctls"] = sysctls()
    instance = node.instance
    seen["pins"] = (instance.pin_dir.exists(), sorted(str(p) for p in instance.pin_dir.rglob("*")))
    seen["cgroup"] = cgroup.path_of(instance.cgroup).exists()
    seen["processes"] = [p.pid for p in procs.find(instance.run_dir)]
    seen["namespaces"] = sorted(p.name for p in Path("/run/netns").iterdir() if instance.name in p.name)
    seen["files"] = sorted(str(p) for p in node.root.rglob("*"))
    seen["cni"] = sorted(str(p) for d in ("/etc/cni/net.d", "/opt/cni/bin", "/usr/lib/cni")
                         for p in Path(d).glob(f"*{instance.name}*"))  # fmt: skip
    seen["mounts"] = [m for m in Path("/proc/mounts").read_text().splitlines() if instance.name in m]
    return seen


def sysctls() -> dict[str, str]:
    """Every readable parameter below net/ of this thread's namespace."""
    root = Path("/proc/sys/net")
    found = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if path.is_file() and name not in VOLATILE:
            try:
                found[name] = path.read_text()
            except OSError:
                continue  # write-only, or of a feature that is off
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    for what in before.keys() - set(but):
        assert after[what] == before[what], what


def up_with_pods(node: Node) -> None:
    node.fibril("up")
    node.fibril("pod", "add", "a", "--label", "app=x")
    node.fibril("pod", "add", "b")
    node.fibril("check")


# What a running node changes of it; or comparing would prove nothing.
CHANGED = ("links", "addresses", "neighbours", "routes", "routes6", "qdiscs", "nft", "sysctls", "pins", "cgroup", "processes",
           "namespaces", "files")  # fmt: skip


def leave(node: Node) -> None:
    """As it is."""


def kill(node: Node) -> None:
    node.kill_all()


def kill_and_lose_run_dir(node: Node) -> None:
    node.kill_all()
    shutil.rmtree(node.instance.run_dir)


def kill_and_lose_state(node: Node) -> None:
    node.kill_all()
    shutil.rmtree(node.instance.run_dir)
    shutil.rmtree(node.instance.state_dir)


def lose_files_while_it_runs(node: Node) -> None:
    shutil.rmtree(node.instance.run_dir)
    shutil.rmtree(node.instance.state_dir)


def lose_supervisor(node: Node) -> None:
    for process in procs.find(node.instance.run_dir):
        with process:
            if process.name == "supervisor":
                process.signal(9)
                assert process.wait(5)


def lose_pod_namespace(node: Node) -> None:
    netns.remove(Path(f"/run/netns/fib-{node.name}_a"))


@pytest.mark.parametrize(
    "damage",
    [leave, kill, kill_and_lose_run_dir, kill_and_lose_state, lose_files_while_it_runs, lose_supervisor,
     lose_pod_namespace],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_down_leaves_nothing(node: Node, damage: Any) -> None:
    before = snapshot(node)
    up_with_pods(node)
    meanwhile = snapshot(node)
    assert [what for what in CHANGED if meanwhile[what] == before[what]] == []
    damage(node)
    # What the kernel's parameters were before is remembered in the state directory and nowhere else.
    lost = ("sysctls",) if damage in (kill_and_lose_state, lose_files_while_it_runs) else ()
    node.fibril("down")
    assert_same(before, snapshot(node), lost)
    # Twice is as good as once.
    node.fibril("down")
    assert_same(before, snapshot(node), lost)


def test_down_of_what_never_was_succeeds(node: Node) -> None:
    before = snapshot(node)
    node.fibril("down")
    assert_same(before, snapshot(node))


def test_down_takes_the_cni_plugin_along(node: Node, tmp_path: Path) -> None:
    node.fibril("cni", "install", "--bin-dir", str(tmp_path / "bin"), "--conf-dir", str(tmp_path / "conf"))
    assert list((tmp_path / "bin").iterdir())
    node.fibril("down")
    assert not list((tmp_path / "bin").iterdir())
    assert not list((tmp_path / "conf").iterdir())


def test_down_ends_what_runs_in_pods(node: Node) -> None:
    node.fibril("up", "--services", "ipam")
    node.fibril("pod", "add", "a")
    inside = node.start("python3", "-m", "services.ctl.main", "pod", "exec", "a", "--", "sleep", "1000")
    group = cgroup.path_of(f"{node.instance.cgroup}/pods/a")
    wait_for(lambda: inside.pid in cgroup.processes(group), "the process in the pod's cgroup")
    node.fibril("down")
    assert inside.wait(30) != 0


def test_keep_state_keeps_addresses(node: Node) -> None:
    node.fibril("up", "--services", "ipam")
    node.fibril("ipam", "allocate", "job-1")
    first = {a["address"] for a in node.json("ipam", "ls", "--owner", "job-1")}
    assert first
    node.fibril("down", "--keep-state")
    assert node.instance.state_dir.exists()
    assert not node.instance.run_dir.exists()
    node.fibril("up", "--services", "ipam")
    assert {a["address"] for a in node.json("ipam", "ls", "--owner", "job-1")} == first
