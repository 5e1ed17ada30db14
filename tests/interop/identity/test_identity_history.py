"""Many nodes in processes of their own, faults of every kind, every call and answer written down and checked afterwards.

`make soak-identity` lets it run for longer (FIBRIL_SOAK_S=600); FIBRIL_SEED=… repeats the choices of an earlier run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from services.common.etcd.client import EtcdClient
from services.common.etcd.embedded import EmbeddedEtcd
from tests.interop.etcd.etcdrig import compact, hanging, kill, until
from tests.interop.identity.history import Holding, contradictions, holdings
from tests.interop.identity.historyworker import CFG
from tests.interop.identity.identityrig import IDS, LABELS, REFS, ROOT, keys, live

SECONDS = float(os.environ.get("FIBRIL_SOAK_S", "12"))
SEED = int(os.environ.get("FIBRIL_SEED", "0")) or random.randrange(1, 1 << 32)
NODES = 4
REPO = Path(__file__).parents[3]


class Process:
    """A node's process, and those that follow it."""

    def __init__(self, etcd: EmbeddedEtcd, place: Path, name: str, chance: random.Random) -> None:
        self.name = name
        self._etcd = etcd
        self._place = place
        self._chance = chance
        self.log = place / f"{name}.jsonl"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.interop.identity.historyworker"),
            *(self._etcd.endpoint, str(self._place), self.name, str(self.log)),
            str(self._chance.randrange(1 << 32)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=self._place,  # so that it does not outlive the test
            env={**os.environ, "PYTHONPATH": str(REPO)},
        )

    @property
    def _running(self) -> asyncio.subprocess.Process:
        assert self._process is not None
        return self._process

    def has_begun(self) -> bool:
        return self.log.exists() and b"\n" in self.log.read_bytes()

    def signal(self, number: signal.Signals) -> None:
        self._running.send_signal(number)

    async def kill(self) -> None:
        self._running.kill()
        await self._running.wait()

    async def finish(self) -> None:
        """End the load."""
        assert self._running.stdin is not None and self._running.stdout is not None
        self._running.stdin.write(b"stop\n")
        assert await asyncio.wait_for(self._running.stdout.readline(), 30) == b"stopped\n"

    async def end(self) -> None:
        if self._running.returncode is None and self._running.stdin is not None:
            self._running.stdin.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._running.wait(), 10)
                return
            await self.kill()

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


class Faults:
    """What happens to the cluster, one thing at a time."""

    def __init__(
        self, etcd: EmbeddedEtcd, client: EtcdClient, processes: list[Process], chance: random.Random
    ) -> None:
        self._etcd = etcd
        self._client = client
        self._processes = processes
        self._chance = chance
        self.done: Counter[str] = Counter()
        self._kinds = (self.hang, self.kill, self.forget, self.crash, self.pause, self.compact)

    def missing(self) -> bool:
        """Whether one of them has not happened yet."""
        return not all(self.done[kind.__name__] for kind in self._kinds)

    async def inject(self) -> None:
        # None much more often than another.
        rare = min(self.done[kind.__name__] for kind in self._kinds)
        kind = self._chance.choice([kind for kind in self._kinds if self.done[kind.__name__] <= rare + 1])
        self.done[kind.__name__] += 1
        await kind()

    async def hang(self) -> None:
        """etcd says nothing for a while."""
        with hanging(self._etcd):
            await asyncio.sleep(self._chance.uniform(0.1, 1.5))

    async def kill(self) -> None:
        """etcd is killed."""
        await kill(self._etcd)
        await asyncio.sleep(self._chance.uniform(0, 0.3))
        await self._etcd.start()

    async def forget(self) -> None:
        """A node's lease ends before its time."""
        refs = (await self._client.get_prefix(REFS)).kvs
        if refs:
            await self._client.revoke(self._chance.choice(refs).lease)

    async def crash(self) -> None:
        """A node's process is killed."""
        process = self._chance.choice(self._processes)
        await process.kill()
        await asyncio.sleep(self._chance.uniform(0, 0.5))
        await process.start()

    async def pause(self) -> None:
        """A node's process stands still, perhaps for longer than its lease."""
        process = self._chance.choice(self._processes)
        process.signal(signal.SIGSTOP)
        await asyncio.sleep(self._chance.uniform(0.5, 1.5 * CFG.lease_s))
        process.signal(signal.SIGCONT)

    async def compact(self) -> None:
        """etcd forgets its history."""
        await compact(self._etcd, (await self._client.get_prefix(ROOT)).revision)


