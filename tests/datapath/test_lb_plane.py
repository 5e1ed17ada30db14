"""What the lb service writes into the kernel, read back from the kernel."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import random
import shutil
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import bpf, features, loader
from services.common.kernel.lines import Lines
from services.common.kernel.maps import BpfMap
from services.common.pipeline.abi import FibAddr
from services.lb import abi, maglev
from services.lb.health.monitor import Health
from services.lb.kernel import flows as flows_module
from services.lb.kernel.fronts import inner_of
from services.lb.kernel.writer import Plane, RemovedBackend
from services.lb.locality import Locality
from services.lb.model import (
    TCP,
    UDP,
    Algorithm,
    Backend,
    BackendKey,
    Frontend,
    FrontendType,
    HealthCheck,
    Spec,
    TcpProbe,
    Topology,
    TrafficPolicy,
)  # fmt: skip
from tests import session

HERE = Locality("n1", "z1", "c1", frozenset({ip_address("192.168.0.1")}))
HASHED = frozenset({ip_address("192.168.0.1"), ip_address("fd00::1")})


class Declared:
    """The services a test declares."""

    def __init__(self) -> None:
        self.specs: dict[str, Spec] = {}
        self.backends: dict[str, dict[BackendKey, Backend]] = {}
        self.unread: frozenset[str] = frozenset()
        self.synced = asyncio.Event()
        self._callbacks: list[Callable[[str, frozenset[BackendKey] | None], None]] = []

    def on_change(self, callback: Callable[[str, frozenset[BackendKey] | None], None]) -> None:
        self._callbacks.append(callback)

    def put(self, spec: Spec, *backends: Backend) -> None:
        self.specs[spec.name] = spec
        self.backends[spec.name] = {backend.key: backend for backend in backends}
        self.tell(spec.name)

    def tell(self, name: str) -> None:
        for callback in self._callbacks:
            callback(name, None)

    def drop(self, name: str) -> None:
        del self.specs[name], self.backends[name]
        self.tell(name)


def front(
    text: str, kind: FrontendType = FrontendType.CLUSTER_IP, proto: int = TCP, last: int = 0
) -> Frontend:
    address, _, port = text.rpartition(":")
    return Frontend(kind, ip_address(address.strip("[]")), proto, int(port), last or int(port))


def backend(address: str, port: int = 80, **more: object) -> Backend:
    return Backend(BackendKey(ip_address(address), port), **more)  # type: ignore[arg-type]


class Reader:
    """The kernel's tables as a program finds them, through descriptors of its own."""

    def __init__(self, plane: Plane) -> None:
        assert plane.tables is not None
        self.tables = plane.tables
        self._lines = {
            table: Lines(plane.tables.lines_outer, table, 1, 1 << 22)
            for table in (abi.Table.SERVICES, abi.Table.BACKENDS, abi.Table.SLOTS, abi.Table.HINT)
        }

    def hint(self, address: str) -> int:
        return self._lines[abi.Table.HINT].mem[abi.hint_of(ip_address(address))]

    def service(self, index: int) -> abi.Service:
        return self._lines[abi.Table.SERVICES].at(index, abi.Service)

    def fronts(self) -> dict[tuple[str, int, int], int]:
        found = {}
        for raw, value in self.tables.fronts.held.items():
            key = abi.FrontKey.from_buffer_copy(raw)
            if key.proto:
                address = ip_address("::") if key.addr.ip() is None else key.addr.ip()
                found[str(address), socket.ntohs(key.port), key.proto] = abi.Front.from_buffer_copy(
                    value
                ).service
        return found

    def stretch(self, word: abi.Stretch) -> list[str]:
        """Backends by slot, each checked to be whole and of the service."""
        ids = struct.unpack_from(f"={word.count}I", self._lines[abi.Table.SLOTS].mem, word.first * 4)
        found = []
        for ident in ids:
            line = self._lines[abi.Table.BACKENDS].at(ident & abi.BACKEND_INDEX, abi.Backend)
            assert line.id == ident and line.state != abi.BackendState.FREE
            found.append(f"{line.addr.ip()}:{socket.ntohs(line.port)}")
        return found

    def served(self, address: str, port: int, proto: int = TCP, outside: bool = False) -> list[str]:
        service = self.service(self.fronts()[address, port, proto])
        return self.stretch(service.outside if outside else service.inside)

    def close(self) -> None:
        for lines in self._lines.values():
            lines.close()


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    features.ensure_bpffs()
    made = Instance.from_env(f"t-lbplane-{session.name()}")
    spec = loader.ProgramSpec(
        source=Path(__file__).with_name("lbmaps.c"),
        service="lbmaps",
        functions={"lb_maps": "xdp"},
        maps=abi.MAPS,
    )
    try:
        asyncio.run(loader.load([spec], made.pin_dir))
        yield made
    finally:
        shutil.rmtree(made.pin_dir, ignore_errors=True)


