"""Label sets to numbers: one each, whoever asks where."""

from __future__ import annotations

import asyncio
import random

import pytest

from fibril.identity.v1 import identity_pb2 as pb
from services.common.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from services.common.etcd.client import EtcdClient
from services.identity.identities.filter import LabelFilter
from services.identity.identities.model import Scope
from services.identity.numbers import LOCAL_CLUSTER, Reserved, cluster_of
from tests.interop.etcd.etcdrig import until
from tests.interop.identity.identityrig import CFG, IDS, LABELS, REFS, ROOT, SHORT, Nodes, keys, live


async def test_an_identity_is_three_keys_and_goes_with_its_last_holder(
    nodes: Nodes, client: EtcdClient
) -> None:
    one = await nodes.start()
    identity = await one.allocate("a", app="web", **{"pod-template-hash": "5f"})
    assert identity.labels == {"app": "web"} and identity.scope is Scope.CLUSTER
    assert cluster_of(identity.number) == 7
    assert await one.allocate("b", app="web") == identity
    stored = pb.StoredIdentity(number=identity.number, labels={"app": "web"})
    assert await keys(client, IDS) == {str(identity.number): stored.SerializeToString()}
    assert list((await keys(client, LABELS)).values()) == [stored.SerializeToString()]
    assert await keys(client, REFS) == {f"{identity.number}/one": b""}
    assert one.allocator.get(identity.number) == identity == one.allocator.find({"app": "web"})

    assert await one.allocator.release("a") == identity.number
    assert await one.allocator.release("a") == 0
    assert one.allocator.holders() == {"b": identity}
    assert await one.allocator.release("b") == identity.number
    await until(lambda: one.allocator.get(identity.number) is None, "its collection")
    assert one.allocator.find({"app": "web"}) is None
    assert await keys(client, REFS) == {} == await live(client, LABELS) == await live(client, IDS)
    assert (one.allocator.usage().used, one.allocator.usage().quarantined) == (0, 1)


async def test_what_is_held_costs_no_round_trip(nodes: Nodes, client: EtcdClient) -> None:
    one = await nodes.start()
    identity = await one.allocate("a", app="web")
    await until(lambda: one.allocator._sweeper.elected, "all that is written besides")
    before = (await client.get_prefix(ROOT)).revision
    assert {await one.allocate(str(number), app="web") for number in range(50)} == {identity}
    assert (await client.get_prefix(ROOT)).revision == before


async def test_many_who_ask_at_once_on_a_node_are_one_transaction(nodes: Nodes, client: EtcdClient) -> None:
    one = await nodes.start()
    await one.allocate("first", app="first")
    await until(lambda: one.allocator._sweeper.elected, "all that is written besides")
    before = (await client.get_prefix(ROOT)).revision
    found = await asyncio.gather(*(one.allocate(f"h{number}", app="web") for number in range(200)))
    assert len(set(found)) == 1 and len(one.allocator.holders("h")) == 200
    assert (await client.get_prefix(ROOT)).revision == before + 1


async def test_of_many_nodes_that_race_all_get_one_number(nodes: Nodes, client: EtcdClient) -> None:
    racers = await nodes.several(6)
    for attempt in range(10):
        asked = [
            (f"{attempt}-{number % 7}", node, f"{attempt}/{number}")
            for number in range(21)
            for node in racers
        ]
        random.shuffle(asked)
        found = await asyncio.gather(*(node.allocate(holder, app=app) for app, node, holder in asked))
        numbers: dict[str, set[int]] = {}
        for (app, _, _), identity in zip(asked, found, strict=True):
            assert identity.labels == {"app": app}
            numbers.setdefault(app, set()).add(identity.number)
        assert all(len(each) == 1 for each in numbers.values())
    stored = await keys(client, IDS)
    assert len(stored) == 70 and len(await keys(client, REFS)) == 70 * 6
    for node in racers:
        await until(lambda node=node: node.allocator.usage().used == 70, "everybody to know all")


async def test_a_holder_that_asks_with_other_labels_moves(nodes: Nodes) -> None:
    one = await nodes.start()
    web = await one.allocate("a", app="web")
    shop = await one.allocate("a", app="shop")
    assert shop != web and one.allocator.holders() == {"a": shop}
    await until(lambda: one.allocator.get(web.number) is None, "the collection of what it had")
    assert await one.allocator.release("a") == shop.number
    # The last of several changes under way counts, and nothing of the others stays.
    await asyncio.gather(*(one.allocate("b", app=f"app-{number}") for number in range(10)))
    await until(lambda: one.allocator.usage().used == 1, "one to be left")
    assert one.allocator.holders()["b"].labels == {"app": "app-9"}


async def test_the_same_labels_get_their_number_back_from_quarantine_and_others_do_not(
    nodes: Nodes,
) -> None:
    one, other = await nodes.start("one", space=2), await nodes.start("other", space=2)
    web = await one.allocate("a", app="web")
    await one.allocator.release("a")
    await until(lambda: other.allocator.usage().quarantined == 1, "its collection")
    shop = await other.allocate("b", app="shop")
    assert shop.number != web.number
    with pytest.raises(ResourceExhausted, match=r"all 2 identity numbers .* 1 used, 1 in quarantine"):
        await other.allocate("c", app="cart")
    assert await other.allocate("c", app="web") == web


async def test_a_number_may_have_other_labels_after_the_quarantine(nodes: Nodes) -> None:
    one = await nodes.start(cfg=SHORT, space=1)
    web = await one.allocate("a", app="web")
    await one.allocator.release("a")
    await until(lambda: one.allocator.usage().quarantined == 1, "its collection")
    await until(lambda: one.allocator.usage().quarantined == 0, "the end of the quarantine")
    shop = await until(lambda: one.allocate("a", app="shop"), "the lease, should it be late")
    assert shop.number == web.number and shop.labels == {"app": "shop"}


