"""The ipcache in real BPF maps: what is written, how often, and what is left alone."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Network, ip_address, ip_network
from pathlib import Path

import pytest

from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from services.common.instance import Instance
from services.common.kernel.maps import BpfMap
from services.common.kernel.netlink import IPAddress
from services.common.pipeline import abi
from services.identity.ipcache.maps import GRACE_S
from services.identity.ipcache.model import address_key, prefix_key
from tests.interop.etcd.etcdrig import until
from tests.interop.ipcache.ipcacherig import (
    PREFIX,
    Member,
    member,
    pinned_maps,
    put_block,
    put_node,
    stored_address,
)


class Kernel:
    """The maps as a program sees them."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance

    @contextlib.contextmanager
    def map(self, name: str) -> Iterator[BpfMap[abi.FibAddr | abi.IpcachePrefix, abi.IpcacheEntry]]:
        key = abi.FibAddr if name == "ipc_addr" else abi.IpcachePrefix
        with BpfMap.open(self.instance.pin_dir / abi.MAPS[name], key, abi.IpcacheEntry) as opened:
            yield opened

    def lookup(self, address: IPAddress | str) -> abi.IpcacheEntry | None:
        """As ipcache_lookup() in bpf/abi/ipcache.h."""
        key = abi.FibAddr.of(address)
        with self.map("ipc_addr") as singles:
            found = singles.lookup(key)
        if found is None:
            with self.map("ipc_prefix") as prefixes:
                longest = abi.IpcachePrefix.from_buffer_copy(b"\x80\0\0\0" + bytes(key))
                found = prefixes.lookup(longest)
        return found

    def content(self) -> dict[bytes, tuple[int, int, int]]:
        """key -> (identity, node, flags)."""
        found = {}
        for name in ("ipc_addr", "ipc_prefix"):
            with self.map(name) as opened:
                for key, value in opened.items():
                    found[bytes(key)] = (value.identity, value.node, value.flags)
        return found


def wanted(who: Member) -> dict[bytes, tuple[int, int, int]]:
    """What the table would have the kernel have."""
    return {
        entry.key: (
            entry.identity,
            who.index.of(entry.node) if entry.node else 0,
            int(entry.single and entry.source.name in ("NODE", "POD")),
        )
        for entry in who.ipcache.entries()
    }


@pytest.fixture
def kernel(place: Path) -> Iterator[Kernel]:
    with pinned_maps(place) as instance:
        yield Kernel(instance)


@contextlib.asynccontextmanager
async def started(
    etcd: EmbeddedEtcd, place: Path, kernel: Kernel, synced: bool = True
) -> AsyncIterator[Member]:
    """Node "a", in step."""
    async with member(etcd.endpoint, "a", place, kernel.instance, lease=False) as a:
        if synced:
            await a.ipcache.synced.wait()
            await a.ipcache.settled()
        yield a


async def fill(client: EtcdClient, pods: int = 20) -> None:
    for number, name in enumerate(("a", "b"), 1):
        await put_node(client, name, f"198.18.77.{number}")
        await put_block(client, name, f"10.{number}.0.0/16", f"10.{number}.0.1")
    for number in range(2, pods + 2):
        address = f"10.2.0.{number}"
        await client.put(PREFIX + address, stored_address(address, 100 + number, "b"))


async def arrived(who: Member, address: str, identity: int) -> None:
    await until(lambda: (e := who.entry(address)) and e.identity == identity, f"{address} with {identity}")


async def test_the_kernel_has_what_the_table_has(
    etcd: EmbeddedEtcd, place: Path, client: EtcdClient, kernel: Kernel
) -> None:
    await fill(client)
    async with started(etcd, place, kernel) as a:
        key = prefix_key(ip_network("198.51.100.7/32"))
        a.ipcache.put_local("o", {key: 7, prefix_key(ip_network("::/0")): 8})
        assert kernel.content() == wanted(a)
        for address, identity, flags in (
            ("10.2.0.5", 105, 1), ("10.2.0.1", 6, 1), ("198.18.77.1", 1, 1), ("10.2.9.9", 3, 0),
            ("198.51.100.7", 7, 0), ("198.51.100.8", 2, 0), ("2001:db8:88::1", 8, 0),
        ):  # fmt: skip
            found = kernel.lookup(address)
            assert found is not None and (found.identity, found.flags) == (identity, flags), address