@pytest.fixture
def clean(instance: Instance) -> Iterator[Instance]:
    """Inner maps and elements of a test before are gone."""
    yield instance
    for name in ("lb_lines", "lb_fronts", "lb_nats"):
        fd = bpf.get(str(instance.pin_dir / abi.MAPS[name]))
        for index in range(bpf.map_info(fd).max_entries):
            key = (bpf.ct.c_uint32)(index)
            try:
                bpf.map_elem(bpf.MAP_DELETE, fd, bpf.ct.addressof(key), 0)
            except FileNotFoundError:
                pass
        os.close(fd)
    with (
        BpfMap.open(instance.pin_dir / abi.MAPS["lb_ranges"], abi.RangeKey, abi.Front) as ranges,
        BpfMap.open(instance.pin_dir / abi.MAPS["lb_sources"], abi.SourceKey, abi.Admitted) as sources,
    ):
        ranges.delete_batch(list(ranges.keys()))
        sources.delete_batch(list(sources.keys()))


async def begin(
    instance: Instance, declared: Declared, verdicts: dict[tuple[str, BackendKey], str] | None = None
) -> tuple[Plane, list[RemovedBackend]]:
    known = verdicts if verdicts is not None else {}
    plane = Plane(
        instance, declared, lambda name, key: known.get((name, key), ""), lambda: HERE, cluster="c1"
    )
    gone: list[RemovedBackend] = []
    plane.on_removed(gone.extend)
    plane.set_addresses(HASHED)
    await plane.start()
    await plane.use_maps()
    await plane.settled()
    return plane, gone


def web(*fronts: Frontend, name: str = "web", **more: object) -> Spec:
    return Spec(name, fronts or (front("10.96.0.1:80"),), **more)  # type: ignore[arg-type]


