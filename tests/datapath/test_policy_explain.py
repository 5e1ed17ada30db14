"""What `trace` says by the rules, `why` says by the kernel's tables, and the rule is the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st

from fibril.policy.v1 import policy_pb2 as pb
from services.policy.answers import Answers
from services.policy.explain import Explainer
from services.policy.kernel.connections import Connections
from services.policy.model import Policy
from tests.datapath.policykit import Rig
from tests.datapath.test_policy_model import Addresses, Kernel
from tests.policy.strategies import NAMED, QUESTIONS, Universe, policy_sets, universes

QUESTIONS_A_WORLD = 60


@pytest.fixture
def addresses(rig: Rig) -> Iterator[Addresses]:
    made = Addresses(rig.dp.instance)
    yield made
    made.close()


def answers_of(rig: Rig, kernel: Kernel, universe: Universe) -> Answers:
    enforcer = kernel.enforcer
    for pod, has in zip(rig.pods, universe.pods, strict=False):
        enforcer.set_endpoint(replace(enforcer.endpoints[pod.id], addresses=has.addresses))
    connections = Connections(lambda: rig.tables, 1)
    return Answers(rig.dp.instance, enforcer, Explainer(enforcer, False), connections, lambda: rig.tables)


# A failure is not made smaller: each try is a world of its own in the kernel.
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=(Phase.explicit, Phase.generate),
)
@given(universe=universes(), policies=policy_sets, seed=st.integers(0, 2**32 - 1))
def test_trace_and_why_agree(
    rig: Rig, addresses: Addresses, universe: Universe, policies: list[Policy], seed: int
) -> None:
    some = random.Random(seed)
    answers = answers_of(rig, Kernel(rig, addresses, universe, policies), universe)
    everybody = [who for who in universe.peers if who.address is not None]
    here = [who for who in everybody if who.address in {at for pod in universe.pods[:3] for at in pod.addresses}]
    for _ in range(QUESTIONS_A_WORLD):
        one = some.choice(here)
        other = some.choice([who for who in everybody if who.address.version == one.address.version])  # type: ignore[union-attr]
        client, server = (one, other) if some.random() < 0.5 else (other, one)
        if client.address == server.address:
            continue
        protocol, port = some.choice(NAMED if some.random() < 0.4 else QUESTIONS)
        if protocol not in (0, 255):
            agree(answers, str(client.address), str(server.address), protocol, port)


def agree(answers: Answers, source: str, destination: str, protocol: int, port: int) -> None:
    note(f"{source} -> {destination} {protocol}/{port}")
    asked: Any = pb.TraceRequest(to=pb.Party(address=destination), protocol=protocol, port=port)  # type: ignore[arg-type]
    getattr(asked, "from").CopyFrom(pb.Party(address=source))
    trace = answers.trace(asked)
    why = answers.why(
        pb.WhyRequest(source=source, destination=destination, protocol=protocol, destination_port=port)
    )
    for rules, tables in ((trace.egress, why.egress), (trace.ingress, why.ingress)):
        if not tables.decision.direction:
            # That end is of another node.
            continue
        event(f"allowed {rules.allowed}, by a rule {bool(rules.rule_id)}")
        assert (rules.allowed, rules.rule_id) == (tables.decision.allowed, tables.decision.rule_id), (rules, tables)
        assert rules.policy == tables.decision.policy and rules.rule_name == tables.decision.rule_name
