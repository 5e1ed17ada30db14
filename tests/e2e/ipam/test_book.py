"""Address books of several nodes on one real etcd."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from services.ipam.db import open_db
from services.ipam.pools.book import AddressBook
from services.ipam.pools.holdings import Holdings
from services.ipam.pools.model import REST_S
from services.ipam.pools.store import PoolStore
from services.ipam.pools.types import Family, Pool, PoolMode, checked_pool


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Node:
    """One node's book on its own database."""

    def __init__(self, name: str, tmp: Path, url: str, first: Pool | None) -> None:
        self.clock = Clock()
        self.etcd = EtcdClient([url], timeout_s=2.0)
        self.db = open_db(tmp / f"{name}.db")
        self.book = AddressBook(Holdings(self.db), self.etcd, PoolStore(self.etcd, "c"), name, first, self.clock)

    async def close(self) -> None:
        await self.book.stop()
        await self.etcd.close()
        self.db.close()


@pytest.fixture
async def etcd(tmp_path: Path) -> AsyncIterator[EmbeddedEtcd]:
    server = EmbeddedEtcd(tmp_path / "etcd-data", tmp_path / "etcd-run")
    await server.start()
    yield server
    await server.stop()


def small(cidr: str = "10.9.0.0/28", prefix: int = 29) -> Pool:
    return checked_pool("default", 0, [cidr], [], prefix, 0)


@asynccontextmanager
async def node(name: str, tmp: Path, etcd: EmbeddedEtcd, first: Pool | None) -> AsyncIterator[Node]:
    made = Node(name, tmp, etcd.endpoint, first)
    await made.book.start()
    try:
        await until(lambda: made.book.synced)
        yield made
    finally:
        await made.close()


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions of any kind
            await asyncio.sleep(0.01)


