"""Whom a policy service that has just begun waits for."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.common.instance import Instance
from services.policy import sources
from services.policy.enforcer import Enforcer
from services.policy.model import Action, Direction, Kind, Policy, PolicyKey, Rule, Selector, ServicePeer
from services.policy.resolve.numbers import RuleNumbers
from services.policy.resolve.world import World
from services.policy.sources import Sources

TO_SERVICE = Policy(
    PolicyKey(Kind.FIBRIL, "", "a"),
    (Rule(Selector(), Direction.EGRESS, Action.ALLOW, (ServicePeer("default/kubernetes"),)),),
)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    """All have told what they know, but the balancer, which is not there although it is late."""
    monkeypatch.setattr(sources, "ABSENT_S", -1.0)
    instance = Instance("t", tmp_path / "run", tmp_path / "state", tmp_path / "bpf")
    enforcer = Enforcer(World(), RuleNumbers(), {})
    enforcer.set_policy(TO_SERVICE.key, TO_SERVICE)
    made = Sources(instance, enforcer)
    for each in (made.endpoints, made.identities, made.nodes):
        each.ever = True
    return made


def pin(tmp_path: Path) -> None:
    (tmp_path / "bpf/fibril/t/prog/lb").mkdir(parents=True)


def test_a_balancer_that_is_being_upgraded_too_is_waited_for(begun: Sources, tmp_path: Path) -> None:
    """What its backends are allowed would be denied meanwhile, and what they are denied allowed."""
    pin(tmp_path)
    assert begun.waiting(adopted=True) == "services"
    begun.services.ever = True
    assert begun.waiting(adopted=True) == ""


def test_a_balancer_that_stays_away_keeps_no_pod_waiting(
    begun: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin(tmp_path)
    monkeypatch.setattr(sources, "BACK_S", -1.0)
    assert begun.waiting(adopted=True) == ""


def test_nobody_waits_for_a_balancer_that_never_ran(begun: Sources) -> None:
    assert begun.waiting(adopted=True) == ""


def test_nobody_waits_for_a_balancer_that_no_policy_needs(begun: Sources, tmp_path: Path) -> None:
    pin(tmp_path)
    begun._enforcer.set_policy(TO_SERVICE.key, None)
    assert begun.waiting(adopted=True) == ""
