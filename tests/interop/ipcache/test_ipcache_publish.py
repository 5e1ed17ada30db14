"""Nodes that publish addresses and follow each other's, on a real etcd."""

from __future__ import annotations

import asyncio
import random
import shutil
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest

from fibril.ipcache.v1 import ipcache_pb2 as pb
from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from services.identity.ipcache.model import Source
from services.identity.ipcache.publisher import BATCH, Published
from tests.interop.etcd.etcdrig import compact, hanging, kill, until
from tests.interop.ipcache.ipcacherig import PREFIX, Member, member, stored, stored_address

A1, A2, A3 = (IPv4Address(f"10.0.0.{n}") for n in (1, 2, 3))
V6 = IPv6Address("fd00::1")


async def knows(who: Member, address: object, identity: int, node: str) -> None:
    await until(lambda: who.pods().get(str(address)) == (identity, node), f"{who.name} to learn {address}")


async def granted(who: Member) -> None:
    await until(lambda: who.publisher._lease, "a lease")


async def test_without_a_lease_nothing_is_published_yet(etcd: EmbeddedEtcd, place: Path) -> None:
    async with member(etcd.endpoint, "a", place, lease=False) as a:
        a.publisher.want({})
        with pytest.raises(errors.Unavailable, match="no lease"):
            await a.publisher.put(A1, 100)
        await a.publisher.remove(A2)
        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(a.lease.run())
            await knows(a, A1, 100, "a")
            keeping.cancel()


async def test_a_node_whose_name_another_has_taken_deletes_nothing(
    etcd: EmbeddedEtcd, place: Path, client: EtcdClient
) -> None:
    async def refuse(lease: int) -> None:
        raise errors.FailedPrecondition("the name is another's")

    async with member(etcd.endpoint, "a", place) as a:
        a.publisher.want({})
        await granted(a)
        a.lease.first(refuse)
        await a.lose_lease()
        await until(lambda: not a.lease.lease, "the end of the lease")
        theirs = pb.StoredAddress(address=str(A1), identity=100, node="a")
        await client.put(PREFIX + str(A1), theirs.SerializeToString())
        await knows(a, A1, 100, "a")
        with pytest.raises(errors.Unavailable, match="no lease"):
            await a.publisher.put(A2, 100)
        await asyncio.sleep(0.3)
        assert await stored(client) == {str(A1): (100, "a")}


async def test_what_one_node_publishes_the_other_knows(etcd: EmbeddedEtcd, place: Path) -> None:
    async with member(etcd.endpoint, "a", place) as a, member(etcd.endpoint, "b", place) as b:
        a.publisher.want({})
        await granted(a)
        await a.publisher.put(A1, 100, previous=5, pod="default/one")
        await a.publisher.put(V6, 100)
        await knows(b, A1, 100, "a")
        await knows(b, V6, 100, "a")
        entry = b.entry("10.0.0.1")
        assert entry is not None
        assert (entry.source, entry.pod, entry.previous_identity) == (Source.POD, "default/one", 5)
        await a.publisher.put(A1, 101, previous=100)
        await knows(b, A1, 101, "a")
        await a.publisher.remove(A1)
        await until(lambda: set(b.pods()) == {str(V6)}, "the removal")
        assert await stored(b.etcd) == {str(V6): (100, "a")}


async def test_many_addresses_take_few_transactions(
    etcd: EmbeddedEtcd, place: Path, client: EtcdClient
) -> None:
    async with member(etcd.endpoint, "a", place) as a:
        a.publisher.want({})
        await granted(a)
        before = (await client.get_prefix(PREFIX)).revision
        await asyncio.gather(*(a.publisher.put(IPv4Address(0x0A000000 + n), 7) for n in range(5 * BATCH)))
        listing = await client.get_prefix(PREFIX)
        assert len(listing.kvs) == 5 * BATCH
        assert listing.revision - before <= 6
        await asyncio.gather(*(a.publisher.remove(IPv4Address(0x0A000000 + n)) for n in range(5 * BATCH)))
        after = await client.get_prefix(PREFIX)
        assert after.kvs == ()
        assert after.revision - listing.revision <= 6


