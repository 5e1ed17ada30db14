"""The XDP program on devices: native or generic, never in another's place, back after a device was made anew."""

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
from services.common.kernel import features, netns, progs, xdp
from services.common.kernel import netlink as nl
from services.common.kernel.netlink import Link, Netlink, Rtnl
from services.common.kernel.netns import NetNs
from services.common.kernel.xdp import Mode
from services.lb import install
from services.lb.xdp import hooks
from services.lb.xdp.xdp import Xdp
from tests import session

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def space() -> Iterator[Rtnl]:
    """A namespace with two devices, fbx0 and fbx2, whose other ends take no frames; the thread is in it."""
    path = Path(f"/run/netns/{session.name()}")
    netns.add(path)
    try:
        with NetNs.open(path) as there, there.entered(), Rtnl(there) as node:
            for first, second in (("fbx0", "fbx1"), ("fbx2", "fbx3")):
                node.create_veth(first, f"02:00:00:00:0{first[3]}:01", second, f"02:00:00:00:0{second[3]}:01", 1500)
            node.apply([nl.link_up(node.ifindex(f"fbx{number}")) for number in range(4)])
            yield node
    finally:
        netns.remove(path)


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    """Programs are compiled once for all tests, and used by the second on as those of an earlier process."""
    features.ensure_bpffs()
    made = Instance.from_env(f"t-lbx-{session.name()}")
    made.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        yield made
    finally:
        shutil.rmtree(made.pin_dir, ignore_errors=True)
        shutil.rmtree(made.run_dir, ignore_errors=True)


@contextlib.asynccontextmanager
async def running(instance: Instance, mode: str, *devices: str, needed: bool | None = True) -> AsyncIterator[Xdp]:
    async with Netlink() as netlink:
        made = Xdp(instance, netlink, mode, devices, ("services",))
        if needed is not None:
            made.need("services", needed)
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


async def until(node: Rtnl, name: str, mode: Mode) -> Link:
    def so() -> bool:
        link = node.link(name)
        return link is not None and link.xdp_mode == mode

    await wait(so)
    found = node.link(name)
    assert found is not None
    return found


def take_frames(name: str) -> None:
    subprocess.run(["ethtool", "-K", name, "gro", "on"], check=True, capture_output=True)


def state(made: Xdp) -> tuple[str, str]:
    (component,) = made.status()
    return component.state, component.message


async def test_generic_where_a_veth_would_lose_frames_else_native(space: Rtnl, instance: Instance) -> None:
    take_frames("fbx3")
    async with running(instance, "auto", "fbx0", "fbx2") as made:
        assert (await until(space, "fbx0", Mode.GENERIC)).xdp_prog_id
        assert (await until(space, "fbx2", Mode.NATIVE)).xdp_prog_id
        said = state(made)
        assert said[0] == "ok" and "generic on fbx0 (the other end" in said[1] and "native on fbx2" in said[1]
    # What is attached outlives the process, and the next one changes nothing.
    ids = {name: space.link(name) for name in ("fbx0", "fbx2")}
    async with running(instance, "auto", "fbx0", "fbx2"):
        assert {name: space.link(name) for name in ids} == ids


async def test_another_program_keeps_its_place(space: Rtnl, instance: Instance) -> None:
    other = Instance.from_env(f"t-lbo-{session.name()}")
    await install.install_xdp(other)
    try:
        with progs.opened(install.program_path(other, install.XDP)) as fd:
            xdp.put(space, space.ifindex("fbx0"), Mode.GENERIC, fd)
            before = space.link("fbx0")
            async with running(instance, "auto", "fbx0", "fbx2") as made:
                await until(space, "fbx2", Mode.GENERIC)
                assert space.link("fbx0") == before
                assert state(made)[0] == "degraded" and "another XDP program, fib_lb_xdp" in state(made)[1]
                assert hooks.remove(space, instance) == ["fbx2"]
                assert space.link("fbx0") == before
                assert xdp.take(space, space.ifindex("fbx0"), Mode.GENERIC, fd)
                # Free now.
                await until(space, "fbx0", Mode.GENERIC)
    finally:
        shutil.rmtree(other.pin_dir, ignore_errors=True)


async def test_a_device_made_anew_gets_the_program_again(space: Rtnl, instance: Instance) -> None:
    async with running(instance, "generic", "fbx0") as made:
        await until(space, "fbx0", Mode.GENERIC)
        space.delete_link("fbx0")
        await wait(lambda: "does not exist" in state(made)[1])
        space.create_veth("fbx0", "02:00:00:00:00:09", "fbx1", "02:00:00:00:01:09", 1500)
        await until(space, "fbx0", Mode.GENERIC)


async def test_only_while_somebody_needs_it(space: Rtnl, instance: Instance) -> None:
    async with running(instance, "auto", "fbx0") as made:
        await until(space, "fbx0", Mode.GENERIC)
    async with running(instance, "auto", "fbx0", needed=None) as made:
        await asyncio.sleep(0.1)
        assert space.link("fbx0").xdp_mode == Mode.GENERIC  # type: ignore[union-attr]  # nobody has said no
        made.need("services", False)
        await until(space, "fbx0", Mode.NONE)
        assert state(made) == ("ok", "not attached: nothing is reached from outside")
        made.need("services", True)
        await until(space, "fbx0", Mode.GENERIC)
    async with running(instance, "off") as made:
        await until(space, "fbx0", Mode.NONE)
        assert state(made) == ("ok", "off (lb.xdp)")


async def test_native_only_is_named_where_it_cannot_be(space: Rtnl, instance: Instance) -> None:
    async with running(instance, "native", "fbx0") as made:
        assert state(made)[0] == "degraded" and "GRO" in state(made)[1]
        assert space.link("fbx0").xdp_mode == Mode.NONE  # type: ignore[union-attr]


async def test_without_names_the_default_route_says(space: Rtnl, instance: Instance) -> None:
    async with running(instance, "generic") as made:
        assert state(made)[0] == "degraded" and "default route" in state(made)[1]
        index = space.ifindex("fbx2")
        space.apply([nl.address_add(index, ip_address("10.9.9.1"), 24),
                     nl.route_put(ip_network("0.0.0.0/0"), index, ip_address("10.9.9.2"))])
        await until(space, "fbx2", Mode.GENERIC)
