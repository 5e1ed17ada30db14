"""The host's programs on devices: only while the host has a policy, behind the others', back after they were taken off."""

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

from services.common import errors
from services.common.etcd.config import EtcdConfig
from services.common.instance import Instance
from services.common.kernel import attach, features, loader, netns, tc_classic
from services.common.kernel import netlink as nl
from services.common.kernel.netlink import Netlink, Rtnl
from services.common.kernel.netns import NetNs
from services.common.kernel.tc_classic import Direction
from services.common.pipeline import install as pipeline
from services.identity.network import programs as identity
from services.lb import packets as lb
from services.policy import host, install
from services.policy.config import PolicyConfig
from services.policy.host import HostHooks
from services.policy.wiring import PolicyService
from tests import session

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
NAMES: dict[Direction, str] = {"ingress": install.HOST_IN[:15], "egress": install.HOST_OUT[:15]}


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
    features.ensure_bpffs()
    made = Instance.from_env(f"t-polh-{session.name()}")
    try:
        asyncio.run(pipeline.install(made))
        asyncio.run(install.install_tables(made))
        asyncio.run(install.install_programs(made))
        yield made
    finally:
        shutil.rmtree(made.pin_dir, ignore_errors=True)


@contextlib.asynccontextmanager
async def running(instance: Instance, *devices: str, needed: bool | None = True) -> AsyncIterator[HostHooks]:
    async with Netlink() as netlink:
        made = HostHooks(instance, netlink, devices)
        await made.use()
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
        ids = [entry.prog_id for entry in attach.attached(index, direction) if entry.name == program]
        ids += tc_classic.attached(index, direction, host.priority_of(instance, direction))
        found.update({direction: ids[0]} if ids else {})
    return found


def test_the_hosts_programs_see_what_its_processes_see(instance: Instance) -> None:
    assert (
        lb.priority_of(instance)
        < identity.priority_of(instance)
        < host.priority_of(instance, "ingress")
        < 0xFFFF
    )
    assert 0 < host.priority_of(instance, "egress") < lb.priority_of(instance)


async def test_on_the_default_route_while_there_is_a_policy(space: Rtnl, instance: Instance) -> None:
    async with running(instance, needed=False) as made:
        assert not there(space, instance, "fbx0")
        assert [component.state for component in made.status()] == ["ok"]
    async with running(instance) as made:
        assert set(there(space, instance, "fbx0")) == {"ingress", "egress"}
        assert not there(space, instance, "fbx2")
        assert [component.state for component in made.status()] == ["ok"]
        assert [device.name for device in made.attached()] == ["fbx0"]
        ids = there(space, instance, "fbx0")
    async with running(instance, needed=None):
        assert there(space, instance, "fbx0") == ids
    async with running(instance) as made:
        assert there(space, instance, "fbx0") == ids
        made.need(False)
        await asyncio.wait_for(made.settled(), 20)
        assert not there(space, instance, "fbx0")
        made.need(True)
        await asyncio.wait_for(made.settled(), 20)
        assert len(there(space, instance, "fbx0")) == 2
    assert host.remove(space, instance) == ["fbx0"] and not there(space, instance, "fbx0")
    assert not host.remove(space, instance)


async def test_put_back_and_moved_with_the_devices(space: Rtnl, instance: Instance) -> None:
    async with running(instance, "fbx2", "fbx7") as made:
        assert set(there(space, instance, "fbx2")) == {"ingress", "egress"}
        assert not there(space, instance, "fbx0")
        (state,) = made.status()
        assert state.state == "degraded" and "fbx7: does not exist" in state.message
        for direction in NAMES:
            tc_classic.detach(space.ifindex("fbx2"), direction, host.priority_of(instance, direction))
            await wait(lambda: len(there(space, instance, "fbx2")) == 2)
        subprocess.run(["tc", "qdisc", "del", "dev", "fbx2", "clsact"], check=True)
        await wait(lambda: len(there(space, instance, "fbx2")) == 2)
        space.create_veth("fbx7", "02:00:00:00:07:01", "fbx8", "02:00:00:00:08:01", 1500)
        await wait(lambda: len(there(space, instance, "fbx7")) == 2)
        await wait(lambda: made.status()[0].state == "ok")
    async with running(instance, "fbx0"):
        assert len(there(space, instance, "fbx0")) == 2
        assert not there(space, instance, "fbx2") and not there(space, instance, "fbx7")


async def test_before_the_programs_are_there(space: Rtnl, tmp_path: Path) -> None:
    nobody = Instance.from_env(f"t-none-{session.name()}")
    async with Netlink() as netlink:
        made = HostHooks(nobody, netlink, ())
        with pytest.raises(errors.NotFound):
            await made.use()
        made.need(True)
        await made.start()
        (state,) = made.status()
        assert state.state == "degraded" and "waits" in state.message
        await made.stop()


async def test_a_policy_that_cannot_be_read_holds_up_the_others_only_where_there_are_programs(
    instance: Instance, tmp_path: Path
) -> None:
    """After a boot nobody would be asked as long as it is waited for: all would be open, not only whom it selects."""
    booted = Instance("t", tmp_path / "run", tmp_path / "state", tmp_path / "bpf")
    for where, waits in ((booted, False), (instance, True)):
        service = PolicyService(where, PolicyConfig(etcd=EtcdConfig(endpoints=("127.0.0.1:1",))))
        for source in service._sources.all:
            source.ever = True
        service._store._put("4/default/back", b"of another version", 1)
        assert ("policies that can be read" in service._missing()) == waits
        await service.stop()


async def test_in_force_is_what_packets_are_asked_about(
    space: Rtnl, instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what is in tables while the programs are being installed, or cannot be."""
    service = PolicyService(instance, PolicyConfig(etcd=EtcdConfig(endpoints=("127.0.0.1:1",))))
    early = asyncio.create_task(service.asked())
    await asyncio.wait([early], timeout=0.1)
    assert not early.done()
    shutil.copytree(loader.bpf_root(), tmp_path / "bpf")
    (tmp_path / "bpf/policy/policy.c").write_text("no program\n")
    with monkeypatch.context() as broken:
        broken.setenv("FIBRIL_BPF_SOURCE", str(tmp_path / "bpf"))
        assert not await service._programs.install()
    with pytest.raises(errors.FailedPrecondition, match="nothing asks"):
        await early
    with pytest.raises(errors.FailedPrecondition, match="nothing asks"):
        await service.asked()
    assert await service._programs.install()
    await asyncio.wait_for(service.asked(), 20)
    await service.stop()