async def test_the_same_owner_gets_the_same_address_also_when_it_asks_twice_at_once(
        tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    first = checked_pool("default", 0, ["10.9.0.0/24", "fd00:9::/96"], [], 28, 112)
    async with node("a", tmp_path, etcd, first) as a:
        answers = await asyncio.gather(*(a.book.allocate("pod") for _ in range(10)))
        assert all(answer == answers[0] for answer in answers)
        assert [x.family for x in answers[0]] == [Family.IPV4, Family.IPV6]
        assert await a.book.allocate("pod", family=Family.IPV6) == [answers[0][1]]
        assert len(a.book.allocations()) == 2


async def test_exhaustion_says_the_numbers_changes_nothing_and_spares_other_nodes(
        tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small()) as a, node("b", tmp_path, etcd, None) as b:
        # Two blocks of 8: each has 5 addresses besides network, gateway and broadcast.
        got = [(await a.book.allocate(f"a{i}"))[0] for i in range(5)]
        assert len({x.address for x in got}) == 5
        assert not {x.address for x in got} & {block.gateway for block in a.book.blocks()}
        with pytest.raises(errors.ResourceExhausted, match="5 of 5 in its 1 blocks are in use, and all 2 blocks"):
            await a.book.allocate("a5")
        assert len(a.book.allocations()) == 5
        assert await b.book.allocate("b0")


async def test_two_nodes_never_get_one_block(tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small("10.9.0.0/24", 29)) as a, node("b", tmp_path, etcd, None) as b:
        jobs = [n.book.allocate(f"{n.book._node}{i}") for i in range(75) for n in (a, b)]
        answers = await asyncio.gather(*jobs)
        addresses = [x.address for (x,) in answers]
        assert len(set(addresses)) == 150
        claimed = await a.book.all_blocks()
        assert len({x.cidr for x in claimed}) == len(claimed) == 30
        assert {x.cidr for x in a.book.blocks()} == {x.cidr for x in claimed if x.node == "a"}


async def test_a_released_address_rests_but_is_better_than_none(tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small("10.9.0.0/29", 29)) as a:
        (old,) = await a.book.allocate("old")
        await a.book.release("old")
        others = [(await a.book.allocate(f"o{i}"))[0].address for i in range(4)]
        assert old.address not in others
        (last,) = await a.book.allocate("last")
        assert last.address == old.address


async def test_rest_survives_a_restart_and_ends(tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small("10.9.0.0/24", 24)) as a:
        (old,) = await a.book.allocate("old")
        await a.book.release("old")
    async with node("a", tmp_path, etcd, None) as a:
        assert (await a.book.allocate("new"))[0].address != old.address
        a.clock.now += REST_S + 1
        everything = {(await a.book.allocate(f"n{i}"))[0].address for i in range(252)}
        assert old.address in everything


async def test_without_etcd_allocation_goes_on_within_the_blocks_and_recovers(
        tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small()) as a:
        await etcd.stop()
        for i in range(5):
            assert await a.book.allocate(f"a{i}")
        with pytest.raises(errors.Unavailable):
            await a.book.allocate("a5")
        with pytest.raises(errors.Unavailable):
            await a.book.put_pool(checked_pool("more", 0, ["10.10.0.0/24"], [], 0, 0))
        assert len(a.book.allocations()) == 5
        await etcd.start()
        assert await a.book.allocate("a5")


async def test_a_node_starts_without_etcd_on_what_it_remembers(tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small()) as a:
        (before,) = await a.book.allocate("pod")
        gateway = a.book.blocks()[0].gateway
    await etcd.stop()
    again = Node("a", tmp_path, etcd.endpoint, None)
    await again.book.start()
    try:
        assert (await again.book.allocate("pod"))[0].address == before.address
        assert (await again.book.allocate("pod2"))[0].gateway == gateway
        assert not again.book.synced
    finally:
        await again.close()


async def test_pools_grow_online_and_shrink_only_where_nothing_is_used(tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small("10.9.0.0/29", 29)) as a:
        for i in range(5):
            await a.book.allocate(f"a{i}")
        with pytest.raises(errors.ResourceExhausted):
            await a.book.allocate("a5")
        grown = await a.book.put_pool(checked_pool("default", 0, ["10.9.0.0/29", "10.9.1.0/29"], [], 29, 0))
        assert (await a.book.allocate("a5"))[0].address.startswith("10.9.1.")
        late = Node("late", tmp_path, etcd.endpoint, None)  # for which no block is left
        await late.book.start()
        await until(lambda: "all 2 blocks" in late.book.problem)
        with pytest.raises(errors.FailedPrecondition, match=r"10\.9\.1\.0/29"):
            await a.book.put_pool(small("10.9.0.0/29", 29))
        with pytest.raises(errors.FailedPrecondition, match="is in use by a5"):
            await a.book.put_pool(checked_pool("default", 0, ["10.9.0.0/29", "10.9.1.0/29"], ["10.9.1.2"], 29, 0))
        with pytest.raises(errors.Aborted):
            await a.book.put_pool(checked_pool("default", 0, ["10.9.0.0/29"], [], 29, 0, grown.revision - 1))
        assert a.book.pool("default") == grown
        await a.book.put_pool(checked_pool("default", 0, ["10.9.0.0/29", "10.9.1.0/29", "10.9.2.0/29"], [], 29, 0))
        await until(lambda: late.book.synced and late.book.blocks())
        await late.close()


async def test_pools_may_not_overlap_whichever_node_makes_them(tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small()) as a, node("b", tmp_path, etcd, None) as b:
        jobs = [n.book.put_pool(checked_pool(f"p{i}", 0, ["10.77.0.0/16"], [], 0, 0))
                for i, n in enumerate((a, b, a, b))]
        answers = await asyncio.gather(*jobs, return_exceptions=True)
        assert [isinstance(x, Pool) for x in answers].count(True) == 1
        assert all(isinstance(x, Pool | errors.AlreadyExists | errors.Aborted) for x in answers)
        await until(lambda: len(b.book.pools()) == 2 == len(a.book.pools()))


async def test_cloud_addresses_come_and_go_with_the_provider(tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small()) as a:
        await a.book.put_pool(checked_pool("eni", PoolMode.CLOUD, ["172.31.0.0/16"], [], 0, 0))
        with pytest.raises(errors.ResourceExhausted, match="0 of 0"):
            await a.book.allocate("pod", "eni")
        results = await a.book.add_cloud("eni", ["172.31.5.5", "10.1.1.1", "nonsense", "172.31.5.5"])
        assert [r is None for r in results] == [True, False, False, True]
        (got,) = await a.book.allocate("pod", "eni")
        assert (got.address, got.gateway, got.block) == ("172.31.5.5", "", "")
        (refused,) = await a.book.remove_cloud("eni", ["172.31.5.5"])
        assert isinstance(refused, errors.FailedPrecondition)
        await a.book.release("pod")
        assert await a.book.remove_cloud("eni", ["172.31.5.5", "172.31.9.9"]) == [None, None]
        with pytest.raises(errors.ResourceExhausted):
            await a.book.allocate("pod", "eni")


async def test_cloud_addresses_in_use_keep_their_prefix(tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small()) as a:
        await a.book.put_pool(checked_pool("eni", PoolMode.CLOUD, ["172.31.0.0/24", "172.31.1.0/24"], [], 0, 0))
        await a.book.add_cloud("eni", ["172.31.0.5"])
        await a.book.allocate("pod", "eni")
        with pytest.raises(errors.FailedPrecondition, match=r"172\.31\.0\.5"):
            await a.book.put_pool(checked_pool("eni", PoolMode.CLOUD, ["172.31.1.0/24"], [], 0, 0))
        await a.book.release("pod")
        await a.book.put_pool(checked_pool("eni", PoolMode.CLOUD, ["172.31.1.0/24"], [], 0, 0))
        with pytest.raises(errors.ResourceExhausted):  # what lies outside now is not given out any more
            await a.book.allocate("pod", "eni")


async def test_withdrawing_or_deleting_touches_one_cloud_pool_only(tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small()) as a:
        for name, cidr in (("one", "172.31.0.0/24"), ("two", "172.31.1.0/24")):
            await a.book.put_pool(checked_pool(name, PoolMode.CLOUD, [cidr], [], 0, 0))
        await a.book.add_cloud("one", ["172.31.0.5"])
        await a.book.add_cloud("two", ["172.31.1.5"])
        (held,) = await a.book.allocate("pod", "one")
        await a.book.remove_cloud("two", [held.address])
        await a.book.delete_pool("two")
        await a.book.put_pool(checked_pool("two", 0, ["172.31.1.0/24"], [], 0, 0))
    async with node("a", tmp_path, etcd, None) as a:
        assert a.book.allocations() == [held]
        assert "two" not in {b.pool for b in a.book.blocks()}


async def test_specific_addresses(tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small("10.9.0.0/24", 28)) as a, node("b", tmp_path, etcd, None) as b:
        (got,) = await a.book.allocate("pod", address="10.9.0.200")
        assert got.address == "10.9.0.200"
        assert await a.book.allocate("pod", address="10.9.0.200") == [got]
        with pytest.raises(errors.AlreadyExists, match="held by 'pod'"):
            await a.book.allocate("other", address="10.9.0.200")
        with pytest.raises(errors.AlreadyExists, match="holds"):
            await a.book.allocate("pod", address="10.9.0.201")
        with pytest.raises(errors.FailedPrecondition, match="another node"):
            await b.book.allocate("pod", address="10.9.0.201")
        for reserved in (got.gateway, "10.9.0.192", "10.9.0.207"):
            with pytest.raises(errors.InvalidArgument, match="reserved"):
                await a.book.allocate("x", address=reserved)
        with pytest.raises(errors.InvalidArgument, match="outside"):
            await a.book.allocate("x", address="11.0.0.1")


async def test_what_is_not_renewed_lapses(tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small()) as a:
        await a.book.allocate("short", ttl=10)
        await a.book.allocate("long", ttl=10)
        await a.book.allocate("ever")
        await a.book.renew("long", 100)
        a.clock.now += 11
        await until(lambda: not a.book.allocations("short"))
        assert a.book.allocations("long") and a.book.allocations("ever")
        with pytest.raises(errors.NotFound):
            await a.book.renew("short", 5)


async def test_watching_gives_a_snapshot_then_changes_and_resumes(tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small()) as a:
        await a.book.allocate("one")
        stream = a.book.feed.watch()
        assert (await anext(stream)).item == a.book.allocations("one")[0]
        mark = await anext(stream)
        assert mark.kind == "synced"
        await a.book.allocate("two")
        await a.book.release("one")
        changes = [await anext(stream), await anext(stream)]
        assert [(c.kind, c.item.owner if c.item else "") for c in changes] == [("put", "two"), ("delete", "one")]
        resumed = a.book.feed.watch(changes[0].revision)
        assert await anext(resumed) == changes[1]


async def test_a_pool_in_use_is_not_deleted(tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small()) as a, node("b", tmp_path, etcd, None) as b:
        await a.book.put_pool(checked_pool("p", 0, ["10.80.0.0/24"], [], 28, 0))
        await until(lambda: len(b.book.pools()) == 2)
        await b.book.allocate("pod", "p")
        with pytest.raises(errors.FailedPrecondition, match="node b"):
            await a.book.delete_pool("p")
        with pytest.raises(errors.FailedPrecondition, match="1 addresses"):
            await b.book.delete_pool("p")
        await b.book.release("pod")
        await b.book.delete_pool("p")
        await until(lambda: len(a.book.pools()) == 1)
        assert not [x for x in await a.book.all_blocks() if x.pool == "p"]


async def test_a_deleted_pool_stays_deleted_and_gives_nothing_while_it_goes(
    tmp_path: Path, etcd: EmbeddedEtcd
) -> None:
    async with node("a", tmp_path, etcd, small()) as a:
        for i in range(10):  # the watch is often quicker than the answer
            await a.book.put_pool(checked_pool("p", 0, [f"10.80.{i}.0/24"], [], 28, 0))
            await a.book.allocate("pod", "p")
            await a.book.release("pod")
            answers = await asyncio.gather(
                a.book.delete_pool("p"), a.book.allocate("late", "p"), return_exceptions=True
            )
            if isinstance(answers[0], errors.FailedPrecondition):  # the allocation was quicker
                assert isinstance(answers[1], list)
                await a.book.release("late")
                await a.book.delete_pool("p")
            else:
                assert answers[0] is None
                assert isinstance(answers[1], errors.NotFound)
        await asyncio.sleep(0.2)
        assert [p.name for p in a.book.pools()] == ["default"]
    async with node("a", tmp_path, etcd, None) as a:  # within the rest of the last address
        assert [p.name for p in a.book.pools()] == ["default"]
        assert {b.pool for b in a.book.blocks()} == {"default"}


async def test_a_pool_that_could_not_be_deleted_is_as_before(tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small()) as a:
        await a.book.put_pool(checked_pool("p", 0, ["10.80.0.0/24"], [], 28, 0))
        await a.book.allocate("pod", "p")
        await a.book.release("pod")
        blocks = a.book.blocks()
        await etcd.stop()
        with pytest.raises(errors.Unavailable):
            await a.book.delete_pool("p")
        assert set(a.book.blocks()) == set(blocks)
        assert await a.book.allocate("pod", "p")
        await etcd.start()


async def test_an_etcd_that_lost_its_data_gets_the_blocks_again(tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small()) as a:
        (held,) = await a.book.allocate("pod")
    client = EtcdClient([etcd.endpoint])
    await client.delete_prefix("/fibril/v1/c/blocks/")
    await client.close()
    async with node("a", tmp_path, etcd, small()) as a:
        assert held.block in {x.cidr for x in await a.book.all_blocks()}
        assert a.book.allocations("pod") == [held]


async def test_a_pool_in_use_is_put_back_into_an_etcd_that_lost_all_its_data(
    tmp_path: Path, etcd: EmbeddedEtcd
) -> None:
    async with node("a", tmp_path, etcd, small("10.9.0.0/28", 29)) as a:
        (held,) = await a.book.allocate("pod")
        await etcd.stop()
        shutil.rmtree(tmp_path / "etcd-data")
        await etcd.start()

        async def restored() -> bool:
            return held.block in {x.cidr for x in await a.book.all_blocks()}

        async with asyncio.timeout(15):
            while not await restored():  # noqa: ASYNC110 - etcd tells nobody
                await asyncio.sleep(0.05)
        for i in range(5):  # the second block can be claimed again
            await a.book.allocate(f"a{i}")
        assert len(a.book.blocks()) == 2


async def test_addresses_of_owners_that_are_gone_are_swept(tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small()) as a:
        for owner in ("endpoint/x/eth0", "endpoint/y/eth0", "job"):
            await a.book.allocate(owner)
        await a.book.sweep("endpoint/", {"endpoint/x/eth0"})
        assert {x.owner for x in a.book.allocations()} == {"endpoint/x/eth0", "job"}


async def test_a_full_disk_is_named_kills_nothing_and_passes(tmp_path: Path, etcd: EmbeddedEtcd) -> None:
    async with node("a", tmp_path, etcd, small("10.9.0.0/24", 24)) as a:
        await a.book.allocate("brief", ttl=1.0)
        (pages,) = a.db.execute("PRAGMA page_count").fetchone()
        a.db.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(errors.ResourceExhausted, match="full"):
            for i in range(200):
                await a.book.allocate(f"{i:0255}")
        held = len(a.book.allocations())
        a.db.execute("PRAGMA max_page_count=100000")
        await a.book.allocate("after")
        assert len(a.book.allocations()) == held + 1
        a.clock.now += 2
        await until(lambda: not a.book.allocations("brief"))
        assert not any(task.done() for task in a.book.tasks())


def test_what_was_committed_before_a_kill_is_there_after_it(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from services.ipam.db import open_db
        from services.ipam.pools.holdings import Holdings
        from services.ipam.pools.types import checked_pool
        from ipaddress import ip_address, ip_network
        from pathlib import Path
        h = Holdings(open_db(Path(sys.argv[1])))
        pool = checked_pool("default", 0, ["10.9.0.0/16"], [], 16, 0)
        h.set_pool(pool)
        block = h.add_block(pool, ip_network("10.9.0.0/16"), ip_address("10.9.0.1"))
        i = 0
        while True:
            h.commit([h.make(block, block.take(0.0), "default", f"o{i}", 0.0, 1.0)])
            print(f"o{i}", flush=True)
            i += 1
    """)
    path = tmp_path / "x.db"
    child = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True,
                             cwd=Path(__file__).resolve().parents[3])
    assert child.stdout
    answered = [child.stdout.readline().strip() for _ in range(300)]
    os.kill(child.pid, signal.SIGKILL)
    answered += child.stdout.read().split()
    child.wait()
    held = Holdings(open_db(path))
    assert set(answered) <= set(held.owners())
    addresses = [a.address for a in held.all()]
    assert len(set(addresses)) == len(addresses)
    block = held.shelf("default", Family.IPV4).holder(int(ip_address(addresses[0])))
    assert block is not None
    assert str(ip_address(block.take(0.0) or 0)) not in addresses


def test_a_damaged_or_newer_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"not a database, surely" * 100)
    with pytest.raises(errors.FailedPrecondition, match="cannot be used"):
        open_db(damaged)
    assert damaged.read_bytes().startswith(b"not a database")
    newer = tmp_path / "newer.db"
    sqlite3.connect(newer).execute("PRAGMA user_version=99").connection.close()
    with pytest.raises(errors.FailedPrecondition, match="version 99"):
        open_db(newer)


def test_the_database_is_for_its_owner_only(tmp_path: Path) -> None:
    open_db(tmp_path / "state" / "ipam.db").close()
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
