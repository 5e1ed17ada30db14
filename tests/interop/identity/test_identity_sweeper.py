"""Collecting what nobody holds: who does it, how soon, and what happens when it dies."""

from __future__ import annotations

import asyncio
import os
import time

import pytest

from fibril.identity.v1 import identity_pb2 as pb
from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from services.identity.identities import sweeper
from services.identity.identities.model import digest
from services.identity.numbers import make
from tests.interop.etcd.etcdrig import compact, hanging, until
from tests.interop.identity.identityrig import IDS, LABELS, REFS, ROOT, SHORT, Node, Nodes, keys, live

SECONDS = float(os.environ.get("FIBRIL_SOAK_S", "4"))


def elected(*nodes: Node) -> Node | None:
    """The node that collects, if all agree."""
    said = {node.allocator._sweeper.elected for node in nodes}
    return next((node for node in nodes if said == {node.name}), None)


async def test_one_node_collects_and_another_does_when_it_stops(nodes: Nodes, client: EtcdClient) -> None:
    several = await nodes.several(3)
    first = await until(lambda: elected(*several), "an election")
    for node in several:
        await node.allocate("a", app=node.name)
    await until(lambda: first.allocator._sweeper._refs, "it to follow the references")
    rest = [node for node in several if node is not first]
    assert not any(node.allocator._sweeper._refs for node in rest), "nobody else does"
    began = time.monotonic()
    await nodes.stop(first)
    assert await until(lambda: elected(*rest), "another election")
    assert time.monotonic() - began < 10, "nobody waits for the end of a lease"


async def test_what_a_dead_node_held_is_collected_by_another_within_its_lease(
    nodes: Nodes, client: EtcdClient
) -> None:
    several = await nodes.several(2, SHORT)
    first = await until(lambda: elected(*several), "an election")
    (second,) = (node for node in several if node is not first)
    shared = await first.allocate("a", app="shared")
    assert await second.allocate("a", app="shared") == shared
    for number in range(100):
        await until(lambda n=number: first.allocate(f"h{n}", app=f"app-{n}"), "the lease, should it be late")
    await until(lambda: second.allocator.usage().used == 101, "the second to know all")
    began = time.monotonic()
    await nodes.die(first)
    await until(lambda: second.allocator.usage().used == 1, "the collection of what it held")
    assert time.monotonic() - began < SHORT.lease_s * 2 + 10
    assert second.allocator.list()[-1] == shared
    assert elected(second)
    assert list(await keys(client, REFS)) == [f"{shared.number}/{second.name}"]


async def test_a_storm_of_short_lived_identities_leaves_nothing(nodes: Nodes, client: EtcdClient) -> None:
    total = int(200 * SECONDS)
    several = await nodes.several(2)
    stays = await several[0].allocate("stays", app="stays")
    began = time.monotonic()

    async def pod(number: int) -> None:
        node, holder = several[number % 2], f"h{number}"
        await asyncio.sleep(number / 200 - (time.monotonic() - began))
        # As whoever makes pods, he asks again when told that etcd is too slow.
        await until(lambda: node.allocate(holder, app=f"app-{number}"), "an identity")
        await asyncio.sleep(0.5)
        await node.allocator.release(holder)

    await asyncio.gather(*(pod(number) for number in range(total)))
    ended = time.monotonic()
    assert ended - began < 2 * SECONDS + 15, "200 a second on a machine that has nothing else to do"
    for node in several:
        await until(lambda node=node: node.allocator.usage().used == 1, "all to be collected")
    assert time.monotonic() - ended < 10
    assert several[1].allocator.usage().quarantined <= total
    assert list(await keys(client, REFS)) == [f"{stays.number}/{several[0].name}"]
    assert len(await live(client, LABELS)) == len(await live(client, IDS)) == 1


async def test_collecting_goes_on_after_trouble_with_etcd(
    etcd: EmbeddedEtcd, nodes: Nodes, client: EtcdClient
) -> None:
    one = await nodes.start(timeout_s=0.5)
    for number in range(50):
        await one.allocate(str(number), app=str(number))
    await until(lambda: one.allocator._sweeper._refs, "it to follow the references")
    with hanging(etcd):
        for number in range(50):
            await one.allocator.release(str(number))
        await until(lambda: one.allocator.problem, "notice of it")
    await compact(etcd, (await client.get_prefix(ROOT)).revision)
    await until(lambda: one.allocator.usage().used == 0, "the collection")
    await until(lambda: not one.allocator.problem, "the end of the trouble")
    assert await keys(client, REFS) == {}


async def test_what_was_missed_is_found(
    nodes: Nodes, client: EtcdClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeper, "RESCAN_S", 0.5)
    one = await nodes.start()
    kept = await one.allocate("a", app="kept")
    number, key = make(7, 1), '{"app":"nobody"}'
    value = pb.StoredIdentity(number=number, labels={"app": "nobody"}).SerializeToString()
    await client.create({f"{IDS}{number}": value, f"{LABELS}{digest(key)}": value})
    await until(lambda: one.allocator.get(number), "it to be seen")
    await until(lambda: one.allocator.get(number) is None, "its collection")
    assert one.allocator.list()[-1] == kept
    # What no Fibril wrote does no harm.
    await client.put(f"{LABELS}x", b"\xff")
    await client.put(f"{REFS}x", b"")
    other = await one.allocate("b", app="other")
    await one.allocator.release("b")
    await until(lambda: one.allocator.get(other.number) is None, "its collection")
    assert one.allocator.list()[-1] == kept