async def test_a_restarted_node_writes_only_what_differs(etcd: EmbeddedEtcd, place: Path) -> None:
    async with EtcdClient([etcd.endpoint]) as client:
        await client.put(f"{PREFIX}10.9.9.9", stored_address("10.9.9.9", 1, "other"))
        # Nobody ends the lease of a process that was killed.
        lease = await client.grant(60)
        for address, identity in ((A1, 100), (A2, 100), (A3, 100)):
            await client.put(
                f"{PREFIX}{address}", stored_address(str(address), identity, "a", 3), lease=lease
            )
        before = (await client.get_prefix(PREFIX)).revision
        async with member(etcd.endpoint, "a", place) as a:
            await granted(a)
            await a.ipcache.synced.wait()
            assert (await client.get_prefix(PREFIX)).revision == before
            # One that is right, one whose identity has changed, one that is gone.
            a.publisher.want({A1: Published(100), A2: Published(200)})
            await until(lambda: set(a.pods()) == {"10.9.9.9", str(A1), str(A2)}, "the removal")
            await knows(a, A2, 200, "a")
            listing = await client.get_prefix(PREFIX)
            assert listing.revision == before + 2
            assert await stored(client) == {
                "10.9.9.9": (1, "other"),
                str(A1): (100, "a"),
                str(A2): (200, "a"),
            }


async def test_after_a_lost_lease_everything_is_published_again(etcd: EmbeddedEtcd, place: Path) -> None:
    async with member(etcd.endpoint, "a", place) as a, member(etcd.endpoint, "b", place) as b:
        await granted(a)
        a.publisher.want({A1: Published(100), V6: Published(100)})
        await knows(b, A1, 100, "a")
        await knows(b, V6, 100, "a")
        for _ in range(3):
            first = a.lease.lease
            await a.lose_lease()
            await until(lambda first=first: a.lease.lease not in (0, first), "a new lease")
            await until(lambda: _is_under(b.etcd, a, 2), "both keys under the new lease")
            await until(lambda: len(b.pods()) == 2, "b to know both")


async def test_keys_that_vanish_are_written_again(
    etcd: EmbeddedEtcd, place: Path, client: EtcdClient
) -> None:
    """The lease of an earlier process, whose number was lost, takes its keys along when it ends."""
    lease = await client.grant(60)
    await client.put(f"{PREFIX}{A1}", stored_address(str(A1), 100, "a"), lease=lease)
    async with member(etcd.endpoint, "a", place) as a:
        await granted(a)
        a.publisher.want({A1: Published(100)})
        await knows(a, A1, 100, "a")
        await client.revoke(lease)
        await until(lambda: _is_under(client, a), "the key under the new lease")


async def _is_under(client: EtcdClient, who: Member, count: int = 1) -> bool:
    kvs = (await client.get_prefix(PREFIX)).kvs
    return len(kvs) == count and all(kv.lease == who.lease.lease for kv in kvs)


async def test_a_late_removal_spares_what_another_node_has_published(etcd: EmbeddedEtcd, place: Path) -> None:
    async with member(etcd.endpoint, "a", place) as a, member(etcd.endpoint, "b", place) as b:
        for each in (a, b):
            each.publisher.want({})
            await granted(each)
        await a.publisher.put(A1, 100)
        await knows(b, A1, 100, "a")
        # The pod moves: b publishes, then a, who may not have heard of it, withdraws; and a's lease ends.
        await asyncio.gather(b.publisher.put(A1, 100), a.publisher.remove(A1))
        await until(lambda: _node_of(b, A1) == "b", "b's entry")
        await a.lose_lease()
        await b.publisher.put(A2, 5)
        await knows(a, A2, 5, "b")
        assert a.pods()[str(A1)] == b.pods()[str(A1)] == (100, "b")
        assert a.publisher.problem == b.publisher.problem == ""


def _node_of(who: Member, address: object) -> str:
    return who.pods().get(str(address), (0, ""))[1]


async def test_two_nodes_that_claim_one_address_do_not_fight(
    etcd: EmbeddedEtcd, place: Path, client: EtcdClient
) -> None:
    async with member(etcd.endpoint, "a", place) as a, member(etcd.endpoint, "b", place) as b:
        for each in (a, b):
            each.publisher.want({})
            await granted(each)
        await a.publisher.put(A1, 100)
        await b.publisher.put(A1, 200)
        await until(lambda: "node b, too, publishes 10.0.0.1" in a.publisher.problem, "the report")
        assert b.publisher.problem == ""
        revision = (await client.get_prefix(PREFIX)).revision
        await asyncio.sleep(0.3)
        assert (await client.get_prefix(PREFIX)).revision == revision
        await b.publisher.remove(A1)
        await knows(b, A1, 100, "a")
        assert a.publisher.problem == ""


