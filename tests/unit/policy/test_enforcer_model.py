"""However things came about, the kernel is given what the rules say; and it is told no more than has changed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from ipaddress import ip_address

from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from services.identity.numbers import Reserved
from services.policy.contents import HOST, Endpoint
from services.policy.enforcer import Enforcer
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
from tests.policy.reference import Decision, Node, Who, decide
from tests.policy.strategies import (
    HOSTNAME,
    LOCAL_IDENTITIES,
    NAMED,
    NAMES,
    NODE_ADDRESSES,
    QUESTIONS,
    WORLD_ADDRESSES,
    labels,
    policies,
    policy_keys,
)
from tests.policy.tables import Answer, FakeWriter, as_writer

HERE = {HOSTNAME: "n1", "app": "x"}
A_TIME = 120
POD_NUMBERS, IDENTITIES = (10, 11, 12), tuple(range(1000, 1006))
ADDRESSES = (*map(ip_address, ("10.1.0.20", "10.1.0.21", "10.1.0.23", "fd00:1::15")), *WORLD_ADDRESSES[:3])


@dataclass
class Truth:
    """What has been told."""

    policies: dict[PolicyKey, Policy] = field(default_factory=dict)
    pods: dict[int, Endpoint] = field(default_factory=dict)
    identities: dict[int, dict[str, str]] = field(default_factory=dict)
    backends: dict[str, frozenset] = field(default_factory=dict)  # type: ignore[type-arg]
    nodes: dict[str, Node] = field(default_factory=dict)
    named: dict[str, dict[tuple[int, int], set[int]]] = field(default_factory=dict)

    def decide(
        self,
        subject: Endpoint,
        direction: Direction,
        identity: int,
        address: object,
        protocol: int,
        port: int,
    ) -> Decision:
        peer = Who(
            self.identities[identity],
            identity,
            address,  # type: ignore[arg-type]
            {
                name: [each for each, having in standing.items() if identity in having]
                for name, standing in self.named.items()
            },
        )
        return decide(
            self.policies.values(), who(subject), direction, peer, protocol, port, self.backends, self.nodes
        )


def who(endpoint: Endpoint) -> Who:
    if endpoint.number == HOST:
        return Who(HERE, Reserved.HOST, is_node=True)
    return Who(
        endpoint.labels, endpoint.identity, None, {name: [port] for name, port in endpoint.named.items()}
    )


@dataclass
class Bench:
    """An enforcer that writes into Python's tables."""

    truth: Truth = field(default_factory=Truth)
    writer: FakeWriter = field(default_factory=FakeWriter)
    numbers: RuleNumbers = field(default_factory=RuleNumbers)

    def __post_init__(self) -> None:
        self.enforcer = Enforcer(World(), self.numbers, HERE)

    def start(self) -> None:
        self.enforcer.use(as_writer(self.writer))
        self.enforcer.set_ready()

    async def flush(self) -> None:
        await self.enforcer.flush(as_writer(self.writer))

    # ---- changes --------------------------------------------------------------------------------------------
    def policy(self, key: PolicyKey, policy: Policy | None) -> None:
        if policy is None:
            self.truth.policies.pop(key, None)
        else:
            self.truth.policies[key] = policy
        self.enforcer.set_policy(key, policy)

    def identity(self, number: int, own: dict[str, str] | None) -> None:
        """None: it is gone. Labels of one that is there are others from now on."""
        if number in self.truth.identities:
            del self.truth.identities[number]
            self.enforcer.remove_identity(number)
        if own is not None:
            self.truth.identities[number] = own
            self.enforcer.add_identity(number, own)

    def pod(self, number: int, endpoint: Endpoint | None) -> None:
        if endpoint is None:
            self.truth.pods.pop(number, None)
            self.enforcer.remove_endpoint(number)
        else:
            self.truth.pods[number] = endpoint
            self.enforcer.set_endpoint(replace(endpoint))

    def service(self, backends: frozenset) -> None:  # type: ignore[type-arg]
        self.truth.backends["shop/db"] = backends
        self.enforcer.set_backends("shop/db", backends)

    def node(self, name: str, own: dict[str, str] | None) -> None:
        if own is None:
            self.truth.nodes.pop(name, None)
            if name in self.enforcer.world.nodes:
                self.enforcer.set_node(name, None)
            return
        node = self.truth.nodes[name] = Node({HOSTNAME: name, **own}, NODE_ADDRESSES[name])
        self.enforcer.set_node(name, NodeFacts(node.labels, frozenset(node.addresses)))

    def name(self, name: str, standing: dict[tuple[int, int], frozenset[int]]) -> None:
        self.truth.named[name] = {port: set(having) for port, having in standing.items()}
        self.enforcer.set_named(name, {port: set(having) for port, having in standing.items()})

    # ---- what holds -----------------------------------------------------------------------------------------
    def check(self, some: random.Random) -> None:
        """Everybody known is treated as the rules say; the rest is as it is."""
        truth, writer = self.truth, self.writer
        assert self.enforcer.idle and not self.enforcer.contents.problems()
        writer.rest()
        assert writer.known == set(truth.identities)
        assert len(writer.lines) == len({each.line for each in writer.endpoints.values()} | self._spare())
        assert len(writer.peers) == len({each.peers for each in writer.lines.values()})
        assert set(writer.endpoints) - {HOST} == set(truth.pods)
        subjects = [*truth.pods.values(), Endpoint(HOST, 0, {})]
        for _ in range(A_TIME if truth.identities else 0):
            subject, direction = some.choice(subjects), some.choice(tuple(Direction))
            identity, address = some.choice(sorted(truth.identities)), some.choice((*ADDRESSES, None))
            protocol, port = some.choice(some.choice((QUESTIONS, NAMED)))
            wanted = truth.decide(subject, direction, identity, address, protocol, port)
            if subject.number not in writer.endpoints:
                assert subject.number == HOST and wanted == Decision(True, None, False)
                continue
            answer = writer.answer(subject.number, direction, identity, address, protocol, port)
            asked = (answer, wanted, subject, direction, truth.identities[identity], address, protocol, port)
            assert self.same(answer, wanted), asked

    def same(self, answer: Answer, wanted: Decision) -> bool:
        deciding = found.place if (found := self.numbers.rule(answer.rule)) else None
        refusal = wanted.allowed or (answer.reject, answer.keep) == (wanted.reject, wanted.keep)
        return answer.allowed == wanted.allowed and deciding == wanted.deciding and refusal

    def _spare(self) -> set[int]:
        """The host's, when no rule is about it: made and not given."""
        content = self.enforcer.content_of(HOST)
        if content is None or content.published is None:
            return set()
        return {content.published.line}