async def test_a_nearly_full_space_is_warned_of_and_a_full_one_refuses(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    one = await nodes.start(space=20)
    for number in range(15):
        await one.allocate(str(number), app=str(number))
    assert one.allocator.status().state == "ok" and "run short" not in caplog.text
    await one.allocate("16", app="16")
    status = one.allocator.status()
    assert status.state == "degraded" and "16 of 20 identity numbers are taken" in status.message
    assert (status.used, status.capacity) == (16, 20) and caplog.text.count("run short") == 1
    rest = await asyncio.gather(
        *(one.allocate(f"x{number}", app=f"x{number}") for number in range(8)), return_exceptions=True
    )
    refused = [each for each in rest if isinstance(each, ResourceExhausted)]
    assert len(refused) == 4 and "all 20 identity numbers" in str(refused[0])
    assert one.allocator.usage().used == 20
    assert await one.allocate("again", app="x0") in rest, "what exists needs no number"


async def test_labels_that_do_not_count_and_those_with_a_meaning(nodes: Nodes, client: EtcdClient) -> None:
    one = await nodes.start()
    init = await one.allocate("a", **{"pod-template-hash": "5f"})
    assert init.number == Reserved.INIT and init.scope is Scope.RESERVED
    assert await one.allocator.allocate({}, "b") == init
    assert await one.allocator.release("b") == Reserved.INIT
    host = await one.allocator.allocate({"reserved:host": ""}, "c")
    assert host.number == Reserved.HOST and one.allocator.get(Reserved.HOST) == host
    for wrong in (
        {"reserved:nobody": ""},
        {"reserved:host": "", "app": "web"},
        {"cidr:10.0.0.0/8": "", "a": ""},
    ):
        with pytest.raises(InvalidArgument) as caught:
            await one.allocator.allocate(wrong, "d")
        assert caught.value.field == "labels"
    assert await keys(client, IDS) == {}


async def test_identities_of_this_node_only(nodes: Nodes, client: EtcdClient) -> None:
    one = await nodes.start()
    labels = {"cidr:10.0.0.0/8": ""}
    cidr = await one.allocator.allocate(labels, "a")
    assert cluster_of(cidr.number) == LOCAL_CLUSTER and cidr.scope is Scope.LOCAL
    assert await one.allocator.allocate(labels, "b") == cidr == one.allocator.get(cidr.number)
    name = await one.allocator.allocate({"fqdn:example.org": ""}, "c")
    assert name != cidr and one.allocator.usage().local == 2
    await one.allocator.release("a")
    assert one.allocator.find(labels) == cidr
    await nodes.die(one)
    one = await nodes.start(ready=False)
    assert one.allocator.find(labels) == cidr, "known before etcd has said anything"
    await one.allocator.release("b")
    assert one.allocator.find(labels) is None and one.allocator.list()[-1] == name
    assert await keys(client, IDS) == {}


async def test_other_labels_may_count_at_any_time(nodes: Nodes) -> None:
    one = await nodes.start()
    before = {tier: await one.allocate(tier, app="web", tier=tier) for tier in ("front", "back")}
    assert before["front"] != before["back"]
    one.allocator.set_filter(LabelFilter(exclude=("tier",)))
    await until(lambda: len(one.moved) == 2, "both to move")
    assert len({identity for _, identity in one.moved}) == 1
    assert one.allocator.holders()["front"].labels == {"app": "web"}
    await until(lambda: one.allocator.usage().used == 1, "the collection of what they had")
    # Back again: what does not count is not forgotten.
    one.allocator.set_filter(CFG.filter())
    await until(lambda: one.allocator.holders() == before, "both to have what they had")
    one.allocator.set_filter(LabelFilter(include=("nothing",)))
    await until(
        lambda: {identity.number for identity in one.allocator.holders().values()} == {Reserved.INIT},
        "nobody to have a label that counts",
    )


async def test_a_node_configured_for_another_cluster_is_refused(nodes: Nodes, client: EtcdClient) -> None:
    one = await nodes.start()
    await one.allocate("a", app="web")
    wrong = await nodes.start("wrong", cluster_id=8, ready=False)
    await until(lambda: "has the number 7" in wrong.allocator.problem, "its status to say so")
    await until(lambda: "has the number 7" in wrong.lease.problem, "its lease's, too")
    with pytest.raises(FailedPrecondition, match="has the number 7, this node is configured for 8") as caught:
        await wrong.allocate("a", app="web")
    assert caught.value.field == "etcd.cluster_id" and "set etcd.cluster_id to 7" in caught.value.fix
    assert len(await keys(client, IDS)) == 1
    assert (await wrong.allocator.allocate({"cidr:10.0.0.0/8": ""}, "b")).scope is Scope.LOCAL


async def test_watchers_see_identities_come_and_go(nodes: Nodes) -> None:
    one, other = await nodes.start("one"), await nodes.start("other")
    first = await one.allocate("a", app="first")
    seen: list[tuple[str, object]] = []

    async def collect() -> None:
        async for change in other.allocator.feed.watch():
            seen.append((change.kind, change.item))

    task = asyncio.create_task(collect())
    try:
        await until(lambda: other.allocator.get(first.number), "the other to know")
        second = await other.allocate("b", app="second")
        await one.allocator.release("a")
        await until(lambda: ("delete", first) in seen, "the end of the first")
        changes = seen[seen.index(("synced", None)) + 1 :]
        assert ("put", second) in changes
        assert await one.allocate("c", app="first") == first
        await until(lambda: seen[-1] == ("put", first), "its return")
        assert len([each for each in seen if each == ("put", second)]) == 1
    finally:
        task.cancel()