async def test_what_cannot_be_published_now_is_as_soon_as_possible(etcd: EmbeddedEtcd, place: Path) -> None:
    async with member(etcd.endpoint, "a", place) as a, member(etcd.endpoint, "b", place) as b:
        a.publisher.want({})
        await granted(a)
        await a.publisher.put(A1, 100)
        await knows(b, A1, 100, "a")
        await etcd.stop()
        with pytest.raises(errors.Unavailable):
            await a.publisher.put(A2, 100)
        await a.publisher.remove(A1)
        assert a.publisher.problem
        assert set(b.pods()) >= {str(A1)}
        await etcd.start()
        await until(lambda: set(b.pods()) == {str(A2)}, "both changes")
        await until(lambda: not a.publisher.problem, "health")


async def test_a_hanging_etcd_delays_and_loses_nothing(etcd: EmbeddedEtcd, place: Path) -> None:
    async with member(etcd.endpoint, "a", place) as a, member(etcd.endpoint, "b", place) as b:
        a.publisher.want({})
        await granted(a)
        with hanging(etcd):
            with pytest.raises(errors.Unavailable):
                await a.publisher.put(A1, 100)
            # Which attempt was taken, if any, is not known.
            a.publisher.want({A2: Published(100)})
        await until(lambda: set(b.pods()) == {str(A2)}, "the last word")
        await until(lambda: _same(b), "etcd to have the same")


async def _same(who: Member) -> bool:
    return await stored(who.etcd) == who.pods()


async def test_nothing_is_forgotten_before_it_is_listed_again(etcd: EmbeddedEtcd, place: Path) -> None:
    async with member(etcd.endpoint, "b", place) as b, EtcdClient([etcd.endpoint]) as other:
        everything = {str(IPv4Address(0x0A000000 + n)): (7, "a") for n in range(50)}
        for address, (identity, node) in everything.items():
            await other.put(PREFIX + address, stored_address(address, identity, node))
        await until(lambda: b.pods() == everything, "b to know all")
        # Cut off; meanwhile one goes, one changes, and the history goes.
        target = etcd.run_dir / "client:0"
        hidden = target.rename(etcd.run_dir / "hidden:0")
        await b.etcd.close()
        await other.close()
        async with EtcdClient([f"unix:{hidden}"]) as there:
            await there.delete(PREFIX + "10.0.0.3")
            await there.put(PREFIX + "10.0.0.4", stored_address("10.0.0.4", 9, "c"))
            last = await there.put("elsewhere", b"")
        # Before it can be found again.
        await compact(etcd, last, f"unix:{hidden}")
        hidden.rename(target)
        wanted = {**everything, "10.0.0.4": (9, "c")}
        del wanted["10.0.0.3"]
        seen = set()

        def settled() -> bool:
            now = b.pods()
            seen.add(frozenset(now))
            return now == wanted

        await until(settled, "the changes")
        assert seen <= {frozenset(everything), frozenset(wanted)}


async def test_another_etcd_is_filled_again_by_those_who_know(etcd: EmbeddedEtcd, place: Path) -> None:
    async with member(etcd.endpoint, "a", place) as a, member(etcd.endpoint, "b", place) as b:
        await granted(a)
        a.publisher.want({IPv4Address(0x0A000000 + n): Published(100 + n) for n in range(20)})
        await until(lambda: len(b.pods()) == 20, "b to know all")
        for number in range(5):  # revisions that the next etcd will not reach soon
            await a.publisher.put(A1, 500 + number)
        await knows(b, A1, 504, "a")
        await etcd.stop()
        shutil.rmtree(etcd.data_dir)
        await etcd.start()
        await until(lambda: _is_under(b.etcd, a, 20), "all of them in the new etcd")
        await until(lambda: _same(b), "b to know all again")
        await knows(b, A1, 504, "a")
        await _try(a.publisher.put(A1, 600))  # it may be about to get another lease
        await knows(b, A1, 600, "a")


