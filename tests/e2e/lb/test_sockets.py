"""What processes see of services at their sockets: real programs, real sockets, tables filled by hand."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from sockrig import Process, Rig, cookie_of, forget, group, make_instance, namespace

from services.common.instance import Instance
from services.common.kernel.maps import BpfMap
from services.common.pipeline.abi import MAPS as PIPELINE
from services.common.pipeline.abi import FibAddr, IpcacheEntry
from services.lb import abi, install
from services.lb.sockets.hooks import Hooks, remove
from tests.datapath.lbtables import TCP, UDP

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

V4, V6 = ("10.96.0.10", "10.90.0.5"), ("fd96::10", "fd90::2")
MAPPED = ("::ffff:10.96.0.10", "::ffff:10.90.0.5")
# Family of the socket, address of frontend and backend as the process writes them.
KINDS = {"v4": ("AF_INET", *V4), "v6": ("AF_INET6", *V6), "mapped": ("AF_INET6", *MAPPED)}


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    made = make_instance()
    try:
        asyncio.run(install.install_sockets(made))
        yield made
    finally:
        forget(made)


@pytest.fixture(scope="module")
def spaces() -> Iterator[tuple[Path, Path]]:
    with namespace() as first, namespace() as second:
        yield first, second


@pytest.fixture
def rig(instance: Instance, spaces: tuple[Path, Path]) -> Iterator[Rig]:
    with group(f"fibril-test-{instance.name}") as top:
        hooks = Hooks(instance)
        hooks.open()
        try:
            hooks.attach(top.name)
            made = Rig(instance, top, spaces[0])
            yield made
            made.close()
            assert made.entries() == [], "what sockets leave behind"
        finally:
            hooks.close()
            remove(instance)


def bare(address: str) -> str:
    return address.removeprefix("::ffff:")


@pytest.mark.parametrize("kind", KINDS)
def test_tcp_reaches_the_backend_and_sees_the_frontend(rig: Rig, kind: str) -> None:
    family, vip, backend = KINDS[kind]
    rig.serve((bare(backend), 8080), tcp=True)
    rig.tables.service([(bare(vip), 80)], [(bare(backend), 8080)])
    assert rig.client.do(f"s = tcp(socket.{family}); s.connect(({vip!r}, 80))", "s.recv(99).decode()") == (
        f"{bare(backend)} 8080"
    )
    assert rig.client.give("s.getpeername()[:2]") == [vip, 80]
    assert rig.tables.stats()[abi.Stat.SOCK] >= 1
    rig.client.do("s.close()")
    assert rig.entries() == []


@pytest.mark.parametrize("kind", KINDS)
def test_connected_udp_sees_the_frontend_in_both_directions(rig: Rig, kind: str) -> None:
    family, vip, backend = KINDS[kind]
    rig.serve((bare(backend), 5353))
    rig.tables.service([(bare(vip), 53)], [(bare(backend), 5353)], UDP)
    rig.client.do(f"s = udp(socket.{family}); s.connect(({vip!r}, 53))")
    assert rig.client.give("ask(s)") == [f"{bare(backend)} 5353", [vip, 53]]
    assert rig.client.give("s.getpeername()[:2]") == [vip, 53]
    # Connected again, elsewhere: one entry, and the truth.
    rig.client.do(f"s.connect(({backend!r}, 5353))")
    assert rig.client.give("ask(s)") == [f"{bare(backend)} 5353", [backend, 5353]]
    assert rig.client.give("s.getpeername()[:2]") == [backend, 5353]
    assert len(rig.entries()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_datagrams_of_one_socket_to_several_frontends_are_answered_by_each(rig: Rig, kind: str) -> None:
    family, vip, backend = KINDS[kind]
    host = bare(backend)
    rig.serve(*((host, 7000 + number) for number in range(20)))
    for number in range(20):
        rig.tables.service([(bare(vip), 100 + number)], [(host, 7000 + number)], UDP)
    # What sockets before have left in a slot means nothing.
    left = abi.SockNear(entry=abi.Sock(next=FibAddr.of("10.9.9.9"), nport=9, further=1024))
    with BpfMap.open(rig.instance.pin_dir / abi.MAPS["lb_socks_near"], ctypes.c_uint32, abi.SockNear) as near:
        near.update_batch((ctypes.c_uint32(slot), left) for slot in range(abi.SOCK_NEAR))
    rig.client.do(f"s = udp(socket.{family})")
    for _ in range(2):
        for number in range(20):
            assert rig.client.give(f"ask(s, ({vip!r}, {100 + number}))") == [
                f"{host} {7000 + number}", [vip, 100 + number],
            ]  # fmt: skip
    # Interleaved with the backend by its own name.
    for number in (0, 5):
        assert rig.client.give(f"ask(s, ({backend!r}, {7000 + number}))")[1] == [backend, 7000 + number]
        assert rig.client.give(f"ask(s, ({vip!r}, {100 + number}))")[1] == [vip, 100 + number]
    kinds = [key.kind for key, _ in rig.entries()]
    assert sorted(kinds) == [abi.SockKind.OWN] + [abi.SockKind.TO] * 19 + [abi.SockKind.FROM] * 19
    rig.client.do("s.close()")
    assert rig.entries() == []


def test_two_frontends_with_one_backend_answer_as_the_last_one_spoken_to(rig: Rig) -> None:
    rig.serve(("10.90.0.5", 5353))
    for vip in ("10.96.0.10", "10.96.0.11"):
        rig.tables.service([(vip, 53)], [("10.90.0.5", 5353)], UDP)
    rig.client.do("s = udp()")
    for vip in ("10.96.0.10", "10.96.0.11", "10.96.0.11", "10.96.0.10", "10.96.0.11"):
        assert rig.client.give(f"ask(s, ({vip!r}, 53))")[1] == [vip, 53]


def test_an_unconnected_socket_stays_with_its_backend_as_long_as_that_serves(rig: Rig) -> None:
    hosts = [f"10.90.0.{number}" for number in range(10, 18)]
    rig.serve(*((host, 5353) for host in hosts))
    index, ids = rig.tables.service([("10.96.0.10", 53)], [(host, 5353) for host in hosts], UDP)
    ask = "ask(s, ('10.96.0.10', 53))"
    first, vip = rig.client.do("s = udp()", ask)
    assert [rig.client.give(ask) for _ in range(5)] == [[first, vip]] * 5
    ident = ids[hosts.index(first.split()[0])]
    line = rig.tables.line(abi.Table.BACKENDS, ident, abi.Backend)
    line.state = abi.BackendState.TERMINATING
    assert rig.client.give(ask) == [first, vip]
    line.id = 0
    second = rig.client.give(ask)
    assert second[0] != first and second[1] == vip
    line.id, line.state = ident, abi.BackendState.ACTIVE
    assert rig.client.give(ask) == second
    spread = {rig.client.do("u = udp()", "ask(u, ('10.96.0.10', 53))")[0] for _ in range(40)}
    assert len(spread) > 3
    assert rig.tables.line(abi.Table.SERVICES, index, abi.Service).connections == 42
    rig.client.do("u.close()")


def test_a_connected_datagram_socket_stays_with_its_backend_however_it_speaks(rig: Rig) -> None:
    """It hears nobody else."""
    hosts = [f"10.90.0.{number}" for number in range(10, 18)]
    rig.serve(*((host, 5353) for host in hosts))
    _, ids = rig.tables.service([("10.96.0.10", 53)], [(host, 5353) for host in hosts], UDP)
    first, vip = rig.client.do("s = udp(); s.connect(('10.96.0.10', 53))", "ask(s)")
    rig.tables.line(
        abi.Table.BACKENDS, ids[hosts.index(first.split()[0])], abi.Backend
    ).state = abi.BackendState.QUARANTINED
    for ask in ("ask(s)", "ask(s, ('10.96.0.10', 53))", f"ask(s, ({first.split()[0]!r}, 5353))", "ask(s)"):
        assert rig.client.give(ask) == [first, vip]
    rig.client.do("s.close()")


def test_a_disconnected_socket_does_not_stay_with_a_backend_that_is_gone(rig: Rig) -> None:
    hosts = ["10.90.0.10", "10.90.0.11"]
    rig.serve(*((host, 5353) for host in hosts))
    _, ids = rig.tables.service([("10.96.0.10", 53)], [(host, 5353) for host in hosts], UDP)
    first, vip = rig.client.do("s = udp(); s.connect(('10.96.0.10', 53))", "ask(s)")
    assert rig.client.do("gone = ctypes.CDLL(None).connect(s.fileno(), bytes(16), 16)", "gone") == 0
    ask = "ask(s, ('10.96.0.10', 53))"
    assert rig.client.give(ask) == [first, vip]
    rig.tables.line(abi.Table.BACKENDS, ids[hosts.index(first.split()[0])], abi.Backend).id = 0
    second = rig.client.give(ask)
    assert second[0] != first and second[1] == vip and rig.client.give(ask) == second
    rig.client.do("s.close()")
    assert not rig.entries()


@pytest.mark.parametrize("flags", [0, abi.ServiceFlag.MAGLEV])
def test_connections_are_spread_over_all_backends(rig: Rig, flags: int) -> None:
    hosts = [f"10.90.0.{number}" for number in range(10, 14)]
    rig.serve(*((host, 8080) for host in hosts), tcp=True)
    rig.tables.service([("10.96.0.10", 80)], [(host, 8080) for host in hosts], flags=flags)
    rig.client.do("""
