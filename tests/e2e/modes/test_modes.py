"""Pods of different nodes reach each other in every mode, and their identity is known where they arrive.

pod p1 -- c1n1 ---- underlay (and router) ---- c1n2 -- pod p1
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from modelab import NETWORK, ModeLab, lab, wait_for

# How `fibril lab up` is called, and the mode and MTU from c1n1 to each other node.
SHAPES: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, int]]]] = {
    "overlay-v6": (("--nodes", "2", "--underlay", "ipv6"), {"c1n2": ("OVERLAY", 1430)}),
    "routed": (("--nodes", "2", "--mode", "routed"), {"c1n2": ("ROUTED", 1500)}),
    # IPv4 pods too: by IPv6 next hops.
    "routed-v6": (("--nodes", "2", "--mode", "routed", "--underlay", "ipv6"), {"c1n2": ("ROUTED", 1500)}),
    "auto": (
        ("--nodes", "3", "--mode", "auto", "--subnets", "2", "--etcd-members", "3"),
        {"c1n2": ("OVERLAY", 1450), "c1n3": ("ROUTED", 1500)},
    ),
    "cloud": (("--nodes", "2", "--mode", "cloud"), {"c1n2": ("CLOUD", 1500)}),
}


@pytest.fixture(scope="module", params=["overlay", *SHAPES])
def moded(request: pytest.FixtureRequest) -> Iterator[tuple[ModeLab, dict[str, tuple[str, int]]]]:
    if request.param == "overlay":
        yield request.getfixturevalue("overlay"), {"c1n2": ("OVERLAY", 1450)}
        return
    shape, ways = SHAPES[request.param]
    with lab(*shape, "--pods", "1", *NETWORK) as made:
        yield made, ways


def test_everything_reaches_everything(moded: tuple[ModeLab, dict[str, tuple[str, int]]]) -> None:
    made, ways = moded
    results = made.test()["results"]
    nodes = {r["name"]: r for r in made.json("c1n1", "node", "ls")}
    for node, (mode, mtu) in ways.items():
        known = nodes[f"{made.name}-{node}"]
        assert (known["mode"], known["mtu"]) == (f"NETWORK_MODE_{mode}", mtu)
        # The largest packets that shall fit do, in both families.
        large = {
            r["bytes"]
            for r in results
            if r["kind"] == "large"
            and r["from"] == f"{made.name}-c1n1/p1"
            and r["to"] == f"{made.name}-{node}/p1"
        }
        pod_mtu = made.pod("c1n1", "p1")["mtu"]
        assert large == {min(mtu, pod_mtu)}
    asked = {(r["to"], ":" in r["address"], r["kind"]) for r in results}
    for target in ("c1n1/p1", "c1n2/p1", "c1n2"):
        for kind in ("icmp", "tcp", "udp", "large"):
            assert (f"{made.name}-{target}", True, kind) in asked
    assert any(r["to"] == "world" for r in results)


def test_one_node_alone_knows_whom_to_ask(moded: tuple[ModeLab, dict[str, tuple[str, int]]]) -> None:
    made, ways = moded
    done = made.exec("c1n1", "fibril", "-o", "json", "connectivity", "test")
    results = json.loads(done.stdout)["results"]
    assert {r["from"] for r in results} == {f"{made.name}-c1n1", f"{made.name}-c1n1/p1"}
    assert {f"{made.name}-{node}/p1" for node in ways} <= {r["to"] for r in results}
    # Nobody listens on the other nodes now, and that is fine.
    assert {r["result"] for r in results if r["kind"] == "tcp" and "c1n2/" in r["to"]} == {"refused"}


def test_the_sender_is_known_by_identity_where_it_arrives(
    moded: tuple[ModeLab, dict[str, tuple[str, int]]], tmp_path: Path
) -> None:
    made, _ = moded
    sender, receiver = made.pod("c1n1", "p1"), made.pod("c1n2", "p1")
    identity = made.json("c1n2", "identity", "resolve", "app=p1")["number"]
    assert sender["identity"] == receiver["identity"] == identity > 0xFFFFF
    for family in ("ipv4", "ipv6"):
        shown = tmp_path / family

        def seen(family: str = family, shown: Path = shown) -> dict[str, Any] | None:
            made.pod_exec("c1n1", "p1", "ping", "-c1", "-W5", receiver[family])
            events = map(json.loads, shown.read_text().splitlines())
            return next((e for e in events if e["source"] == sender[family]), None)

        with (
            shown.open("w") as output,
            made.started("c1n2", "fibril", "-o", "json", "monitor", "--forwarded", "--endpoint", "p1",
                         stdout=output, stderr=subprocess.DEVNULL),
        ):  # fmt: skip
            event = wait_for(seen, f"a packet of {sender[family]}")
        assert event["source_identity"] == event["destination_identity"] == identity
        assert event["verdict"] == "VERDICT_DELIVERED"
        assert event["destination_pod"] == "p1"
        assert event["direction"] in ("DIRECTION_FROM_OVERLAY", "DIRECTION_FROM_UPLINK")


def test_further_addresses_of_a_node_change_nothing(moded: tuple[ModeLab, dict[str, tuple[str, int]]]) -> None:
    """Left to itself the kernel would send from the newest, which peers do not know."""
    made, _ = moded
    receiver = made.pod("c1n2", "p1")
    made.exec("c1n1", "ip", "address", "add", "fd30::1:99/64", "dev", "eth0", "nodad")
    try:
        for family in ("ipv4", "ipv6"):
            made.pod_exec("c1n1", "p1", "ping", "-c1", "-W5", receiver[family])
    finally:
        made.exec("c1n1", "ip", "address", "del", "fd30::1:99/64", "dev", "eth0")
