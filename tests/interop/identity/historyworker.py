"""One node under load in a process of its own, which writes down every call and answer.

    python -m tests.interop.identity.historyworker <etcd's URL> <directory> <node> <log> <seed>

A line of the log is written in one piece and before or after what it is about, so a killed process leaves all that anybody
could have seen of it. "stop" on standard input ends the load; the end of standard input ends the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
import time
from pathlib import Path

from services.common.errors import FibrilError
from services.common.etcd.client import EtcdClient
from services.identity.db import open_db
from services.identity.identities.allocator import Allocator
from services.identity.identities.config import IdentitiesConfig
from services.identity.identities.model import canonical
from services.identity.lease import NodeLease
from tests.interop.identity.identityrig import CLUSTER

CFG = IdentitiesConfig(lease_s=2, quarantine_s=10)
SPACE = 300
"""Few, so that numbers are picked twice, and used again after their quarantine."""
SHARED = 25
"""Label sets that all nodes ask for, over and over; others are asked for once."""
CLIENTS, HOLDERS = 5, 4


class Worker:
    """A node and its clients."""

    def __init__(self, url: str, place: Path, name: str, log: Path, seed: int) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._name = name
        self._random = random.Random(seed)
        self._fresh = f"{name}-{seed}"
        self._calls = 0
        self._etcd = EtcdClient([url], timeout_s=1.0)
        self._db = open_db(place / f"{name}.db")
        self._lease = NodeLease(self._etcd, self._db, CFG.lease_s)
        self._allocator = Allocator(self._etcd, CLUSTER, 1, name, self._lease, self._db, CFG, space=SPACE)
        self._allocator.on_moved(
            lambda holder, identity: self.write(
                "moved", holder=holder, number=identity.number, labels=identity.key
            )
        )

    def write(self, event: str, **what: object) -> None:
        """Write down what happens now."""
        line = json.dumps({"at": time.monotonic(), "event": event, "node": self._name, **what})
        os.write(self._log, line.encode() + b"\n")

    async def run(self) -> None:
        """Until standard input ends."""
        commands = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(commands), sys.stdin
        )
        await self._allocator.start()
        self.write("started", holders=self._held())
        keeping = asyncio.create_task(self._lease.run())
        clients = [asyncio.create_task(self._client(number)) for number in range(CLIENTS)]
        await commands.readline()
        self._stopping = True
        await asyncio.gather(*clients)
        self.write("stopped", holders=self._held())
        print("stopped", flush=True)
        await commands.read()
        keeping.cancel()
        await self._allocator.stop()

    _stopping = False

    def _held(self) -> dict[str, tuple[int, str]]:
        return {
            holder: (identity.number, identity.key) for holder, identity in self._allocator.holders().items()
        }

    async def _client(self, client: int) -> None:
        while not self._stopping:
            holder = f"{client}/{self._random.randrange(HOLDERS)}"
            if self._random.random() < 0.4:
                await self._call("release", holder, {})
            else:
                await self._call("allocate", holder, self._labels())
            await asyncio.sleep(self._random.expovariate(1 / 0.02))

    def _labels(self) -> dict[str, str]:
        if self._random.random() < 0.8:
            return {"app": f"shared-{self._random.randrange(SHARED)}"}
        return {"app": f"{self._fresh}-{self._calls}"}

    async def _call(self, method: str, holder: str, labels: dict[str, str]) -> None:
        self._calls += 1
        call = f"{self._fresh}-{self._calls}"
        self.write("call", call=call, method=method, holder=holder, labels=canonical(labels))
        try:
            if method == "release":
                await self._allocator.release(holder)
                self.write("answer", call=call)
            else:
                identity = await self._allocator.allocate(labels, holder)
                self.write("answer", call=call, number=identity.number, labels=identity.key)
        except FibrilError as error:
            self.write("error", call=call, code=error.code_name, message=str(error))


def main() -> None:
    url, place, name, log, seed = sys.argv[1:]
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(Worker(url, Path(place), name, Path(log), int(seed)).run())


if __name__ == "__main__":
    main()
