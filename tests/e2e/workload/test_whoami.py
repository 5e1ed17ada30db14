"""Who a process, a control group or a namespace belongs to."""

from __future__ import annotations

import os
from typing import Any

import grpc
import pytest
from workloadkit import World

from fibril.workload.v1 import workload_pb2 as pb
from services.common.kernel import cgroup


def ask(world: World, **by: Any) -> pb.Workload:
    return world.workload.Whoami(pb.WhoamiRequest(**by), timeout=5, wait_for_ready=True).workload


def refusal(world: World, **by: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        ask(world, **by)
    return caught.value.code(), caught.value.details()


def test_a_process_is_of_the_pod_of_its_cgroup(world: World) -> None:
    with world.sleeper(group=world.web_group) as pid:
        found = ask(world, pid=pid)
    assert (found.endpoint_id, found.pod, found.container_id, found.identity) == (1, "shop/web", "c1", 70000)
    assert dict(found.labels) == {"app": "web", "tier": "front"}
    assert list(found.addresses) == ["10.0.0.1", "fd00::1"]


def test_a_process_of_a_nested_cgroup_is_of_the_pod_above(world: World) -> None:
    with world.sleeper(group=world.nested) as pid:
        assert ask(world, pid=pid).pod == "shop/web"


def test_a_process_whose_cgroup_is_no_pods_is_of_the_pod_of_its_network(world: World) -> None:
    with world.sleeper(space=world.cart_netns) as pid:
        assert ask(world, pid=pid).pod == "shop/cart"


def test_the_cgroup_counts_before_the_network(world: World) -> None:
    with world.sleeper(group=world.web_group, space=world.cart_netns) as pid:
        assert ask(world, pid=pid).pod == "shop/web"


def test_a_process_of_the_host_is_of_no_pod(world: World) -> None:
    code, text = refusal(world, pid=os.getpid())
    assert code is grpc.StatusCode.NOT_FOUND
    assert f"process {os.getpid()}" in text and "no pod" in text


def test_a_process_that_is_gone_is_not_found(world: World) -> None:
    with world.sleeper(group=world.web_group) as pid:
        pass
    code, text = refusal(world, pid=pid)
    assert code is grpc.StatusCode.NOT_FOUND and f"there is no process {pid}" in text


def test_control_groups_are_found_by_number_with_what_is_below_a_pods(world: World) -> None:
    assert ask(world, cgroup_id=cgroup.cgroup_id(world.web_group)).endpoint_id == 1
    assert ask(world, cgroup_id=cgroup.cgroup_id(world.nested)).endpoint_id == 1
    code, text = refusal(world, cgroup_id=cgroup.cgroup_id(world.groups))
    assert code is grpc.StatusCode.NOT_FOUND and "belongs to no pod" in text
    for none in (0, 1 << 60):
        code, text = refusal(world, cgroup_id=none)
        assert code is grpc.StatusCode.NOT_FOUND and "there is no control group" in text


def test_namespaces_are_found_by_cookie(world: World) -> None:
    assert ask(world, netns_cookie=world.endpoints[1].netns_cookie).pod == "shop/cart"
    assert refusal(world, netns_cookie=1 << 60)[0] is grpc.StatusCode.NOT_FOUND


def test_a_question_without_a_subject_is_told_what_to_give(world: World) -> None:
    code, text = refusal(world)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "which process asks" in text


def test_nobody_is_named_before_the_pods_are_known(bare: World) -> None:
    bare.start(told=False)
    assert refusal(bare, pid=os.getpid())[0] is grpc.StatusCode.UNAVAILABLE
