"""Sockets of removed backends are ended in whichever namespace they are; programs stay when nobody looks after them."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes as ct
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sockrig import Rig, forget, group, make_instance, namespace

from services.common.instance import Instance
from services.common.kernel import attach, cgroup
from services.common.kernel.maps import BpfMap
from services.common.pipeline.abi import FibAddr
from services.lb import abi, install
from services.lb.sockets import sockets as module
from services.lb.sockets.destroy import Destroyer
from services.lb.sockets.entries import Entries
from services.lb.sockets.hooks import Hooks, remove
from services.lb.sockets.sockets import Sockets
from tests.datapath.lbtables import TCP, UDP, LbTables

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


class Gone(NamedTuple):
    id: int


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    made = make_instance()
    try:
        yield made
    finally:
        forget(made)


@pytest.fixture(scope="module")
def spaces() -> Iterator[tuple[Path, Path]]:
    with namespace() as first, namespace() as second:
        yield first, second


@pytest.fixture
async def sockets(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Sockets]:
    """As the service runs them, on a group of the test's."""
    monkeypatch.setattr(module, "RESYNC_S", 0.1)
    given: dict[str, Any] = {}
    name = f"fibril-test-{instance.name}"
    with group(name):
        made = Sockets(instance, given.update, name)
        await made.start()
        try:
            assert given["flags"] == 0 and given["host_netns"]
            yield made
        finally:
            await made.stop()
            remove(instance)


@pytest.fixture
def rig(instance: Instance, sockets: Sockets, spaces: tuple[Path, Path]) -> Iterator[Rig]:
    made = Rig(instance, cgroup.path_of(f"fibril-test-{instance.name}"), spaces[0])
    yield made
    made.close()


async def until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, "in vain"
        await asyncio.sleep(0.01)


def free(tables: LbTables, ident: int) -> None:
    """What the lb service does to a backend's line."""
    ct.memset(ct.addressof(tables.line(abi.Table.BACKENDS, ident, abi.Backend)), 0, abi.LINE)


LISTEN = """
ends = {}
def listen(name, made):
    def body():
        try:
            made.settimeout(120)
            made.recv(99)
            ends[name] = "data"
        except OSError as error:
            ends[name] = errno.errorcode.get(error.errno, str(error))
    threading.Thread(target=body, daemon=True).start()
"""


async def test_sockets_of_a_removed_backend_end_at_once_wherever_they_are(
    rig: Rig, sockets: Sockets, spaces: tuple[Path, Path]
) -> None:
    places = (("10.90.0.5", 8080), ("10.90.0.6", 8080), ("fd90::2", 8080))
    for space in spaces:
        server = rig.process(space=space)
        for host, port in places:
            for kind in ("STREAM", "DGRAM"):
                server.do(f"serve({host!r}, {port}, socket.SOCK_{kind})")
    ids: dict[tuple[str, int], int] = {}
    for vip, host in (("10.96.0.10", "10.90.0.5"), ("10.96.0.11", "10.90.0.6"), ("fd96::10", "fd90::2")):
        for proto in (TCP, UDP):
            ids[host, proto] = rig.tables.service([(vip, 80)], [(host, 8080)], proto)[1][0]
    processes = [rig.client, rig.process(space=spaces[1])]
    for process in processes:
        process.do(LISTEN)
        for name, family, address in (
            ("v4", "AF_INET", "10.96.0.10"), ("mapped", "AF_INET6", "::ffff:10.96.0.10"), ("v6", "AF_INET6", "fd96::10"),
            ("other", "AF_INET", "10.96.0.11"),
        ):  # fmt: skip
            process.do(f"""
for kind in (tcp, udp):
    made = kind(socket.{family})
    made.connect(({address!r}, 80))
    if kind is tcp:
        made.recv(99)
    listen(kind.__name__ + " {name}", made)
""")
        # By the backend's own name: none of ours.
        process.do("made = tcp(); made.connect(('10.90.0.5', 8080)); made.recv(99); listen('direct', made)")
    gone = [ids[host, proto] for host in ("10.90.0.5", "fd90::2") for proto in (TCP, UDP)]
    for ident in gone:
        free(rig.tables, ident)
    sockets.backends_removed([Gone(ident) for ident in gone])
    expected = {f"{kind} {name}" for kind in ("tcp", "udp") for name in ("v4", "mapped", "v6")}
    for process in processes:
        # Long before a sweep would find them.
        await until(lambda process=process: set(process.give("ends")) >= expected)  # type: ignore[misc]
    await asyncio.sleep(0.4)
    for process in processes:
        assert process.give("ends") == dict.fromkeys(expected, "ECONNABORTED")
    assert sockets.destroyed == 12
    assert [status.state for status in sockets.status()] == ["ok"]


