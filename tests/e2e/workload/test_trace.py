"""What pods execute and connect to, seen from outside."""

from __future__ import annotations

import ctypes as ct
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from workloadkit import HIDE_BTF, World, wait_until

from services.common.kernel import bpf

LINK_FD_BY_ID, LINK_NEXT_ID = 30, 31
CONNECT = """
import socket, sys
family, kind, host, port = sys.argv[1:]
s = socket.socket(getattr(socket, family), getattr(socket, kind))
s.settimeout(5)
try:
    s.connect((host, int(port)))
    print(s.getsockname()[1])
except OSError as error:
    print(error)
"""


def runs(path: str, *arguments: str) -> Callable[[Any], bool]:
    """An execution of this program with these arguments behind the first."""
    return lambda event: event.path == path and (not arguments or tuple(event.arguments[1:]) == arguments)


def goes_to(port: int, protocol: int = 6) -> Callable[[Any], bool]:
    return lambda event: event.destination_port == port and event.protocol == protocol


def link_info(fd: int) -> tuple[int, int, int]:
    """(id, type, id of the program) of a link."""
    out = ct.create_string_buffer(64)
    bpf.call(bpf.INFO_BY_FD, struct.pack("IIQ", fd, len(out), ct.addressof(out)))
    kind, ident, program = struct.unpack_from("III", out.raw)
    return ident, kind, program


def attached(world: World) -> list[int]:
    """Types of the links by which programs of the instance hang anywhere."""
    ours = set()
    for path in (world.instance.pin_dir / "prog" / "identity").iterdir():
        fd = bpf.get(str(path))
        ours.add(bpf.prog_info(fd).id)
        os.close(fd)
    found, link = [], 0
    while True:
        try:
            _, back = bpf.call(LINK_NEXT_ID, struct.pack("III", link, 0, 0))
        except FileNotFoundError:
            return sorted(found)
        link = struct.unpack_from("I", back, 4)[0]
        try:
            fd, _ = bpf.call(LINK_FD_BY_ID, struct.pack("III", link, 0, 0))
        except (FileNotFoundError, BlockingIOError):
            # Gone, or just being made by another test.
            continue
        _, kind, program = link_info(fd)
        # Held open, it would keep the program where it is.
        os.close(fd)
        if program in ours:
            found.append(kind)


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_execution_is_named_by_pod_and_labels(world: World) -> None:
    with world.watch("WatchExecs") as watch:
        before = time.time_ns()
        process = world.spawn("/bin/echo", "one", "two words", "", group=world.web_group)
        process.wait(10)
        event = watch.until(runs("/bin/echo"))
    who = event.process
    assert list(event.arguments) == ["/bin/echo", "one", "two words", ""]
    assert (who.pid, who.uid, who.command) == (process.pid, 0, "echo")
    assert (who.workload.endpoint_id, who.workload.pod) == (1, "shop/web")
    assert dict(who.workload.labels) == {"app": "web", "tier": "front"}
    assert before - 10**8 < event.time_unix_nanos < time.time_ns() + 10**8
    assert event.lost == 0


def test_the_parent_is_known(world: World) -> None:
    with world.watch("WatchExecs") as watch:
        process = world.spawn("sh", "-c", "/bin/true; /bin/true", group=world.web_group)
        process.wait(10)
        event = watch.until(runs("/bin/true"))
    assert event.process.parent_pid == process.pid


def test_numbers_are_those_of_the_services_namespace(world: World) -> None:
    with world.watch("WatchExecs") as watch:
        inner = ("setpriv", "--reuid=1234", "--clear-groups", "/bin/echo", "inside")
        process = world.spawn("unshare", "--pid", "--fork", *inner, group=world.web_group)
        process.wait(10)
        who = watch.until(runs("/bin/echo", "inside")).process
    assert who.parent_pid == process.pid < who.pid
    assert who.uid == 1234


def test_long_arguments_are_cut(world: World) -> None:
    with world.watch("WatchExecs") as watch:
        world.run("/bin/echo", "x" * 10000, group=world.web_group)
        event = watch.until(runs("/bin/echo"))
    assert sum(len(word) + 1 for word in event.arguments) in (4096, 4097)
    assert event.arguments[1].startswith("xxxx")


def test_processes_below_a_pods_cgroup_and_in_its_network_are_its_own(world: World) -> None:
    with world.watch("WatchExecs") as watch:
        world.run("/bin/echo", "nested", group=world.nested)
        assert watch.until(runs("/bin/echo", "nested")).process.workload.pod == "shop/web"
        world.run("/bin/echo", "network", space=world.cart_netns)
        assert watch.until(runs("/bin/echo", "network")).process.workload.pod == "shop/cart"
        world.run("/bin/echo", "both", group=world.web_group, space=world.cart_netns)
        assert watch.until(runs("/bin/echo", "both")).process.workload.pod == "shop/web"


def test_processes_of_the_host_are_shown_to_those_who_ask(world: World) -> None:
    with world.watch("WatchExecs") as pods, world.watch("WatchExecs", host=True) as all_of_them:
        world.run("/bin/echo", f"host {world.name}")
        world.run("/bin/echo", "pod", group=world.web_group)
        event = all_of_them.until(runs("/bin/echo", f"host {world.name}"))
        assert not event.process.HasField("workload")
        all_of_them.until(runs("/bin/echo", "pod"))
        pods.until(runs("/bin/echo", "pod"))
        assert all(event.process.workload.endpoint_id for event in pods.seen)