async def test_a_restarted_process_writes_nothing_that_is_there(
    etcd: EmbeddedEtcd, place: Path, client: EtcdClient, kernel: Kernel
) -> None:
    await fill(client)
    async with started(etcd, place, kernel) as first:
        assert first.ipcache.writes == len(wanted(first))
        before = kernel.content()
    async with started(etcd, place, kernel) as second:
        assert second.ipcache.writes == 0
        assert kernel.content() == before
    # What changed while nobody looked: one new, one other, one gone.
    await client.put(PREFIX + "10.2.0.99", stored_address("10.2.0.99", 199, "b"))
    await client.put(PREFIX + "10.2.0.2", stored_address("10.2.0.2", 999, "b"))
    await client.delete(PREFIX + "10.2.0.3")
    async with started(etcd, place, kernel) as third:
        assert third.ipcache.writes == 3
        assert kernel.content() == wanted(third)


async def test_one_change_is_one_write(
    etcd: EmbeddedEtcd, place: Path, client: EtcdClient, kernel: Kernel
) -> None:
    await fill(client, pods=500)
    async with started(etcd, place, kernel) as a:

        async def writes(key: str, value: bytes | None, address: str, identity: int) -> int:
            before = a.ipcache.writes
            if value is None:
                await client.delete(key)
            else:
                await client.put(key, value)
            await arrived(a, address, identity)
            assert kernel.content() == wanted(a)
            return a.ipcache.writes - before

        one = PREFIX + "10.2.0.7"
        assert await writes(one, stored_address("10.2.0.7", 555, "b"), "10.2.0.7", 555) == 1
        assert await writes(one, None, "10.2.0.7", 3) == 1
        assert await writes(one, stored_address("10.2.0.7", 556, "b"), "10.2.0.7", 556) == 1
        # Nothing that the kernel has changes: a pod's name, a key under a new lease.
        before = a.ipcache.writes
        await client.put(one, stored_address("10.2.0.7", 556, "b", pod="renamed"))
        await until(lambda: (e := a.entry("10.2.0.7")) and e.pod == "renamed", "the name")
        assert a.ipcache.writes == before
        # A node that moves: its own addresses, not its 500 pods.
        await put_node(client, "b", "198.18.77.9")
        await arrived(a, "198.18.77.9", 6)
        assert a.ipcache.writes - before == 2
        assert kernel.content() == wanted(a)


async def test_packets_under_way_may_carry_what_was_before(
    etcd: EmbeddedEtcd, place: Path, client: EtcdClient, kernel: Kernel
) -> None:
    async with started(etcd, place, kernel) as a:
        for identity, previous, before in ((100, 0, 5), (101, 100, 100), (101, 101, 100), (102, 102, 0)):
            key, begun = PREFIX + "10.2.0.7", time.monotonic()
            await client.put(key, stored_address("10.2.0.7", identity, "b", previous))
            await until(
                lambda p=previous: (e := a.entry("10.2.0.7")) and e.previous_identity == p, "the news"
            )
            found = kernel.lookup("10.2.0.7")
            assert found is not None
            assert (found.identity, found.before) == (identity, before)
            if before:
                assert begun + GRACE_S - 1 < found.before_until <= time.monotonic() + GRACE_S + 1
            else:
                assert found.before_until == 0
        a.ipcache.put_local("o", {prefix_key(ip_network("198.51.100.7/32")): 7})
        found = kernel.lookup("198.51.100.7")
        assert found is not None and (found.before, found.before_until) == (0, 0)


