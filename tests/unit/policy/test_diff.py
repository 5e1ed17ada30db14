"""What a change would change: pairs of identities by their ports, and flows that were seen."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import ip_address
from itertools import product
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fibril.flow.v1 import flow_pb2
from fibril.policy.v1 import policy_pb2 as pb
from services.identity.numbers import Reserved, make
from services.policy.answers import Answers
from services.policy.contents import Endpoint
from services.policy.diff import SHOWN_MAX, Differ
from services.policy.enforcer import Enforcer
from services.policy.explain import Explainer
from services.policy.model import (
    TCP,
    Action,
    Direction,
    EndpointPeer,
    Kind,
    Policy,
    PolicyKey,
    Port,
    Rule,
    Selector,
)
from services.policy.resolve.numbers import RuleNumbers
from services.policy.resolve.world import NodeFacts, World
from tests.policy.reference import Who, decide
from tests.policy.strategies import QUESTIONS, Universe, policy_sets, universes

WEB, DB = make(1, 1), make(1, 2)


def policy(name: str, port: int, peer: str = "web", direction: Direction = Direction.INGRESS, subject: str = "db") -> Policy:
    rule = Rule(
        Selector.of({"app": subject}), direction, Action.ALLOW, (EndpointPeer(Selector.of({"app": peer})),),
        (Port(TCP, port, port),), default_deny=True,
    )  # fmt: skip
    return Policy(PolicyKey(Kind.FIBRIL, "", name), (rule,))


def flow(port: int) -> flow_pb2.Flow:
    return flow_pb2.Flow(
        protocol=TCP,
        source=flow_pb2.FlowEnd(address="10.0.0.1", identity=WEB, endpoint=1),
        destination=flow_pb2.FlowEnd(address="10.0.0.2", identity=DB, endpoint=2, port=port),
    )


async def diff(there: list[Policy], changed: list[Policy], gone: bool = False, *flows: flow_pb2.Flow) -> pb.DiffResponse:
    enforcer = Enforcer(World(), RuleNumbers(), {})
    for reserved in Reserved:
        enforcer.add_identity(reserved, {reserved.label: ""})
    for number, identity, app in ((1, WEB, "web"), (2, DB, "db")):
        enforcer.add_identity(identity, {"app": app})
        address = (ip_address(f"10.0.0.{number}"),)
        enforcer.set_endpoint(Endpoint(number, 100 + number, {"app": app}, identity, app, addresses=address))
    for each in there:
        enforcer.set_policy(each.key, each)
    explainer = Explainer(enforcer, True)
    # Only the shape of a decision is asked of it.
    answers = Answers(None, enforcer, explainer, None, lambda: None)  # type: ignore[arg-type]
    held = len(enforcer.world.selectors)
    found = await Differ(enforcer, explainer, answers, lambda _: flows).diff(changed, gone, 0)
    assert len(enforcer.world.selectors) == held
    return found


async def test_pairs_whose_verdict_changes_and_no_others() -> None:
    found = await diff([], [policy("p", 80)])
    pairs = {(each.source_identity, each.destination_identity): each for each in found.pairs}
    assert {server for _, server in pairs} == {DB} and (WEB, DB) in pairs and found.pair_count == len(found.pairs)
    assert (Reserved.HOST, DB) not in pairs, "the node's host reaches its own pods whatever policies say"
    # From the web all but the port is refused then.
    assert all(each.allowed_before and not each.allowed_after for each in pairs[WEB, DB].ports)
    assert not any(each.protocol == TCP and each.first <= 80 <= each.last for each in pairs[WEB, DB].ports)
    assert list(pairs[WEB, DB].source_pods) == ["web"] and dict(pairs[WEB, DB].source_labels)["app"] == "web"


async def test_nothing_changes_by_the_same_policy_again() -> None:
    found = await diff([policy("p", 80)], [policy("p", 80)], False, flow(80))
    assert (found.pair_count, found.flow_count) == (0, 0)


async def test_flows_that_would_break() -> None:
    found = await diff([], [policy("p", 80)], False, flow(80), flow(81))
    assert [each.flow.destination.port for each in found.flows] == [81]
    assert not found.flows[0].decision.allowed and "no rule allows it" in found.flows[0].decision.reason
    # What the server refuses now breaks by nothing that the client's policy says.
    there = [policy("p", 80)]
    changed = [policy("out", 443, "db", Direction.EGRESS, "web")]
    found = await diff(there, changed, False, flow(80), flow(81))
    assert [each.flow.destination.port for each in found.flows] == [80]


async def test_connections_of_the_host_that_would_break() -> None:
    """Whoever is about to shut himself out is told."""
    ssh = flow_pb2.Flow(
        protocol=TCP,
        source=flow_pb2.FlowEnd(address="192.0.2.1", identity=Reserved.WORLD),
        destination=flow_pb2.FlowEnd(address="172.30.0.1", identity=Reserved.HOST, port=22),
    )
    made = policy("host", 80)
    made = Policy(made.key, (replace(made.rules[0], subject=Selector(), subject_is_node=True, peers=None),))
    found = await diff([], [made], False, ssh)
    assert [each.flow for each in found.flows] == [ssh] and found.pair_count == 0
    assert not (await diff([], [made], False, flow(80))).flow_count


async def test_a_policy_that_goes() -> None:
    found = await diff([policy("p", 80)], [policy("p", 80)], True, flow(80))
    assert found.flow_count == 0 and found.pair_count
    assert all(each.allowed_after for pair in found.pairs for each in pair.ports)


A_TIME = 150
"""Questions asked of each world."""


# ---- any policies -------------------------------------------------------------------------------------------------
def enforcer_of(universe: Universe, there: list[Policy]) -> Enforcer:
    enforcer = Enforcer(World(), RuleNumbers(), {})
    for number, own in universe.identities.items():
        enforcer.add_identity(number, own)
    for number, pod in enumerate(universe.pods, 1):
        enforcer.set_endpoint(Endpoint(number, number, pod.labels, pod.identity, str(number), addresses=pod.addresses))
    for name, backends in universe.services.items():
        enforcer.set_backends(name, backends)
    for name, node in universe.nodes.items():
        enforcer.set_node(name, NodeFacts(node.labels, frozenset(node.addresses)))
    for each in there:
        enforcer.set_policy(each.key, each)
    return enforcer


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(universes(), policy_sets, policy_sets, st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_pairs_are_those_whose_verdict_the_rules_change(
    universe: Universe, there: list[Policy], changed: list[Policy], gone: bool, local_host: bool, some: Random
) -> None:
    enforcer = enforcer_of(universe, there)
    explainer = Explainer(enforcer, local_host)
    answers = Answers(None, enforcer, explainer, None, lambda: None)  # type: ignore[arg-type]
    answer = asyncio.run(Differ(enforcer, explainer, answers, lambda _: ()).diff(changed, gone, 0))
    keys = {each.key for each in changed}
    after = [*(each for each in there if each.key not in keys), *([] if gone else changed)]
    addresses = {pod.identity: pod.addresses[0] for pod in reversed(universe.pods)}
    everybody = {number: Who(own, number, addresses.get(number)) for number, own in universe.identities.items()}

    def allowed(policies: list[Policy], client: Who, server: Who, protocol: int, port: int) -> bool:
        ends = [(Direction.EGRESS, client, server), (Direction.INGRESS, server, client)]
        if local_host and client.identity == Reserved.HOST:
            ends.pop()
        return all(
            decide(policies, subject, direction, peer, protocol, port, universe.services, universe.nodes).allowed
            for direction, subject, peer in ends
            if subject.identity not in Reserved.__members__.values()
        )

    found = {(pair.source_identity, pair.destination_identity): pair for pair in answer.pairs}
    assert len(found) == len(answer.pairs) == answer.pair_count
    asked = list(product(everybody, everybody, QUESTIONS))
    for one, two, (protocol, port) in some.sample(asked, min(len(asked), A_TIME)):
        before, then = (allowed(each, everybody[one], everybody[two], protocol, port) for each in (there, after))
        ports = found[one, two].ports if (one, two) in found else ()
        told = [each for each in ports if each.protocol == protocol and each.first <= port <= each.last]
        if before == then:
            assert not told
        else:
            # Stretches of more than one protocol name none.
            others = [each for each in ports if not each.protocol]
            assert (before, then) in [(each.allowed_before, each.allowed_after) for each in told or others]


async def test_ten_thousand_identities_are_a_few_kinds() -> None:
    """One rule for all is one comparison for each kind of peers."""
    enforcer = Enforcer(World(), RuleNumbers(), {})
    for number in range(1, 10_001):
        enforcer.add_identity(make(1, number), {"app": f"a{number % 100}", "pod": str(number)})
    explainer = Explainer(enforcer, True)
    answers = Answers(None, enforcer, explainer, None, lambda: None)  # type: ignore[arg-type]
    made = policy("p", 80, "a1")
    made = Policy(made.key, (replace(made.rules[0], subject=Selector()),))
    found = await Differ(enforcer, explainer, answers, lambda _: ()).diff([made], False, 0)
    assert found.pair_count == 10_000 * 10_000 and len(found.pairs) == SHOWN_MAX
