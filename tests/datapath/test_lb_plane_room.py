"""Tables that grow, that cannot, and that are full."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import random
import struct
from ipaddress import ip_address

import pytest

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import bpf
from services.common.kernel.lines import Lines
from services.common.pipeline.abi import FibAddr
from services.lb import abi
from services.lb.kernel import flows as flows_module
from services.lb.kernel.fronts import inner_of
from services.lb.model import TCP, FrontendType
from tests.datapath.planekit import Declared, Reader, backend, begin, eventually, front, no_memory_for, web


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