async def test_a_socket_that_is_still_connecting_is_ended_too(rig: Rig, sockets: Sockets) -> None:
    """One that waits for an answer that never comes."""
    _, ids = rig.tables.service([("10.96.0.10", 80)], [("10.90.0.7", 8080)])
    rig.server.do("""
full = tcp(); full.bind(("10.90.0.7", 8080)); full.listen(0)
crowd = [tcp() for _ in range(3)]
for made in crowd:
    made.setblocking(False)
    made.connect_ex(("10.90.0.7", 8080))
""")
    rig.client.send("""
s = tcp(); s.settimeout(20)
s.connect(("10.96.0.10", 80))
""")
    await until(lambda: rig.count() == 1)
    free(rig.tables, ids[0])
    sockets.backends_removed([Gone(ids[0])])
    with pytest.raises(ConnectionAbortedError):
        await asyncio.to_thread(rig.client.receive)


async def test_a_sweep_finds_what_nobody_told(rig: Rig, sockets: Sockets, instance: Instance) -> None:
    await sockets.stop()
    rig.serve(("10.90.0.5", 5353))
    _, ids = rig.tables.service([("10.96.0.10", 53)], [("10.90.0.5", 5353)], UDP)
    rig.client.do("s = udp(); s.connect(('10.96.0.10', 53))")
    destroyer = Destroyer(instance)
    assert await asyncio.to_thread(destroyer.sweep) == 0
    free(rig.tables, ids[0])
    assert await asyncio.to_thread(destroyer.sweep) == 1
    assert await asyncio.to_thread(destroyer.sweep) == 0
    with pytest.raises(ConnectionAbortedError):
        rig.client.do("s.recv(99)")
    # What a closed socket has left behind goes; what belongs to one stays.
    with BpfMap.open(instance.pin_dir / abi.MAPS["lb_socks"], abi.SockKey, abi.Sock) as table:
        for cookie in (rig.entries()[0][0].cookie, 1):
            key = abi.SockKey(cookie=cookie, addr=FibAddr.of("10.96.0.99"), port=1, proto=UDP, kind=abi.SockKind.TO)
            table.update(key, abi.Sock())
        assert await asyncio.to_thread(destroyer.sweep) == 1
        assert {key.cookie for key, _ in rig.entries()} == {rig.entries()[0][0].cookie}
        table.delete(abi.SockKey(cookie=rig.entries()[0][0].cookie, addr=FibAddr.of("10.96.0.99"), port=1,
                                 proto=UDP, kind=abi.SockKind.TO))  # fmt: skip


async def test_sockets_closed_behind_the_programs_back_are_forgotten(
    rig: Rig, sockets: Sockets, instance: Instance
) -> None:
    await sockets.stop()
    rig.serve(("10.90.0.5", 5353))
    rig.tables.service([("10.96.0.10", 53), ("10.96.0.11", 53)], [("10.90.0.5", 5353)], UDP)
    for name in "st":
        rig.client.do(f"{name} = udp()")
        for vip in ("10.96.0.10", "10.96.0.11"):
            rig.client.do(f"{name}.sendto(b'?', ({vip!r}, 53))")
    assert len(rig.entries()) == 6
    destroyer = Destroyer(instance)
    assert await asyncio.to_thread(destroyer.forget_closed) == 0
    remove(instance)
    rig.client.do("s.close()")
    with contextlib.closing(Hooks(instance)) as hooks:
        hooks.open()
        hooks.attach(rig.group.name)
    assert await asyncio.to_thread(destroyer.forget_closed) == 1
    assert await asyncio.to_thread(destroyer.sweep) == 2
    assert len(rig.entries()) == 3
    rig.client.do("u = udp(); u.connect(('10.96.0.10', 53)); u.close(); t.close()")
    assert rig.entries() == []


async def test_programs_taken_off_come_back(sockets: Sockets, instance: Instance) -> None:
    path = cgroup.path_of(f"fibril-test-{instance.name}")
    for name, kind in install.SOCKETS.items():
        assert attach.detach_cgroup(path, kind, name)
    assert all(not attach.attached_cgroup(path, kind) for kind in install.SOCKETS.values())
    await until(
        lambda: all(len(attach.attached_cgroup(path, kind)) == 1 for kind in install.SOCKETS.values())
    )
    path.rmdir()
    await until(lambda: path.is_dir() and len(attach.attached_cgroup(path, "cgroup_inet4_connect")) == 1)