def test_each_watcher_gets_the_pod_it_asked_for(world: World) -> None:
    with (
        world.watch("WatchExecs", endpoint_id=1) as web,
        world.watch("WatchExecs", endpoint_id=2) as cart,
    ):
        for _ in range(2):
            world.run("/bin/echo", "cart", space=world.cart_netns)
            world.run("/bin/echo", "web", group=world.web_group)
        web.until(runs("/bin/echo", "web"))
        cart.until(runs("/bin/echo", "cart"))
        assert {event.process.workload.endpoint_id for event in web.seen} == {1}
        assert {event.process.workload.endpoint_id for event in cart.seen} == {2}
    # One watcher that is left is filtered for in the kernel; that must not outlive it.
    with world.watch("WatchExecs", endpoint_id=2):
        pass
    with world.watch("WatchExecs") as both:
        world.run("/bin/echo", "again", group=world.web_group)
        both.until(runs("/bin/echo", "again"))


@contextmanager
def listening(world: World, space: Path, family: socket.AddressFamily) -> Iterator[int]:
    """A TCP listener in a namespace, as a process; its port."""
    host = "127.0.0.1" if family is socket.AF_INET else "::1"
    code = (
        f"import socket, sys, time\ns = socket.create_server(({host!r}, 0), family=socket.{family.name})\n"
        "print(s.getsockname()[1], flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen(
        ["nsenter", f"--net={space}", sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("family", "host", "seen"),
    [
        ("AF_INET", "127.0.0.1", "127.0.0.1"),
        ("AF_INET6", "::1", "::1"),
        ("AF_INET6", "::ffff:127.0.0.1", "127.0.0.1"),
    ],
)
def test_a_tcp_connection_is_shown_with_both_ends(world: World, family: str, host: str, seen: str) -> None:
    listens = socket.AF_INET6 if seen == "::1" else socket.AF_INET
    with listening(world, world.web_netns, listens) as port, world.watch("WatchConnects") as watch:
        argv = (sys.executable, "-c", CONNECT, family, "SOCK_STREAM", host, str(port))
        process = world.spawn(*argv, group=world.web_group, space=world.web_netns)
        process.wait(10)
        event = watch.until(goes_to(port))
    assert (event.source, event.destination, event.protocol) == (seen, seen, 6)
    assert event.source_port >= 1024
    assert (event.process.pid, event.process.workload.pod) == (process.pid, "shop/web")
    assert event.process.command.startswith("python")


def test_a_connection_nobody_answers_is_shown_at_once(world: World, port: int) -> None:
    with world.watch("WatchConnects") as watch:
        # Nobody listens: refused.
        argv = (sys.executable, "-c", CONNECT, "AF_INET", "SOCK_STREAM", "127.0.0.1", str(port))
        world.run(*argv, group=world.web_group, space=world.web_netns)
        assert watch.until(goes_to(port)).process.workload.pod == "shop/web"


@pytest.mark.parametrize(("family", "host"), [("AF_INET", "127.0.0.1"), ("AF_INET6", "::1")])
def test_a_connected_udp_socket_is_shown(world: World, port: int, family: str, host: str) -> None:
    with world.watch("WatchConnects") as watch:
        argv = (sys.executable, "-c", CONNECT, family, "SOCK_DGRAM", host, str(port))
        world.run(*argv, space=world.cart_netns)
        event = watch.until(goes_to(port, 17))
    assert (event.destination, event.source, event.process.workload.pod) == (host, "", "shop/cart")


def test_nothing_hangs_in_the_kernel_while_nobody_watches(world: World) -> None:
    wait_until(lambda: world.component() == "nobody watches", "somebody still watches")
    assert attached(world) == []
    with world.watch("WatchExecs"), world.watch("WatchConnects"), world.watch("WatchExecs"):
        assert len(attached(world)) == 4
        assert world.component() == "3 watchers of connect and exec"
    wait_until(lambda: not attached(world), "programs are still attached")


def test_a_killed_tracer_leaves_nothing_attached_and_its_successor_goes_on(bare: World) -> None:
    bare.load()
    bare.start()
    with bare.watch("WatchExecs"), bare.watch("WatchConnects"):
        assert len(attached(bare)) == 4
        bare.kill()
        wait_until(lambda: not attached(bare), "programs outlive their tracer")
    bare.start()
    with bare.watch("WatchExecs") as watch:
        bare.run("/bin/echo", "after", group=bare.web_group)
        watch.until(runs("/bin/echo", "after"))


def test_a_flood_is_counted_where_it_is_lost(world: World) -> None:
    """More executions than anyone reads: the stream goes on, and what is missing is said."""
    script = "i=0; while [ $i -lt 600 ]; do /bin/true; i=$((i+1)); done"
    with world.watch("WatchExecs") as watch:
        world.run("sh", "-c", script, group=world.web_group)
        world.run("/bin/echo", "end", group=world.web_group)
        last = watch.until(runs("/bin/echo", "end"), 20)
        shown = sum(event.path == "/bin/true" for event in watch.seen)
    assert shown + last.lost >= 600 and (shown == 600 or last.lost)


def test_a_kernel_without_types_is_named(bare: World) -> None:
    bare.start(HIDE_BTF)
    for method in ("WatchExecs", "WatchConnects"):
        with pytest.raises(grpc.RpcError) as caught, bare.watch(method):
            pass
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "BTF" in caught.value.details()


def test_a_service_that_may_not_trace_says_so(bare: World) -> None:
    bare.start(("setpriv", "--bounding-set=-bpf,-perfmon,-sys_admin", "--inh-caps=-all"))
    with pytest.raises(grpc.RpcError) as caught, bare.watch("WatchExecs"):
        pass
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("request_", [{"endpoint_id": 70000}, {"endpoint_id": 1, "host": True}])
def test_wishes_that_make_no_sense_are_refused(world: World, request_: dict[str, Any]) -> None:
    with pytest.raises(grpc.RpcError) as caught, world.watch("WatchExecs", **request_):
        pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
