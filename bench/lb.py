"""Services: how long a connection to one takes with 1 to 50,000 of them, and how long they take to be programmed.

A process connects to a service whose backend is in another namespace and waits for the first byte. Three processes in turn,
each in a namespace of its own: one whose control group has this project's hooks, one with the rules that kube-proxy would
write for iptables, one with those for nftables. Of N services the one in the middle is asked for. Client and server are on
one CPU. "direct" is the backend itself, asked for by the first.

Rules are written a thousand services at a time, which is all that makes 50,000 possible: nft still takes some minutes for them,
since the kernel looks through all maps there are for the name of each new one.

Programming: from nothing to the kernel, by the service's own writer, against iptables-restore and nft -f.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, ip_address
from pathlib import Path

from bench import lbrules
from bench.common import Bench, cpus, log, median, quick
from services.common.instance import Instance
from services.common.kernel import cgroup, features, loader
from services.lb import install, maglev
from services.lb.kernel.writer import Plane
from services.lb.locality import Locality
from services.lb.model import TCP, Backend, BackendKey, Frontend, FrontendType, Spec
from services.lb.sockets.hooks import Hooks, remove

SIZES = quick((1, 1000), (1, 1000, 10_000, 50_000))
ROUNDS = quick(5, 15)
COUNT = quick(200, 400)
PROGRAMMED = quick(1000, 10_000)
BACKENDS = 5
PORT = 9000
PROGRAM_TARGET_S, FLAT_TARGET, WRITES_TARGET, MAGLEV_TARGET_MS = 3.0, 1.1, 3.0, 40.0
PROGRESS_S = 15.0
KINDS = ("fibril", "iptables", "nftables")


def vip(number: int) -> str:
    return str(IPv4Address("10.96.0.0") + number + 1)


class Declared:
    """Services as the writer wants to be told of them."""

    def __init__(self) -> None:
        self.specs: dict[str, Spec] = {}
        self.backends: dict[str, dict[BackendKey, Backend]] = {}
        self.synced = asyncio.Event()
        self.synced.set()
        self.tell: Callable[[str, frozenset[BackendKey] | None], None] = lambda name, keys: None

    def on_change(self, callback: Callable[[str, frozenset[BackendKey] | None], None]) -> None:
        self.tell = callback

    def put(self, number: int, members: list[tuple[str, int]]) -> None:
        front = Frontend(FrontendType.CLUSTER_IP, ip_address(vip(number)), TCP, 80, 80)
        name = f"s{number}"
        self.specs[name] = Spec(name, (front,))
        keys = [BackendKey(ip_address(address), port) for address, port in members]
        self.backends[name] = {key: Backend(key) for key in keys}


class Rig:
    """A server's namespace and one a kind of client, each with a link of its own to it."""

    def __init__(self) -> None:
        self.tag = secrets.token_hex(3)
        self.server = f"fbb{self.tag}s"
        self.spaces = {kind: f"fbb{self.tag}{kind[0]}" for kind in KINDS}
        self.scratch = Path(tempfile.mkdtemp(prefix="fibril-bench-lb-"))
        self.instance = Instance.from_env(f"b-lb-{self.tag}")
        self.group = cgroup.create(f"fibril/{self.instance.name}")
        self.children: list[subprocess.Popen[str]] = []
        self.program = self.scratch / "vip"

    def run(self, *words: str, text: str | None = None) -> None:
        subprocess.run(words, check=True, input=text, text=True, stdout=subprocess.DEVNULL)

    def inside(self, kind: str, *words: str, text: str | None = None) -> None:
        self.run("ip", "netns", "exec", self.spaces[kind], *words, text=text)

    def address(self, kind: str) -> str:
        """The server's towards a kind of client."""
        return f"10.90.{KINDS.index(kind)}.2"

    def build(self) -> None:
        self.run("gcc", "-O2", "-o", str(self.program), str(Path(__file__).with_name("vip.c")))
        self.run("ip", "netns", "add", self.server)
        for number, (kind, space) in enumerate(self.spaces.items()):
            self.run("ip", "netns", "add", space)
            self.run(
                "ip",
                "-n",
                space,
                "link",
                "add",
                "eth0",
                "type",
                "veth",
                "peer",
                "name",
                kind,
                "netns",
                self.server,
            )
            for name, device, host in ((space, "eth0", 1), (self.server, kind, 2)):
                self.run("ip", "-n", name, "address", "add", f"10.90.{number}.{host}/24", "dev", device)
                self.run("ip", "-n", name, "link", "set", device, "up")
            self.run("ip", "-n", space, "link", "set", "lo", "up")
            self.run("ip", "-n", space, "route", "add", "default", "via", self.address(kind))
        server = self._child("server", f"/run/netns/{self.server}", "0.0.0.0", str(PORT))
        assert server.stdout is not None and server.stdout.readline() == "ready\n"

    def _child(self, role: str, space: str, *more: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [self.program, role, space, str(cpus()[-1]), *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.children.append(child)
        return child

    def client(self, kind: str) -> Callable[..., float]:
        """Microseconds a connection to an address takes, the median of COUNT."""
        child = self._child("client", f"/run/netns/{self.spaces[kind]}")
        if kind == "fibril":
            cgroup.move(self.group, child.pid)

        def measure(address: str, port: int = 80) -> float:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(f"{address} {port} {COUNT}\n")
            child.stdin.flush()
            line = child.stdout.readline()
            if not line:
                raise RuntimeError(f"no connection by {kind} to {address}")
            return int(line) / 1000

        return measure

    def rules(self, kind: str, services: list[lbrules.Service], whole: bool = True) -> float:
        """Write a rule set, in place of any other; seconds. whole: in one transaction."""
        if kind == "iptables":
            self.inside(kind, "iptables", "-t", "nat", "-F")
            self.inside(kind, "iptables", "-t", "nat", "-X")
            texts, words = list(lbrules.iptables(services, whole)), ["iptables-restore", "--noflush"]
        else:
            self.inside(kind, "nft", "flush", "ruleset")
            texts, words = list(lbrules.nftables(services, whole)), ["nft", "-f", "-"]
        began = told = time.perf_counter()
        for number, text in enumerate(texts):
            self.inside(kind, *words, text=text)
            if (now := time.perf_counter()) - told > PROGRESS_S:
                log(f"{kind}: {number} of {len(texts)} parts of the rules are written after {now - began:.0f} s")
                told = now
        return time.perf_counter() - began

    def close(self) -> None:
        for child in self.children:
            child.kill()
            child.wait()
        for space in (self.server, *self.spaces.values()):
            subprocess.run(["ip", "netns", "delete", space], check=False, stderr=subprocess.DEVNULL)
        with contextlib.suppress(Exception):
            remove(self.instance)
        asyncio.run(cgroup.remove(self.group, kill=True))
        shutil.rmtree(self.instance.pin_dir, ignore_errors=True)
        shutil.rmtree(self.scratch, ignore_errors=True)


@contextlib.contextmanager
def rig() -> Iterator[Rig]:
    made = Rig()
    try:
        made.build()
        yield made
    finally:
        made.close()


def plane_of(rig: Rig, declared: Declared) -> Plane:
    plane = Plane(rig.instance, declared, lambda name, key: "", lambda: Locality("bench"), cluster="bench")
    plane.set_addresses(frozenset((ip_address("127.0.0.1"),)))
    return plane


async def connections(bench: Bench, rig: Rig) -> None:
    declared = Declared()
    plane = plane_of(rig, declared)
    await loader.load([install.tables(), install.sockets()], rig.instance.pin_dir)
    await plane.start()
    await plane.use_maps()
    hooks = Hooks(rig.instance)
    hooks.open()
    hooks.attach(f"fibril/{rig.instance.name}")
    clients = {kind: rig.client(kind) for kind in KINDS}
    against_direct: dict[int, float] = {}
    for size in SIZES:
        for number in range(len(declared.specs), size):
            declared.put(number, [(rig.address("fibril"), PORT)])
            declared.tell(f"s{number}", None)
        await plane.settled()
        for kind in KINDS[1:]:
            services = [(vip(number), 80, [(rig.address(kind), PORT)]) for number in range(size)]
            log(f"{size} services by {kind}: {rig.rules(kind, services, whole=False):.2f} s")
        address = vip(size // 2)
        times: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "direct")}
        for _ in range(ROUNDS):
            for kind in KINDS:
                times[kind].append(clients[kind](address))
            times["direct"].append(clients["fibril"](rig.address("fibril"), PORT))
        found = {kind: median(values) for kind, values in times.items()}
        # Minutes lie between the sizes, in which the machine may become another: "direct" says which it was.
        against_direct[size] = found["fibril"] / found["direct"]
        log(f"{size} services: " + ", ".join(f"{kind} {value:.2f} us" for kind, value in found.items()))
        bench.emit(f"connect_vip_{size}", "us", found["fibril"], "direct", found["direct"])
        bench.emit(f"connect_vip_{size}_vs_iptables", "us", found["fibril"], "iptables", found["iptables"])
        bench.emit(f"connect_vip_{size}_vs_nftables", "us", found["fibril"], "nftables", found["nftables"])
    flat = against_direct[SIZES[-1]] / against_direct[SIZES[0]]
    bench.emit("connect_flat", "ratio", flat, "target", FLAT_TARGET)
    hooks.close()
    await plane.stop()


async def programming(bench: Bench, rig: Rig) -> None:
    """With a rig that has no services yet."""
    services = [
        (
            vip(number),
            80,
            [(str(IPv4Address("10.128.0.0") + number * BACKENDS + at), PORT) for at in range(BACKENDS)],
        )
        for number in range(PROGRAMMED)
    ]
    declared = Declared()
    for number, (_, _, several) in enumerate(services):
        declared.put(number, several)
    await loader.load([install.tables()], rig.instance.pin_dir)
    gc.collect()
    plane = plane_of(rig, declared)
    began = time.perf_counter()
    await plane.start()
    await plane.use_maps()
    await plane.settled()
    taken = time.perf_counter() - began
    name = "lb_program_10k"
    bench.emit(name, "s", taken, "target", PROGRAM_TARGET_S)
    for kind, word in (("iptables", "iptables-restore"), ("nftables", "nft -f")):
        bench.emit(f"{name}_vs_{kind}", "s", taken, word, rig.rules(kind, services))
        rig.rules(kind, [])
    bench.emit("lb_change_writes", "writes", await changes(plane, declared), "target", WRITES_TARGET)
    await plane.stop()


async def changes(plane: Plane, declared: Declared) -> int:
    """Stores into the kernel for one backend that takes another's place, with all services there."""
    assert plane.program is not None and plane.tables is not None
    held = plane.held("s7", 4)
    assert held is not None

    def writes() -> int:
        tables, program = plane.tables, plane.program
        assert tables is not None and program is not None
        return program.writes + held.inside.writes + tables.fronts.writes + tables.ranges.writes

    before = writes()
    backends = declared.backends["s7"]
    backends.pop(next(iter(backends)))
    key = BackendKey(ip_address("10.77.7.7"), PORT)
    backends[key] = Backend(key)
    declared.tell("s7", frozenset({key}))
    await plane.settled()
    return writes() - before


def maglev_table(bench: Bench) -> None:
    names = [(f"10.0.{i >> 8}.{i & 255}:80".encode(), 1) for i in range(1000)]
    times = []
    for _ in range(quick(3, 15)):
        began = time.perf_counter()
        maglev.table(names, 16381)
        times.append((time.perf_counter() - began) * 1000)
    bench.emit("maglev_16381", "ms", median(times), "target", MAGLEV_TARGET_MS)


def main() -> None:
    features.ensure_bpffs()
    os.sched_setaffinity(0, {cpus()[0]})
    with Bench("lb") as bench:
        maglev_table(bench)
        with rig() as made:
            asyncio.run(programming(bench, made))
        with rig() as made:
            asyncio.run(connections(bench, made))


if __name__ == "__main__":
    main()