seen = {}
for _ in range(200):
    with tcp() as s:
        s.connect(("10.96.0.10", 80))
        name = s.recv(99).decode()
        seen[name] = seen.get(name, 0) + 1
""")
    assert set(rig.client.give("seen")) == {f"{host} 8080" for host in hosts}
    assert min(rig.client.give("seen").values()) > 20


def test_without_a_backend_a_service_refuses_at_once_or_says_nothing(rig: Rig) -> None:
    for proto in (TCP, UDP):
        rig.tables.service([("10.96.0.10", 80), ("fd96::10", 80)], [], proto)
        rig.tables.service([("10.96.0.11", 80)], [], proto, flags=abi.ServiceFlag.DROP)
    for family, vip in (("AF_INET", "10.96.0.10"), ("AF_INET6", "fd96::10"), ("AF_INET6", "::ffff:10.96.0.10")):
        for call in ("tcp({0}).connect(({1!r}, 80))", "udp({0}).connect(({1!r}, 80))", "udp({0}).sendto(b'', ({1!r}, 80))"):
            with pytest.raises(ConnectionRefusedError):
                rig.client.do(call.format("socket." + family, vip))
    for call in ("tcp().connect(('10.96.0.11', 80))", "udp().sendto(b'', ('10.96.0.11', 80))"):
        with pytest.raises(OSError) as caught:
            rig.client.do(call)
        # Untranslated: here there is no route.
        assert caught.value.errno == errno.ENETUNREACH


def test_a_backend_of_the_other_family_is_none(rig: Rig) -> None:
    rig.tables.service([("10.96.0.10", 80)], [("fd90::2", 80)])
    rig.tables.service([("fd96::10", 80)], [("10.90.0.5", 80)])
    for family, vip in (("AF_INET", "10.96.0.10"), ("AF_INET6", "fd96::10")):
        with pytest.raises(ConnectionRefusedError):
            rig.client.do(f"tcp(socket.{family}).connect(({vip!r}, 80))")


def test_affinity_keeps_a_namespace_with_its_backend_until_its_time_is_over(
    rig: Rig, spaces: tuple[Path, Path]
) -> None:
    # Several, so that two namespaces do not happen to have the same backend of each: that of one would in one run of 32.
    vips, services = [f"10.96.0.{number}" for number in range(10, 14)], []
    for number, vip in enumerate(vips):
        hosts = [f"10.90.{number}.{host}" for host in range(10, 42)]
        index, _ = rig.tables.service(
            [(vip, 53)], [(host, 5353) for host in hosts], UDP, flags=abi.ServiceFlag.AFFINITY, affinity_s=3600
        )
        services.append(index)
    pick = f"own = [udp() for _ in {vips}]\nfor made, vip in zip(own, {vips}):\n    made.connect((vip, 53))"
    # Not the process counts, but where it is.
    other, far = rig.process(), rig.process(space=spaces[1])

    def chosen() -> set[str]:
        return {str(entry.addr.ip()) for _, entry in rig.entries()}

    for process in (rig.client, other, rig.client):
        process.do(pick)
    assert len(chosen()) == len(vips)
    far.do(pick)
    seen = chosen()
    assert len(vips) < len(seen) <= 2 * len(vips)
    for _ in range(8):
        far.do(pick)
        assert chosen() <= seen
    # Only now does time count.
    for index in services:
        rig.tables.line(abi.Table.SERVICES, index, abi.Service).affinity_s = 1
    time.sleep(3.2)
    for process in (far, rig.client, other):
        process.do(pick)
    assert not chosen() <= seen


def test_node_ports_are_at_loopback_the_nodes_addresses_and_other_nodes(
    rig: Rig, spaces: tuple[Path, Path]
) -> None:
    rig.serve(("10.90.0.5", 8080), ("fd90::2", 8080), tcp=True)
    rig.tables.service([("0.0.0.0", 30080), ("::", 30080)], [("10.90.0.5", 8080)])
    rig.tables.service([("::", 30080)], [("fd90::2", 8080)])
    rig.tables.node_address("10.90.0.1")
    rig.tables.write_config(host_netns=cookie_of(rig.space))
    addresses = BpfMap.open(rig.instance.pin_dir / PIPELINE["ipc_addr"], FibAddr, IpcacheEntry)
    with addresses:
        addresses.update(FibAddr.of("192.0.2.7"), IpcacheEntry(identity=6))
        addresses.update(FibAddr.of("192.0.2.8"), IpcacheEntry(identity=4711))

        def reach(process: Process, address: str, port: int = 30080) -> list[object]:
            family = "AF_INET6" if ":" in address else "AF_INET"
            process.do(f"s = tcp(socket.{family}); s.connect(({address!r}, {port}))")
            return [process.give("s.recv(99).decode()"), *process.give("s.getpeername()[:2]")]

        for address in ("127.0.0.1", "127.9.9.9", "10.90.0.1", "192.0.2.7"):
            assert reach(rig.client, address) == ["10.90.0.5 8080", address, 30080]
        assert reach(rig.client, "::1") == ["fd90::2 8080", "::1", 30080]
        assert reach(rig.client, "::ffff:127.0.0.1") == ["10.90.0.5 8080", "::ffff:127.0.0.1", 30080]
        for address in ("192.0.2.8", "192.0.2.9"):
            with pytest.raises(OSError, match="unreachable"):
                reach(rig.client, address)
        # A pod's loopback is its own.
        pod = rig.process(space=spaces[1])
        with pytest.raises(ConnectionRefusedError):
            reach(pod, "127.0.0.1")
        # A host port is this node's alone.
        rig.tables.service([("0.0.0.0", 8443)], [("10.90.0.5", 8080)])
        with rig.tables.fronts() as fronts:
            fronts.update(
                abi.FrontKey.of(ip_address("0.0.0.0"), 8443, TCP),
                abi.Front(service=3, first=8443, flags=abi.FrontFlag.OUTSIDE),
            )
        assert reach(rig.client, "10.90.0.1", 8443)[1:] == ["10.90.0.1", 8443]
        with pytest.raises(OSError, match="unreachable"):
            reach(rig.client, "192.0.2.7", 8443)
        for address in ("192.0.2.7", "192.0.2.8"):
            addresses.delete(FibAddr.of(address))
    for process in (rig.client, pod):
        process.do("s.close()")


def test_ranges_of_ports_keep_their_distance(rig: Rig) -> None:
    rig.serve(("10.90.0.5", 6003))
    index, _ = rig.tables.service([("10.96.0.10", 0)], [("10.90.0.5", 6000)], UDP)
    rig.tables.hint("10.96.0.10", abi.Hint.VIP | abi.Hint.RANGE)
    path = rig.instance.pin_dir / abi.MAPS["lb_ranges"]
    # 4000 to 4007.
    key = abi.RangeKey.of(ip_address("10.96.0.10"), UDP, 4000, 13)
    with BpfMap.open(path, abi.RangeKey, abi.Front) as ranges:
        ranges.update(key, abi.Front(service=index, first=4000))
        rig.client.do("s = udp()")
        assert rig.client.give("ask(s, ('10.96.0.10', 4003))") == ["10.90.0.5 6003", ["10.96.0.10", 4003]]
        rig.client.do("t = udp(); t.connect(('10.96.0.10', 4003))")
        assert rig.client.give("ask(t)") == ["10.90.0.5 6003", ["10.96.0.10", 4003]]
        with pytest.raises(OSError, match="unreachable"):
            rig.client.give("ask(s, ('10.96.0.10', 4008))")
        ranges.delete(key)


def test_other_groups_and_namespaces_are_left_alone(
    rig: Rig, spaces: tuple[Path, Path], instance: Instance
) -> None:
    rig.serve(("10.90.0.5", 5353))
    rig.tables.service([("10.96.0.10", 53)], [("10.90.0.5", 5353)], UDP)
    ask = "ask(udp(), ('10.96.0.10', 53))"
    with pytest.raises(OSError, match="unreachable"):
        rig.server.give(ask)  # not in the group
    # At the root of all groups: only the node's own and pods' sockets.
    rig.tables.write_config(flags=abi.ConfigFlag.NETNS, host_netns=cookie_of(spaces[1]))
    with pytest.raises(OSError, match="unreachable"):
        rig.client.give(ask)
    with BpfMap.open(instance.pin_dir / PIPELINE["ep_netns"], abi.ct.c_uint64, abi.ct.c_uint32) as pods:
        pods.update(cookie_of(rig.space), 7)
        assert rig.client.give(ask)[1] == ["10.96.0.10", 53]
        pods.delete(cookie_of(rig.space))
    rig.tables.write_config(host_netns=cookie_of(rig.space))
    assert rig.client.give(ask)[1] == ["10.96.0.10", 53]


def test_thousands_of_connections_leave_nothing_behind(rig: Rig) -> None:
    rig.serve(("10.90.0.5", 8080), tcp=True)
    rig.tables.service([("10.96.0.10", 80)], [("10.90.0.5", 8080)])
    rig.tables.service([("10.96.0.11", 80)], [("10.90.0.5", 9)])
    rig.tables.service([("10.96.0.10", 53)], [("10.90.0.5", 5353)], UDP)
    before = rig.tables.stats()[abi.Stat.SOCK]
    rig.client.do("""
