"""What a process that was killed has left in the tables, and the next one."""

from __future__ import annotations

import asyncio
import ctypes as ct
from ipaddress import ip_address, ip_network

import pytest

from services.common.kernel.maps import BpfMap
from services.policy import abi
from services.policy.contents import Endpoint
from services.policy.enforcer import Enforcer
from services.policy.kernel import replay
from services.policy.kernel.writer import Writer
from services.policy.model import (
    Action,
    CidrPeer,
    Direction,
    EndpointPeer,
    Kind,
    Peer,
    Policy,
    PolicyKey,
    Rule,
    Selector,
)
from services.policy.resolve.numbers import RuleNumbers
from services.policy.resolve.world import World
from tests.datapath.policykit import Rig

GOOD, BAD, LATE = 5001, 5002, 5003
LABELS = {GOOD: {"app": "good"}, BAD: {"app": "bad"}}
BADS = Selector.of({"app": "bad"})


@pytest.fixture
def rig(rig: Rig) -> Rig:
    """Of which nobody knows anything yet."""
    rig.clear()
    return rig


def policy(name: str, *peers: Peer, action: Action = Action.DENY, subject: Selector | None = None) -> Policy:
    rule = Rule(subject or Selector(), Direction.INGRESS, action, peers)
    return Policy(PolicyKey(Kind.FIBRIL, "", name), (rule,))


class Process:
    """The part of a policy service that writes."""

    def __init__(self, rig: Rig, *policies: Policy, others: dict[int, dict[str, str]] | None = None) -> None:
        self.rig = rig
        self.writer = Writer(rig.tables)
        self.enforcer = Enforcer(World(), RuleNumbers(), {})
        for number, labels in {**LABELS, **(others or {})}.items():
            self.enforcer.add_identity(number, labels)
        for each in policies:
            self.enforcer.set_policy(each.key, each)
        for pod in rig.pods[:2]:
            self.enforcer.set_endpoint(Endpoint(pod.id, pod.ifindex, {"pod": str(pod.id)}, pod.identity))
        self.enforcer.use(self.writer)
        self.enforcer.set_ready()
        self.flush()

    def flush(self) -> None:
        asyncio.run(self.enforcer.flush(self.writer))

    def allowed(self, peer: int, address: str = "192.0.2.9") -> bool:
        """By the first pod's tables."""
        found = replay.ask(self.rig.tables, self.rig.a.id, Direction.INGRESS, peer, ip_address(address), 6, 80)
        return found.allowed


def test_tables_that_no_policy_names_are_nobodys(rig: Rig) -> None:
    """The process was killed when it had written them, and before an endpoint got them."""
    before = Process(rig, policy("a", EndpointPeer(BADS)))
    assert not before.allowed(BAD) and before.allowed(GOOD)
    table = max(key.table for key, _ in rig.tables.peers.items()) + 1
    net = ip_network("192.0.2.0/24")
    for number in range(table, table + 3):
        # As if good ones were bad.
        rig.tables.peers.update(abi.Peer(number, GOOD), 1)
        rig.tables.prefixes.update(abi.Prefix.of(number, net), 1)
    after = Process(rig, policy("a", EndpointPeer(BADS), CidrPeer(ip_network("198.51.100.0/24"))))
    assert not after.allowed(BAD) and after.allowed(GOOD)
    assert not after.allowed(GOOD, "198.51.100.1")
    left = {key.table for table in (rig.tables.peers, rig.tables.prefixes) for key, _ in table.items()}
    assert left.isdisjoint(range(table, table + 3))


def test_what_does_not_fit_after_a_restart_stays_as_it_was(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy of an earlier process stays whole, is not wrong about who comes new, and goes when its own fits."""
    denying = policy("a", EndpointPeer(BADS))
    Process(rig, denying)
    line = rig.tables.ep(rig.a.id).policy
    monkeypatch.setattr(abi, "PEERS_MAX", 0)
    more = policy("b", EndpointPeer(Selector.of({"app": "good"})), subject=Selector.of({"pod": str(rig.b.id)}))
    after = Process(rig, denying, more, others={LATE: {"app": "bad"}})
    assert len(after.enforcer.contents.problems()) == 2
    assert rig.tables.ep(rig.a.id).policy == line
    assert not after.allowed(BAD) and after.allowed(GOOD) and not after.allowed(LATE)
    # Its room is nobody else's.
    other = policy("c", CidrPeer(ip_network("198.51.100.0/24")), subject=Selector.of({"pod": "none"}))
    after.enforcer.set_policy(other.key, other)
    after.enforcer.set_endpoint(Endpoint(rig.c.id, rig.c.ifindex, {"pod": "none"}, rig.c.identity))
    after.flush()
    assert not after.allowed(BAD) and after.allowed(GOOD)
    monkeypatch.undo()
    after.enforcer.contents.try_again()
    after.flush()
    assert not after.enforcer.contents.problems() and not after.writer.left
    assert rig.tables.ep(rig.a.id).policy != line
    assert not after.allowed(BAD) and after.allowed(GOOD) and not after.allowed(LATE)


def test_who_finds_no_room_is_not_known_at_all(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is full when some of several are known already: none of them passes for one that no rule matches."""
    late = range(LATE, LATE + 4)
    with BpfMap.create("hash", abi.Peer, ct.c_uint32, 9, 1, "few") as few:
        monkeypatch.setattr(rig.tables, "peers", few)
        process = Process(rig, policy("a", EndpointPeer(BADS)))
        there = set(map(bytes, few.keys()))
        for number in late:
            process.enforcer.add_identity(number, {"app": "bad"})
        process.flush()
        assert few.lookup(abi.Peer(abi.KNOWN, BAD)) is not None and process.allowed(GOOD)
        assert [number for number in late if process.allowed(number)] == []
        assert set(map(bytes, few.keys())) == there
        # Two of them fit.
        for number in late[2:]:
            process.enforcer.remove_identity(number)
        process.flush()
        assert [number for number in late if few.lookup(abi.Peer(abi.KNOWN, number)) is not None] == list(late[:2])
        assert not any(process.allowed(number) for number in late)


def test_lockdown_holds_where_the_policy_does_not_fit(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    Process(rig, policy("a", EndpointPeer(BADS)))
    monkeypatch.setattr(abi, "PEERS_MAX", 0)
    after = Process(rig, policy("a", EndpointPeer(BADS), action=Action.ALLOW))
    assert after.enforcer.contents.problems()
    after.enforcer.set_flags(rig.a.id, abi.EpFlag.LOCKDOWN)
    assert rig.tables.ep(rig.a.id).flags == abi.EpFlag.LOCKDOWN


