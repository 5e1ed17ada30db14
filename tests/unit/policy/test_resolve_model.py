"""Any policies, any endpoints: the tables say what the rules say, peer by peer and port by port."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from services.common.errors import ResourceExhausted
from services.identity.numbers import Reserved
from services.policy import abi
from services.policy.model import (
    TCP,
    Action,
    CidrPeer,
    Direction,
    EndpointPeer,
    Entity,
    EntityPeer,
    Expression,
    Kind,
    Operator,
    Policy,
    PolicyKey,
    Port,
    Rule,
    Selector,
    Tier,
)
from services.policy.resolve.numbers import RuleNumbers, RuleRef
from services.policy.resolve.resolved import Resolved, Tables
from services.policy.resolve.selectors import Selectors
from services.policy.resolve.world import NodeFacts, World
from tests.policy.reference import Decision, Who, concerns, decide
from tests.policy.strategies import QUESTIONS, Universe, policy_sets, question, universes
from tests.policy.tables import Answer, Prefixes, look_up

A_TIME = 250
"""Questions asked of each world."""
KEY = PolicyKey(Kind.FIBRIL, "", "a")
seeds = st.integers(0, 2**32 - 1)
numbers = RuleNumbers()
often = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


def world_of(universe: Universe) -> World:
    return World(
        selectors_of(universe),
        {name: frozenset(backends) for name, backends in universe.services.items()},
        {name: NodeFacts(node.labels, frozenset(node.addresses)) for name, node in universe.nodes.items()},
        {
            name: {port: set(having) for port, having in standing.items()}
            for name, standing in universe.named.items()
        },
    )


def selectors_of(universe: Universe) -> Selectors:
    made = Selectors()
    for number, own in universe.identities.items():
        made.add(number, own)
    return made


def refs_of(policies: list[Policy], subject: Who) -> list[RuleRef]:
    return [
        numbers.ref(policy.key, index, rule)
        for policy in policies
        for index, rule in enumerate(policy.rules)
        if concerns(rule, subject)
    ]


def resolved_for(policies: list[Policy], subject: Who, world: World) -> Resolved:
    named = {name: port for name, (port,) in subject.named_ports.items()}
    return Resolved(refs_of(policies, subject), named, world)


def same(answer: Answer, wanted: Decision) -> bool:
    deciding = found.place if (found := numbers.rule(answer.rule)) else None
    return (
        answer.allowed == wanted.allowed
        and deciding == wanted.deciding
        and answer.enforced >= wanted.enforced
        and (wanted.allowed or (answer.reject, answer.keep) == (wanted.reject, wanted.keep))
    )


@often
@given(universes(), policy_sets, seeds)
def test_tables_say_what_the_rules_say(universe: Universe, policies: list[Policy], seed: int) -> None:
    world, some = world_of(universe), random.Random(seed)
    made = {}
    for subject in universe.subjects:
        resolved = resolved_for(policies, subject, world)
        resolved.classify()
        tables = resolved.tables()
        made[id(subject)] = resolved, tables, Prefixes(tables.prefixes)
    asked = [who for who in universe.subjects if refs_of(policies, who)] or universe.subjects
    for _ in range(A_TIME):
        subject, direction, peer, protocol, port = question(universe, asked, some)
        resolved, tables, prefixes = made[id(subject)]
        wanted = decide(policies, subject, direction, peer, protocol, port, universe.services, universe.nodes)
        answer = look_up(
            tables,
            direction,
            resolved.classes.get(peer.identity, 0),
            prefixes.find(peer.address),
            protocol,
            port,
        )
        assert same(answer, wanted), (answer, wanted, subject, direction, peer, protocol, port)
        event(f"allowed {wanted.allowed}, by a rule {wanted.deciding is not None}")


@often
@given(universes(), policy_sets, seeds)
def test_whom_nothing_is_known_of_is_allowed_what_all_are(
    universe: Universe, policies: list[Policy], seed: int
) -> None:
    """Whatever labels an identity may turn out to have, and whatever ports, it was not allowed too much."""
    world, some = world_of(universe), random.Random(seed)
    for subject in universe.subjects:
        resolved = resolved_for(policies, subject, world)
        resolved.classify()
        tables = resolved.tables()
        prefixes = Prefixes(tables.prefixes)
        for who in some.sample(universe.peers, 8):
            for direction in Direction:
                protocol, port = some.choice(QUESTIONS)
                answer = look_up(
                    tables, direction, tables.unknown, prefixes.find(who.address), protocol, port
                )
                if not answer.allowed:
                    assert answer.verdict & abi.VERDICT in (abi.Verdict.DENY, abi.Verdict.DEFAULT)
                    continue
                # Of those who could be at that address.
                for other in universe.peers:
                    turned_out = Who(other.labels, other.identity, who.address, other.named_ports)
                    wanted = decide(
                        policies,
                        subject,
                        direction,
                        turned_out,
                        protocol,
                        port,
                        universe.services,
                        universe.nodes,
                    )
                    assert wanted.allowed, (answer, wanted, subject, direction, turned_out, protocol, port)


def of_rules(*rules: Rule) -> tuple[Resolved, Tables, Prefixes]:
    """Rules for a pod beside which there are only reserved identities."""
    world = World()
    for each in Reserved:
        world.selectors.add(each, {each.label: ""})
    resolved = resolved_for([Policy(KEY, rules)], Who({}, 1000), world)
    resolved.classify()
    tables = resolved.tables()
    return resolved, tables, Prefixes(tables.prefixes)


def test_entity_all_is_everybody_also_who_is_not_known() -> None:
    """One class, however many identities there are."""
    resolved, tables, _ = of_rules(
        Rule(Selector(), Direction.INGRESS, Action.ALLOW, (EntityPeer(Entity.ALL),), (Port(6, 80, 80),), default_deny=True)
    )
    assert not resolved.classes
    for kind in (0, tables.unknown):
        assert look_up(tables, Direction.INGRESS, kind, 0, 6, 80).allowed
        assert not look_up(tables, Direction.INGRESS, kind, 0, 6, 81).allowed


def test_what_many_rules_make_of_many_peers_is_refused_before_it_is_worked_out() -> None:
    """Thousands of rules that could each deny an identity that nothing is known of, whatever its address."""
    rules = [
        Rule(
            Selector(),
            Direction.INGRESS,
            Action.DENY,
            (EndpointPeer(Selector.of({"a": str(at)})), CidrPeer(ip_network(10 << 24 | at))),
            (Port(6, at + 1, at + 1),),
        )
        for at in range(3000)
    ]
    refs = [numbers.ref(KEY, at, rule) for at, rule in enumerate(rules)]
    began = time.process_time()
    resolved = Resolved(refs, {}, World())
    resolved.classify()
    with pytest.raises(ResourceExhausted, match="9006000 combinations"):
        resolved.tables()
    # If they allow, little has to be looked at.
    allowing = [RuleRef(ref.key, ref.index, replace(ref.rule, action=Action.ALLOW), ref.number) for ref in refs]
    resolved = Resolved(allowing, {}, World())
    resolved.classify()
    assert resolved.tables().prefix_classes == 3001
    assert time.process_time() - began < 15


def test_selectors_of_several_values_are_found_by_each() -> None:
    selectors = Selectors()
    term = EndpointPeer(Selector.of({}, Expression("app", Operator.IN, ("a", "b"))))
    for number, app in enumerate("abc" * 30, 1000):
        selectors.add(number, {"app": app})
    selectors.hold([term])
    assert len(selectors.numbers(term)) == 60 == selectors.tried
    selectors.add(2000, {"app": "b"})
    selectors.add(2001, {"app": "c"})
    assert 2000 in selectors.numbers(term) and selectors.tried == 61
    selectors.remove(1000)
    assert 1000 not in selectors.numbers(term)
    selectors.drop([term])
    assert selectors.add(2002, {"app": "a"}) == [] and selectors.tried == 61


@pytest.mark.parametrize("prefix", ["::/0", "::/80", "::ffff:0:0/96", "::ffff:c000:200/120"])
def test_prefixes_of_ipv6_hold_no_addresses_of_ipv4(prefix: str) -> None:
    rule = Rule(
        Selector(), Direction.INGRESS, Action.ALLOW, (CidrPeer(ip_network(prefix)),), default_deny=True
    )
    resolved, tables, prefixes = of_rules(rule)
    world = resolved.classes.get(Reserved.WORLD, 0)
    for address, allowed in ((ip_address("192.0.2.1"), False), (ip_address("::1"), prefix < "::f")):
        answer = look_up(tables, Direction.INGRESS, world, prefixes.find(address), TCP, 80)
        assert answer.allowed is allowed


def test_unknown_identity_may_be_one_that_the_last_tier_would_not_pass() -> None:
    """PASS of the administrator and no PASS of the baseline: denied, though either alone would allow it."""
    passed = (EntityPeer(Entity.INIT),)
    direction = Direction.INGRESS
    _, tables, _ = of_rules(
        Rule(Selector(), direction, Action.PASS, passed, tier=Tier.ADMIN),
        Rule(Selector(), direction, Action.ALLOW, tier=Tier.ADMIN),
        Rule(Selector(), direction, Action.PASS, (EntityPeer(Entity.WORLD),), tier=Tier.BASELINE),
        Rule(Selector(), direction, Action.DENY, tier=Tier.BASELINE),
    )
    assert not look_up(tables, direction, tables.unknown, 0, TCP, 80).allowed
