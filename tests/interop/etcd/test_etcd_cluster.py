"""A cluster of three with TLS and client certificates (drawing: etcdrig.Cluster)."""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.common.errors import FailedPrecondition, Unavailable
from services.common.etcd.client import EtcdClient, EtcdTls
from services.common.etcd.watch import Event, Put, Synced
from tests.interop.etcd.etcdrig import Authority, Cluster, Watcher, until, watching


@pytest.fixture
def authority(place: Path) -> Authority:
    return Authority(place / "authority")


@pytest.fixture
def cluster(place: Path, authority: Authority) -> Iterator[Cluster]:
    cluster = Cluster(place, authority)
    cluster.start()
    with contextlib.ExitStack() as stack:
        stack.callback(cluster.stop)
        yield cluster


async def test_calls_and_watches_move_on_when_members_die(cluster: Cluster, authority: Authority) -> None:
    async with (
        EtcdClient(cluster.urls, tls=authority.issue("fibril")) as client,
        EtcdClient(cluster.urls[::-1], tls=authority.issue("other")) as other,
    ):
        await until(lambda: _reads(client), "a leader")
        async with watching(client, "p/") as watcher:
            await until(lambda: len(watcher.events) == 2, "the snapshot")
            wanted = []
            for number in range(3):
                cluster.kill(number)
                revision = await until(lambda n=number: _made(other, f"p/{n}"), "a write with two members")
                wanted.append(Put(f"p/{number}", b"", revision))
                await until(lambda: len(_changes(watcher)) >= len(wanted), f"{wanted}: {watcher.events}")
                assert _changes(watcher) == wanted
                cluster.start(number)
                await until(lambda n=number: _reads_from(cluster, authority, n), "the member's return")


async def test_a_hanging_member_is_left_for_another(cluster: Cluster, authority: Authority) -> None:
    async with EtcdClient(cluster.urls, tls=authority.issue("fibril")) as client:
        await until(lambda: _reads(client), "a leader")
        cluster.signal(0, signal.SIGSTOP)
        await until(lambda: client.put("key", b""), "a write by another member")
        cluster.signal(0, signal.SIGCONT)


async def test_without_a_quorum_everything_is_unavailable_until_there_is_one(
    cluster: Cluster, authority: Authority
) -> None:
    async with EtcdClient(cluster.urls, tls=authority.issue("fibril"), timeout_s=1.0) as client:
        await until(lambda: _reads(client), "a leader")
        cluster.kill(0)
        cluster.kill(1)
        with pytest.raises(Unavailable):
            await client.get("key")
        with pytest.raises(Unavailable):
            await client.put("key", b"")
        cluster.start(0)
        await until(lambda: client.put("key", b""), "a write with two members")


async def test_certificates_are_checked_by_both_sides(
    cluster: Cluster, authority: Authority, place: Path
) -> None:
    async with EtcdClient(cluster.urls, tls=authority.issue("fibril")) as client:
        await until(lambda: _reads(client), "a leader")
    foreign = Authority(place / "foreign").issue("stranger")
    for tls in (EtcdTls(authority.ca), EtcdTls(authority.ca, foreign.cert, foreign.key), foreign, None):
        async with EtcdClient(cluster.urls, tls=tls, timeout_s=1.0) as client:
            with pytest.raises(Unavailable, match="cannot be reached"):
                await client.get("key")
    async with EtcdClient(cluster.urls, tls=EtcdTls(place / "absent")) as client:
        with pytest.raises(FailedPrecondition, match="absent, a TLS file for etcd: No such file"):
            await client.get("key")


async def test_a_replaced_certificate_is_taken_up(
    cluster: Cluster, authority: Authority, place: Path
) -> None:
    good, bad = authority.issue("fibril"), Authority(place / "foreign").issue("stranger")
    assert good.cert and good.key and bad.cert and bad.key
    used = EtcdTls(authority.ca, place / "used.pem", place / "used.key")
    assert used.cert and used.key
    shutil.copy(bad.cert, used.cert)
    shutil.copy(bad.key, used.key)
    async with EtcdClient(cluster.urls, tls=used, timeout_s=1.0) as client:
        with pytest.raises(Unavailable):
            await client.get("key")
        shutil.copy(good.cert, used.cert)
        shutil.copy(good.key, used.key)
        await until(lambda: _reads(client), "a call with the new certificate")


async def _made(client: EtcdClient, key: str) -> int:
    """The revision at which it was made. A write may hit the moment without a leader: it says so, and whether the key is
    there all the same; then it is made again by us.
    """
    with contextlib.suppress(Unavailable):
        await client.cas(key, 0, b"")
    found = await client.get(key)
    return 0 if found is None else found.mod_revision


def _changes(watcher: Watcher) -> list[Event]:
    """What was told after the snapshot. A member that lags behind the one before has it listed again, which changes nothing."""
    return [event for event in watcher.events[2:] if not isinstance(event, Synced)]


async def _reads(client: EtcdClient) -> bool:
    await client.check()
    return True


async def _reads_from(cluster: Cluster, authority: Authority, number: int) -> bool:
    async with EtcdClient([cluster.urls[number]], tls=authority.issue("probe"), timeout_s=1.0) as client:
        return await _reads(client)