async def test_an_etcd_put_back_to_an_earlier_state_is_brought_up_to_date(
    etcd: EmbeddedEtcd, place: Path, client: EtcdClient
) -> None:
    async with member(etcd.endpoint, "a", place) as a:
        await granted(a)
        a.publisher.want({A1: Published(100), A2: Published(200)})
        await until(lambda: len(a.pods()) == 2, "both")
        await etcd.stop()
        shutil.copytree(etcd.data_dir, place / "snapshot")
        await etcd.start()
        for change in (a.publisher.put(A1, 101), a.publisher.put(A3, 300), a.publisher.remove(A2)):
            await _try(change)  # what cannot be written yet will be
        wanted = {str(A1): (101, "a"), str(A3): (300, "a")}
        await until(lambda: a.pods() == wanted, "the changes")
        lease = a.lease.lease
        await etcd.stop()
        shutil.rmtree(etcd.data_dir)
        shutil.copytree(place / "snapshot", etcd.data_dir)
        await etcd.start()

        async def under_another_lease() -> bool:
            new = {kv.key for kv in (await client.get_prefix(PREFIX)).kvs if kv.lease != lease}
            return new == {f"{PREFIX}{A1}", f"{PREFIX}{A3}"}

        await until(under_another_lease, "what is wanted to be written anew")
        await client.revoke(lease)  # or time passes
        await until(lambda: a.pods() == wanted, "order")
        assert await stored(client) == a.pods()


async def test_malformed_keys_are_passed_over(etcd: EmbeddedEtcd, place: Path, client: EtcdClient) -> None:
    async with member(etcd.endpoint, "b", place) as b:
        await client.put(f"{PREFIX}10.0.0.1", stored_address("10.0.0.1", 4, "a"))
        await knows(b, A1, 4, "a")
        await client.put(f"{PREFIX}nonsense", b"x")
        await client.put(f"{PREFIX}::ffff:10.0.0.1", stored_address("::ffff:10.0.0.1", 666, "evil"))
        await client.put(f"{PREFIX}10.0.0.01", stored_address("10.0.0.1", 666, "evil"))
        await client.put(f"{PREFIX}10.0.0.2", b"\xff\xff")
        await client.put(f"{PREFIX}10.0.0.3", stored_address("10.0.0.3", 0, "a"))
        await client.delete(f"{PREFIX}nonsense")
        await client.put(f"{PREFIX}10.0.0.9", stored_address("10.0.0.9", 5, "a"))
        await knows(b, "10.0.0.9", 5, "a")
        assert b.pods() == {"10.0.0.1": (4, "a"), "10.0.0.9": (5, "a")}


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_everyone_agrees_in_the_end(
    etcd: EmbeddedEtcd, place: Path, client: EtcdClient, seed: int
) -> None:
    """Three nodes change what they have, addresses move between them, leases and etcd die."""
    dice = random.Random(seed)
    addresses = [ip_address(0x0A000000 + n) for n in range(12)]
    owner: dict[object, int] = {}
    wanted: list[dict[IPv4Address, int]] = [{}, {}, {}]

    async with (
        member(etcd.endpoint, "n0", place) as m0,
        member(etcd.endpoint, "n1", place) as m1,
        member(etcd.endpoint, "n2", place) as m2,
    ):
        members = (m0, m1, m2)
        for each in members:
            each.publisher.want({})
            await granted(each)
        under_way: set[asyncio.Task[None]] = set()

        def begin(work: object) -> None:
            task = asyncio.ensure_future(_try(work))
            under_way.add(task)
            task.add_done_callback(under_way.discard)

        for _ in range(120):
            address = dice.choice(addresses)
            what = dice.random()
            if what < 0.45:
                # A pod with this address comes up on some node; it goes from where it was, soon or late.
                now, before = dice.randrange(3), owner.get(address)
                identity = dice.randrange(1, 1000)
                owner[address] = now
                wanted[now][address] = identity  # type: ignore[index]
                begin(members[now].publisher.put(address, identity))
                if before is not None and before != now:
                    del wanted[before][address]  # type: ignore[arg-type]
                    begin(members[before].publisher.remove(address))
            elif what < 0.75:
                held = owner.pop(address, None)
                if held is not None:
                    del wanted[held][address]  # type: ignore[arg-type]
                    begin(members[held].publisher.remove(address))
            elif what < 0.80:
                begin(dice.choice(members).lose_lease())
            elif what < 0.83:
                await kill(etcd)
                await etcd.start()
            else:
                await asyncio.sleep(dice.random() * 0.02)
        await until(lambda: not under_way, "the end of all calls")
        right = {
            str(address): (identity, f"n{number}")
            for number, of_node in enumerate(wanted)
            for address, identity in of_node.items()
        }
        await until(lambda: _stored_is(client, right), f"etcd to have {right}")
        for each in members:
            await until(lambda each=each: each.pods() == right, f"{each.name} to know")
            await until(lambda each=each: not each.publisher.problem, "health")


async def _stored_is(client: EtcdClient, right: dict[str, tuple[int, str]]) -> bool:
    return await stored(client) == right


async def _try(work: object) -> None:
    try:
        await work  # type: ignore[misc]
    except errors.FibrilError:
        pass
