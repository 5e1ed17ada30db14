"""How the nodes of a lab are started, how labs grow, and small things of the commands around nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lab import build
from lab.topology import Lab
from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.instance import Instance
from services.ctl import children, labs
from services.ctl.commands import lab as command
from services.ctl.commands.endpoint import merged
from services.ctl.commands.node import reached


@pytest.fixture(autouse=True)
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIBRIL_RUN_ROOT", str(tmp_path / "run"))
    monkeypatch.setenv("FIBRIL_STATE_ROOT", str(tmp_path / "state"))


def test_nodes_that_hold_etcd_are_started_before_those_that_need_it() -> None:
    one, three = Lab("x", 2, 4), Lab("x", 1, 4, etcd_members=3)
    assert [[n.name for n in batch] for batch in labs.batches(one)] == [
        ["c1n1", "c2n1"],
        ["c1n2", "c1n3", "c1n4", "c2n2", "c2n3", "c2n4"],
    ]
    assert [len(batch) for batch in labs.batches(three)] == [3, 1]
    assert "--etcd" not in labs.up_words(one, "", one.node(1, 1))
    first = children.embedded_etcd(Instance.from_env("x-c2n1")).endpoint
    assert labs.up_words(one, "", one.node(2, 3))[-2:] == ["--etcd", first]
    members = ["--etcd-members", "172.30.1.1,172.30.1.2,172.30.1.3"]
    assert all(labs.up_words(three, "", each)[-2:] == members for each in three.nodes())


def test_a_lab_may_grow_and_nothing_else() -> None:
    assert command._wanted("x", {"nodes_each": 3, "mode": "routed"}) == Lab("x", 1, 3, mode="routed")
    build.remember(Lab("x", 1, 3, mode="routed"))
    assert command._wanted("x", {}).mode == "routed"
    assert command._wanted("x", {"nodes_each": 4}).nodes_each == 4
    assert command._wanted("x", {"nodes_each": 1, "mode": "routed"}).nodes_each == 3
    with pytest.raises(FailedPrecondition, match="another mode: routed"):
        command._wanted("x", {"mode": "cloud"})
    build.forget("x")
    build.forget("x")
    assert build.known("x") is None


def test_in_cloud_mode_each_node_is_given_its_addresses() -> None:
    lab = Lab("x", 1, 2, mode="cloud", ipv6=False)
    assert labs.pool_words(lab, lab.node(1, 1)) == [
        "ipam", "pool", "put", "default", "--cloud", "--cidr", "10.101.0.0/16",
    ]  # fmt: skip
    given = labs.address_words(lab, lab.node(1, 2))[4:]
    assert given == lab.node(1, 2).cloud_addresses()[0]


def test_a_member_of_etcd_runs_where_its_address_is() -> None:
    instance = Instance.from_env("x")
    here = children.Options(etcd_members=("127.0.0.1", "192.0.2.1", "192.0.2.2"))
    urls, own = children.own_etcd(instance, here)
    assert urls == ("http://127.0.0.1:2379", "http://192.0.2.1:2379", "http://192.0.2.2:2379")
    assert own is not None and own.endpoint == urls[0]
    urls, own = children.own_etcd(instance, children.Options(etcd_members=("192.0.2.1", "2001:db8::1")))
    assert urls[1] == "http://[2001:db8::1]:2379" and own is None
    with pytest.raises(InvalidArgument):
        children.own_etcd(instance, children.Options(etcd_members=("somewhere",)))
    with pytest.raises(InvalidArgument):
        children.Options(etcd=("http://192.0.2.1:2379",), etcd_members=("192.0.2.1",))


def test_labels_are_merged_one_by_one() -> None:
    assert merged({"a": "1", "b": "2"}, ["b-", "c=x=y", "a="]) == {"a": "", "c": "x=y"}
    assert merged({}, ["none-"]) == {}
    for wrong in ("a", "=x", "-"):
        with pytest.raises(InvalidArgument):
            merged({}, [wrong])


def test_who_does_not_reach_a_node_is_named() -> None:
    def view(prober: str, underlay: bool, pods: bool) -> dict[str, Any]:
        return {"prober": prober, "underlay": underlay, "pod_network": pods}

    assert reached({"reachability": []}) == ""
    assert reached({"reachability": [view("a", True, True), view("b", True, False)]}) == "1/2 not from b"
