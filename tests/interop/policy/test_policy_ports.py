"""Named ports in etcd, whatever becomes of the endpoints that have them meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from fibril.policy.v1 import policy_pb2 as pb
from services.common import errors
from services.common.etcd.client import EtcdClient
from services.policy import named
from services.policy.contents import Endpoint
from services.policy.enforcer import Enforcer
from services.policy.model import TCP
from services.policy.named import NamedPorts
from services.policy.resolve.numbers import RuleNumbers
from services.policy.resolve.world import NamedPort, World
from tests.interop.etcd.etcdrig import until

ROOT = "/fibril/v1/c1/policy-ports/n1/"
WEB = {"web": (TCP, 8080)}
OTHER = {"web": (TCP, 9090)}


class Node:
    """What a policy service knows of its pods and their ports."""

    def __init__(self, client: EtcdClient) -> None:
        self.enforcer = Enforcer(World(), RuleNumbers(), {})
        self.ports = NamedPorts(client, "c1", "n1", self.enforcer)
        self.enforcer.set_ready()

    def pod(self, number: int, container: str, identity: int = 1000) -> None:
        own = self.ports.of(number, container)
        self.enforcer.set_endpoint(Endpoint(number, number, {}, identity, container=container, named=own))

    def named(self, number: int) -> dict[str, NamedPort]:
        return dict(self.enforcer.endpoints[number].named)


@contextlib.asynccontextmanager
async def node(client: EtcdClient) -> AsyncIterator[Node]:
    made = Node(client)
    task = asyncio.create_task(made.ports.run())
    await made.ports.synced.wait()
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_who_gets_a_number_does_not_get_the_ports(client: EtcdClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pod went while its node's policy service was away, and another one has its number."""
    monkeypatch.setattr(named, "RETRY_S", 0.01)
    async with node(client) as before:
        before.pod(5, "a")
        await before.ports.set(5, WEB)
        assert before.named(5) == WEB
    async with node(client) as after:
        after.pod(5, "b")
        assert after.named(5) == {}
        after.pod(6, "a")
        tidy = asyncio.create_task(after.ports.tidy())

        async def gone() -> bool:
            return await client.get(f"{ROOT}5") is None

        await until(gone, "the ports of the pod before are gone")
        assert after.named(5) == {}
        await after.ports.set(5, OTHER)
        assert after.named(5) == OTHER
        tidy.cancel()
    # The same pod keeps them over a restart.
    async with node(client) as again:
        again.pod(5, "b")
        assert again.named(5) == OTHER


async def test_ports_of_an_older_version_stay(client: EtcdClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """It did not say whose they are; that is made up for."""
    monkeypatch.setattr(named, "RETRY_S", 0.01)
    stored = pb.StoredNamedPorts(identity=1000, ports=named.to_proto(WEB))
    await client.put(f"{ROOT}5", stored.SerializeToString())
    async with node(client) as new:
        new.pod(5, "a")
        assert new.named(5) == WEB
        tidy = asyncio.create_task(new.ports.tidy())

        async def told() -> bool:
            kv = await client.get(f"{ROOT}5")
            return kv is not None and pb.StoredNamedPorts.FromString(kv.value).container == "a"

        await until(told, "etcd says whose they are")
        assert new.named(5) == WEB
        tidy.cancel()
        new.pod(5, "b")
        assert new.named(5) == {}


async def test_ports_that_go_while_others_are_tidied_end_nothing(
    client: EtcdClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named, "RETRY_S", 0.01)
    async with node(client) as here:
        for number in (5, 6):
            here.pod(number, str(number))
            await here.ports.set(number, WEB)
        here.enforcer.remove_endpoint(5)
        delete = client.delete

        async def slowly(key: str) -> bool:
            if key == f"{ROOT}5":
                await delete(f"{ROOT}6")
                await until(lambda: not here.ports.of(6, "6"), "the others are gone")
            return await delete(key)

        monkeypatch.setattr(client, "delete", slowly)
        tidy = asyncio.create_task(here.ports.tidy())
        await until(lambda: tidy.done() or not here.ports.of(5, "5"), "tidied")
        await asyncio.wait([tidy], timeout=0.1)
        assert not tidy.done(), tidy.exception()
        tidy.cancel()


async def test_ports_set_while_those_of_the_number_are_taken_away_stay(
    client: EtcdClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named, "RETRY_S", 0.01)
    async with node(client) as here:
        here.pod(5, "a")
        await here.ports.set(5, WEB)
        here.enforcer.remove_endpoint(5)
        delete = client.delete
        setting: list[asyncio.Task[None]] = []

        async def slowly(key: str) -> bool:
            if not setting:
                here.pod(5, "b")
                setting.append(asyncio.create_task(here.ports.set(5, OTHER)))
                await asyncio.wait(setting, timeout=0.2)
            return await delete(key)

        monkeypatch.setattr(client, "delete", slowly)
        tidy = asyncio.create_task(here.ports.tidy())
        await until(lambda: bool(setting) and setting[0].done(), "set")
        await setting[0]
        tidy.cancel()
        kv = await client.get(f"{ROOT}5")
        assert kv is not None and pb.StoredNamedPorts.FromString(kv.value).ports["web"].port == 9090
        assert here.named(5) == OTHER


async def test_ports_for_a_pod_that_goes_meanwhile(client: EtcdClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has the number by then has none, and the caller hears of it."""
    async with node(client) as here:
        here.pod(5, "a")
        put = client.put

        async def slowly(key: str, value: bytes) -> int:
            done = await put(key, value)
            here.enforcer.remove_endpoint(5)
            here.pod(5, "b")
            return done

        monkeypatch.setattr(client, "put", slowly)
        with pytest.raises(errors.NotFound):
            await here.ports.set(5, WEB)
        assert here.named(5) == {}
