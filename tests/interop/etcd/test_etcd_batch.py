"""Conditional changes made together are made as if each were alone."""

from __future__ import annotations

import asyncio
import random

import pytest

from services.common.errors import NotFound, Unavailable
from services.common.etcd.batch import Batcher, Txn
from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from tests.interop.etcd.etcdrig import hanging


class Counting(EtcdClient):
    """Counts transactions."""

    transactions = 0

    async def transact(self, *args: object, **options: object) -> int | None:
        self.transactions += 1
        return await super().transact(*args, **options)  # type: ignore[arg-type]


@pytest.fixture
async def counting(etcd: EmbeddedEtcd) -> Counting:
    return Counting([etcd.endpoint], timeout_s=10.0)


def create(key: str) -> Txn:
    return Txn({key: 0}, put={key: b""})


async def test_changes_that_come_together_go_together(counting: Counting) -> None:
    async with counting as client:
        batcher = Batcher(client)
        revisions = await asyncio.gather(*(batcher.transact(create(f"k{n}")) for n in range(100)))
        assert all(revisions) and len((await client.get_prefix("k")).kvs) == 100
        assert client.transactions == 1
        await asyncio.gather(*(batcher.transact(create(f"l{n}")) for n in range(300)))
        assert client.transactions == 1 + 3, "300 by 128"
        big = bytes(100 << 10)
        before = client.transactions
        await asyncio.gather(*(batcher.transact(Txn(put={f"b{n}": big})) for n in range(20)))
        assert client.transactions == before + 4, "20 by what etcd takes"


async def test_one_that_fails_does_not_fail_the_others(counting: Counting) -> None:
    async with counting as client:
        await client.put("k3", b"old")
        batcher = Batcher(client)
        revisions = await asyncio.gather(*(batcher.transact(create(f"k{n}")) for n in range(10)))
        assert [revision is None for revision in revisions] == [n == 3 for n in range(10)]
        found = await client.get("k3")
        assert found is not None and found.value == b"old"
        assert client.transactions == 1 + 10, "then each by itself"


async def test_who_gives_up_waiting_holds_up_nobody(counting: Counting) -> None:
    async with counting as client:
        batcher = Batcher(client)
        asking = [asyncio.create_task(batcher.transact(create(f"k{n}"))) for n in range(9)]
        await asyncio.sleep(0)
        asking[0].cancel()
        asking[5].cancel()
        found = await asyncio.gather(*asking, return_exceptions=True)
        assert [isinstance(each, int) for each in found] == [n not in (0, 5) for n in range(9)]


async def test_a_failure_is_everybodys(etcd: EmbeddedEtcd, counting: Counting) -> None:
    async with counting as client:
        batcher = Batcher(client)
        gone = Txn(put={"x": b""}, leases={"x": 12345})
        found = await asyncio.gather(
            batcher.transact(create("a")),
            batcher.transact(create("b")),
            batcher.transact(gone),
            return_exceptions=True,
        )
        assert [type(each) for each in found] == [NotFound] * 3
    async with EtcdClient([etcd.endpoint], timeout_s=0.5) as hasty:
        batcher = Batcher(hasty)
        with hanging(etcd):
            found = await asyncio.gather(
                *(batcher.transact(create(f"h{n}")) for n in range(3)), return_exceptions=True
            )
            assert [type(each) for each in found] == [Unavailable] * 3


async def test_of_two_that_each_forbid_the_other_one_is_made(client: EtcdClient) -> None:
    for pair in (
        (Txn({"x": 0}, put={"y": b""}), Txn({"y": 0}, put={"x": b""})),
        (Txn(nothing_below=["x/"], put={"y/1": b""}), Txn(nothing_below=["y/"], put={"x/1": b""})),
        (Txn({"x": 0}, put={"x": b"1"}), Txn({"x": 0}, put={"x": b"2"})),
    ):
        await client.delete_prefix("")
        batcher = Batcher(client)
        first = asyncio.create_task(batcher.transact(create("first")))
        done = await asyncio.gather(*(batcher.transact(txn) for txn in pair))
        assert await first and sum(revision is not None for revision in done) == 1


async def test_counters_kept_by_many_batchers_lose_nothing(client: EtcdClient) -> None:
    names = ["a", "b", "c"]
    for name in names:
        await client.put(name, b"0")
    made = 0

    async def count(batcher: Batcher) -> None:
        nonlocal made
        for _ in range(40):
            found = await client.get(random.choice(names))
            assert found is not None
            more = b"%d" % (int(found.value) + 1)
            txn = Txn({found.key: found.mod_revision}, put={found.key: more})
            revision = await batcher.transact(txn)
            made += revision is not None

    batchers = [Batcher(client) for _ in range(3)]
    await asyncio.gather(*(count(batcher) for batcher in batchers for _ in range(6)))
    # Of 720; each that is made may be why the 17 others under way are not.
    assert sum(int(kv.value) for kv in (await client.get_prefix("")).kvs) == made >= 40