# ---- any history ------------------------------------------------------------------------------------------------
Change = Callable[[Bench], None]


def change(method: Callable[..., None], *given: st.SearchStrategy[object]) -> st.SearchStrategy[Change]:
    def of(arguments: tuple[object, ...]) -> Change:
        def apply(bench: Bench) -> None:
            note(f"{method.__name__}{arguments}")
            method(bench, *arguments)

        return apply

    return st.tuples(*given).map(of)


named_of_pod = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(NAMED), max_size=2)
numbered = st.sampled_from(POD_NUMBERS)


def endpoint(number: int, own: dict[str, str], named: dict[str, tuple[int, int]], owner: int) -> Endpoint:
    return Endpoint(number, owner, own, 999, named=named)


set_pod = st.builds(endpoint, numbered, labels, named_of_pod, st.integers(1, 2)).map(
    lambda made: lambda bench: bench.pod(made.number, made)
)
set_policy = policies(max_rules=3).map(lambda made: lambda bench: bench.policy(made.key, made))
having = st.frozensets(st.sampled_from(IDENTITIES), min_size=1, max_size=3)
changes: st.SearchStrategy[Change] = st.one_of(
    set_policy,
    set_policy,
    set_policy,
    change(Bench.policy, policy_keys, st.none()),
    set_pod,
    set_pod,
    change(Bench.pod, numbered, st.none()),
    change(Bench.identity, st.sampled_from(IDENTITIES), labels),
    change(Bench.identity, st.sampled_from(IDENTITIES), labels),
    change(Bench.identity, st.sampled_from(IDENTITIES), st.none()),
    change(Bench.service, st.frozensets(st.sampled_from(ADDRESSES), max_size=2)),
    change(
        Bench.node, st.sampled_from(sorted(NODE_ADDRESSES)), st.sampled_from(({}, {"app": "x"}, {"app": "y"}))
    ),
    change(Bench.node, st.sampled_from(sorted(NODE_ADDRESSES)), st.none()),
    change(Bench.name, st.sampled_from(NAMES), st.dictionaries(st.sampled_from(NAMED), having, max_size=2)),
)
# Many at once, then a look; now and then while the ones before are being written.
histories = st.lists(st.lists(changes, min_size=1, max_size=4), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(histories, histories, st.integers(0, 2**32 - 1))
def test_what_does_not_fit_leaves_what_was_there_and_comes_when_it_fits(
    before: list[list[Change]], history: list[list[Change]], seed: int
) -> None:
    """No endpoint is left with what is given up meanwhile."""
    asyncio.run(crowded(before, history, random.Random(seed)))


async def crowded(before: list[list[Change]], history: list[list[Change]], some: random.Random) -> None:
    bench = Bench()
    for each in Reserved:
        bench.identity(int(each), {each.label: ""})
    bench.pod(10, Endpoint(10, 1, {"app": "x"}, 1000))
    bench.start()
    for several in (*before, *history):
        bench.writer.full = some.random() < 0.4
        for change in several:
            change(bench)
        await bench.flush()
        bench.writer.rest()
    bench.writer.full = False
    bench.writer.freed += 1
    bench.enforcer.contents.try_again()
    await bench.flush()
    assert not bench.enforcer.contents.problems()
    bench.check(some)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(histories, st.sampled_from(("none", "reserved", "all")), st.integers(0, 2**32 - 1))
def test_any_history_leads_to_what_the_rules_say(history: list[list[Change]], first: str, seed: int) -> None:
    asyncio.run(live(history, first, random.Random(seed)))


async def live(history: list[list[Change]], first: str, some: random.Random) -> None:
    bench = Bench()
    bench.identity(IDENTITIES[0], {"app": "x"})
    if first != "none":
        for each in Reserved:
            bench.identity(int(each), {each.label: ""})
    if first == "all":
        for number, own in LOCAL_IDENTITIES.items():
            bench.identity(number, dict(own))
    bench.pod(10, Endpoint(10, 1, {"app": "x"}, 1000))
    bench.start()
    for several in history:
        writing = asyncio.create_task(bench.flush()) if some.random() < 0.3 else None
        for each in several:
            each(bench)
            if writing is not None:
                await asyncio.sleep(0)
        if writing is not None:
            await writing
        await bench.flush()
        bench.check(some)


# ---- no more than has changed -----------------------------------------------------------------------------------
MANY = 40


def allowing(app: str, *peers: str) -> Policy:
    """`app` is reached by `peers`."""
    rule = Rule(
        Selector.of({"app": app}),
        Direction.INGRESS,
        Action.ALLOW,
        tuple(EndpointPeer(Selector.of({"app": each})) for each in peers),
        (Port(TCP, 80, 80),),
        default_deny=True,
    )
    return Policy(PolicyKey(Kind.FIBRIL, "", app), (rule,))


async def settled() -> Bench:
    """Pods a0, a1, … of which each may be reached by the one before, and twice as many identities."""
    bench = Bench()
    for at in range(2 * MANY):
        bench.identity(1000 + at, {"app": f"a{at}"})
    for at in range(1, MANY):
        bench.pod(at, Endpoint(at, 1, {"app": f"a{at}"}, 1000 + at))
        made = allowing(f"a{at}", f"a{at - 1}")
        bench.policy(made.key, made)
    bench.start()
    await bench.flush()
    bench.check(random.Random(0))
    return bench


async def cost(bench: Bench, change: Callable[[], None]) -> tuple[int, int, int]:
    """Policies worked out, elements written, selectors tried."""
    enforcer = bench.enforcer
    before = enforcer.contents.built, bench.writer.writes, enforcer.world.selectors.tried
    change()
    await bench.flush()
    bench.check(random.Random(1))
    after = enforcer.contents.built, bench.writer.writes, enforcer.world.selectors.tried
    built, writes, tried = (b - a for a, b in zip(before, after, strict=True))
    return built, writes, tried


async def test_what_changed_first_is_enforced_first() -> None:
    """Also while more changes come: nobody waits for those who came later."""
    bench, gave = await settled(), []
    give = bench.writer.set_endpoint

    def noted(number: int, *rest: object) -> None:
        gave.append(number)
        give(number, *rest)  # type: ignore[arg-type]

    bench.writer.set_endpoint = noted  # type: ignore[method-assign,assignment]
    for number in (21, 22, 23):
        bench.pod(number, Endpoint(number, 100 + number, {"app": f"late{number}"}))
        bench.policy(PolicyKey(Kind.FIBRIL, "", f"late{number}"), allowing(f"late{number}", "x"))
    flushing = asyncio.create_task(bench.flush())
    while 21 not in gave:
        await asyncio.sleep(0)
        bench.policy(PolicyKey(Kind.FIBRIL, "", "late23"), allowing("late23", f"x{len(gave)}"))
    assert gave == [21]
    await flushing
    assert gave == [21, 22, 23]


async def test_identity_of_a_known_kind_costs_what_it_concerns() -> None:
    bench = await settled()
    # Known, and in the one policy that names it.
    assert await cost(bench, lambda: bench.identity(5000, {"app": "a3", "more": "x"})) == (0, 2, 1)
    assert await cost(bench, lambda: bench.identity(5001, {"app": "other"})) == (0, 1, 0)
    assert await cost(bench, lambda: bench.identity(5000, None)) == (0, 2, 0)


async def test_change_of_a_policy_concerns_whom_it_selects() -> None:
    bench = await settled()
    wider = allowing("a5", "a4", "a6")
    built, writes, tried = await cost(bench, lambda: bench.policy(wider.key, wider))
    # One policy with its two peers, given to one endpoint; the new selector is tried on who has the label.
    assert built == 1 and writes <= 4 and tried <= 1
    unrelated = allowing("nobody", "a1")
    assert (await cost(bench, lambda: bench.policy(unrelated.key, unrelated)))[:2] == (0, 0)
    assert (await cost(bench, lambda: bench.policy(wider.key, wider))) == (0, 0, 0)


async def test_port_added_to_a_policy_writes_no_peers() -> None:
    bench = await settled()
    rule = replace(bench.truth.policies[allowing("a5").key].rules[0], ports=(Port(TCP, 81, 90),))
    other = Policy(allowing("a5").key, (rule,))
    built, writes, tried = await cost(bench, lambda: bench.policy(other.key, other))
    assert (built, writes, tried) == (1, 2, 0)


async def test_endpoint_like_another_shares_its_policy() -> None:
    bench = await settled()
    built, writes, tried = await cost(bench, lambda: bench.pod(200, Endpoint(200, 1, {"app": "a7"}, 1007)))
    assert (built, writes, tried) == (0, 1, 0)
    assert bench.writer.endpoints[200] is bench.writer.endpoints[7]


async def test_backends_concern_policies_that_name_the_service() -> None:
    bench = await settled()
    assert await cost(bench, lambda: bench.service(frozenset({ip_address("10.1.0.10")}))) == (0, 0, 0)


# ---- what histories have found ----------------------------------------------------------------------------------
async def test_who_comes_new_is_not_like_those_there_were() -> None:
    """All identities there are were alike and are allowed now; the next one is not."""
    bench = Bench()
    bench.identity(1000, {"app": "x"})
    bench.pod(10, Endpoint(10, 1, {"app": "server"}, 1001))
    bench.start()
    for made in (allowing("server", "nobody"), allowing("server", "x")):
        bench.policy(made.key, made)
        await bench.flush()
    bench.identity(1002, {"app": "y"})
    await bench.flush()
    bench.check(random.Random(0))
    assert bench.writer.answer(10, Direction.INGRESS, 1000, None, TCP, 80).allowed
    assert not bench.writer.answer(10, Direction.INGRESS, 1002, None, TCP, 80).allowed


async def test_number_that_is_given_again_has_the_new_labels() -> None:
    bench = await settled()
    assert bench.writer.answer(5, Direction.INGRESS, 1004, None, TCP, 80).allowed
    bench.identity(1004, {"app": "other"})
    await bench.flush()
    bench.check(random.Random(0))
    assert not bench.writer.answer(5, Direction.INGRESS, 1004, None, TCP, 80).allowed


async def test_number_that_was_given_again_while_nobody_told_has_the_new_labels() -> None:
    """Its removal is never told: who told of it was away, and comes back with a snapshot."""
    bench = await settled()
    assert bench.writer.answer(5, Direction.INGRESS, 1004, None, TCP, 80).allowed
    bench.truth.identities[1004] = {"app": "a7"}
    bench.enforcer.add_identity(1004, {"app": "a7"})
    await bench.flush()
    bench.check(random.Random(0))
    assert not bench.writer.answer(5, Direction.INGRESS, 1004, None, TCP, 80).allowed
    assert bench.writer.answer(8, Direction.INGRESS, 1004, None, TCP, 80).allowed
    assert await cost(bench, lambda: bench.enforcer.add_identity(1004, {"app": "a7"})) == (0, 0, 0)
