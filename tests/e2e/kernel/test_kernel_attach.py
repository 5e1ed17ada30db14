"""Programs on interfaces and cgroups, checked by what they count of real traffic.

node: <prefix>0 ---- eth0 (pod's namespace)
"""

from __future__ import annotations

import ctypes as ct
import socket
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from kernel_programs import load_counter

from services.common import errors
from services.common.kernel import attach, cgroup, progs
from services.common.kernel import netlink as nl
from services.common.kernel.attach import Direction, Via
from services.common.kernel.maps import BpfMap
from services.common.kernel.netlink import Netlink, Rtnl
from services.common.kernel.netns import NetNs
from services.common.kernel.rtnl import CREATE, EXCL, NEWQDISC, Message


@pytest.fixture
async def ifindex(netlink: Netlink, prefix: str, pod: Path) -> AsyncIterator[int]:
    """The node's end of a veth pair, both ends up."""

    def make(node: Rtnl) -> int:
        with NetNs.open(pod) as netns, Rtnl(netns) as inside:
            index = node.create_veth(
                f"{prefix}0", "02:00:00:00:00:01", "eth0", "02:00:00:00:00:02", 1500, netns
            )
            inside.apply([nl.no_link_local(2), nl.link_up(2)])
        node.apply([nl.no_link_local(index), nl.link_up(index)])
        return index

    yield await netlink.call(make)