import struct
linger = struct.pack("ii", 1, 0)
for number in range(1500):
    with tcp() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        s.connect(("10.96.0.10", 80))
    with udp() as s:
        s.connect(("10.96.0.10", 53))
    with udp() as s:
        s.sendto(b"", ("10.96.0.10", 53))
    with tcp() as s:
        try:
            s.connect(("10.96.0.11", 80))
        except ConnectionRefusedError:
            continue
        raise AssertionError
""")
    assert rig.tables.stats()[abi.Stat.SOCK] - before == 6000
    assert rig.entries() == []
    # Also of a process that is killed.
    doomed = rig.process()
    doomed.do("held = [udp() for _ in range(50)]; [s.connect(('10.96.0.10', 53)) for s in held]")
    assert len(rig.entries()) == 50
    doomed.close()
    assert rig.entries() == []


def test_more_sockets_than_near_places_work_alike(rig: Rig) -> None:
    """Where a slot in front is taken, the table behind it has the entry."""
    rig.serve(("10.90.0.5", 5353))
    rig.tables.service([("10.96.0.10", 53)], [("10.90.0.5", 5353)], UDP)
    path = rig.instance.pin_dir / abi.MAPS["lb_socks_near"]
    with BpfMap.open(path, ctypes.c_uint32, abi.SockNear) as near:
        taken = abi.SockNear(cookie=1 << 50, claims=1)
        near.update_batch((ctypes.c_uint32(slot), taken) for slot in range(abi.SOCK_NEAR))
        assert rig.client.do("s = udp(); s.connect(('10.96.0.10', 53))", "ask(s)")[1] == ["10.96.0.10", 53]
        assert rig.client.give("list(s.getpeername())") == ["10.96.0.10", 53]
        rig.client.do("s.connect(('10.96.0.10', 53)); t = udp()")
        for _ in range(2):
            assert rig.client.give("ask(t, ('10.96.0.10', 53))")[1] == ["10.96.0.10", 53]
        with BpfMap.open(rig.instance.pin_dir / abi.MAPS["lb_socks"], abi.SockKey, abi.Sock) as table:
            assert table.count() == 2
            rig.client.do("s.close(); t.close()")
            assert table.count() == 0
        assert {slot.crowd for _, slot in near.items()} == {0}
        near.update_batch((ctypes.c_uint32(slot), abi.SockNear()) for slot in range(abi.SOCK_NEAR))


def test_a_full_table_costs_only_the_names(rig: Rig) -> None:
    """Further frontends than one socket may have: they are reached all the same."""
    rig.serve(("10.90.0.5", 5353))
    rig.tables.service([("10.96.0.10", port) for port in range(1000, 2100)], [("10.90.0.5", 5353)], UDP)
    with rig.tables.fronts() as fronts:
        for port in range(1000, 2100):
            key = abi.FrontKey.of(ip_address("10.96.0.10"), port, UDP)
            fronts.update(key, abi.Front(service=1, first=port))
    rig.client.do("""
