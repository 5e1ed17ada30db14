"""Calls to a real etcd."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from services.common.errors import InvalidArgument, NotFound, ResourceExhausted, Unavailable
from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from services.common.etcd.endpoint import Address, Endpoint, EtcdTls
from services.common.etcd.lease import LeaseKeeper
from tests.interop.etcd.etcdrig import hanging, kill, until


async def test_keys_are_put_read_and_deleted(client: EtcdClient) -> None:
    revision = await client.put("a/1", b"one")
    found = await client.get("a/1")
    assert found is not None
    assert (found.value, found.mod_revision, found.create_revision) == (b"one", revision, revision)
    await client.put("a/2", b"two")
    await client.put("b/1", b"other")
    listing = await client.get_prefix("a/")
    assert [(kv.key, kv.value) for kv in listing.kvs] == [("a/1", b"one"), ("a/2", b"two")]
    assert listing.revision == revision + 2
    assert {kv.value for kv in (await client.get_prefix("a/", keys_only=True)).kvs} == {b""}
    assert len((await client.get_prefix("")).kvs) == 3
    assert await client.delete("a/1") and not await client.delete("a/1")
    assert await client.get("a/1") is None
    assert (await client.delete_prefix("a/"), await client.delete_prefix("a/")) == (1, 0)


async def test_a_listing_of_several_pages_is_of_one_revision(client: EtcdClient) -> None:
    for start in range(0, 4500, 125):
        await client.create({f"many/{start + i:05}": b"v" for i in range(125)})
    listing = await client.get_prefix("many/")
    assert [kv.key for kv in listing.kvs] == [f"many/{i:05}" for i in range(4500)]


async def test_create_makes_all_or_none(client: EtcdClient) -> None:
    assert await client.create({"a": b"1", "b": b"2"})
    assert not await client.create({"b": b"3", "c": b"4"})
    assert [(kv.key, kv.value) for kv in (await client.get_prefix("")).kvs] == [("a", b"1"), ("b", b"2")]


async def test_of_many_who_create_one_key_one_succeeds(client: EtcdClient) -> None:
    won = await asyncio.gather(*(client.create({"key": b"%d" % i, f"mine/{i}": b""}) for i in range(50)))
    assert sum(won) == 1
    found = await client.get("key")
    assert found is not None and found.value == b"%d" % won.index(True)
    assert [kv.key for kv in (await client.get_prefix("mine/")).kvs] == [f"mine/{won.index(True)}"]


async def test_changes_on_condition_of_a_revision(client: EtcdClient) -> None:
    first = await client.cas("key", 0, b"1")
    assert first is not None
    assert await client.cas("key", 0, b"x") is None
    second = await client.cas("key", first, b"2")
    assert second is not None and second > first
    assert await client.cas("key", first, b"x") is None
    assert not await client.delete_if("key", first)
    assert not await client.delete_if("absent", second)
    # Moves: one key goes, another comes, or nothing happens.
    assert await client.transact({"key": first, "new": 0}, put={"new": b"3"}, delete=["key"]) is None
    assert await client.transact({"key": second, "new": 0}, put={"new": b"3"}, delete=["key"])
    assert [kv.key for kv in (await client.get_prefix("")).kvs] == ["new"]


async def test_changes_on_condition_that_nothing_is_below_a_prefix(client: EtcdClient) -> None:
    assert await client.transact({}, nothing_below=["refs/7/"], put={"retired": b""})
    await client.put("refs/7/node", b"")
    await client.put("refs/77/node", b"")
    for below in (["refs/7/"], ["refs/8/", "refs/7/"], ["refs/"], [""]):
        assert await client.transact({}, nothing_below=below, put={"retired": b"x"}) is None
    assert await client.transact({"retired": 1}, nothing_below=["refs/8/"], put={"retired": b"x"}) is None
    found = await client.get("retired")
    assert found is not None and found.value == b""
    assert await client.transact(
        {"retired": found.mod_revision}, nothing_below=["refs/8/", "refs/6"], delete=["retired"]
    )


async def test_keys_of_one_transaction_may_hang_on_several_leases(client: EtcdClient) -> None:
    one, two = await client.grant(60), await client.grant(60)
    put = {"a": b"", "b": b"", "c": b""}
    assert await client.transact({}, put=put, lease=one, leases={"b": two, "c": 0})
    found = await client.get_many(["c", "b", "absent", "a"])
    assert [(kv.key, kv.lease) for kv in found.kvs] == [("c", 0), ("b", two), ("a", one)]
    assert found.revision == found.kvs[0].mod_revision
    assert (await client.keys_of(one), await client.keys_of(two)) == (["a"], ["b"])
    assert await client.transact({}, put={"a": b""}), "a key put again is where it is put last"
    await client.revoke(one)
    await client.revoke(two)
    assert await client.keys_of(two) == []
    assert [kv.key for kv in (await client.get_prefix("")).kvs] == ["a", "c"]


async def test_what_etcd_refuses_is_named(client: EtcdClient) -> None:
    with pytest.raises(InvalidArgument, match="129 conditions exceeds the limit of 128"):
        await client.create({str(i): b"" for i in range(129)})
    with pytest.raises(InvalidArgument, match="129 conditions exceeds the limit of 128"):
        await client.transact({"x": 1}, nothing_below=[str(i) for i in range(128)])
    with pytest.raises(InvalidArgument, match="129 keys exceed the limit of 128"):
        await client.get_many([str(i) for i in range(129)])
    with pytest.raises(InvalidArgument, match="duplicate key"):
        await client.transact({}, put={"a": b""}, delete=["a"])
    with pytest.raises(NotFound, match="lease not found"):
        await client.put("a", b"", lease=12345)
    assert client.healthy, "a refusal is an answer"


async def test_a_full_database_is_resource_exhausted_and_reading_goes_on(place: Path) -> None:
    etcd = EmbeddedEtcd(place / "data", place / "run", quota_bytes=1 << 20)
    await etcd.start()
    async with EtcdClient([etcd.endpoint]) as client:
        with pytest.raises(ResourceExhausted, match="raise its quota"):
            # It knows its size only after the next commit, up to 0.1 s later.
            for i in range(200):
                await client.put(f"big/{i}", bytes(256 << 10))
        assert (await client.get_prefix("big/")).kvs
        assert "full" in await etcd.check(10)


async def test_a_lost_etcd_is_unavailable_after_a_bounded_time_and_found_again(
    etcd: EmbeddedEtcd, hasty: EtcdClient
) -> None:
    await until(lambda: hasty.put("key", b"1"), "a key")
    assert hasty.healthy
    await kill(etcd)
    for call in (hasty.get("key"), hasty.put("key", b"2"), hasty.renew(1)):
        began = time.monotonic()
        with pytest.raises(Unavailable, match="client:0"):
            await call
        assert time.monotonic() - began < 1.5 + 8.0
    assert not hasty.healthy and "reached" in hasty.error
    await etcd.start()
    found = await until(lambda: hasty.get("key"), "reading again")
    assert found.value == b"1", "a call that found no server has had no effect"
    assert hasty.healthy and hasty.error == ""


async def test_a_call_waits_for_an_etcd_that_is_about_to_come(etcd: EmbeddedEtcd, client: EtcdClient) -> None:
    # The client has no connection yet: of one that has just broken it may not know, and then the call fails.
    await etcd.stop()
    waiting = asyncio.create_task(client.put("key", b"2"))
    await etcd.start()
    assert await waiting


async def test_who_waits_for_a_connection_takes_the_one_that_another_call_has_opened(etcd: EmbeddedEtcd) -> None:
    await kill(etcd)
    endpoint = Endpoint(Address.parse(etcd.endpoint), EtcdTls())
    waiting = asyncio.create_task(endpoint.ready(time.monotonic() + 20, patient=True))
    await asyncio.sleep(0.05)
    await endpoint.close()
    # Also who asks why there is none.
    assert "closed" not in await endpoint.why()
    await endpoint.close()
    assert await endpoint.why()
    await etcd.start()
    assert await waiting
    await endpoint.close()


async def test_a_connection_that_is_closed_cancels_nobody(place: Path) -> None:
    """Whose call is under way, or who asks why there is no connection, was not cancelled himself."""
    path = place / "silent"
    server = await asyncio.start_unix_server(lambda reader, writer: None, path)
    client = EtcdClient([f"unix:{path}"], timeout_s=0.1)
    call = asyncio.create_task(client.get("key"))
    while not call.done():
        await asyncio.sleep(0.01)
        await client.close()
    with pytest.raises(Unavailable):
        await call
    await client.close()
    server.close()


async def test_a_hanging_etcd_is_unavailable_after_a_bounded_time_and_found_again(
    etcd: EmbeddedEtcd, hasty: EtcdClient
) -> None:
    await until(lambda: hasty.put("key", b"1"), "a key")
    with hanging(etcd):
        for call, doubt in ((hasty.get("key"), False), (hasty.cas("key", 0, b"x"), True)):
            began = time.monotonic()
            with pytest.raises(Unavailable) as caught:
                await call
            assert time.monotonic() - began < 1.5 + 8.0
            assert ("whether the change was made is unknown" in str(caught.value)) == doubt
        assert not hasty.healthy
    assert (await until(lambda: hasty.get("key"), "reading again")).value == b"1"
    assert hasty.healthy


async def test_keys_of_a_lease_go_with_it(client: EtcdClient) -> None:
    lease = await client.grant(60)
    await client.create({"a": b"", "b": b""}, lease=lease)
    found = await client.get("a")
    assert found is not None and found.lease == lease
    assert 50 < await client.renew(lease) <= 60
    await client.revoke(lease)
    assert (await client.get_prefix("")).kvs == ()
    assert await client.renew(lease) == 0
    await client.revoke(lease)


class Kept:
    """A key kept alive by a lease."""

    def __init__(self, client: EtcdClient, ttl_s: int, lease: int = 0, key: str = "kept") -> None:
        self._client = client
        self._key = key
        self.leases: list[int] = []
        self.granted: list[int] = []
        self.fail = 0
        self.keeper = LeaseKeeper(client, ttl_s, lease=lease, remember=self.granted.append)
        self.keeper.on_grant(self.write)

    async def write(self, lease: int) -> None:
        self.leases.append(lease)
        if self.fail:
            self.fail -= 1
            raise Unavailable("not this time")
        await self._client.put(self._key, b"", lease=lease)


async def test_a_kept_lease_outlives_its_time_and_is_replaced_when_lost(client: EtcdClient) -> None:
    # It may come late to renew it by two thirds of the time.
    kept = Kept(client, 5)
    task = asyncio.create_task(kept.keeper.run())
    try:
        await until(lambda: client.get("kept"), "the key written")
        began = time.monotonic()
        await until(lambda: time.monotonic() - began > 6, "more than its time")
        assert await client.get("kept") is not None
        assert kept.leases == kept.granted and len(kept.leases) == 1 and kept.keeper.valid

        kept.fail = 1
        await client.revoke(kept.leases[0])
        assert await client.get("kept") is None
        await until(lambda: kept.keeper.problem, "notice of the failure")
        await until(lambda: client.get("kept"), "the key written anew")
        # Asked again with the same lease after it had failed.
        assert len(kept.leases) == 3 and kept.leases[1] == kept.leases[2] == kept.keeper.lease
        await until(lambda: not kept.keeper.problem, "the end of the problem")
    finally:
        task.cancel()
    await kept.keeper.revoke()
    assert await client.get("kept") is None and kept.keeper.lease == 0


async def test_a_lease_that_somebody_misses_is_replaced_at_once(client: EtcdClient) -> None:
    kept = Kept(client, 60)
    task = asyncio.create_task(kept.keeper.run())
    try:
        await until(lambda: client.get("kept"), "the key written")
        await client.revoke(kept.keeper.lease)
        kept.keeper.suspect()
        await until(lambda: client.get("kept"), "the key written anew")
        assert kept.leases == kept.granted and len(kept.leases) == 2
    finally:
        task.cancel()


async def test_a_lease_is_gone_on_with_unless_it_has_ended(client: EtcdClient) -> None:
    lease = await client.grant(60)
    first = Kept(client, 60, lease)
    assert first.keeper.lease == 0 and not first.keeper.valid
    task = asyncio.create_task(first.keeper.run())
    try:
        await until(lambda: client.get("kept"), "the key written")
        assert first.leases == [lease] and first.granted == []
    finally:
        task.cancel()
    await client.revoke(lease)
    second = Kept(client, 60, lease)
    task = asyncio.create_task(second.keeper.run())
    try:
        await until(lambda: client.get("kept"), "the key written anew")
        assert second.leases == second.granted != [lease]
    finally:
        task.cancel()


async def test_who_has_keys_under_a_lease_holds_up_nobody_else(client: EtcdClient) -> None:
    kept = Kept(client, 5)
    stuck = asyncio.Event()

    async def wait(_lease: int) -> None:
        await stuck.wait()

    kept.keeper.on_grant(wait)
    task = asyncio.create_task(kept.keeper.run())
    try:
        await until(lambda: client.get("kept"), "the key written")
        late = Kept(client, 5, key="late")
        kept.keeper.on_grant(late.write)
        await until(lambda: client.get("late"), "the key of one who came later")
        began = time.monotonic()
        await until(lambda: time.monotonic() - began > 6, "more than the lease's time")
        assert kept.keeper.valid and len(kept.granted) == 1
    finally:
        task.cancel()


async def test_a_kept_lease_survives_an_etcd_that_is_killed(etcd: EmbeddedEtcd, client: EtcdClient) -> None:
    kept = Kept(client, 2)
    task = asyncio.create_task(kept.keeper.run())
    try:
        await until(lambda: kept.keeper.valid, "the first lease")
        await kill(etcd)
        await until(lambda: not kept.keeper.valid, "the end of it by our own clock")
        await etcd.start()
        await until(lambda: kept.keeper.valid, "a valid lease")
        await until(lambda: client.get("kept"), "the key")
    finally:
        task.cancel()
