"""Watches of a real etcd that is killed, hangs, compacts and is replaced."""

from __future__ import annotations

import asyncio
import shutil

import pytest

from services.common.errors import Unavailable
from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from services.common.etcd.watch import Delete, Put, Snapshot, Synced
from tests.interop.etcd.etcdrig import compact, hanging, kill, until, watching


async def test_a_snapshot_then_every_change_in_order(client: EtcdClient) -> None:
    await client.create({"p/a": b"1", "p/b": b"2", "other": b""})
    async with watching(client, "p/") as watcher:
        await until(lambda: len(watcher.events) == 2, "the snapshot")
        snapshot = watcher.events[0]
        assert isinstance(snapshot, Snapshot)
        assert [(kv.key, kv.value) for kv in snapshot.kvs] == [("p/a", b"1"), ("p/b", b"2")]
        assert watcher.events[1] == Synced(snapshot.revision)
        first = await client.put("p/c", b"3")
        await client.put("other", b"x")
        await client.delete("p/a")
        last = await client.transact({}, put={"p/b": b"4", "p/d": b"5"}, delete=["p/c"])
        assert last is not None
        await watcher.told(
            Put("p/c", b"3", first),
            Delete("p/a", first + 2),
            Put("p/b", b"4", last),
            Put("p/d", b"5", last),
            Delete("p/c", last),
            since=2,
        )


async def test_an_empty_prefix_is_a_snapshot_too(client: EtcdClient) -> None:
    async with watching(client, "nothing/") as watcher:
        await until(lambda: len(watcher.events) == 2, "the snapshot")
        assert isinstance(watcher.events[0], Snapshot) and watcher.events[0].kvs == ()


async def test_a_watch_begins_when_etcd_comes(
    etcd: EmbeddedEtcd, client: EtcdClient, hasty: EtcdClient
) -> None:
    await client.put("p/a", b"1")
    await etcd.stop()
    async with watching(hasty, "p/") as watcher:
        await until(lambda: "reached" in hasty.error, "the client's finding out")
        assert watcher.events == []
        await etcd.start()
        await until(lambda: len(watcher.events) == 2, "the snapshot")


async def test_nothing_is_lost_or_told_twice_over_a_killed_etcd(
    etcd: EmbeddedEtcd, client: EtcdClient
) -> None:
    async with watching(client, "p/") as watcher, EtcdClient([etcd.endpoint]) as other:
        await until(lambda: len(watcher.events) == 2, "the snapshot")
        wanted = []
        for round_ in range(3):
            wanted.append(Put("p/a", b"%d" % round_, await other.put("p/a", b"%d" % round_)))
            await kill(etcd)
            await etcd.start()
            # Before the watch is back, perhaps.
            wanted.append(Put("p/b", b"%d" % round_, await other.put("p/b", b"%d" % round_)))
        await watcher.told(*wanted, since=2)


async def test_after_a_compaction_what_vanished_is_deleted(etcd: EmbeddedEtcd, client: EtcdClient) -> None:
    await client.create({"p/stays": b"1", "p/goes": b"1", "p/changes": b"1"})
    async with watching(client, "p/") as watcher, EtcdClient([etcd.endpoint]) as other:
        await until(lambda: len(watcher.events) == 2, "the snapshot")
        # Cut the watch off, and keep it off while the history it needs goes away.
        target = etcd.run_dir / "client:0"
        hidden = target.rename(etcd.run_dir / "hidden:0")
        await client.close()
        there = EtcdClient([f"unix:{hidden}"])
        await there.delete("p/goes")
        changed = await there.put("p/changes", b"2")
        new = await there.put("p/new", b"1")
        last = await there.put("elsewhere", b"")
        # Before the watch can come back to it.
        await compact(etcd, last, f"unix:{hidden}")
        hidden.rename(target)
        await there.close()
        await watcher.told(
            Delete("p/goes", last),
            Put("p/changes", b"2", changed),
            Put("p/new", b"1", new),
            Synced(last),
            since=2,
        )
        again = await other.put("p/new", b"2")
        await watcher.told(Put("p/new", b"2", again), since=6)


async def test_another_etcd_in_the_same_place_is_noticed(etcd: EmbeddedEtcd, client: EtcdClient) -> None:
    await client.create({"p/gone": b"1", "p/same": b"1"})
    for _ in range(20):
        await client.put("elsewhere", b"")
    async with watching(client, "p/") as watcher:
        await until(lambda: len(watcher.events) == 2, "the snapshot")
        await etcd.stop()
        shutil.rmtree(etcd.data_dir)
        await etcd.start()
        async with EtcdClient([etcd.endpoint]) as other:
            # The same key at the same revision, with another value, and further than the watcher has seen.
            await other.create({"p/other": b"", "p/same": b"2"})
            await until(lambda: len(watcher.events) >= 3, "a new listing")
            for _ in range(40):
                await other.put("elsewhere", b"")
            new = await other.put("p/new", b"")
        await until(lambda: Put("p/new", b"", new) in watcher.events, "the newest change")
        held: dict[str, bytes] = {}
        for event in watcher.events:
            match event:
                case Snapshot(kvs):
                    held = {kv.key: kv.value for kv in kvs}
                case Put(key, value):
                    held[key] = value
                case Delete(key):
                    held.pop(key, None)
        assert held == {"p/other": b"", "p/same": b"2", "p/new": b""}


async def test_a_hanging_etcd_delays_a_watch_and_loses_nothing(
    etcd: EmbeddedEtcd, client: EtcdClient, hasty: EtcdClient
) -> None:
    async with watching(hasty, "p/") as watcher:
        await until(lambda: len(watcher.events) == 2, "the snapshot")
        with hanging(etcd):
            with pytest.raises(Unavailable):
                await hasty.check()
            assert not hasty.healthy
        revision = await client.put("p/a", b"1")
        await watcher.told(Put("p/a", b"1", revision), since=2)


async def test_a_closed_watch_leaves_nothing_running(client: EtcdClient) -> None:
    before = asyncio.all_tasks()
    async with watching(client, "p/") as watcher:
        await until(lambda: len(watcher.events) == 2, "the snapshot")
    await until(lambda: asyncio.all_tasks() <= before, "the end of all that the watch began")
