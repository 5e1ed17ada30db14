"""Real processes behind the socket programs: in a control group and a network namespace of their own, told what to do.

    namespace A: lo with 10.90.0.1/16 and fd90::1..3; backends listen there, nothing leads elsewhere
    namespace B: the same, for those whose sockets are none of the node's

A frontend's address has no route: who reaches it has been translated.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self

from services.common.instance import Instance
from services.common.kernel import cgroup, features, netns
from services.common.kernel import netlink as nl
from services.common.kernel.maps import BpfMap
from services.common.kernel.netlink import Rtnl
from services.common.kernel.netns import NetNs
from services.lb import abi
from tests import session
from tests.datapath.lbtables import LbTables

DRIVER = """
import ctypes, errno, json, os, socket, sys, threading, time

def enter(path):
    with open(path) as file:
        assert ctypes.CDLL(None).setns(file.fileno(), 0x40000000) == 0

def tcp(family=socket.AF_INET):
    return socket.socket(family, socket.SOCK_STREAM)

def udp(family=socket.AF_INET):
    made = socket.socket(family, socket.SOCK_DGRAM)
    made.settimeout(5)
    return made

def serve(host, port, kind=socket.SOCK_DGRAM, name=None):
    # Says its name (address:port) to whoever speaks or connects.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    if kind == socket.SOCK_STREAM:
        listener.listen(1024)  # before anyone is told
    name = (name or f"{host} {port}").encode()
    def datagrams():
        while True:
            data, peer = listener.recvfrom(2048)
            listener.sendto(name, peer)
    held = []
    def connections():
        while True:
            made, _ = listener.accept()
            try:
                made.sendall(name)
            except OSError:
                continue  # its client has reset it
            held.append(made)
    threading.Thread(target=datagrams if kind == socket.SOCK_DGRAM else connections, daemon=True).start()

def ask(made, to=None):
    # One datagram there and back: who answered, by the name that the process sees.
    made.send(b"?") if to is None else made.sendto(b"?", tuple(to))
    data, peer = made.recvfrom(2048)
    return data.decode(), list(peer[:2])

space = dict(globals())
for line in sys.stdin:
    order = json.loads(line)
    try:
        exec(order["do"], space)
        answer = {"value": eval(order["give"], space)}
    except OSError as error:
        answer = {"errno": error.errno, "text": str(error)}
    print(json.dumps(answer), flush=True)
"""


class Process:
    """A Python process that does what it is told. OSError with its errno if that fails there."""

    def __init__(self, group: Path | None = None, inside: Path | None = None) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # Before it makes a socket: a socket belongs to the group its maker is in.
        if group is not None:
            cgroup.move(group, self._child.pid)
        if inside is not None:
            self.do(f"enter({str(inside)!r})")

    @property
    def pid(self) -> int:
        return self._child.pid

    def send(self, do: str, give: str = "None") -> None:
        """Begin; `receive` has the answer."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"do": do, "give": give}) + "\n")
        self._child.stdin.flush()

    def receive(self) -> Any:
        assert self._child.stdout is not None
        answer = json.loads(self._child.stdout.readline())
        if "errno" in answer:
            raise OSError(answer["errno"], answer["text"])
        return answer["value"]

    def do(self, do: str, give: str = "None") -> Any:
        self.send(do, give)
        return self.receive()

    def give(self, expression: str) -> Any:
        return self.do("", expression)

    def close(self) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.close()
        self._child.kill()
        self._child.wait()
        self._child.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_instance() -> Instance:
    features.ensure_bpffs()
    made = Instance.from_env(f"t-sock-{session.name()}")
    made.run_dir.mkdir(parents=True, exist_ok=True)
    return made


def forget(instance: Instance) -> None:
    shutil.rmtree(instance.pin_dir, ignore_errors=True)
    shutil.rmtree(instance.run_dir, ignore_errors=True)


@contextlib.contextmanager
def namespace() -> Iterator[Path]:
    path = Path(f"/run/netns/{session.name()}")
    netns.add(path)
    try:
        with NetNs.open(path) as there, Rtnl(there) as inside:
            addresses = [nl.address_add(1, ip_address("10.90.0.1"), 16)]
            addresses += [nl.address_add(1, ip_address(f"fd90::{number}")) for number in (1, 2, 3)]
            inside.apply([nl.link_up(1), *addresses])
        yield path
    finally:
        netns.remove(path)


@contextlib.contextmanager
def group(name: str) -> Iterator[Path]:
    """A control group, whose processes have ended by the end."""
    path = cgroup.create(name)
    try:
        yield path
    finally:
        for directory, _, _ in os.walk(path, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)


def cookie_of(path: Path) -> int:
    with NetNs.open(path) as there:
        return there.cookie()


class Rig:
    """Tables of an instance whose programs hang on `group`, a server outside of it and a client inside, both in one
    namespace.
    """

    def __init__(self, instance: Instance, group: Path, space: Path) -> None:
        self.instance, self.group, self.space = instance, group, space
        self._exit = contextlib.ExitStack()
        self.tables = LbTables(instance.pin_dir)
        self._exit.callback(self.tables.close)
        self.server = self._exit.enter_context(Process(None, space))
        self.client = self._exit.enter_context(Process(group, space))

    def process(self, group: Path | None = None, space: Path | None = None) -> Process:
        return self._exit.enter_context(Process(group or self.group, space or self.space))

    def serve(self, *places: tuple[str, int], tcp: bool = False) -> None:
        for host, port in places:
            self.server.do(f"serve({host!r}, {port}, socket.{'SOCK_STREAM' if tcp else 'SOCK_DGRAM'})")

    def _tables(self) -> tuple[list[tuple[abi.SockKey, abi.Sock]], list[abi.SockNear]]:
        pins = self.instance.pin_dir
        with BpfMap.open(pins / abi.MAPS["lb_socks"], abi.SockKey, abi.Sock) as table:
            found = list(table.items())
        with BpfMap.open(pins / abi.MAPS["lb_socks_near"], ct.c_uint32, abi.SockNear) as near:
            return found, [slot for _, slot in near.items()]

    def count(self) -> int:
        """How many entries there are, perhaps while programs write them."""
        found, slots = self._tables()
        return len(found) + sum(bool(slot.cookie) for slot in slots)

    def entries(self) -> list[tuple[abi.SockKey, abi.Sock]]:
        """Of both tables, as if they were one; nothing may be changing them."""
        found, slots = self._tables()
        assert sum(slot.crowd for slot in slots) == sum(key.kind == abi.SockKind.OWN for key, _ in found)
        assert all(bool(slot.cookie) == slot.claims for slot in slots)
        return found + [
            (abi.SockKey(cookie=slot.cookie, proto=slot.entry.proto), slot.entry)
            for slot in slots
            if slot.cookie
        ]

    def close(self) -> None:
        self._exit.close()
