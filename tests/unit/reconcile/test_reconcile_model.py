"""Any history of wishes, failures, meddling, restarts and time: the rules hold throughout, and once things
stop failing the world becomes what is wanted.
"""

from __future__ import annotations

import asyncio

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.unit.reconcile.fakes import Setup

KEYS = st.sampled_from("abcde")
VALUES = st.integers(0, 3)


class Histories(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.s = Setup(resync_s=50.0)

    @rule(key=KEYS, value=VALUES)
    def want(self, key: str, value: int) -> None:
        self.s.want(key, value)

    @rule(key=KEYS)
    def drop(self, key: str) -> None:
        self.s.drop(key)

    @rule(key=KEYS, value=VALUES)
    def meddle(self, key: str, value: int) -> None:
        self.s.world.objects[key] = value

    @rule(key=KEYS)
    def destroy(self, key: str) -> None:
        self.s.world.objects.pop(key, None)

    @rule(key=KEYS, times=st.integers(1, 5), late=st.booleans())
    def fail(self, key: str, times: int, late: bool) -> None:
        self.s.world.fail_next[key] = times
        (self.s.world.late.add if late else self.s.world.late.discard)(key)

    @rule(times=st.integers(1, 3))
    def fail_reads(self, times: int) -> None:
        self.s.world.fail_reads = times

    @rule(synced=st.booleans())
    def sync(self, synced: bool) -> None:
        self.s.synced = synced

    @rule(seconds=st.sampled_from((0.5, 1.0, 7.0, 60.0)))
    def time_passes(self, seconds: float) -> None:
        self.s.clock.now += seconds

    @rule()
    def wake_all(self) -> None:
        self.s.reconciler.wake()

    @rule()
    def restart(self) -> None:
        self.s.restart()

    @rule()
    def work(self) -> None:
        world, wanted = self.s.world, dict(self.s.wanted)
        before, seen = dict(world.objects), len(world.calls)
        failing = +world.fail_next
        pause = self.loop.run_until_complete(self.s.reconciler.work())
        assert pause > 0, "work came back although there is more"
        calls = world.calls[seen:]
        assert len(set(calls)) == len(calls), "an object was tried twice without a reason"
        kinds = [kind for kind, _ in calls]
        # The comparison comes before everything else that is due, so the order holds over the whole.
        assert kinds == sorted(kinds), "an update came before a delete"
        for kind, key in calls:
            assert (kind == "update") == (key in wanted)
        if not self.s.synced:
            assert "delete" not in kinds
        for key in before.keys() | world.objects.keys():
            if key not in {k for _, k in calls}:
                assert before.get(key) == world.objects.get(key)
        status = self.s.reconciler.status()
        for _, key in calls:
            assert (status.get(key) is not None and status[key].state == "failed") == (key in failing)

    @invariant()
    def status_covers_what_is_wanted(self) -> None:
        assert self.s.reconciler.status().keys() >= self.s.wanted.keys()

    def teardown(self) -> None:
        """Nothing fails any more and all sources are in sync: after a resync's time all is as wanted."""
        self.s.world.fail_next.clear()
        self.s.world.fail_reads = 0
        self.s.synced = True
        for _ in range(2):
            self.s.clock.now += 60
            self.loop.run_until_complete(self.s.reconciler.work())
        self.loop.close()
        assert self.s.world.objects == self.s.wanted
        assert self.s.reconciler.health().state == "ok"
        assert {status.state for status in self.s.reconciler.status().values()} <= {"done"}


Histories.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestHistories = Histories.TestCase