async def test_two_instances_share_a_group(sockets: Sockets, instance: Instance) -> None:
    """Each has its own tables, and replaces and removes only what is its own."""
    path = cgroup.path_of(f"fibril-test-{instance.name}")
    other = make_instance()
    try:
        await install.install_sockets(other)
        with contextlib.closing(Hooks(other)) as hooks:
            hooks.open()
            for _ in range(2):
                hooks.attach(path.name)
                assert {len(attach.attached_cgroup(path, kind)) for kind in install.SOCKETS.values()} == {2}
                await install.install_sockets(other)
                hooks.open()
        assert remove(other) == [path]
        assert {len(attach.attached_cgroup(path, kind)) for kind in install.SOCKETS.values()} == {1}
        assert remove(other) == []
    finally:
        remove(other)
        forget(other)


async def test_another_group_by_configuration_leaves_none_on_the_first(sockets: Sockets, instance: Instance) -> None:
    await sockets.stop()
    first = cgroup.path_of(f"fibril-test-{instance.name}")
    with group(f"fibril-test-{instance.name}/inner") as second:
        moved = Sockets(instance, lambda **_: None, f"/fibril-test-{instance.name}/inner/")
        await moved.start()
        assert [entry.name for entry in attach.attached_cgroup(second, "cgroup_inet4_connect")] == ["fib_connect4"]
        assert attach.attached_cgroup(first, "cgroup_inet4_connect") == []
        await moved.stop()
        off = Sockets(instance, lambda **_: None, "", wanted=False)
        await off.start()
        assert attach.attached_cgroup(second, "cgroup_inet4_connect") == []
        assert off.status()[0].message == "off (lb.sockets)"
        await off.stop()


SERVICE = """
import asyncio, sys
from services.common.instance import Instance
from services.lb.sockets.sockets import Sockets
async def main():
    made = Sockets(Instance.from_env(sys.argv[1]), lambda **_: None, sys.argv[2])
    await made.start()
    print(made.status()[0].state, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_a_killed_service_leaves_everything_working_and_the_next_one_adopts_it(
    rig: Rig, sockets: Sockets, instance: Instance
) -> None:
    await sockets.stop()
    rig.serve(("10.90.0.5", 8080), tcp=True)
    rig.tables.service([("10.96.0.10", 80)], [("10.90.0.5", 8080)])
    ids = [entry.prog_id for entry in attach.attached_cgroup(rig.group, "cgroup_inet4_connect")]
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", SERVICE, instance.name, rig.group.name], stdout=subprocess.PIPE, text=True
        ) as service:
            assert service.stdout is not None
            assert await asyncio.to_thread(service.stdout.readline) == "ok\n"
            service.send_signal(signal.SIGKILL)
        assert rig.client.do(
            "s = tcp(); s.connect(('10.96.0.10', 80))", "[s.recv(99).decode(), s.getpeername()[0]]"
        ) == ["10.90.0.5 8080", "10.96.0.10"]
        assert [entry.prog_id for entry in attach.attached_cgroup(rig.group, "cgroup_inet4_connect")] == ids


async def test_a_hundred_thousand_entries_do_not_hold_up_the_process(
    rig: Rig, sockets: Sockets, instance: Instance
) -> None:
    with BpfMap.open(instance.pin_dir / abi.MAPS["lb_socks"], abi.SockKey, abi.Sock) as table:
        count = 100_000
        value = bytes(abi.Sock(addr=FibAddr.of("10.90.0.5"), netns=1, backend=7, flags=abi.SockFlag.CONNECTED, proto=TCP))
        keys = b"".join(bytes(abi.SockKey(cookie=1 << 40 | number, proto=TCP)) for number in range(count))
        assert table.update_packed(keys, value * count) == (count, None)
        longest = 0.0
        start, last = time.monotonic(), time.thread_time()
        sockets.backends_removed([Gone(9)])
        while time.monotonic() - start < 0.8:
            await asyncio.sleep(0.002)
            # Of this thread's own time: others' takes turns with it.
            now = time.thread_time()
            longest, last = max(longest, now - last), now
        assert longest < 0.1
        with contextlib.closing(Entries(instance)) as entries:
            begin = time.monotonic()
            assert entries.backends() == {7}
            assert len(entries.connected({7})) == count
            print(f"{count} entries looked through twice in {time.monotonic() - begin:.2f} s, {longest=:.3f}")
        raw = [abi.SockKey(cookie=1 << 40 | number, proto=TCP) for number in range(count)]
        assert table.delete_batch(raw) == count
