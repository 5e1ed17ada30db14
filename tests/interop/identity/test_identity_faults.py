"""Nodes that die, leases that are lost, an etcd that hangs, is killed or comes back empty."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from pathlib import Path

import pytest

from services.common.errors import FibrilError, Unavailable
from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from services.identity.db import open_db
from services.identity.identities.filter import LabelFilter
from tests.interop.etcd.etcdrig import compact, hanging, kill, until
from tests.interop.identity.identityrig import CFG, IDS, LABELS, REFS, ROOT, SHORT, Node, Nodes, keys, live


async def in_order(client: EtcdClient, *nodes: Node) -> bool:
    """Whether etcd has exactly what these nodes, and no others, hold."""
    held = {
        f"{identity.number}/{node.name}": identity.key
        for node in nodes
        for identity in node.allocator.holders().values()
    }
    if {name: b"" for name in held} != await keys(client, REFS):
        return False
    if any(node.allocator.problem for node in nodes):
        return False
    active, labels = await live(client, IDS), await live(client, LABELS)
    return active.keys() == {name.partition("/")[0] for name in held} and len(labels) == len(active)


async def test_a_killed_process_finds_everything_in_place(nodes: Nodes, client: EtcdClient) -> None:
    one, other = await nodes.start("one"), await nodes.start("other")
    held = {holder: await one.allocate(holder, app=holder) for holder in ("a", "b")}
    before = await client.get_prefix(REFS)
    # Taken, but not recorded when the process died.
    forgotten = await other.allocate("c", app="c")
    await client.put(f"{REFS}{forgotten.number}/one", b"", lease=one.lease.lease)
    await nodes.die(one)
    one = await nodes.start("one", ready=False)
    assert one.allocator.holders() == held and one.allocator.get(held["a"].number) == held["a"]
    assert one.allocator.find({"app": "a"}) == held["a"]
    assert await one.allocate("a", app="a") == held["a"]
    await until(lambda: in_order(client, one, other), "the forgotten one to be given back")
    after = await client.get_prefix(REFS)
    mine = [kv for kv in before.kvs if kv.key.endswith("/one")]
    assert mine == [kv for kv in after.kvs if kv.key.endswith("/one")], "nothing was written anew"
    assert one.moved == []


async def test_what_a_dying_process_had_asked_for_does_not_stay(
    etcd: EmbeddedEtcd, nodes: Nodes, client: EtcdClient
) -> None:
    one = await nodes.start()
    await one.allocate("a", app="a")
    with hanging(etcd):
        asking = [asyncio.create_task(one.allocate(f"h{n}", app=f"app-{n}")) for n in range(20)]
        await asyncio.sleep(0.05)  # on its way; etcd finds it in its socket when it goes on
        for task in asking:
            task.cancel()
        await nodes.die(one)
    one = await nodes.start()
    await until(lambda: in_order(client, one), "only what is held to be there")


async def test_references_go_with_the_lease_the_node_has_now(
    etcd: EmbeddedEtcd, nodes: Nodes, client: EtcdClient, place: Path
) -> None:
    one = await nodes.start()
    held = {str(n): await one.allocate(str(n), app=str(n)) for n in range(10)}
    former = one.lease.lease
    await nodes.die(one)
    with contextlib.closing(open_db(place / "one.db")) as db, db:
        db.execute("DELETE FROM lease")
    one = await nodes.start()
    await until(lambda: in_order(client, one), "order")
    await until(lambda: all_under(client, one.lease.lease), "all references to go with the new lease")
    await client.revoke(former)
    assert await in_order(client, one) and one.allocator.holders() == held


async def all_under(client: EtcdClient, lease: int) -> bool:
    return {kv.lease for kv in (await client.get_prefix(REFS)).kvs} == {lease}


async def test_a_lost_lease_is_made_good_with_the_same_numbers(nodes: Nodes, client: EtcdClient) -> None:
    one = await nodes.start()
    held = {str(n): await one.allocate(str(n), app=f"app-{n % 10}") for n in range(30)}
    await client.revoke(one.lease.lease)
    assert await keys(client, REFS) == {}
    # The next who asks is told that there is no lease any more.
    held["new"] = await one.allocate("new", app="new")
    await until(lambda: in_order(client, one), "everything to be held again")
    assert one.allocator.holders() == held and one.moved == []


async def test_what_was_collected_while_a_node_was_away_is_its_again(
    nodes: Nodes, client: EtcdClient
) -> None:
    one, other = await nodes.start("one", SHORT), await nodes.start("other", SHORT)
    web = await one.allocate("a", app="web")
    await one.cut()
    await until(lambda: other.allocator.get(web.number) is None, "its collection")
    assert one.allocator.holders() == {"a": web}
    await one.start_lease()
    await until(lambda: in_order(client, one, other), "it to be held again")
    await until(lambda: other.allocator.get(web.number) == web, "the other to know")
    assert one.moved == []


async def test_a_holder_moves_if_its_number_went_to_others_meanwhile(
    nodes: Nodes, client: EtcdClient
) -> None:
    one = await nodes.start("one", SHORT, space=1)
    web = await one.allocate("a", app="web")
    await nodes.die(one)
    other = await nodes.start("other", SHORT, space=1)
    await until(lambda: other.allocator.usage().quarantined, "its collection")
    (tombstone,) = (await client.get_prefix(IDS)).kvs
    await client.revoke(tombstone.lease)  # its quarantine is over
    shop = await until(lambda: other.allocate("b", app="shop"), "the number to be free")
    assert shop.number == web.number
    one = await nodes.start("one", SHORT, space=2, ready=False)
    assert one.allocator.holders() == {"a": web}, "what it had, as long as nothing else is known"
    await until(lambda: one.moved, "it to move")
    assert one.moved == [("a", one.allocator.holders()["a"])]
    moved = one.moved[0][1]
    assert moved.labels == {"app": "web"} and moved.number != web.number
    assert one.allocator.get(web.number) == shop
    await until(lambda: in_order(client, one, other), "order")


async def test_an_etcd_that_comes_back_empty_is_given_everything_anew(
    etcd: EmbeddedEtcd, nodes: Nodes, client: EtcdClient
) -> None:
    one, other = await nodes.start("one"), await nodes.start("other")
    held = [await node.allocate(str(n), app=str(n)) for node in (one, other) for n in range(20)]
    await etcd.stop()
    shutil.rmtree(etcd.data_dir)
    await etcd.start()
    await until(lambda: in_order(client, one, other), "everything to be there again")
    assert held == [node.allocator.holders()[str(n)] for node in (one, other) for n in range(20)], (
        "the same numbers"
    )
    assert (one.moved, other.moved) == ([], [])


async def test_references_lost_with_a_restored_snapshot_are_taken_again(
    etcd: EmbeddedEtcd, nodes: Nodes, client: EtcdClient
) -> None:
    one, other = await nodes.start("one", SHORT), await nodes.start("other", SHORT)
    web = await one.allocate("a", app="web")
    gone = await other.allocate("b", app="gone")
    await etcd.stop()
    snapshot = etcd.data_dir.with_name("snapshot")
    shutil.copytree(etcd.data_dir, snapshot)
    await etcd.start()
    for _ in range(10):  # so far that it cannot be caught up with before anybody looks
        await client.put(f"{ROOT}something", b"")
    # Neither changes what is followed of identities. The lease may be late after all this.
    assert await until(lambda: other.allocate("a", app="web"), "the lease") == web
    await until(lambda: other.allocate("b", app="web"), "the lease")
    await etcd.stop()
    shutil.rmtree(etcd.data_dir)
    shutil.copytree(snapshot, etcd.data_dir)
    await etcd.start()
    await until(lambda: in_order(client, one, other), "order")
    before = await client.get(f"{IDS}{web.number}")
    await one.allocator.release("a")
    await asyncio.sleep(2)
    await until(lambda: in_order(client, one, other), "order again")
    assert await client.get(f"{IDS}{web.number}") == before, "it was not even retired"
    assert other.allocator.holders()["a"] == web
    await until(lambda: other.allocator.get(gone.number) is None, "the end of what nobody holds")


async def test_a_hanging_etcd_refuses_the_new_and_nothing_else(
    etcd: EmbeddedEtcd, nodes: Nodes, client: EtcdClient
) -> None:
    one = await nodes.start(timeout_s=0.5)
    web = await one.allocate("a", app="web", tier="front")
    with hanging(etcd):
        began = time.monotonic()
        with pytest.raises(Unavailable):
            await one.allocate("b", app="shop")
        assert time.monotonic() - began < 5
        assert await one.allocate("c", app="web", tier="front") == web, "held, and the lease is valid"
        assert await one.allocator.release("a") == web.number
        one.allocator.set_filter(LabelFilter(exclude=("app",), include=("tier",)))
        assert await one.allocate("c", app="web", tier="front") == web, "until it can have what it should"
        one.allocator.set_filter(CFG.filter())
    await until(lambda: in_order(client, one), "nothing of the refused to stay")
    assert one.allocator.holders() == {"c": web}
    assert (await one.allocate("b", app="shop")).labels == {"app": "shop"}


async def test_a_node_cut_off_for_longer_than_its_lease_goes_on_with_what_it_holds(
    etcd: EmbeddedEtcd, nodes: Nodes, client: EtcdClient
) -> None:
    one = await nodes.start("one", SHORT, timeout_s=0.5)
    web = await one.allocate("a", app="web")
    with hanging(etcd):
        await until(lambda: not one.lease.valid, "the end of its lease")
        began = time.monotonic()
        for holder, app in (("b", "shop"), ("c", "web")):
            with pytest.raises(Unavailable, match="cannot be allocated: the lease of this node"):
                await one.allocate(holder, app=app)
        assert time.monotonic() - began < 3.5, "refused at once: whoever waits does so for two seconds each"
        assert await one.allocate("a", app="web") == web
        assert one.allocator.get(web.number) == web == one.allocator.find({"app": "web"})
        assert one.allocator.status().state == "degraded"
    assert await until(lambda: one.allocate("c", app="web"), "the lease") == web
    await until(lambda: in_order(client, one), "order")


async def test_other_labels_may_count_before_who_asks_has_an_answer(etcd: EmbeddedEtcd, nodes: Nodes) -> None:
    one = await nodes.start()
    with hanging(etcd):
        asking = asyncio.create_task(one.allocate("a", app="web", tier="front"))
        await until(lambda: one.allocator._claims._flights, "it to be asked for")
        one.allocator.set_filter(LabelFilter(exclude=("tier",)))
    with contextlib.suppress(Unavailable):  # then asked again, under what counts now
        await asking
    await until(lambda: one.allocate("a", app="web", tier="front"), "an identity")
    await until(lambda: one.allocator.holders()["a"].labels == {"app": "web"}, "what counts now to count")


async def test_other_labels_may_count_while_a_node_is_cut_off(
    etcd: EmbeddedEtcd, nodes: Nodes, client: EtcdClient
) -> None:
    one = await nodes.start("one", SHORT, timeout_s=0.5)
    await one.allocate("a", app="web", tier="front")
    await kill(etcd)
    await until(lambda: not one.lease.valid, "the end of its lease, by its own clock")
    one.allocator.set_filter(LabelFilter(exclude=("tier",)))
    await asyncio.sleep(0.1)  # it looks, and can do nothing
    await etcd.start()  # by whose clock all leases begin anew
    await until(lambda: one.moved, "it to move")
    assert one.moved[-1][1].labels == {"app": "web"}
    await until(lambda: in_order(client, one), "order")


async def test_a_node_starts_without_etcd_with_what_it_held(
    etcd: EmbeddedEtcd, nodes: Nodes, client: EtcdClient
) -> None:
    one = await nodes.start()
    web = await one.allocate("a", app="web")
    await nodes.stop(one)
    await etcd.stop()
    one = await nodes.start(timeout_s=0.5, ready=False)
    assert await one.allocate("a", app="web") == web
    assert one.allocator.find({"app": "web"}) == web == one.allocator.get(web.number)
    with pytest.raises(Unavailable):
        await one.allocate("b", app="web")
    assert not one.allocator.synced.is_set() and one.allocator.problem
    await one.allocator.release("a")
    await etcd.start()
    await until(lambda: in_order(client, one), "what was released to be given back")
    assert one.allocator.usage().holders == 0


async def test_an_etcd_killed_under_load_loses_and_doubles_nothing(
    etcd: EmbeddedEtcd, nodes: Nodes, client: EtcdClient
) -> None:
    several = await nodes.several(3)
    stop = asyncio.Event()

    async def work(node: Node, worker: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            try:
                await node.allocate(f"{worker}/{number}", app=f"app-{number}")
                if number % 2:
                    await node.allocator.release(f"{worker}/{number}")
            except FibrilError:
                await asyncio.sleep(0.05)

    workers = [asyncio.create_task(work(node, each)) for node in several for each in range(4)]
    for _ in range(3):
        await asyncio.sleep(0.3)
        await kill(etcd)
        await etcd.start()
    stop.set()
    await asyncio.gather(*workers)
    await until(lambda: in_order(client, *several), "exactly what is held to be there")
    held = [identity for node in several for identity in node.allocator.holders().values()]
    await until(
        lambda: all(several[0].allocator.get(identity.number) == identity for identity in held),
        "one node to know what all hold",
    )


async def test_history_may_be_compacted_while_a_node_is_cut_off(
    etcd: EmbeddedEtcd, nodes: Nodes, client: EtcdClient
) -> None:
    one, other = await nodes.start("one"), await nodes.start("other")
    gone, kept = await one.allocate("a", app="gone"), await one.allocate("b", app="kept")
    await until(lambda: other.allocator.get(kept.number), "the other to know")
    follow = other.allocator._follower.run
    task = next(task for task in other.allocator.tasks() if task.get_name() == "identity.follow")
    task.cancel()
    await one.allocator.release("a")
    await until(lambda: one.allocator.get(gone.number) is None, "its collection")
    new = await one.allocate("c", app="new")
    await compact(etcd, (await client.get_prefix(ROOT)).revision)
    again = asyncio.create_task(follow())
    try:
        await until(lambda: other.allocator.get(new.number) == new, "what it missed")
        assert other.allocator.get(gone.number) is None and other.allocator.get(kept.number) == kept
    finally:
        again.cancel()


async def test_two_nodes_of_one_name_are_noticed(
    nodes: Nodes, client: EtcdClient, caplog: pytest.LogCaptureFixture
) -> None:
    one = await nodes.start("one")
    await one.allocate("a", app="web")
    # As its twin does.
    lease = await client.grant(60)
    await client.put(f"{ROOT}identities/epochs/one", b"", lease=lease)
    shop = await one.allocate("b", app="shop")
    assert "another node has its name" in caplog.text
    assert shop.labels == {"app": "shop"}