s = udp()
for port in range(1000, 2100):
    s.sendto(b"?", ("10.96.0.10", port))
    assert s.recvfrom(99)[0] == b"10.90.0.5 5353"
""")
    assert rig.tables.stats()[abi.Stat.SOCK_FULL] == 1100 - 1 - 1024
    rig.client.do("s.close()")


def test_threads_that_share_a_socket_do_not_confuse_it(rig: Rig) -> None:
    rig.serve(*(("10.90.0.5", 7000 + number) for number in range(8)))
    for number in range(8):
        rig.tables.service([("10.96.0.10", 100 + number)], [("10.90.0.5", 7000 + number)], UDP)
    rig.client.do("""
s = udp()
def talk(first):
    for turn in range(300):
        s.sendto(b"?", ("10.96.0.10", 100 + (first + turn) % 8))
threads = [threading.Thread(target=talk, args=(first,)) for first in range(4)]
[t.start() for t in threads]
wrong = 0
got = 0
try:
    while got < 1200:
        s.settimeout(1 if got > 100 else 20)  # some may be lost
        data, peer = s.recvfrom(99)
        got += 1
        wrong += int(data.split()[1]) - 7000 != peer[1] - 100
except TimeoutError:
    pass
[t.join() for t in threads]
""")
    assert rig.client.give("wrong") == 0
    assert rig.client.give("got") > 100
    rig.client.do("s.close()")