def send(name: str, count: int) -> None:
    """Frames out of the node's end (its egress)."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((name, 0))
        for _ in range(count):
            raw.send(b"\2" * 12 + struct.pack(">H", 0x88B5) + b"x" * 50)


async def send_from_pod(netlink: Netlink, pod: Path, count: int) -> None:
    def inside() -> None:
        with NetNs.open(pod) as netns, netns.entered():
            send("eth0", count)

    await netlink.run(inside)


def counted(pin_dir: Path, wanted: dict[int, int]) -> bool:
    """Whether that many are counted, of which the kernel may still have some to deliver."""
    until = time.monotonic() + 5
    with BpfMap.open(pin_dir / "family/v1/counts", ct.c_uint32, ct.c_uint64) as found:
        while (now := {key.value: value.value for key, value in found.items()}) != wanted:
            if time.monotonic() > until:
                print(f"counted {now}, not {wanted}")
                return False
            time.sleep(0.005)
    return True


@pytest.mark.parametrize("via", ["clsact", "tcx"])
async def test_each_direction_sees_its_packets(
    netlink: Netlink, pod: Path, pin_dir: Path, ifindex: int, prefix: str, via: Via
) -> None:
    await load_counter(pin_dir)
    with progs.opened(pin_dir / "prog/test/second") as fd:
        await netlink.run(attach.attach_tc, ifindex, "ingress", fd, via)
        await send_from_pod(netlink, pod, 3)
        assert counted(pin_dir, {1: 3})
        await netlink.run(attach.attach_tc, ifindex, "egress", fd, via)
        send(f"{prefix}0", 2)
        assert counted(pin_dir, {1: 5})
        for direction in ("ingress", "egress"):
            assert await netlink.run(attach.detach_tc, ifindex, direction, "second") is True
            assert await netlink.run(attach.detach_tc, ifindex, direction, "second") is False
        await send_from_pod(netlink, pod, 3)
        assert counted(pin_dir, {1: 5})


@pytest.mark.parametrize("first", ["clsact", "tcx"])
@pytest.mark.parametrize("second", ["clsact", "tcx"])
async def test_a_new_version_takes_the_old_ones_place(
    netlink: Netlink, pod: Path, pin_dir: Path, ifindex: int, first: Via, second: Via
) -> None:
    await load_counter(pin_dir)
    with progs.opened(pin_dir / "prog/test/second") as fd:
        await netlink.run(attach.attach_tc, ifindex, "ingress", fd, first)
    await load_counter(pin_dir, defines={"STEP": 6})
    with progs.opened(pin_dir / "prog/test/second") as fd:
        await netlink.run(attach.attach_tc, ifindex, "ingress", fd, second)
        await netlink.run(attach.attach_tc, ifindex, "ingress", fd, second)
    present = await netlink.run(attach.attached, ifindex, "ingress")
    assert [entry.prog_id for entry in present] == [progs.info(pin_dir / "prog/test/second").id]
    await send_from_pod(netlink, pod, 4)
    assert counted(pin_dir, {7: 4})


async def test_programs_of_others_stay(netlink: Netlink, pod: Path, pin_dir: Path, ifindex: int) -> None:
    await load_counter(pin_dir)
    with (
        progs.opened(pin_dir / "prog/test/second") as other,
        progs.opened(pin_dir / "prog/test/count_packets") as mine,
    ):
        await netlink.run(attach.attach_tc, ifindex, "ingress", other, "tcx")
        await netlink.run(attach.attach_tc, ifindex, "ingress", mine, "tcx")
        await netlink.run(attach.detach_tc, ifindex, "ingress", "count_packets")
    present = await netlink.run(attach.attached, ifindex, "ingress")
    assert [entry.name for entry in present] == ["second"]


async def test_an_interface_with_an_ingress_qdisc_gets_tcx(
    netlink: Netlink, pod: Path, pin_dir: Path, ifindex: int
) -> None:
    """As the CNI bandwidth plugin leaves it."""
    await load_counter(pin_dir)
    ingress = {"index": ifindex, "handle": 0xFFFF0000, "parent": 0xFFFFFFF1}
    await netlink.apply([Message(NEWQDISC, ingress, [("TCA_KIND", "ingress")], CREATE | EXCL)])
    with progs.opened(pin_dir / "prog/test/second") as fd:
        hooks: dict[Direction, int] = {"ingress": fd, "egress": fd}
        with pytest.raises(errors.FailedPrecondition, match="ingress qdisc"):
            await netlink.run(attach.attach_tc_hooks, ifindex, hooks, "clsact")
        await netlink.run(attach.attach_tc_hooks, ifindex, hooks)
    await send_from_pod(netlink, pod, 3)
    assert counted(pin_dir, {1: 3})
    assert [q.kind for q in await netlink.call(Rtnl.qdiscs, ifindex) if q.handle == 0xFFFF0000] == ["ingress"]


@pytest.mark.parametrize("via", ["clsact", "tcx"])
async def test_an_interface_that_is_gone_is_not_found(netlink: Netlink, pin_dir: Path, via: Via) -> None:
    await load_counter(pin_dir)
    with progs.opened(pin_dir / "prog/test/second") as fd:
        with pytest.raises(errors.NotFound):
            await netlink.run(attach.attach_tc, 1 << 30, "ingress", fd, via)
        assert await netlink.run(attach.detach_tc, 1 << 30, "ingress", "second") is False


async def test_an_xdp_program_is_set_replaced_and_removed(
    netlink: Netlink, pod: Path, pin_dir: Path, ifindex: int, prefix: str
) -> None:
    await load_counter(pin_dir, functions={"second": "xdp"}, slots={}, defines={"RESULT": 2})
    with progs.opened(pin_dir / "prog/test/second") as fd:
        await netlink.run(attach.attach_xdp, ifindex, fd)
        await netlink.run(attach.attach_xdp, ifindex, fd)
    link = await netlink.call(Rtnl.link, f"{prefix}0")
    assert link is not None
    assert link.xdp_prog_id == progs.info(pin_dir / "prog/test/second").id
    await send_from_pod(netlink, pod, 2)
    assert counted(pin_dir, {1: 2})
    assert await netlink.run(attach.detach_xdp, ifindex) is True
    link = await netlink.call(Rtnl.link, f"{prefix}0")
    assert link is not None
    assert link.xdp_prog_id == 0


async def test_a_cgroup_program_is_attached_once_and_replaced(pin_dir: Path, prefix: str) -> None:
    group = cgroup.create(f"fibril-test-{prefix}")
    try:
        for _ in range(2):
            await load_counter(pin_dir, functions={"second": "cgroup_skb"}, slots={}, defines={"RESULT": 1})
            with progs.opened(pin_dir / "prog/test/second") as fd:
                attach.attach_cgroup(group, "cgroup_inet_egress", fd)
                attach.attach_cgroup(group, "cgroup_inet_egress", fd)
            present = attach.attached_cgroup(group, "cgroup_inet_egress")
            assert [e.prog_id for e in present] == [progs.info(pin_dir / "prog/test/second").id]
        assert attach.detach_cgroup(group, "cgroup_inet_egress", "second") is True
        assert attach.detach_cgroup(group, "cgroup_inet_egress", "second") is False
    finally:
        await cgroup.remove(group)
    with pytest.raises(errors.NotFound):
        attach.attached_cgroup(group, "cgroup_inet_egress")
