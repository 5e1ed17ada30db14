"""A connectivity test's plan and report, and how it learns what there is."""

from __future__ import annotations

from typing import Any

from services.ctl.connectivity import collect, report
from services.ctl.connectivity.model import KINDS, NODE, POD, Cluster, Probe, Source, Target
from services.ctl.connectivity.plan import plan
from services.ctl.context import Ctl

POD_A = Source("n1/a", "n1", "/netns/a", frozenset({"10.0.1.2", "fd00::1:2"}), frozenset({4, 6}), True, 1450)
POD_B = Source("n2/b", "n2", "/netns/b", frozenset({"10.0.2.2"}), frozenset({4}), True, 1450)
NODE_1 = Source("n1", "n1", "", frozenset({"172.30.0.1", "10.0.1.1"}), frozenset({4}), False)
TARGETS = [
    Target("n1/a", "n1", POD, "10.0.1.2", 1450),
    Target("n1/a", "n1", POD, "fd00::1:2", 1450),
    Target("n2/b", "n2", POD, "10.0.2.2"),
    Target("n1", "n1", NODE, "172.30.0.1"),
    Target("n2", "n2", NODE, "172.30.0.2"),
]
CLUSTER = Cluster([POD_A, POD_B, NODE_1], TARGETS, {("n1", "n2"): 1430, ("n2", "n1"): 1450})


def asked(probes: list[Probe]) -> set[tuple[str, str, str]]:
    return {(p.source.name, p.target.address, p.kind) for p in probes}


def test_everyone_asks_every_address_of_its_families_but_its_own() -> None:
    found = asked(plan(CLUSTER, ("icmp",)))
    assert found == {
        ("n1", "10.0.1.2", "icmp"), ("n1", "10.0.2.2", "icmp"), ("n1", "172.30.0.2", "icmp"),
        ("n1/a", "10.0.2.2", "icmp"), ("n1/a", "172.30.0.1", "icmp"), ("n1/a", "172.30.0.2", "icmp"),
        ("n2/b", "10.0.1.2", "icmp"), ("n2/b", "172.30.0.1", "icmp"), ("n2/b", "172.30.0.2", "icmp"),
    }  # fmt: skip


def test_the_world_is_asked_what_it_can_answer() -> None:
    found = plan(CLUSTER, KINDS, ["203.0.113.1", "2001:db8::1"])
    world = {(p.source.name, p.target.version, p.kind) for p in found if p.target.name == "world"}
    assert world == {
        (name, version, kind)
        for name, versions in (("n1/a", (4, 6)), ("n2/b", (4,)), ("n1", (4,)))
        for version in versions
        for kind in ("icmp", "tcp")
    }


def test_large_packets_are_as_large_as_both_ends_and_the_way_allow() -> None:
    sizes = {(p.source.name, p.target.address): p.size for p in plan(CLUSTER, ("large",))}
    assert sizes["n1/a", "10.0.2.2"] == 1430
    assert sizes["n2/b", "10.0.1.2"] == 1450
    assert sizes["n1", "10.0.2.2"] == 1430
    # Between nodes themselves there is no pod network.
    assert sizes["n1", "172.30.0.2"] == 0


def test_a_sample_bounds_the_pods_of_each_node() -> None:
    pods = [
        Source(f"n{n}/p{i}", f"n{n}", f"/{n}/{i}", frozenset({f"10.0.{n}.{i}"}), frozenset({4}), True)
        for n in range(3)
        for i in range(20)
    ]
    targets = [Target(p.name, p.node, POD, next(iter(p.addresses))) for p in pods]
    probes = plan(Cluster([*pods, NODE_1], [*targets, TARGETS[4]]), ("icmp",), sample=2)
    assert len({p.source.name for p in probes if p.source.is_pod}) == 6
    assert len({p.target.name for p in probes if p.target.kind == POD}) == 6
    assert {p.target.name for p in probes if p.target.kind == NODE} == {"n2"}


def answered(probes: list[Probe], failing: set[tuple[str, str]] = frozenset()) -> list[Probe]:  # type: ignore[assignment]
    for p in probes:
        p.ok = (p.source.name, p.target.name) not in failing
        p.detail = "" if p.ok else "no answer"
        p.passed = p.size
    return probes


