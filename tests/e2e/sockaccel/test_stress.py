"""Hundreds of conversations at once, each byte checked, while everything about them changes.

FIBRIL_SOAK_S: how long it goes on, seconds; by default a few. The number everything is drawn from is printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes as ct
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stressplay
from accelrig import A4, A6, B4, B6, Rig, at_work, until
from test_shorten import MESSAGE

from services.common.instance import Instance
from services.common.kernel.maps import BpfMap
from services.common.pipeline.abi import POLICY_EPS, PolicyEp
from services.sockaccel import abi, hooks, install
from tests.e2e.lb.sockrig import Process, forget, make_instance

SECONDS = float(os.environ.get("FIBRIL_SOAK_S", "5"))
CLIENTS = 60
"""Conversations at once, of each of two processes."""


class Crowd:
    """Two servers and two clients: one of each in each namespace."""

    def __init__(self, rig: Rig, count: int = CLIENTS, splices: bool = False) -> None:
        """splices: all processes do, and have done so before."""
        self.seed = secrets.randbits(48)
        print(f"\nseed {self.seed}")
        self.servers, self.clients = ([rig.process(space) for space in (0, 1)] for _ in range(2))
        for each in (*self.servers, *self.clients):
            each.do(Path(stressplay.__file__).read_text())
            if splices:
                each.do("SPLICES = True; splice_once()")
        within = [self._listening(server, host) for server in self.servers for host in ("127.0.0.1", "::1")]
        apart = [
            self._listening(server, host)
            for server, hosts in zip(self.servers, ((A4, A6), (B4, B6)), strict=True)
            for host in hosts
        ]
        for space, client in enumerate(self.clients):
            places = within[2 * space : 2 * space + 2] + apart
            client.do(f"begin({places!r}, {count}, {self.seed + 1000 * space})")

    @staticmethod
    def _listening(server: Process, host: str) -> tuple[int, str, int]:
        family = 10 if ":" in host else 2
        return family, host, server.give(f"listen({family}, {host!r})")

    def finish(self) -> dict[str, Any]:
        """Have all come to an end; what they have done together, in which nothing is wrong."""
        for client in self.clients:
            client.send("", "finish()")
        hanging = [client.receive() for client in self.clients]
        # A server's side may end a moment after the client's; main and two listeners stay.
        until(lambda: all(server.give("threading.active_count()") <= 5 for server in self.servers), 2 * stressplay.PATIENCE_S)
        tallies = [each.give("tally()") for each in (*self.clients, *self.servers)]
        wrong = [error for tally in tallies for error in tally["errors"]]
        assert not wrong and not any(hanging), (self.seed, hanging, wrong)
        assert all(not tally["failed"] for tally in tallies)
        return {name: sum(tally[name] for tally in tallies) for name in ("connections", "sent", "read", "spurious")}


def sockets(instance: Instance) -> int:
    """In the map of sockets."""
    with BpfMap.open(instance.pin_dir / abi.MAPS["sa_socks"], ct.c_uint64, ct.c_uint32) as table:
        return sum(1 for _ in table.keys())  # noqa: SIM118 - it is no mapping


def openings(instance: Instance) -> int:
    """Clients whose server was never met."""
    with BpfMap.open(instance.pin_dir / abi.MAPS["sa_opening"], ct.c_uint8 * 40, abi.Pair) as table:
        return sum(1 for _ in table.keys())  # noqa: SIM118 - it is no mapping


class Faults:
    """What may happen to a node at any time, at random."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig, self.rand = rig, random.Random(seed)
        self.began = rig.wanted
        self.done: dict[str, int] = {}
        self.detached = 0
        """When programs were last off, ns: who closed in between was not seen."""
        self.policies: BpfMap[Any, Any] = BpfMap.open(rig.instance.pin_dir / POLICY_EPS, ct.c_uint32, PolicyEp)
        self.kinds: dict[Callable[[], None], int] = {
            self.off: 2, self.class_off: 2, self.one_off: 4, self.policy: 8, self.judge: 8, self.limits: 4,
            self.other_class: 2, self.restart: 4, self.calls: 2, self.reattach: 1,
            self.nonblocking: 1,
        }  # fmt: skip

    def step(self) -> None:
        fault = self.rand.choices(list(self.kinds), list(self.kinds.values()))[0]
        fault()
        self.done[fault.__name__] = self.done.get(fault.__name__, 0) + 1

    def off(self) -> None:
        self._for_a_moment(on=False)

    def class_off(self) -> None:
        self._for_a_moment(classes=0)

    def one_off(self) -> None:
        pairs = self.rig.pairs()
        if pairs:
            self._for_a_moment(off=frozenset(pair.ends[0].cookie for pair in self.rand.sample(pairs, (len(pairs) + 1) // 2)))

    def other_class(self) -> None:
        """New ones are of another class, which those that are there keep."""
        self._for_a_moment(classes=3, same=2, pods=2, any_port=3, any_group=3, spaces=self._spaces(3))

    def policy(self) -> None:
        number = self.rand.randrange(3)
        held = self.policies.lookup(number)
        held.revision += 1
        self.policies.update(number, held)

    def judge(self) -> None:
        self.rig.tables.write(self.rig.wanted, judge=True)

    def limits(self) -> None:
        self._for_a_moment(
            run_bytes=self.rand.choice((1000, 20_000, 65_536)),
            proofs=self.rand.choice((0, 1, 4)),
            beat_s=self.rand.choice((0.001, 0.1, 30.0)),
        )

    def nonblocking(self) -> None:
        """Whoever waits in recv() is left to TCP."""
        self._for_a_moment(nonblocking=1)

    def restart(self) -> None:
        """As a service that finds everything in place."""
        hooks.attach_all(self.rig.instance, self.rig.group.name)

    def calls(self) -> None:
        """Programs behind recv() go, and nothing is shortened without them."""
        self._for_a_moment(calls=False)

    def reattach(self) -> None:
        hooks.detach_all(self.rig.instance)
        time.sleep(self.rand.random() * 0.02)
        hooks.attach_all(self.rig.instance, self.rig.group.name)
        self.detached = time.monotonic_ns()

    def _for_a_moment(self, **changes: Any) -> None:
        self.rig.write(**changes)
        time.sleep(self.rand.random() * 0.05)
        self.rig.write(**{name: getattr(self.began, name) for name in changes})

    def _spaces(self, mask: int) -> dict[int, tuple[int, int, int]]:
        return {cookie: (mask, mask, endpoint) for cookie, (_, _, endpoint) in self.began.spaces.items()}


def quiet(rig: Rig, detached: int = 0) -> None:
    """Nothing is left of connections that are gone, but those that ended while no program was there to see it."""
    until(lambda: all(pair.made < detached for pair in rig.pairs()))
    until(lambda: sockets(rig.instance) == 0)
    for pair in rig.pairs():
        rig.tables.pairs.delete(pair.ends[0].cookie)


def report(rig: Rig, before: dict[abi.Stat, int], found: dict[str, Any], **more: Any) -> dict[str, int]:
    """Counters since then, printed."""
    stats = {which.name.lower(): rig.stat(which) - before[which] for which in abi.Stat if which != abi.Stat.ENDED}
    stats |= {f"ended_{why.name.lower()}": rig.ended(why) for why in abi.EndReason if rig.ended(why)}
    print({**found, **stats, **more})
    return stats


def counters(rig: Rig) -> dict[abi.Stat, int]:
    return {which: rig.stat(which) for which in abi.Stat}


def test_every_byte_arrives_whatever_happens(rig: Rig) -> None:
    before = counters(rig)
    crowd = Crowd(rig)
    faults = Faults(rig, crowd.seed)
    with contextlib.closing(faults.policies):
        began = time.monotonic()
        while time.monotonic() - began < SECONDS:
            time.sleep(faults.rand.random() * 0.1)
            faults.step()
        found = crowd.finish()
    stats = report(rig, before, found, faults=faults.done)
    assert found["connections"] > 20 * SECONDS and found["read"] > 0.5 * found["sent"]
    # Or else nothing has been put to the test.
    assert stats["shortened"] > 0.4 * stats["pairs"] and stats["pairs"] > 0.4 * found["connections"]
    assert stats["sends"] > 0.2 * stats["tcp_sends"]
    quiet(rig, faults.detached)


def test_in_peace_most_is_handed_over_and_nothing_is_left(rig: Rig) -> None:
    before, waiting = counters(rig), openings(rig.instance)
    crowd = Crowd(rig)
    time.sleep(SECONDS / 2)
    found = crowd.finish()
    stats = report(rig, before, found)
    assert stats["pairs"] == found["connections"] and stats["full"] == stats["taken"] == 0
    assert stats["shortened"] > 0.7 * stats["pairs"] and stats["sends"] > stats["tcp_sends"]
    quiet(rig)
    assert openings(rig.instance) == waiting


def test_who_splices_is_left_to_tcp(rig: Rig) -> None:
    """Processes that read plainly or splice, at the same connection; in peace, and while everything changes."""
    before = counters(rig)
    crowd = Crowd(rig, 20, splices=True)
    faults = Faults(rig, crowd.seed)
    began, length = time.monotonic(), min(SECONDS / 2, 20)
    with contextlib.closing(faults.policies):
        while (so_far := time.monotonic() - began) < length:
            time.sleep(0.05)
            if so_far > length / 2:
                faults.step()
        found = crowd.finish()
    stats = report(rig, before, found, faults=faults.done)
    assert stats["pairs"] > 0 and stats["shortened"] == 0
    quiet(rig, faults.detached)


@pytest.fixture
def small(spaces: tuple[Path, Path]) -> Iterator[Rig]:
    """With room for eight pairs."""
    instance = make_instance()
    try:
        asyncio.run(install.load(instance, pairs=8))
        with at_work(instance, f"fibril-test-{instance.name}") as group:
            made = Rig(instance, group, spaces)
            try:
                yield made
            finally:
                made.close()
    finally:
        forget(instance)


def test_without_room_connections_are_left_to_tcp(small: Rig) -> None:
    before = counters(small)
    crowd = Crowd(small, 20)
    time.sleep(min(SECONDS / 3, 20))
    stats = report(small, before, crowd.finish())
    assert stats["full"] > 0 and stats["shortened"] > 5
    quiet(small)


def test_sockets_of_another_program_are_left_to_it(rig: Rig, spaces: tuple[Path, Path]) -> None:
    """Another instance was there first and takes those of two servers; the other two are free."""
    other = make_instance()
    try:
        asyncio.run(install.load(other))
        # Whoever is attached first is asked first.
        hooks.detach_all(rig.instance)
        hooks.attach_all(other, rig.group.name)
        hooks.attach_all(rig.instance, rig.group.name)
        with contextlib.closing(Rig(other, rig.group, spaces)) as first:
            first.write(same=0)
            mine, others = counters(rig), counters(first)
            found = Crowd(rig, 20)
            time.sleep(min(SECONDS / 3, 20))
            done = found.finish()
            theirs = report(first, others, done)
            ours = report(rig, mine, done)
            assert ours["taken"] > 0 and theirs["shortened"] > 0 and ours["shortened"] > 0
            assert ours["pairs"] + theirs["pairs"] == done["connections"] and theirs["taken"] == 0
            quiet(rig)
            quiet(first)
    finally:
        with contextlib.suppress(Exception):
            hooks.detach_all(other)
        forget(other)


TALK = """
import array
def pair_up(family, host):
    l = socket.create_server((host, 0), family=family)
    c = socket.create_connection(l.getsockname()[:2]); d, _ = l.accept(); l.close()
    for _ in range(20):
        c.sendall(b"ping"); assert d.recv(9) == b"ping"
        d.sendall(b"pong"); assert c.recv(9) == b"pong"
    return c, d

def memory(s):
    # SO_MEMINFO: what waits to be read, its limit, what waits to be sent, its limit.
    return list(array.array("I", s.getsockopt(socket.SOL_SOCKET, 55, 36)))[:4]

def fill(s, size):
    s.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < 64 << 20:
            sent += s.send(BLOCK[sent % PERIOD : sent % PERIOD + size])
    return sent
"""


@pytest.mark.parametrize("size", [20, 500, 60_000])
def test_who_stops_reading_stops_the_writer(rig: Rig, size: int) -> None:
    """What waits unread is bounded by what one end may say alone and by TCP's own buffers; later all of it arrives."""
    process = rig.process()
    process.do(Path(stressplay.__file__).read_text() + TALK)
    process.do("c, d = pair_up(socket.AF_INET, '127.0.0.1')")
    sent = process.do(f"sent = fill(c, {size})", "sent")
    held, limit, _, _ = process.give("memory(d)")
    pair = max(rig.pairs(), key=lambda each: each.made)
    assert sent < 64 << 20 and pair.ends[0].bytes <= rig.wanted.run_bytes + 100
    # Each send counts for something, however small it is.
    assert pair.ends[0].bytes > rig.wanted.run_bytes * size // (size + MESSAGE) - 2 * size - 100
    assert held <= limit + rig.wanted.run_bytes + 2 * 65536, (held, limit)
    assert process.do("""
got = 0
d.settimeout(5)
while got < sent:
    more = d.recv(1 << 16)
    assert more == BLOCK[got % PERIOD : got % PERIOD + len(more)], "closed" if not more else f"wrong at {got}"
    got += len(more)
""", "got") == sent  # fmt: skip
    assert process.give("memory(d)")[0] == 0
