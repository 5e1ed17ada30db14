"""The conditions under which identities change in etcd: of two that must not both happen, one does."""

from __future__ import annotations

import asyncio

import pytest

from services.common.errors import FailedPrecondition, NotFound
from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from services.identity.identities.model import Identity, digest
from services.identity.identities.store import Epoch, IdentityStore, Look, Record

KEY, OTHER = '{"app":"web"}', '{"app":"shop"}'


@pytest.fixture
def one(client: EtcdClient) -> IdentityStore:
    return IdentityStore(client, "test", "one")


@pytest.fixture
def two(client: EtcdClient) -> IdentityStore:
    return IdentityStore(client, "test", "two")


async def begin(client: EtcdClient, store: IdentityStore) -> Epoch:
    return await store.begin(await client.grant(60))


async def create(store: IdentityStore, number: int, key: str, epoch: Epoch) -> Record:
    record = await store.create(number, key, epoch)
    assert record is not None and record.identity == Identity(number, key) and not record.retired
    return record


async def test_labels_and_number_are_taken_together_or_not_at_all(
    client: EtcdClient, one: IdentityStore, two: IdentityStore
) -> None:
    mine, theirs = await begin(client, one), await begin(client, two)
    web = await create(one, 1, KEY, mine)
    assert await two.create(2, KEY, theirs) is None, "the labels are taken"
    assert await two.create(1, OTHER, theirs) is None, "the number is taken"
    assert await two.refs([1, 2]) == {}
    look = await two.look(digest(KEY), 2)
    assert look == Look(web, None, theirs.revision, look.revision)
    look = await two.look(digest(OTHER), 1)
    assert look == Look(None, web, theirs.revision, look.revision)


async def test_what_is_held_is_not_retired_and_what_is_retired_not_taken(
    client: EtcdClient, one: IdentityStore, two: IdentityStore
) -> None:
    mine, theirs, lease = await begin(client, one), await begin(client, two), await client.grant(60)
    web = await create(one, 1, KEY, mine)
    assert await one.retire(web, lease) is None
    taken = await two.take(web, theirs)
    assert taken is not None and await two.refs([1]) == {1: (taken, theirs.lease)}
    await one.drop(1, web.revision)
    assert await one.retire(web, lease) is None, "another node holds it"
    await two.drop(1, web.revision)
    assert await two.refs([1]) == {1: (taken, theirs.lease)}, "not the one that was meant"
    await two.drop(1, taken)
    gone = await one.retire(web, lease)
    assert gone is not None and gone.identity == web.identity and gone.retired
    assert await two.take(web, theirs) is None
    assert await two.create(2, KEY, theirs) is None, "the labels are in quarantine"
    assert await two.create(1, OTHER, theirs) is None, "the number is in quarantine"
    look = await two.look(digest(KEY), 1)
    assert look == Look(gone, gone, theirs.revision, look.revision)
    again = await two.revive(gone, theirs)
    assert again is not None and await one.revive(gone, mine) is None
    await client.revoke(lease)
    look = await two.look(digest(KEY), 1)
    assert look.theirs == again and not again.retired, "it does not hang on the quarantine any more"


async def test_a_retired_identity_is_gone_with_its_lease(client: EtcdClient, one: IdentityStore) -> None:
    mine, lease = await begin(client, one), await client.grant(60)
    web = await create(one, 1, KEY, mine)
    await one.drop(1, web.revision)
    assert await one.retire(web, lease)
    await client.revoke(lease)
    look = await one.look(digest(KEY), 1)
    assert look.theirs is None is look.occupant
    assert await one.create(1, OTHER, mine)


async def test_a_request_of_an_earlier_epoch_has_no_effect(client: EtcdClient, one: IdentityStore) -> None:
    lease = await client.grant(60)
    earlier = await one.begin(lease)
    web = await create(one, 1, KEY, earlier)
    now = await one.begin(lease)
    assert await one.create(2, OTHER, earlier) is None
    assert await one.take(web, earlier) is None
    assert await one.revive(web, earlier) is None
    assert await one.refs([1, 2]) == {1: (web.revision, lease)} and await one.refs_under(lease) == {1}
    assert await one.create(2, OTHER, now)
    await client.revoke(lease)
    assert await one.refs_under(lease) == set() == set(await one.refs([1, 2]))
    assert await one.take(web, now) is None, "an epoch ends with its lease"
    with pytest.raises(NotFound):
        await one.begin(lease)


async def test_two_that_exclude_each_other_at_once(
    client: EtcdClient, one: IdentityStore, two: IdentityStore
) -> None:
    mine, theirs, lease = await begin(client, one), await begin(client, two), await client.grant(60)
    for number in range(1, 60):
        key = f'{{"app":"{number}"}}'
        web = await create(one, number, key, mine)
        await one.drop(number, web.revision)
        taken, retired = await asyncio.gather(two.take(web, theirs), one.retire(web, lease))
        assert (taken is None) != (retired is None)


async def test_a_cluster_has_the_number_its_first_node_says(client: EtcdClient, one: IdentityStore) -> None:
    first, second = await asyncio.gather(one.claim(3), one.claim(4), return_exceptions=True)
    wrong = second if first is None else first
    assert isinstance(wrong, FailedPrecondition) and wrong.field == "etcd.cluster_id"
    await one.claim(3 if first is None else 4)


async def test_a_hundred_refs_and_more_are_read(
    client: EtcdClient, etcd: EmbeddedEtcd, one: IdentityStore
) -> None:
    mine = await begin(client, one)
    made = await asyncio.gather(*(create(one, n, f'{{"app":"{n}"}}', mine) for n in range(1, 301)))
    found = await one.refs(range(1, 400))
    assert found == {record.number: (record.revision, mine.lease) for record in made}
    assert await one.refs_under(mine.lease) == set(range(1, 301))
