"""What the kernel calls rules: never what it called another one that somebody may still ask about."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.policy.contents import Endpoint
from services.policy.model import Action, Direction, EndpointPeer, Kind, Policy, PolicyKey, Rule, Selector
from services.policy.resolve import numbers as module
from services.policy.resolve.numbers import RuleNumbers
from tests.unit.policy.test_enforcer_model import Bench

KEY = PolicyKey(Kind.KUBERNETES, "shop", "api")
WEB = Rule(Selector(), Direction.INGRESS, Action.ALLOW, (EndpointPeer(Selector.of({"app": "web"})),), name="web")
BATCH = replace(WEB, peers=(EndpointPeer(Selector.of({"app": "batch"})),), name="batch")


def title(numbers: RuleNumbers, number: int) -> str:
    found = numbers.rule(number)
    return found.title if found is not None else ""


def test_a_number_means_what_the_rule_said() -> None:
    """Nothing is renamed by what comes in a rule's place; and it is the same in another process."""
    numbers = RuleNumbers()
    before, after = numbers.ref(KEY, 0, WEB), numbers.ref(KEY, 0, BATCH)
    assert before.number != after.number
    assert (title(numbers, before.number), title(numbers, after.number)) == ("web", "batch")
    assert numbers.ref(KEY, 0, replace(WEB)).number == before.number, "one number a rule"
    others = RuleNumbers()
    assert (others.ref(KEY, 0, BATCH).number, others.ref(KEY, 0, WEB).number) == (after.number, before.number)
    places = [(KEY, 1), (replace(KEY, name="web"), 0), (replace(KEY, kind=Kind.FIBRIL), 0), (replace(KEY, namespace="s"), 0)]
    assert len({numbers.ref(*place, WEB).number for place in [(KEY, 0), *places]}) == 5


def test_hashes_that_are_one() -> None:
    """Every rule has a number of its own, also when there are hardly any left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MASK", 31)
        numbers = RuleNumbers()
        found = {numbers.ref(KEY, index, WEB).number for index in range(16)}
        assert found == set(range(16, 32)), "those below are nobody's"
        assert {numbers.ref(KEY, index, WEB).number for index in range(16)} == found


def test_given_up_when_nobody_has_used_it_twice() -> None:
    numbers = RuleNumbers()
    web, batch = numbers.ref(KEY, 0, WEB).number, numbers.ref(KEY, 0, BATCH).number
    numbers.sweep([batch])
    assert title(numbers, web) == "web", "the kernel may just have told of it"
    numbers.ref(KEY, 0, WEB)
    numbers.sweep([batch])
    assert title(numbers, web) == "web", "it was wanted meanwhile"
    numbers.sweep([batch])
    assert not title(numbers, web) and title(numbers, batch) == "batch" and len(numbers) == 1


async def test_many_changes_leave_nothing_behind() -> None:
    """Of policies that come and go, and of one that is always another; for as long as the kernel has a rule it has its name."""
    bench = Bench()
    bench.start()
    bench.identity(5000, {"app": "web"})
    bench.pod(1, Endpoint(1, 101, {"app": "api"}))
    for count in range(300):
        key = replace(KEY, name=f"p{count}")
        rule = replace(WEB, peers=(EndpointPeer(Selector.of({"app": f"a{count}"})),), name=f"r{count}")
        bench.policy(key, Policy(key, (rule,)))
        bench.policy(KEY, Policy(KEY, (replace(rule, name=f"s{count}"),)))
        if count % 100 == 50:
            await bench.flush()
        bench.policy(key, None)
        bench.enforcer.sweep()
    content = bench.enforcer.content_of(1)
    assert content is not None
    assert [title(bench.numbers, ref.number) for ref in content.key[0]] == ["s250", "r250"], "as in the kernel"
    await bench.flush()
    for _ in range(2):
        bench.enforcer.sweep()
    assert len(bench.numbers) == 1 and len(bench.enforcer.world.selectors) == 1
    assert len(bench.enforcer.world.selectors._by_label) == 1 and len(bench.enforcer.contents) == 2


async def test_of_a_policy_only_what_has_changed() -> None:
    """Endpoints that its other rules select keep the policy they have."""
    bench = Bench()
    bench.start()
    bench.pod(1, Endpoint(1, 101, {"app": "api"}))
    bench.pod(2, Endpoint(2, 102, {"app": "db"}))
    rules = tuple(replace(WEB, subject=Selector.of({"app": name}), name=name) for name in ("api", "db"))
    bench.policy(KEY, Policy(KEY, rules))
    await bench.flush()
    built, has = bench.enforcer.contents.built, dict(bench.writer.endpoints)
    bench.policy(KEY, Policy(KEY, (rules[0], replace(rules[1], peers=None))))
    await bench.flush()
    assert bench.enforcer.contents.built == built + 1
    assert bench.writer.endpoints[1] == has[1] and bench.writer.endpoints[2] != has[2]