async def test_a_service_is_there_changes_and_goes(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    plane, gone = await begin(clean, declared)
    declared.put(web(), backend("10.0.0.1"), backend("10.0.0.2"))
    await plane.settled()
    kernel = Reader(plane)
    assert sorted(kernel.served("10.96.0.1", 80)) == ["10.0.0.1:80", "10.0.0.2:80"]
    assert kernel.hint("10.96.0.1") & abi.Hint.VIP and kernel.hint("10.0.0.1") & abi.Hint.BACKEND
    assert kernel.hint("192.168.0.1") & abi.Hint.NODE
    state = plane.service_state("web")
    assert (state.programmed, state.problem, state.inside) == (True, "", 2)
    declared.put(web(front("10.96.0.1:80"), front("10.96.0.1:443")), backend("10.0.0.2"), backend("10.0.0.3"))
    await plane.settled()
    assert sorted(kernel.served("10.96.0.1", 443)) == ["10.0.0.2:80", "10.0.0.3:80"]
    assert [(str(each.address), each.service) for each in gone] == [("10.0.0.1", "web")]
    declared.drop("web")
    await plane.settled()
    assert not kernel.fronts() and not kernel.hint("10.96.0.1") & abi.Hint.VIP
    assert {str(each.address) for each in gone} == {"10.0.0.1", "10.0.0.2", "10.0.0.3"}
    kernel.close()
    await plane.stop()


async def test_one_backend_of_many_is_a_few_stores(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    many = [backend(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}") for i in range(1, 10_001)]
    plane, _ = await begin(clean, declared)
    declared.put(web(), *many)
    await plane.settled()
    program, held = plane.program, plane.held("web", 4)
    assert program is not None and held is not None

    def writes() -> int:
        tables = plane.tables
        assert tables is not None
        return program.writes + held.inside.writes + tables.fronts.writes + tables.ranges.writes

    before = writes()
    declared.put(web(), *many[:-1], backend("10.77.0.1"))
    await plane.settled()
    # The old one's line, the new one's, and the slot.
    assert writes() - before <= 3
    before = writes()
    declared.put(web(), *many[1:-1], backend("10.77.0.1"))
    await plane.settled()
    assert writes() - before <= 3
    before = writes()
    declared.put(web(), *many[1:], backend("10.77.0.1"))
    await plane.settled()
    assert writes() - before <= 3
    kernel = Reader(plane)
    assert len(set(kernel.served("10.96.0.1", 80))) == 10_000
    kernel.close()
    await plane.stop()


async def test_a_restart_adopts_everything_and_writes_nothing(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    node = front("0.0.0.0:30080", FrontendType.NODE_PORT)
    declared.put(
        web(front("10.96.0.1:80"), node, algorithm=Algorithm.MAGLEV, sources=(ip_network("10.0.0.0/8"),)),
        *(backend(f"10.0.0.{i}") for i in range(1, 6)),
    )
    declared.put(web(front("10.96.0.2:8000", last=8999), front("[fd00::5]:80"), name="range"), backend("10.0.1.1"),
                 backend("fd00::9"))  # fmt: skip
    declared.put(web(front("10.96.0.3:80"), name="gone"), backend("10.0.2.1"))
    await plane.settled()
    kernel = Reader(plane)
    before = (kernel.fronts(), kernel.served("10.96.0.1", 80), kernel.served("0.0.0.0", 30080, outside=True))
    kernel.close()
    ids = {name: dict(held.backends) for name, held in plane.program.held.items()} if plane.program else {}
    await plane.stop()
    later = Declared()
    later.specs, later.backends = dict(declared.specs), dict(declared.backends)
    del later.specs["gone"], later.backends["gone"]
    plane, gone = await begin(clean, later)
    assert plane.program is not None and plane.tables is not None
    kernel = Reader(plane)
    # Not all is known yet: what nobody wants stays.
    assert (kernel.fronts(), kernel.served("10.96.0.1", 80)) == before[:2]
    assert kernel.served("0.0.0.0", 30080, outside=True) == before[2]
    assert plane.program.writes == 0 and plane.tables.fronts.writes == 0 and plane.tables.ranges.writes == 0
    assert {n: dict(held.backends) for n, held in plane.program.held.items()} == {
        name: known for name, known in ids.items() if name[0] != "gone"
    }
    later.synced.set()
    await asyncio.sleep(0.05)
    await plane.settled()
    assert ("10.96.0.3", 80, TCP) not in kernel.fronts()
    assert [str(each.address) for each in gone] == ["10.0.2.1"]
    assert kernel.served("10.96.0.1", 80) == before[1]
    kernel.close()
    await plane.stop()


async def test_a_restart_gives_the_unwell_nothing(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    sick, well = backend("10.0.0.1"), backend("10.0.0.2")
    plane, _ = await begin(clean, declared, {("web", sick.key): "no answer"})
    spec = web(health_check=HealthCheck(TcpProbe()))
    declared.put(spec, sick, well)
    await plane.settled()
    assert plane.quarantined("web", sick.key) and not plane.quarantined("web", well.key)
    await plane.stop()
    later = Declared()
    health = Health(later, lambda name, key: plane.quarantined(name, key))
    plane = Plane(clean, later, health.verdict, lambda: HERE, cluster="c1")
    plane.set_addresses(HASHED)
    await plane.start()
    await plane.use_maps()
    assert plane.quarantined("web", sick.key) and not plane.quarantined("web", backend("10.0.0.3").key)
    later.synced.set()
    later.put(spec, sick, well)
    await plane.settled()
    kernel = Reader(plane)
    assert kernel.served("10.96.0.1", 80) == ["10.0.0.2:80"]
    assert plane.program is not None and plane.program.writes == 0
    kernel.close()
    await plane.stop()


async def test_policies_topology_and_health_decide_who_serves(clean: Instance) -> None:
    declared, verdicts = Declared(), {}
    declared.synced.set()
    plane, _ = await begin(clean, declared, verdicts)
    near, zone, far = (
        backend("10.0.0.1", node="n1", zone="z1"), backend("10.0.0.2", node="n2", zone="z1"),
        backend("10.0.0.3", node="n3", zone="z2"),
    )  # fmt: skip
    spec = web(
        front("10.96.0.1:80"), front("192.0.2.1:80", FrontendType.EXTERNAL_IP), topology=Topology.SAME_NODE,
        external=TrafficPolicy.LOCAL, health_check=HealthCheck(TcpProbe()),
    )  # fmt: skip
    declared.put(spec, near, zone, far)
    await plane.settled()
    kernel = Reader(plane)

    def inside() -> list[str]:
        return sorted(set(kernel.served("10.96.0.1", 80)))

    def outside() -> list[str]:
        return sorted(set(kernel.served("192.0.2.1", 80, outside=True)))

    assert (inside(), outside()) == (["10.0.0.1:80"], ["10.0.0.1:80"])
    verdicts["web", near.key] = "connection refused"
    plane.mark("web", frozenset({near.key}))
    await plane.settled()
    assert (inside(), outside()) == (["10.0.0.2:80"], [])
    assert plane.effective_state("web", near.key) is abi.BackendState.QUARANTINED
    declared.put(replace(spec, topology=Topology.ANY), near, zone, far)
    await plane.settled()
    assert inside() == ["10.0.0.2:80", "10.0.0.3:80"]
    # Whoever is leaving serves when nobody else does.
    leaving = replace(far, state=abi.BackendState.TERMINATING)
    declared.put(replace(spec, topology=Topology.ANY), near, leaving)
    await plane.settled()
    assert inside() == ["10.0.0.3:80"]
    kernel.close()
    await plane.stop()


async def test_a_frontend_moves_from_one_service_to_another(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    declared.put(web(name="b"), backend("10.0.0.1"))
    await plane.settled()
    declared.drop("b")
    declared.put(web(name="a"), backend("10.0.0.2"))
    await plane.settled()
    kernel = Reader(plane)
    assert kernel.served("10.96.0.1", 80) == ["10.0.0.2:80"]
    declared.put(web(name="b"), backend("10.0.0.1"))
    declared.drop("a")
    await plane.settled()
    assert kernel.served("10.96.0.1", 80) == ["10.0.0.1:80"]
    kernel.close()
    await plane.stop()


async def test_damage_is_mended(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    declared.put(web(), backend("10.0.0.1"), backend("10.0.0.2"))
    await plane.settled()
    await asyncio.sleep(0.05)
    held, tables = plane.held("web", 4), plane.tables
    assert held is not None and tables is not None
    assert await plane.compare() == 0
    tables.services.at(held.index, abi.Service).inside.count = 1
    tables.backends.at(
        held.backends[BackendKey(ip_address("10.0.0.1"), 80)] & abi.BACKEND_INDEX, abi.Backend
    ).port = 7
    tables.hints.mem[abi.hint_of(ip_address("10.96.0.1"))] = 0
    key = abi.FrontKey.of(ip_address("10.96.0.1"), 80, TCP)
    tables.fronts._inner.table.delete(key)
    assert await plane.compare() == 3
    kernel = Reader(plane)
    assert sorted(kernel.served("10.96.0.1", 80)) == ["10.0.0.1:80", "10.0.0.2:80"]
    assert kernel.hint("10.96.0.1") & abi.Hint.VIP
    assert await plane.compare() == 0
    kernel.close()
    await plane.stop()


async def test_any_sequence_of_changes_ends_as_declared(clean: Instance) -> None:
    """Against what is declared, after each of some hundred random changes, with two restarts between."""
    seed = int.from_bytes(os.urandom(4))
    print("seed", seed)
    rand = random.Random(seed)
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    for step in range(400):
        if step in (150, 300):
            await plane.stop()
            plane, _ = await begin(clean, declared)
        number = rand.randrange(12)
        name = f"s{number}"
        if name in declared.specs and rand.random() < 0.1:
            declared.drop(name)
        else:
            fronts = [
                front(f"10.96.0.{number}:{port}", proto=rand.choice((TCP, UDP)))
                for port in rand.sample(range(80, 90), 3)
            ]
            if rand.random() < 0.3:
                fronts.append(front(f"[fd00::{number}]:80"))
            spec = web(*fronts, name=name, algorithm=rand.choice(list(Algorithm)), maglev_size=251)
            hosts = rand.sample(range(30), rand.randrange(9))
            backends = [backend(f"10.0.{number}.{i}", weight=rand.choice((1, 1, 1, 3))) for i in hosts]
            backends += [backend(f"fd00:{number}::{i}") for i in range(rand.randrange(3))]
            declared.put(spec, *backends)
        if rand.random() < 0.6:
            await plane.settled()
    await plane.settled()
    kernel = Reader(plane)
    expected = {
        (str(each.address), each.port, each.proto): name
        for name, spec in declared.specs.items()
        for each in spec.frontends
    }
    there = kernel.fronts()
    assert there.keys() == expected.keys()
    for (address, port, proto), name in expected.items():
        mine = [
            b
            for b in declared.backends[name].values()
            if b.key.address.version == ip_address(address).version
        ]
        got = Counter(kernel.served(address, port, proto))
        assert set(got) == {f"{b.key.address}:{b.key.port}" for b in mine}
        if declared.specs[name].algorithm is Algorithm.RANDOM and mine:
            least = min(got.values())
            light = min(b.weight for b in mine)
            assert all(got[f"{b.key.address}:{b.key.port}"] * light == b.weight * least for b in mine)
        elif mine:
            assert got.total() == 251
    assert plane.program is not None
    assert plane.program.used[1] == sum(map(len, declared.backends.values())) - sum(
        1 for name, each in declared.backends.items() for key in each
        if key.address.version not in {f.address.version for f in declared.specs[name].frontends}
    )  # fmt: skip
    assert await plane.compare() == 0
    kernel.close()
    await plane.stop()


async def test_tables_grow_and_keep_what_they_hold(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    for i in range(6000):
        name = f"s{i}"
        declared.specs[name] = web(front(f"10.{96 + (i >> 16)}.{i >> 8 & 255}.{i & 255}:80"), name=name)
        mine = [backend(f"10.0.{i >> 8}.{i & 255}", port) for port in (1, 2, 3)]
        declared.backends[name] = {each.key: each for each in mine}
        declared.tell(name)
    await plane.settled()
    kernel = Reader(plane)
    fronts = kernel.fronts()
    assert len(fronts) == 6000
    for i in (0, 1, 77, 4095, 5999):
        assert sorted(kernel.served(f"10.96.{i >> 8}.{i & 255}", 80)) == [
            f"10.0.{i >> 8}.{i & 255}:{p}" for p in (1, 2, 3)
        ]
    usage = {each.name: each for each in plane.usage()}
    assert usage["services"].used == 6000 and usage["backends"].used == 18000
    assert usage["frontends"].size > 6000 and usage["slots"].size >= usage["slots"].used
    kernel.close()
    await plane.stop()


async def test_connections_outlive_the_growth_of_their_tables(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    flows, tables = plane.flows, plane.tables
    assert flows is not None and tables is not None
    from services.common.kernel.beats import beat

    stamp = beat(tables.config.beat_shift) >> 2 & abi.STAMP | abi.FlowFlag.CONFIRMED | abi.FlowFlag.TCP
    written = {}
    rand = random.Random(1)
    for number in range(flows.lines.size * 2):
        sig = rand.getrandbits(64) | 1
        at = (sig & flows.lines.size - 1) * abi.LINE
        for place in range(4):
            if not struct.unpack_from("=Q", flows.lines.mem, at + place * 16)[0]:
                struct.pack_into("=QIHH", flows.lines.mem, at + place * 16, sig, number + 1, 0, stamp)
                written[sig] = number + 1
                break
    size = flows.lines.size
    await flows.look()
    assert flows.lines.size == 4 * size and tables.config.flow_mask == 4 * size - 1
    assert tables.config.before_mask == 0 and tables.lines_outer.lookup(int(abi.Table.FLOWS_BEFORE)) is None
    found = {}
    for line in range(flows.lines.size):
        for sig, ident, _, _ in struct.iter_unpack("=QIHH", flows.lines.mem[line * 64 : line * 64 + 64]):
            if sig:
                assert sig & flows.lines.size - 1 == line or found.get(sig, ident) == ident
                found[sig] = ident
    missing = {sig for sig in written if sig not in found}
    # A line may take no more than it has places for.
    assert len(missing) < len(written) / 1000
    await plane.stop()


async def test_growth_that_a_kill_has_cut_short_is_finished(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    flows, tables = plane.flows, plane.tables
    assert flows is not None and tables is not None
    size, stamp = flows.lines.size, abi.FlowFlag.CONFIRMED | abi.FlowFlag.TCP
    sigs = {line | 1 << 62 | line << 20: line + 1 for line in range(0, size, 7)}
    for sig, ident in sigs.items():
        struct.pack_into("=QIHH", flows.lines.mem, (sig & size - 1) * abi.LINE, sig, ident, 0, stamp)
    outer, nats = tables.lines_outer, tables.nats_outer
    tuples = [abi.Tuple(remote=FibAddr.of(ip_address("10.0.0.1")), lport=n, proto=TCP) for n in range(100)]
    with inner_of(nats, 0, abi.Tuple, abi.Nat, "nats") as inner:
        assert inner is not None
        for key in tuples:
            inner.update(key, abi.Nat(backend=7))
        # As far as _grow_flows and _grow_nats come before they copy.
        nats.update(1, inner.fd)
    flows._put_nats(0, 4 * flows.nats_size)
    before = outer.lookup(int(abi.Table.FLOWS))
    assert before is not None
    fd = bpf.map_fd_by_id(before.value)
    outer.update(int(abi.Table.FLOWS_BEFORE), fd)
    os.close(fd)
    tables.config.before_mask = size - 1
    flows.lines.replace(4 * size)
    await plane.stop()
    plane, _ = await begin(clean, declared)
    flows, tables = plane.flows, plane.tables
    assert flows is not None and tables is not None
    async with asyncio.timeout(10):
        while tables.config.before_mask or tables.nats_outer.lookup(1) is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    # Where programs look for them by the mask they have.
    mask = tables.config.flow_mask
    assert mask == 4 * size - 1
    for sig, ident in sigs.items():
        raw = flows.lines.mem[(sig & mask) * abi.LINE : (sig & mask) * abi.LINE + 12]
        assert struct.unpack("=QI", raw) == (sig, ident)
    with inner_of(tables.nats_outer, 0, abi.Tuple, abi.Nat, "nats") as inner:
        assert inner is not None and all(inner.lookup(key) is not None for key in tuples)
    await plane.stop()


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def no_memory_for(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = bpf.map_create

    def create(kind: str, key: int, value: int, entries: int, flags: int = 0, called: str = "", *more: Any) -> int:
        if called == name:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return real(kind, key, value, entries, flags, called, *more)

    monkeypatch.setattr(bpf, "map_create", create)


async def test_translations_grow_when_there_is_memory_again(clean: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = Declared()
    declared.synced.set()
    monkeypatch.setattr(flows_module, "LOOK_S", 0.01)
    plane, _ = await begin(clean, declared)
    flows = plane.flows
    assert flows is not None
    size = flows.nats_size
    with monkeypatch.context() as full:
        no_memory_for(full, "lb_nats")
        full.setattr(flows, "_count_nats", lambda: size)
        await eventually(lambda: "no memory" in plane.status()[0].message)
        # As another look finds it, too.
        await asyncio.sleep(0.05)
        assert plane.status()[0].state == "degraded" and flows.nats_size == size
        full.undo()
        full.setattr(flows, "_count_nats", lambda: size)
        await eventually(lambda: flows.nats_size > size and plane.status()[0].state == "ok")
    await plane.stop()


async def test_frontends_come_when_there_is_memory_again(clean: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    many = web(*(front(f"10.96.1.1:{port}") for port in range(1, 4001)), name="many")
    with monkeypatch.context() as full:
        no_memory_for(full, "lb_front")
        declared.put(many, backend("10.0.0.1"))
        declared.put(web(), backend("10.0.0.2"))
        async with asyncio.timeout(20):
            await plane.settled()
        assert "no memory" in plane.service_state("many").problem
        assert plane.service_state("web").programmed
        # So it is where much is to be done at once.
        for number in range(300):
            declared.put(web(front(f"10.97.0.1:{number + 1}"), name=f"s{number}"), backend("10.0.0.3"))
        await plane.settled()
        assert not any(task.done() for task in plane.tasks())
    plane.mark("many")
    await plane.settled()
    assert plane.service_state("many").programmed
    await plane.stop()


async def test_a_table_that_cannot_be_put_in_place_is_the_one_before(
    clean: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    assert plane.tables is not None
    lines = plane.tables.backends
    size = lines.size

    def fails(*_: object) -> None:
        raise errors.ResourceExhausted("no memory")

    wanted = [backend(f"10.1.0.{number}") for number in range(1, 101)]
    with monkeypatch.context() as full:
        full.setattr(plane.tables.lines_outer, "update", fails)
        declared.put(web(), *wanted)
        await plane.settled()
        assert plane.service_state("web").problem == "no memory" and lines.size == size
    plane.mark("web")
    await plane.settled()
    kernel = Reader(plane)
    assert len(kernel.served("10.96.0.1", 80)) == 100
    kernel.close()
    await plane.stop()


async def test_a_table_that_cannot_be_mapped_is_the_one_before(clean: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    assert plane.tables is not None and plane.program is not None
    lines = plane.tables.backends
    size = lines.size

    def no_descriptors(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as full:
        full.setattr(mmap, "mmap", no_descriptors)
        # Only a hint of how much will be wanted: what does not work is told by the service that needs it.
        plane.program.expect(1, 2 * size, 1)
        with pytest.raises(errors.ResourceExhausted, match="Too many open files"):
            lines.ensure(2 * size)
    assert lines.size == size and lines.ensure(2 * size)
    await plane.stop()


async def test_connections_that_cannot_grow_stay_in_one_table(clean: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    flows, tables = plane.flows, plane.tables
    assert flows is not None and tables is not None
    size = flows.lines.size
    with monkeypatch.context() as full:
        no_memory_for(full, "flows")
        with pytest.raises(errors.ResourceExhausted):
            await flows._grow_flows()
    assert (flows.lines.size, tables.config.flow_mask, tables.config.before_mask) == (size, size - 1, 0)
    assert tables.lines_outer.lookup(int(abi.Table.FLOWS_BEFORE)) is None
    await flows._grow_flows()
    assert flows.lines.size > size
    # Tried again and again, it would take another descriptor each time.
    tables.nats_outer.delete(0)
    with monkeypatch.context() as full:
        no_memory_for(full, "lb_nats")
        closed: list[Lines] = []
        full.setattr(Lines, "close", lambda lines: closed.append(lines))
        with pytest.raises(errors.ResourceExhausted):
            flows_module.Flows(tables, "c1", flows_module.Limits())
        assert len(closed) == 1
    closed[0].close()
    await plane.stop()


async def test_more_than_fits_is_refused_and_the_rest_goes_on(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    assert plane.tables is not None
    plane.tables.backends.limit = 64
    plane.program._backend_indexes._limit = 64  # type: ignore[union-attr]
    declared.put(web(name="big"), *(backend(f"10.1.0.{i}") for i in range(1, 100)))
    declared.put(web(front("10.96.0.9:80"), name="old"), backend("10.0.0.1"))
    await plane.settled()
    state = plane.service_state("big")
    assert not state.programmed and "all 63 backends are in use" in state.problem
    assert any(part.state == "degraded" and "big" in part.message for part in plane.status())
    declared.drop("big")
    plane.mark("old")
    await plane.settled()
    assert plane.service_state("old").programmed
    await plane.stop()


async def test_a_family_without_room_leaves_the_other(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    told: list[str] = []
    plane.on_planned(told.append)
    plane.program._backend_indexes._limit = 8  # type: ignore[union-attr]
    fronts = (front("192.0.2.1:80", FrontendType.EXTERNAL_IP), front("[2001:db8::1]:80", FrontendType.EXTERNAL_IP))
    declared.put(web(*fronts), backend("10.0.0.1"), *(backend(f"fd00::{n}") for n in range(1, 20)))
    await plane.settled()
    assert "in use" in plane.problems["web"] and not plane.service_state("web").programmed
    # So programs come to hang on uplinks.
    assert plane.plans["web"].keys() == {4} and told == ["web"]
    plane.mark("web")
    await plane.settled()
    assert told == ["web"]
    declared.put(web(*fronts), backend("10.0.0.1"), backend("fd00::1"))
    await plane.settled()
    assert plane.plans["web"].keys() == {4, 6} and not plane.problems
    await plane.stop()


async def test_what_a_full_table_took_of_a_service_goes_with_it(clean: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    tables = plane.tables
    assert tables is not None
    ports = front("10.96.0.1:1", last=65535)  # sixteen elements
    prefixes = tuple(ip_network(f"10.{n}.0.0/16") for n in range(20))
    room = 5
    for known in (tables.ranges, tables.sources):

        def some(keys: bytes, values: bytes, real: Any = known.table.update_packed, table: Any = known.table) -> Any:
            size = table.info.key_size
            done, failure = real(keys[: room * size], values[: room * table.info.value_size])
            return done, failure or (errors.ResourceExhausted("full") if len(keys) > room * size else None)

        with monkeypatch.context() as full:
            full.setattr(known.table, "update_packed", some)
            declared.put(web(front("10.96.0.1:80"), ports, sources=prefixes), backend("10.0.0.1"))
            await plane.settled()
            assert plane.service_state("web").problem == "full"
            assert len(known.held) == room
            # Another try that fails is as harmless.
            plane.mark("web")
            await plane.settled()
        declared.put(web(front("10.96.0.2:80"), sources=prefixes[-1:]), backend("10.0.0.1"))
        await plane.settled()
        kernel = Reader(plane)
        assert plane.service_state("web").programmed and kernel.fronts().keys() == {("10.96.0.2", 80, TCP)}
        assert len(list(known.table.keys())) == len(known.held) == (1 if known is tables.sources else 0)
        assert not kernel.hint("10.96.0.1") and kernel.hint("10.96.0.2") == abi.Hint.VIP
        declared.drop("web")
        await plane.settled()
        assert not kernel.fronts() and not tables.sources.held and not kernel.hint("10.96.0.2")
        kernel.close()
    await plane.stop()


async def test_what_is_not_understood_after_a_restart_is_served_as_it_was(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    declared.put(web(front("10.96.0.1:80"), front("[fd00:96::1]:80")), backend("10.0.0.1"), backend("fd00::9"))
    declared.put(web(front("10.96.0.2:80"), name="other"), backend("10.0.0.2"))
    await plane.settled()
    await plane.stop()
    # Another version has written it anew.
    later = Declared()
    later.unread = frozenset({"web"})
    later.synced.set()
    plane, gone = await begin(clean, later)
    kernel = Reader(plane)
    assert kernel.served("10.96.0.1", 80) == ["10.0.0.1:80"] and kernel.served("fd00:96::1", 80) == ["fd00::9:80"]
    assert kernel.hint("10.96.0.1") & abi.Hint.VIP and kernel.hint("10.0.0.1") & abi.Hint.BACKEND
    assert ("10.96.0.2", 80, TCP) not in kernel.fronts() and len(gone) == 1
    assert await plane.compare() == 0
    # It is declared so that it is understood, and is what it was.
    ids = dict(plane.program.held["web", 4].backends)  # type: ignore[union-attr]
    later.unread = frozenset()
    later.put(web(front("10.96.0.1:80")), backend("10.0.0.1"))
    await plane.settled()
    assert plane.program.held["web", 4].backends == ids  # type: ignore[union-attr]
    assert kernel.fronts().keys() == {("10.96.0.1", 80, TCP)} and len(gone) == 2
    later.drop("web")
    await plane.settled()
    assert not kernel.fronts() and len(gone) == 3
    kernel.close()
    await plane.stop()


async def test_what_cannot_be_written_after_a_restart_is_served_as_it_was(clean: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    spec = web(front("10.96.0.1:80"), front("10.96.0.2:1000", last=1003), front("[::]:30080", FrontendType.NODE_PORT))
    first = (backend("10.0.0.1"), backend("fd00::9"))
    declared.put(spec, *first)
    await plane.settled()
    await plane.stop()
    later = Declared()
    plane, _ = await begin(clean, later)
    assert plane.program is not None
    plane.program._backend_indexes._limit = 8
    later.synced.set()
    later.put(spec, *first, *(backend(f"10.1.0.{i}") for i in range(1, 20)), *(backend(f"fd00:1::{i}") for i in range(1, 20)))
    await plane.settled()
    assert "in use" in plane.service_state("web").problem
    kernel = Reader(plane)
    assert {("10.96.0.1", 80, TCP), ("::", 30080, TCP)} <= kernel.fronts().keys()
    assert kernel.served("10.96.0.1", 80) == ["10.0.0.1:80"] and kernel.served("::", 30080) == ["fd00::9:80"]
    assert kernel.hint("10.96.0.1") & abi.Hint.VIP and kernel.hint("::") & abi.Hint.VIP
    assert kernel.hint("10.96.0.2") & (abi.Hint.VIP | abi.Hint.RANGE) == abi.Hint.VIP | abi.Hint.RANGE
    later.drop("web")
    await plane.settled()
    assert not any(kernel.hint(address) & (abi.Hint.VIP | abi.Hint.RANGE) for address in ("10.96.0.1", "10.96.0.2", "::"))
    kernel.close()
    await plane.stop()


async def test_sources_of_a_service_that_was_cut_off_are_not_admitted_by_the_next(
    clean: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    tables = plane.tables
    assert tables is not None
    known = tables.sources
    size = known.table.info.key_size
    real = known.table.update_packed

    def some(keys: bytes, values: bytes) -> Any:
        return real(keys[:size], values[: known.table.info.value_size])[0], errors.ResourceExhausted("full")

    theirs = (ip_network("10.0.0.0/8"), ip_network("11.0.0.0/8"))
    with monkeypatch.context() as full:
        full.setattr(known.table, "update_packed", some)
        declared.put(web(front("192.0.2.1:80", FrontendType.EXTERNAL_IP), sources=theirs), backend("10.0.0.1"))
        await plane.settled()
        assert plane.service_state("web").problem == "full" and len(known.held) == 1
        index = plane.program.held["web", 4].index  # type: ignore[union-attr]
    await plane.stop()
    # It is no longer declared when the next process begins; another has its line.
    later = Declared()
    later.synced.set()
    plane, _ = await begin(clean, later)
    assert plane.tables is not None and plane.program is not None
    mine = ip_network("172.16.0.0/12")
    later.put(
        web(front("192.0.2.2:80", FrontendType.EXTERNAL_IP), name="other", sources=(mine,)), backend("10.0.0.2")
    )
    await plane.settled()
    assert plane.program.held["other", 4].index == index
    there = set(map(bytes, plane.tables.sources.table.keys()))
    assert there == {bytes(abi.SourceKey.of(index, mine))}
    await plane.stop()


async def test_sources_are_admitted_before_they_count(clean: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(clean, declared)
    spec = web(front("192.0.2.1:80", FrontendType.EXTERNAL_IP))
    declared.put(spec, backend("10.0.0.1"))
    await plane.settled()
    held, tables = plane.held("web", 4), plane.tables
    assert held is not None and tables is not None
    seen = []
    real = tables.sources.put_many

    def put(pairs: Any) -> None:
        seen.append(tables.services.at(held.index, abi.Service).flags & abi.ServiceFlag.SOURCES)
        real(pairs)

    monkeypatch.setattr(tables.sources, "put_many", put)
    declared.put(replace(spec, sources=(ip_network("10.0.0.0/8"),)), backend("10.0.0.1"))
    await plane.settled()
    assert seen == [0] and tables.services.at(held.index, abi.Service).flags & abi.ServiceFlag.SOURCES
    await plane.stop()


def test_maglev_is_fast_enough_for_its_default() -> None:
    """Not timed: counts what the size gives."""
    assert maglev.size_for(5) == 509 and maglev.size_for(160) == 16381 and maglev.size_for(100_000) == 131071