@contextlib.asynccontextmanager
async def load(etcd: EmbeddedEtcd, place: Path, chance: random.Random) -> AsyncIterator[list[Process]]:
    processes = [Process(etcd, place, f"node-{number}", chance) for number in range(NODES)]
    try:
        for process in processes:
            await process.start()
        yield processes
    finally:
        for process in processes:
            await process.end()


async def test_a_recorded_history_has_no_contradiction(
    etcd: EmbeddedEtcd, client: EtcdClient, place: Path
) -> None:
    print(f"FIBRIL_SEED={SEED}")
    chance = random.Random(SEED)
    async with load(etcd, place, chance) as processes:
        faults = Faults(etcd, client, processes, chance)
        # Who is killed before he is there has not been killed.
        await until(lambda: all(process.has_begun() for process in processes), "all to be there")
        await until(lambda: keys(client, REFS), "the first to be held")
        ends = time.monotonic() + SECONDS
        while time.monotonic() < ends or faults.missing():
            await faults.inject()
            await asyncio.sleep(chance.uniform(0.1, 0.6))
        await asyncio.gather(*(process.finish() for process in processes))
        held = {
            (event["node"], holder): (number, labels)
            for process in processes
            for event in process.events()[-1:]
            for holder, (number, labels) in event["holders"].items()
        }
        await until(lambda: nothing_lost(client, held), "etcd to have exactly what is held")
    events = [event for process in processes for event in process.events()]
    history = holdings(events, CFG.quarantine_s / 2)
    assert list(contradictions(history, CFG.quarantine_s)) == []
    count = Counter(event["event"] for event in events)
    print(dict(count), dict(faults.done), f"{len({each.number for each in history})} numbers")
    assert count["answer"] > 20 * SECONDS and count["started"] > NODES
    assert len({each.labels for each in history}) > 50


async def nothing_lost(client: EtcdClient, held: dict[tuple[str, str], tuple[int, str]]) -> bool:
    """Whether etcd has all that is held, and nothing else but tombstones."""
    identities = {int(name): dict(stored.labels) for name, stored in (await live(client, IDS)).items()}
    wanted = {number: json.loads(labels) for number, labels in held.values()}
    refs = {f"{number}/{node}" for (node, _), (number, _) in held.items()}
    return (
        identities == wanted
        and (await keys(client, REFS)).keys() == refs
        and len(await live(client, LABELS)) == len(identities)
    )


def test_the_check_finds_what_must_not_be() -> None:
    def holding(begin: float, end: float, labels: str, number: int) -> Holding:
        return Holding(begin, end, "node", "holder", labels, number)

    fine = [holding(0, 5, "a", 1), holding(1, 9, "a", 1), holding(20, 30, "b", 1), holding(9.5, 12, "a", 2)]
    assert list(contradictions(fine, 10)) == []
    (found,) = contradictions([*fine, holding(8, 8.5, "a", 3)], 10)
    assert "two numbers at a time" in found
    (found,) = contradictions([*fine, holding(18, 19, "b", 1)], 10)
    assert "too soon" in found
    # Behind a longer one that began before.
    (found,) = contradictions([holding(0, 50, "a", 1), holding(1, 2, "a", 1), holding(30, 31, "a", 2)], 10)
    assert "two numbers at a time" in found


def test_a_history_says_who_certainly_held_what() -> None:
    def at(moment: float, event: str, **what: object) -> dict[str, Any]:
        return {"at": moment, "event": event, "node": "n", **what}

    def call(moment: float, name: str, method: str, holder: str, labels: str = "{}") -> dict[str, Any]:
        return at(moment, "call", call=name, method=method, holder=holder, labels=labels)

    events = [
        at(0, "started", holders={"old": (9, "z")}),
        call(1, "c1", "allocate", "h", "a"),
        at(2, "answer", call="c1", number=1, labels="a"),
        call(3, "c2", "allocate", "h", "b"),
        at(4, "error", call="c2", code="UNAVAILABLE"),
        call(5, "c3", "release", "h"),
        at(6, "answer", call="c3"),
        call(7, "c4", "allocate", "h", "c"),  # killed: nobody knows
        at(8, "started", holders={"old": (9, "z"), "h": (3, "c")}),
        at(9, "moved", holder="h", number=4, labels="c"),
        at(30, "started", holders={}),  # away for so long that what it held may be another's
    ]
    assert sorted((h.begin, h.end, h.holder, h.number) for h in holdings(events, 5)) == [
        (0, 8, "old", 9),
        (2, 3, "h", 1),
        (4, 5, "h", 1),
        (8, 9, "h", 3),
        (8, 9, "old", 9),
        (9, 9, "h", 4),
    ]