def test_failures_come_first_and_the_matrix_names_what_failed() -> None:
    probes = answered(plan(CLUSTER, ("icmp", "tcp")), {("n1/a", "n2/b")})
    next(p for p in probes if p.source is POD_B and p.target.name == "n1" and p.kind == "tcp").ok = False
    lines = report.text(probes, 200).splitlines()
    assert lines[0].split() == ["FROM", "TO", "ADDRESS", "KIND", "RESULT"]
    assert lines[1].startswith("n1/a  n2/b  10.0.2.2    icmp")
    head = next(line for line in lines[4:] if line.startswith("FROM"))
    assert head.split() == ["FROM", "n1/a", "n2/b", "n1", "n2"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[lines.index(head) + 1 :] if line}
    assert rows["n1/a"] == ["-", "FAIL", "ok", "ok"]
    assert rows["n2/b"] == ["ok", "-", "tcp4", "ok"]
    assert lines[-1].startswith("3 of 18 questions")
    assert report.record(probes)["failed"] == 3


def test_the_matrix_gets_coarser_before_it_gets_too_wide() -> None:
    targets = [Target(f"n{i % 2}/pod-{i}", f"n{i % 2}", POD, f"10.0.0.{i}") for i in range(40)]
    probes = answered(plan(Cluster([NODE_1, POD_A], targets), ("icmp",)))
    for width, heads in ((1000, 41), (60, 3)):
        shown = report.matrix(probes, width)
        assert max(map(len, shown.splitlines())) <= width
        if width == 1000:
            assert len(shown.splitlines()[0].split()) == heads
        else:
            assert "pods of n0" in shown
    assert "pods elsewhere" in report.matrix(probes, 26)


def test_packets_that_got_through_smaller_are_named() -> None:
    probes = answered(plan(CLUSTER, ("large",)))
    probe = next(p for p in probes if p.source is POD_A and p.target.name == "n2/b")
    probe.passed = 1400
    text = report.text(probes, 120)
    assert "only packets of 1400 bytes instead of 1430 pass from n1/a to n2/b (10.0.2.2)" in text
    assert text.splitlines()[-1].startswith("all of ")


def test_what_several_nodes_know_is_put_together() -> None:
    def endpoint(pod: str, ipv4: str) -> dict[str, Any]:
        return {
            "pod": pod, "container_id": "x" * 20, "netns": f"/netns/{pod}", "ipv4": ipv4, "ipv6": "", "mtu": 1450,
            "ipv4_gateway": "10.0.1.1", "ipv6_gateway": "",
        }  # fmt: skip

    def node(name: str, local: bool) -> dict[str, Any]:
        number = name[1:]
        return {
            "name": name, "ipv4": f"172.30.0.{number}", "ipv6": "", "gateways": [f"10.0.{number}.1"],
            "local": local, "mtu": 0 if local else 1430,
        }  # fmt: skip

    def entry(prefix: str, node_name: str, pod: str, source: str = "POD") -> dict[str, Any]:
        return {"prefix": prefix, "node": node_name, "pod": pod, "source": f"ENTRY_SOURCE_{source}"}

    entries = [
        entry("10.0.1.2/32", "n1", "a"),
        entry("10.0.2.2/32", "n2", ""),
        entry("10.0.2.0/24", "n2", "", "BLOCK"),
        entry("172.30.0.2/32", "n2", "", "NODE"),
    ]
    view = collect.View(
        collect.Origin(Ctl("x", "table", None, None)),
        [endpoint("a", "10.0.1.2")],
        [node("n1", True), node("n2", False)],
        entries,
    )
    found = collect.cluster([view])
    assert {(s.name, s.netns, s.is_pod) for s in found.sources} == {
        ("n1/a", "/netns/a", True),
        ("n1", "", False),
    }
    assert {(t.name, t.kind, t.address, t.mtu) for t in found.targets} == {
        ("n1/a", POD, "10.0.1.2", 1450),
        ("n2/10.0.2.2", POD, "10.0.2.2", 0),
        ("n1", NODE, "172.30.0.1", 0),
        ("n1", NODE, "10.0.1.1", 0),
        ("n2", NODE, "172.30.0.2", 0),
        ("n2", NODE, "10.0.2.1", 0),
    }
    assert found.mtu == {("n1", "n2"): 1430}