async def test_nothing_is_taken_away_before_everything_is_known(
    etcd: EmbeddedEtcd, place: Path, client: EtcdClient, kernel: Kernel
) -> None:
    await fill(client)
    async with started(etcd, place, kernel):
        before = kernel.content()
    await client.delete(PREFIX + "10.2.0.3")
    await client.close()
    await etcd.stop()
    async with started(etcd, place, kernel, synced=False) as a:
        # Without etcd: what is declared here is added, what is there stays.
        taken, free = ip_address("10.2.0.4"), ip_address("198.51.100.7")
        a.ipcache.put_local("o", {address_key(taken): 7, address_key(free): 8})
        assert kernel.content() == {**before, address_key(free): (8, 0, 0)}
        with pytest.raises(errors.FailedPrecondition):
            a.ipcache.put_local("p", {address_key(free): 9})
        assert "waiting for the pods' addresses" in a.ipcache.problem
        await etcd.start()
        await until(lambda: kernel.content() == wanted(a), "the comparison")
        assert address_key(ip_address("10.2.0.3")) not in kernel.content()
        assert kernel.content()[address_key(taken)] == before[address_key(taken)]
        assert a.ipcache.problem == ""


async def test_a_full_map_is_told_and_filled_when_there_is_room(
    etcd: EmbeddedEtcd, place: Path, client: EtcdClient
) -> None:
    with pinned_maps(place, singles=24, prefixes=4) as instance:
        kernel = Kernel(instance)
        await fill(client, pods=40)
        async with started(etcd, place, kernel) as a:

            def lacking() -> int:
                return len(wanted(a)) - len(kernel.content())

            part = next(p for p in a.ipcache.status() if p.name == "map.ipc_addr")
            assert (part.state, part.used, part.capacity) == ("degraded", 24, 24)
            assert f"24 of 24 entries and lacks {lacking()}" in part.message
            # What is not many comes first; what is there can change.
            assert all(kernel.lookup(f"198.18.77.{n}") is not None for n in (1, 2))
            there = [n for n in range(2, 42) if kernel.content().get(address_key(ip_address(f"10.2.0.{n}")))]
            some, other, third = (f"10.2.0.{n}" for n in there[:3])
            await client.put(PREFIX + some, stored_address(some, 7777, "b"))
            await arrived(a, some, 7777)
            found = kernel.lookup(some)
            assert found is not None and found.identity == 7777
            # One goes, another takes its place.
            missing = lacking()
            await client.delete(PREFIX + other)
            await arrived(a, other, 3)
            assert (len(kernel.content()) - 2, lacking()) == (24, missing - 1)
            # New ones wait; declarations that do not fit are refused, with the numbers.
            await client.put(PREFIX + "10.2.1.1", stored_address("10.2.1.1", 1, "b"))
            await arrived(a, "10.2.1.1", 1)
            assert lacking() == missing
            with pytest.raises(errors.ResourceExhausted, match="ipc_addr holds 24 of 24 entries: 1 more"):
                a.ipcache.put_local("o", {address_key(ip_address("198.51.100.1")): 7})
            a.ipcache.put_local("o", {prefix_key(ip_network(f"198.51.{n}.0/24")): 7 for n in range(2)})
            with pytest.raises(errors.ResourceExhausted, match="ipc_prefix holds 4 of 4"):
                a.ipcache.put_local("o", {prefix_key(ip_network("198.51.2.0/24")): 7})
            # Everything fits again.
            for number in range(2, 42):
                if f"10.2.0.{number}" != third:
                    await client.delete(f"{PREFIX}10.2.0.{number}")
            await arrived(a, "10.2.0.41", 3)
            await until(lambda: lacking() == 0, "what had no room")
            assert kernel.content() == wanted(a)
            assert {part.state for part in a.ipcache.status() if part.name == "map.ipc_addr"} == {"ok"}


