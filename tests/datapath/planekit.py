"""A plane of the lb service over real tables, and what a program finds there."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from services.common.instance import Instance
from services.common.kernel import bpf, features, loader
from services.common.kernel.lines import Lines
from services.common.kernel.maps import BpfMap
from services.lb import abi
from services.lb.kernel.writer import Plane, RemovedBackend
from services.lb.locality import Locality
from services.lb.model import (
    TCP,
    Backend,
    BackendKey,
    Frontend,
    FrontendType,
    Spec,
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
def lb_maps() -> Iterator[Instance]:
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
def clean(lb_maps: Instance) -> Iterator[Instance]:
    """Inner maps and elements of a test before are gone."""
    yield lb_maps
    for name in ("lb_lines", "lb_fronts", "lb_nats"):
        fd = bpf.get(str(lb_maps.pin_dir / abi.MAPS[name]))
        for index in range(bpf.map_info(fd).max_entries):
            key = (bpf.ct.c_uint32)(index)
            try:
                bpf.map_elem(bpf.MAP_DELETE, fd, bpf.ct.addressof(key), 0)
            except FileNotFoundError:
                pass
        os.close(fd)
    with (
        BpfMap.open(lb_maps.pin_dir / abi.MAPS["lb_ranges"], abi.RangeKey, abi.Front) as ranges,
        BpfMap.open(lb_maps.pin_dir / abi.MAPS["lb_sources"], abi.SourceKey, abi.Admitted) as sources,
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
