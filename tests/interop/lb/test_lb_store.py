"""Services in a real etcd: who wins, what a change costs, and what is left when etcd goes away."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from dataclasses import replace
from typing import Any

import pytest

from fibril.lb.v1 import lb_pb2 as pb
from services.common.errors import (
    AlreadyExists,
    FailedPrecondition,
    FibrilError,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from services.common.etcd.watch import Delete, Put
from services.lb import convert, keys
from services.lb.abi import BackendState
from services.lb.model import Backend, BackendKey, Spec
from tests.interop.etcd.etcdrig import compact, kill, until, watching
from tests.interop.lb.lbrig import CLUSTER, Declared, Node, keys_of, node_port, service

ROOT = f"/fibril/v1/{CLUSTER}/"


def anything(spec: Spec) -> None:
    """Accepts whatever is added."""


async def agree(nodes: list[Node], wanted: dict[str, Declared]) -> None:
    for node in nodes:
        await until(lambda node=node: node.services.synced.is_set() and node.all() == wanted, "agreement")


async def test_one_of_many_gets_an_address(nodes: list[Node], client: EtcdClient) -> None:
    wanted = [service(f"s{n}", "10.96.0.1") for n in range(24)]
    results = await asyncio.gather(
        *(nodes[n % 3].store.upsert(*each) for n, each in enumerate(wanted)), return_exceptions=True
    )
    won = [n for n, result in enumerate(results) if not isinstance(result, BaseException)]
    assert len(won) == 1
    for result in results:
        if isinstance(result, BaseException):
            assert isinstance(result, AlreadyExists) and f"belongs to service s{won[0]}" in str(result)
            assert result.field == "service.frontends[0]" and result.fix
    await agree(nodes, {f"s{won[0]}": wanted[won[0]]})
    # Nothing is left of those who lost.
    assert len((await client.get_prefix(ROOT)).kvs) == 3
    await nodes[0].store.delete(f"s{won[0]}")
    await agree(nodes, {})
    assert not (await client.get_prefix(ROOT)).kvs
    assert (await nodes[1].store.upsert(*wanted[won[0] - 1])).created


async def test_many_get_ports_of_one_address_at_once(nodes: list[Node]) -> None:
    wanted = {f"s{n}": service(f"s{n}", "10.96.0.1", port=1 + n) for n in range(60)}
    await asyncio.gather(*(nodes[n % 3].store.upsert(*each) for n, each in enumerate(wanted.values())))
    await agree(nodes, wanted)


async def test_ranges_and_ports_of_nodes_collide_too(nodes: list[Node]) -> None:
    store = nodes[0].store
    await store.upsert(*node_port("range", 30000, 33000))
    await store.upsert(*node_port("on-a", 8080, node="a"))
    await store.upsert(*node_port("on-b", 8080, node="b"))
    await store.upsert(*service("checked", "10.96.0.1", health_check_node_port=29000))
    for other, owner in (
        (node_port("x", 30000), "range"),
        (node_port("x", 32999), "range"),
        (node_port("x", 20000, 30000), "on-a|range|checked"),
        (node_port("x", 32100, 40000), "range"),
        (node_port("x", 8080), "on-a|on-b"),
        (node_port("x", 8080, node="a"), "on-a"),
        (node_port("x", 29000), "checked"),
        (service("x", "10.96.0.2", health_check_node_port=29000), "checked"),
    ):
        with pytest.raises(AlreadyExists) as caught:
            await store.upsert(*other)
        assert any(f"belongs to service {each}" in str(caught.value) for each in owner.split("|")), owner
    for n, free in enumerate((node_port("y", 33001), node_port("z", 8080, node="c"))):
        assert (await nodes[n].store.upsert(*free)).created
    # Moving makes room.
    await store.upsert(*node_port("range", 40000))
    assert (await nodes[2].store.upsert(*node_port("x", 30000, 32000))).created


async def test_a_revision_protects_what_others_have_changed(nodes: list[Node]) -> None:
    a, b = nodes[0].store, nodes[1].store
    spec, backends = service("s", "10.96.0.1", backends=3)
    first = await a.upsert(spec, backends)
    assert first.created and first.changed
    assert await b.upsert(spec, backends, first.revision) == replace(first, created=False, changed=False)
    key = keys_of((spec, backends))[0]

    changed = replace(spec, affinity_s=5)
    for change in (
        lambda: b.set_state("s", [key], BackendState.MAINTENANCE),
        lambda: b.remove_backends("s", [key]),
        lambda: b.add_backends("s", {key: replace(backends[key], weight=3)}, anything),
    ):
        assert await change() in (1, (0, 1))
        with pytest.raises(FailedPrecondition) as caught:
            await a.upsert(changed, backends, first.revision)
        assert caught.value.field == "service.revision"
        now = int(str(caught.value).split("revision ")[1].split(",")[0])
        await until(lambda now=now: nodes[0].services.revisions.get("s") == now, "the same revision")
        await until(lambda now=now: nodes[1].services.revisions.get("s") == now, "the same revision")
        first = await a.upsert(spec, backends, now)
    await a.delete("s")
    with pytest.raises(FailedPrecondition):
        await a.upsert(changed, backends, first.revision)
    for missing in (
        a.delete("s"),
        a.add_backends("s", backends, anything),
        a.remove_backends("s", [key]),
        a.set_state("s", [key], BackendState.ACTIVE),
        a.set_state("", [key], BackendState.ACTIVE),
    ):
        with pytest.raises(NotFound):
            await missing


async def test_changes_by_many_are_as_if_made_one_after_the_other(nodes: list[Node]) -> None:
    """Random calls at random nodes against a model."""
    rand = random.Random(4)
    model: dict[str, Declared] = {}
    for step in range(150):
        node, name = rand.choice(nodes), f"s{rand.randrange(3)}"
        spec, some = service(name, f"10.96.0.{name[1:]}", backends=6, affinity_timeout_s=rand.randrange(3))
        some = {key: replace(some[key], weight=rand.randrange(1, 3)) for key in rand.sample(list(some), 3)}
        there = model.get(name)
        what = rand.choice(("upsert", "add", "remove", "state", "state", "delete"))
        try:
            if what == "upsert":
                done = await node.store.upsert(spec, some)
                assert done.created == (there is None) and done.changed == (there != (spec, some))
                model[name] = spec, some
            elif what == "add":
                counts = await node.store.add_backends(name, some, anything)
                assert there is not None
                old = there[1]
                assert counts == (
                    len(some.keys() - old.keys()),
                    sum(key in old and old[key] != each for key, each in some.items()),
                )
                model[name] = there[0], old | some
            elif what == "remove":
                gone = await node.store.remove_backends(name, some)
                assert there is not None
                assert gone == len(some.keys() & there[1].keys())
                model[name] = there[0], {key: each for key, each in there[1].items() if key not in some}
            elif what == "state" and there is not None and there[1]:
                key, state = rand.choice(list(there[1])), rand.choice(list(BackendState)[1:])
                assert await node.store.set_state(name, [key], state) == (there[1][key].state is not state)
                model[name] = there[0], there[1] | {key: replace(there[1][key], state=state)}
            elif what == "delete" and step % 3 == 0:
                await node.store.delete(name)
                del model[name]
        except NotFound:
            assert there is None
    await agree(nodes, model)


async def test_of_two_who_declare_a_service_one_is_heard(nodes: list[Node]) -> None:
    for backends in (3, 300):
        wanted = [
            service("s", f"10.96.{n}.1", backends=backends + 7 * n, affinity_timeout_s=n + 1)
            for n in range(3)
        ]
        await asyncio.gather(*(nodes[n].store.upsert(*each) for n, each in enumerate(wanted)))

        def agreed(wanted: list[Any] = wanted) -> bool:
            # What one node has heard so far may not be the last word yet.
            found = [node.all() for node in nodes]
            return found[0].get("s") in wanted and found.count(found[0]) == len(found)

        await until(agreed, "one of them")
        await nodes[0].store.delete("s")
        await agree(nodes, {})


async def test_who_sets_a_state_takes_back_nothing_else(nodes: list[Node]) -> None:
    spec, backends = service("s", "10.96.0.1", backends=40)
    await nodes[0].store.upsert(spec, backends)
    heavier = {key: replace(each, weight=9) for key, each in backends.items()}
    counts = await asyncio.gather(
        *(nodes[1].store.add_backends("s", {key: heavier[key]}, anything) for key in backends),
        *(nodes[2].store.set_state("s", [key], BackendState.MAINTENANCE) for key in backends),
    )
    assert counts[:40] == [(0, 1)] * 40 and counts[40:] == [1] * 40

    def agreed() -> bool:
        found = [node.all().get("s", (None, {})) for node in nodes]
        # Who adds a backend that is there replaces it, its state too: who of the two came last decides on the state only.
        return all(
            there == spec
            and members.keys() == backends.keys()
            and all(each.weight == 9 for each in members.values())
            and members == found[0][1]
            for there, members in found
        )

    await until(agreed, "agreement")
    states = {each.state for each in nodes[0].all()["s"][1].values()}
    assert states <= {BackendState.ACTIVE, BackendState.MAINTENANCE}
    await nodes[2].store.set_state("s", list(backends), BackendState.MAINTENANCE)
    await agree(
        nodes,
        {"s": (spec, {key: replace(each, state=BackendState.MAINTENANCE) for key, each in heavier.items()})},
    )


async def test_a_change_among_ten_thousand_backends_is_one_key(nodes: list[Node], client: EtcdClient) -> None:
    spec, backends = service("big", "10.96.0.1", backends=10_000)
    begun = time.monotonic()
    assert (await nodes[0].store.upsert(spec, backends)).created
    took = time.monotonic() - begun
    print(f"10,000 backends declared in {took:.2f} s")
    await agree(nodes[1:2], {"big": (spec, backends)})
    # The service came last.
    assert nodes[1].told[0] == ("big", None)
    key = keys_of((spec, backends))[5000]
    nodes[1].told.clear()
    async with watching(client, ROOT) as watcher:
        await until(lambda: len(watcher.events) >= 2, "a snapshot")
        assert await nodes[0].store.set_state("big", [key], BackendState.TERMINATING) == 1
        await until(lambda: nodes[1].told, "news")
        assert nodes[1].told == [("big", frozenset({key}))]
        more = Backend(BackendKey(key.address, 9))
        assert await nodes[2].store.add_backends("big", {more.key: more}, anything) == (1, 0)
        await until(lambda: len(nodes[1].told) == 2, "news")
        await until(lambda: len(watcher.events) >= 4, "both keys")
        assert [type(event) for event in watcher.events[2:]] == [Put, Put]
        assert await nodes[2].store.remove_backends("big", [more.key]) == 1
        await until(lambda: len(nodes[1].told) == 3, "news")
        await until(lambda: len(watcher.events) >= 6, "both keys")
        assert len(watcher.events) == 6 and isinstance(watcher.events[-1], Delete)
    begun = time.monotonic()
    assert await nodes[0].store.set_state("big", list(backends)[:1000], BackendState.MAINTENANCE) == 1000
    small = dict(list(backends.items())[:10])
    await nodes[0].store.upsert(spec, small)
    await agree(nodes[1:2], {"big": (spec, small)})
    await nodes[0].store.delete("big")
    print(f"changed, shrunk and deleted in {time.monotonic() - begun:.2f} s")
    assert not (await client.get_prefix(ROOT)).kvs


async def test_many_services_are_imported_quickly(nodes: list[Node]) -> None:
    cluster = [service(f"ns/{n}:x", f"10.96.{n // 250}.{1 + n % 250}", backends=3) for n in range(1000)]
    ports = [node_port(f"port/{n}", 30000 + n) for n in range(500)]
    for what, wanted in (("cluster IPs with 3 backends", cluster), ("node ports", ports)):
        begun = time.monotonic()
        assert await nodes[0].store.upsert_many(wanted) == (len(wanted), 0, 0)
        rate = len(wanted) / (time.monotonic() - begun)
        print(f"{what}: {rate:.0f} services/s")
        # A machine that does nothing else has several thousand.
        assert rate > 100
    assert await nodes[1].store.upsert_many(cluster) == (0, 0, 1000)
    changed = [(replace(spec, affinity_s=1), backends) for spec, backends in cluster[:100]]
    assert await nodes[1].store.upsert_many([*changed, *cluster[100:]]) == (0, 100, 900)
    await agree(nodes[:1], {each[0].name: each for each in (*changed, *cluster[100:], *ports)})


async def test_a_refused_service_leaves_the_others_of_its_batch(nodes: list[Node]) -> None:
    wanted = [service(f"s{n}", f"10.96.0.{n % 20 + 1}") for n in range(21)]
    with pytest.raises(AlreadyExists) as caught:
        await nodes[0].store.upsert_many(wanted)
    assert "belongs to service s0" in str(caught.value)
    await agree(nodes, {each[0].name: each for each in wanted[:20]})


async def test_a_refusal_names_the_frontend_as_it_was_given(nodes: list[Node]) -> None:
    await nodes[0].store.upsert(*service("first", "10.96.0.1"))
    both = pb.Frontend(type=pb.FRONTEND_TYPE_NODE_PORT, port=30000)
    taken = pb.Frontend(address="10.96.0.1", port=80)
    with pytest.raises(AlreadyExists) as caught:
        await nodes[1].store.upsert(*convert.service(pb.Service(name="second", frontends=[both, taken])))
    assert caught.value.field == "service.frontends[1]"


async def test_nothing_is_forgotten_while_etcd_is_away(nodes: list[Node], etcd: EmbeddedEtcd) -> None:
    wanted = {f"s{n}": service(f"s{n}", f"10.96.0.{n + 1}", backends=2) for n in range(3)}
    await nodes[0].store.upsert_many(wanted.values())
    await agree(nodes, wanted)
    await kill(etcd)
    for node in nodes:
        node.told.clear()
    with pytest.raises(Unavailable):
        await nodes[0].store.upsert(*service("late", "10.96.1.1"))
    with pytest.raises(Unavailable):
        await nodes[0].store.set_state("s0", keys_of(wanted["s0"])[:1], BackendState.MAINTENANCE)
    assert all(node.all() == wanted for node in nodes)
    await etcd.start()

    async def deleted() -> bool:
        try:
            await nodes[0].store.delete("s1")
        except NotFound:
            pass
        return True

    await until(deleted, "etcd again")
    wanted.pop("s1")
    wanted["s3"] = service("s3", "10.96.0.9")
    done = await nodes[0].store.upsert(*wanted["s3"])
    await compact(etcd, done.revision)
    await agree(nodes[:2], wanted)
    assert {name for name, _ in nodes[1].told} == {"s1", "s3"}


async def test_what_cannot_be_read_is_named_and_can_be_mended(
    nodes: list[Node], client: EtcdClient, etcd: EmbeddedEtcd
) -> None:
    spec, backends = service("s", "10.96.0.1", backends=2)
    await nodes[0].store.upsert(spec, backends)
    await agree(nodes, {"s": (spec, backends)})
    broken = keys.root(CLUSTER) + keys.backend_key("s", keys_of((spec, backends))[0])
    for key in (
        broken,
        keys.root(CLUSTER) + keys.service_key("s"),
        keys.root(CLUSTER) + "backends/s/nonsense",
    ):
        await client.put(key, b"\xff\xff")
    await until(lambda: nodes[0].services.problem.count("2 more"), "a problem")
    assert nodes[0].all() == {"s": (spec, backends)} and not nodes[0].services.unread
    late = await Node(etcd.endpoint).start()
    await until(late.services.synced.is_set, "all there is")
    assert not late.all() and late.services.unread == {"s"}
    await late.stop()
    assert (await nodes[1].store.upsert(spec, backends)).changed
    await until(lambda: "nonsense" in nodes[0].services.problem, "a smaller problem")
    await nodes[1].store.delete("s")
    await until(lambda: not nodes[0].services.problem, "no problem")
    assert not (await client.get_prefix(ROOT)).kvs


async def test_what_cannot_be_read_gives_its_ports_back(nodes: list[Node], client: EtcdClient) -> None:
    for number, name in enumerate(("removed", "changed")):
        await nodes[0].store.upsert(*service(name, f"10.96.0.{number + 1}"))
        await client.put(keys.root(CLUSTER) + keys.service_key(name), b"\xff\xff")
    await nodes[0].store.delete("removed")
    await nodes[0].store.upsert(*service("changed", "10.96.0.9"))
    for number in range(2):
        await nodes[0].store.upsert(*service(f"s{number}", f"10.96.0.{number + 1}"))
    with pytest.raises(AlreadyExists):
        await nodes[0].store.upsert(*service("late", "10.96.0.9"))


async def test_who_removes_a_key_that_is_not_usable_removes_no_service(
    nodes: list[Node], client: EtcdClient
) -> None:
    wanted = {"shop/web": service("shop/web", "10.96.0.1", backends=2)}
    await nodes[0].store.upsert(*wanted["shop/web"])
    await agree(nodes, wanted)
    root = keys.root(CLUSTER)
    value = keys.encode_spec(wanted["shop/web"][0])
    backend = keys.encode_backend(next(iter(wanted["shop/web"][1].values())))
    by_hand = {
        f"{root}services/shop/web": value,
        f"{root}services/shop%2fweb": value,
        f"{root}backends/shop%2fweb/10.1.0.0:8080": backend,
        f"{root}backends/shop%2Fweb/10.1.0.0:08080": backend,
    }
    for key, text in by_hand.items():
        await client.put(key, text)
    await until(lambda: nodes[0].services.problem.count("3 more"), "a problem")
    for key in by_hand:
        await client.delete(key)
    await until(lambda: not nodes[0].services.problem, "no problem")
    assert nodes[0].all() == wanted


async def test_nobody_waits_for_a_revision_of_an_etcd_that_is_no_more(
    nodes: list[Node], etcd: EmbeddedEtcd, client: EtcdClient
) -> None:
    node = nodes[0]
    for _ in range(50):
        await client.put("elsewhere", b"")
    await node.store.upsert(*service("s", "10.96.0.1"))
    await node.store.settle()
    await etcd.stop()
    shutil.rmtree(etcd.data_dir)
    await etcd.start()
    await until(lambda: not node.services.specs, "the other etcd")
    done = await node.store.upsert(*service("t", "10.96.0.2"))
    assert await asyncio.wait_for(node.services.seen.wait(done.revision), 20)
    waited = []
    real = node.services.seen.wait

    async def wait(revision: int) -> bool:
        waited.append(revision)
        return await real(revision)

    node.services.seen.wait = wait  # type: ignore[method-assign,assignment]
    await node.store.settle()
    assert waited == [done.revision]
    # Of several that are written together, the first may have gone to the etcd before.
    many = asyncio.create_task(node.store.upsert_many([service("u", "10.96.0.3")]))
    await asyncio.sleep(0)
    node.services.seen.restart()
    await many
    await node.store.settle()
    assert waited == [done.revision]


async def test_backends_must_suit_the_service(nodes: list[Node]) -> None:
    spec, backends = service("s", "10.96.0.1")
    await nodes[0].store.upsert(spec, backends)

    def refuse(found: Spec) -> None:
        assert found == spec
        convert.check_backends(
            replace(found, frontends=(replace(found.frontends[0], proto=132),)), backends.values(), "b"
        )

    with pytest.raises(InvalidArgument) as caught:
        await nodes[0].store.add_backends("s", backends, refuse)
    assert caught.value.field == "b[0].port"
    assert isinstance(caught.value, FibrilError)