async def test_maps_may_come_late_and_be_replaced(
    etcd: EmbeddedEtcd, place: Path, client: EtcdClient
) -> None:
    await fill(client)
    async with member(etcd.endpoint, "a", place, lease=False) as early:
        with pytest.raises(errors.NotFound):
            await early.ipcache.use_maps()
        await early.ipcache.synced.wait()
        assert "not installed" in early.ipcache.problem
    with pinned_maps(place) as first, pinned_maps(place) as second:
        async with member(etcd.endpoint, "a", place, first, lease=False) as a:
            await a.ipcache.synced.wait()
            await a.ipcache.settled()
            assert Kernel(first).content() == wanted(a)
            for name in ("ipc_addr", "ipc_prefix"):
                path = first.pin_dir / abi.MAPS[name]
                path.unlink()
                (second.pin_dir / abi.MAPS[name]).rename(path)
            await a.ipcache.use_maps()
            assert Kernel(first).content() == wanted(a)
            await client.put(PREFIX + "10.2.0.2", stored_address("10.2.0.2", 999, "b"))
            await arrived(a, "10.2.0.2", 999)
            assert Kernel(first).content() == wanted(a)


async def test_what_somebody_did_to_the_maps_is_mended(
    etcd: EmbeddedEtcd, place: Path, client: EtcdClient, kernel: Kernel
) -> None:
    await fill(client)
    async with started(etcd, place, kernel) as a:
        writes = a.ipcache.writes
        with kernel.map("ipc_addr") as opened:
            opened.delete(abi.FibAddr.of("10.2.0.2"))
            opened.update(abi.FibAddr.of("10.2.0.3"), abi.IpcacheEntry(identity=1))
            opened.update(abi.FibAddr.of("203.0.113.3"), abi.IpcacheEntry(identity=1))
        await a.ipcache.compare()
        assert kernel.content() == wanted(a)
        assert a.ipcache.writes - writes == 3


async def test_a_node_that_was_forgotten_and_is_back_is_named_anew(
    etcd: EmbeddedEtcd, place: Path, client: EtcdClient, kernel: Kernel
) -> None:
    await fill(client, pods=3)
    async with started(etcd, place, kernel) as a:
        first = a.index.of("b")
        await client.delete(f"{PREFIX.removesuffix('ip/')}nodes/b")
        await until(lambda: a.entry("198.18.77.2") is None, "b's end")
        await put_node(client, "b", "198.18.77.2")
        await arrived(a, "198.18.77.2", 6)
        assert a.index.of("b") != first
        await until(lambda: kernel.content() == wanted(a), "its pods to name it right")


async def test_the_kernel_finds_what_the_table_finds(etcd: EmbeddedEtcd, place: Path, kernel: Kernel) -> None:
    dice = random.Random(7)

    def somewhere() -> IPAddress:
        if dice.random() < 0.5:
            return ip_address(0x0A000000 | dice.getrandbits(6) | dice.getrandbits(6) << 14)
        return ip_address(0xFD00 << 112 | dice.getrandbits(6) | dice.getrandbits(6) << 60)

    async with started(etcd, place, kernel) as a:
        for round_ in range(20):
            entries = {}
            for number in range(30):
                address = somewhere()
                bits = dice.choice((0, 8, 10, 18, 24, 29, address.max_prefixlen, address.max_prefixlen))
                entries[prefix_key(ip_network(f"{address}/{bits}", strict=False))] = number + 1
            a.ipcache.put_local(f"o{round_}", entries)
            for address in (somewhere() for _ in range(60)):
                here, there = a.ipcache.lookup(address), kernel.lookup(address)
                assert (here and here.identity) == (there and there.identity), address
            assert a.ipcache.delete_local(f"o{round_}", None) == len(entries)
        assert kernel.content() == wanted(a)


def test_an_empty_network_of_ipv4_is_the_v4_part_of_the_trie() -> None:
    """What keeps ::/0 from being found for IPv4 addresses."""
    assert abi.IpcachePrefix.of(IPv4Network("0.0.0.0/0")).bits == 96
