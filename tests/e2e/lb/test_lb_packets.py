"""The tc programs on devices: only while needed, back after they were taken off, adopted by the next process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from services.common.instance import Instance
from services.common.kernel import attach, bpf, features, netns, progs, tc_classic
from services.common.kernel import netlink as nl
from services.common.kernel.netlink import Netlink, Rtnl
from services.common.kernel.netns import NetNs
from services.identity.network import programs
from services.lb import abi, install, packets, teardown
from services.lb.packets import Packets
from tests import session

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
NAMES = {"ingress": install.UPLINK[:15], "egress": install.UPLINK_OUT[:15]}


@pytest.fixture
def space() -> Iterator[Rtnl]:
    """A namespace with two devices, fbx0, which has the default route, and fbx2; the thread is in it."""
    path = Path(f"/run/netns/{session.name()}")
    netns.add(path)
    try:
        with NetNs.open(path) as there, there.entered(), Rtnl(there) as node:
            for first, second in (("fbx0", "fbx1"), ("fbx2", "fbx3")):
                node.create_veth(
                    first, f"02:00:00:00:0{first[3]}:01", second, f"02:00:00:00:0{second[3]}:01", 1500
                )
            index = node.ifindex("fbx0")
            node.apply(
                [
                    *(nl.link_up(node.ifindex(f"fbx{number}")) for number in range(4)),
                    nl.address_add(index, ip_address("192.168.7.1"), 24),
                    nl.route_put(ip_network("0.0.0.0/0"), index, ip_address("192.168.7.254")),
                ]
            )
            yield node
    finally:
        netns.remove(path)


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    """Programs are compiled once for all tests, and used by the second on as those of an earlier process."""
    features.ensure_bpffs()
    made = Instance.from_env(f"t-lbp-{session.name()}")
    made.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        yield made
    finally:
        shutil.rmtree(made.pin_dir, ignore_errors=True)
        shutil.rmtree(made.run_dir, ignore_errors=True)


@contextlib.asynccontextmanager
async def running(instance: Instance, *devices: str, needed: bool | None = True) -> AsyncIterator[Packets]:
    async with Netlink() as netlink:
        made = Packets(instance, netlink, devices)
        if needed is not None:
            made.need(needed)
        await made.start()
        try:
            yield made
        finally:
            await made.stop()


async def wait(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise TimeoutError


def there(node: Rtnl, instance: Instance, name: str) -> dict[str, int]:
    """Programs of ours on a device, by direction."""
    index = node.ifindex(name)
    found = {}
    for direction, program in NAMES.items():
        listed = attach.attached(index, direction)  # type: ignore[arg-type]
        ids = [entry.prog_id for entry in listed if entry.name == program]
        ids += tc_classic.attached(index, direction, packets.priority_of(instance))  # type: ignore[arg-type]
        found.update({direction: ids[0]} if ids else {})
    return found


async def test_on_the_default_route_while_needed(space: Rtnl, instance: Instance) -> None:
    async with running(instance) as made:
        assert set(there(space, instance, "fbx0")) == {"ingress", "egress"} and not there(
            space, instance, "fbx2"
        )
        assert [component.state for component in made.status()] == ["ok"]
        ids = there(space, instance, "fbx0")
    async with running(instance, needed=None):
        assert there(space, instance, "fbx0") == ids
    async with running(instance) as made:
        assert there(space, instance, "fbx0") == ids
        made.need(False)
        await wait(lambda: not there(space, instance, "fbx0"))
        made.need(True)
        await wait(lambda: len(there(space, instance, "fbx0")) == 2)
    assert await teardown.remove(instance) and not there(space, instance, "fbx0")
    assert not await teardown.remove(instance)


async def test_programs_of_two_versions_leave_each_other_what_they_know(space: Rtnl, instance: Instance) -> None:
    """While they are replaced, one of before goes on to one of now: both have the same scratch map."""

    def shared() -> set[int]:
        uses = []
        for name in (install.LB, *install.TAILS):
            fd = progs.open_prog(install.program_path(instance, name))
            try:
                info = bpf.prog_info(fd)
            finally:
                os.close(fd)
            assert info.id not in seen, "it was loaded anew"
            seen.add(info.id)
            uses.append(set(info.map_ids))
        return set.intersection(*uses)

    seen: set[int] = set()
    async with running(instance):
        before = shared()
        await install.install_packets(instance)
        fd = bpf.get(str(instance.pin_dir / abi.FAMILY / install.WORKS_MAP))
        try:
            assert bpf.map_info(fd).id in before & shared()
        finally:
            os.close(fd)


async def test_put_back_and_moved_with_the_devices(space: Rtnl, instance: Instance) -> None:
    async with running(instance, "fbx2", "fbx7") as made:
        assert set(there(space, instance, "fbx2")) == {"ingress", "egress"} and not there(
            space, instance, "fbx0"
        )
        (state,) = made.status()
        assert state.state == "degraded" and "fbx7: does not exist" in state.message
        for direction in NAMES:
            tc_classic.detach(space.ifindex("fbx2"), direction, packets.priority_of(instance))  # type: ignore[arg-type]
            await wait(lambda: len(there(space, instance, "fbx2")) == 2)
        subprocess.run(["tc", "qdisc", "del", "dev", "fbx2", "clsact"], check=True)
        await wait(lambda: len(there(space, instance, "fbx2")) == 2)
        space.create_veth("fbx7", "02:00:00:00:07:01", "fbx8", "02:00:00:00:08:01", 1500)
        await wait(lambda: len(there(space, instance, "fbx7")) == 2)
        await wait(lambda: made.status()[0].state == "ok")
    async with running(instance, "fbx0"):
        assert (
            len(there(space, instance, "fbx0")) == 2
            and not there(space, instance, "fbx2")
            and not there(space, instance, "fbx7")
        )


@pytest.mark.skipif(not attach.has_tcx(), reason="needs tcx")
async def test_beside_an_ingress_qdisc(space: Rtnl, instance: Instance) -> None:
    subprocess.run(["tc", "qdisc", "add", "dev", "fbx0", "ingress"], check=True)
    async with running(instance) as made:
        await wait(lambda: len(there(space, instance, "fbx0")) == 2)
        assert made.status()[0].state == "ok"
    assert await teardown.remove(instance) and not there(space, instance, "fbx0")


def test_before_the_identity_services_program(instance: Instance) -> None:
    assert packets.priority_of(instance) < programs.priority_of(instance)
