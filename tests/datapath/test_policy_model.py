"""Any policies, any packets: the programs let pass what the rules allow, and tell which rule it was."""

from __future__ import annotations

import asyncio
import ctypes as ct
import random
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st
from scapy.layers.inet import TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.sctp import SCTP
from scapy.packet import Packet, Raw

from services.common.instance import Instance
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi as pipeline
from services.common.pipeline.reasons import Reason
from services.identity.numbers import Reserved
from services.policy import abi
from services.policy.contents import Endpoint
from services.policy.enforcer import Enforcer
from services.policy.kernel.writer import Writer
from services.policy.model import Direction, Policy, PolicyKey
from services.policy.resolve.numbers import RuleNumbers
from services.policy.resolve.world import NodeFacts, World
from tests.datapath import policykit as kit
from tests.datapath.policykit import Rig
from tests.policy.reference import Address, Decision, Who, concerns, decide
from tests.policy.strategies import NAMED, NAMES, QUESTIONS, Universe, policy_sets, universes

PACKETS = 70
"""In a world."""
STATELESS = 47
TCP_CLIENT, TCP_SERVER = ("S", "A", "A", "PA", "FA", "R"), ("SA", "A", "A", "FA", "R")
ECHO_REPLY = {8: 0, 128: 129}
ECHO = 0xFFFF
NEW, DROPPED = 1, 2
"""POL_EVENT_NEW, POL_EVENT_DROPPED."""
LONG = 30000
"""Seconds after which no connection is remembered."""


# ---- packets ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Flow:
    """Packets between a client and a server; `port` is the server's, or an ICMP type."""

    client: Who
    server: Who
    proto: int
    port: int
    client_port: int

    @property
    def echo(self) -> bool:
        return self.proto in (1, 58) and self.port in (8, 128)

    def key(self) -> tuple[Any, ...]:
        """The same for both directions, and for what the kernel must take for the same."""
        if self.proto in (1, 58):
            ports = (self.client_port, ECHO) if self.echo else (self.port, 0)
        else:
            ports = (self.client_port, self.port) if self.proto in (6, 17, 132) else (0, 0)
        ends = sorted([(str(self.client.address), ports[0]), (str(self.server.address), ports[1])])
        return (self.proto, *ends)

    def packet(self, back: bool, flags: str) -> Packet:
        one, two = (self.server, self.client) if back else (self.client, self.server)
        ports = {"sport": self.client_port, "dport": self.port}
        if back:
            ports = {"sport": self.port, "dport": self.client_port}
        head = kit.header(str(one.address), str(two.address))
        match self.proto:
            case 6:
                return head / TCP(**ports, flags=flags)
            case 17:
                return head / UDP(**ports)
            case 132:
                return head / SCTP(**ports) / Raw(bytes(8))
        setattr(head, "nh" if isinstance(head, IPv6) else "proto", self.proto)
        if self.proto in (1, 58):
            kind = ECHO_REPLY[self.port] if back else self.port
            return head / Raw(struct.pack("!BBHHH", kind, 0, 0, self.client_port, 1) + bytes(8))
        return head / Raw(bytes(24))


# ---- what should become of them ---------------------------------------------------------------------------------
@dataclass
class Known:
    """A connection. passed: the policies that have ever allowed it; since: when each did last."""

    client: Address
    identities: tuple[int, int]
    """Its client's and its server's, when it began or when the client has spoken since."""
    answered: bool = False
    established: bool = False
    """The client has heard the answer."""
    closed: bool = False
    reset: bool = False
    passed: set[Direction] = field(default_factory=set)
    since: dict[Direction, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Expected:
    """decision: of the stage that ended it, if the rules were asked there."""

    reason: Reason
    decision: Decision | None = None


@dataclass
class Model:
    """One of two ends, or both, are pods of this node. What a policy says of a connection holds for its packets both ways."""

    universe: Universe
    policies: list[Policy]
    pods: dict[Address, Who]
    """This node's, as subjects."""
    host: Who
    epoch: int = 0
    """Counts changes of policies."""
    known: dict[tuple[Any, ...], Known] = field(default_factory=dict)
    allowed_by: list[Decision] = field(default_factory=list)
    """Those that let a connection begin, at each end, by the last packet."""

    def packet(self, flow: Flow, back: bool, flags: str) -> Expected:
        self.allowed_by = []
        sender, receiver = (flow.server, flow.client) if back else (flow.client, flow.server)
        if sender.address == receiver.address:
            return Expected(Reason.NONE)
        ends = ((Direction.EGRESS, sender), (Direction.INGRESS, receiver))
        asked = [(end, self.pods[who.address]) for end, who in ends if who.address in self.pods]
        if self.host_has_policy():
            # Beside a pod, and after it.
            asked += [(end, self.host) for end, who in ends if who.identity == Reserved.HOST]
        for end, subject in asked:
            found = self.stage(end, subject, flow, back, flags, sender)
            if found.reason is not Reason.NONE:
                return found
        return Expected(Reason.NONE)

    def host_has_policy(self) -> bool:
        return any(concerns(rule, self.host) for policy in self.policies for rule in policy.rules)

    def ask(
        self, end: Direction, subject: Who, direction: Direction, flow: Flow, back: bool, turned: bool
    ) -> Decision:
        """The policy of the packet's sender (end EGRESS) or receiver, about the connection. turned: the flow's server has begun
        it.
        """
        peer = flow.server if back == (end is Direction.INGRESS) else flow.client
        port = flow.port
        if flow.proto == STATELESS:
            port = 0
        elif turned and flow.proto not in (1, 58):
            port = flow.client_port
        elif turned and flow.echo:
            port = ECHO_REPLY[flow.port]
        universe = self.universe
        return decide(
            self.policies, subject, direction, peer, flow.proto, port, universe.services, universe.nodes
        )

    def stage(
        self, end: Direction, subject: Who, flow: Flow, back: bool, flags: str, sender: Who
    ) -> Expected:
        known = self.known.get(flow.key())
        if known is not None and flow.proto == 6 and flags == "S":
            # Answers begin nothing: a SYN to whoever opened it is of another connection.
            is_another = known.closed or (known.established and known.client != sender.address)
            known = None if is_another else known
        if known is None:
            return self.begin(end, subject, flow, back, flags, sender)
        forward = known.client == sender.address
        direction = end if forward else Direction(not end)
        # The connection is this one, or the one that its server began.
        turned = forward == back
        identities = self.identities(flow, turned)
        if known.since.get(direction) != self.epoch or known.identities != identities:
            decision = self.ask(end, subject, direction, flow, back, turned)
            if not decision.allowed:
                if direction not in known.passed:
                    return (
                        refused(decision) if forward else self.begin(end, subject, flow, back, flags, sender)
                    )
                if not (decision.keep and known.answered):
                    return Expected(Reason.POLICY_REVOKED, decision)
            elif direction not in known.passed:
                self.allowed_by.append(decision)
            if forward and known.identities != identities:
                known.identities = identities
                known.since.clear()
            if known.identities == identities:
                known.passed.add(direction)
                known.since[direction] = self.epoch
        known.answered |= not forward
        self.end(known, flow, flags, forward)
        known.established |= forward and known.answered and not known.reset
        return Expected(Reason.NONE)

    def begin(
        self, end: Direction, subject: Who, flow: Flow, back: bool, flags: str, sender: Who
    ) -> Expected:
        decision = self.ask(end, subject, end, flow, back, turned=back)
        if not decision.allowed:
            return refused(decision)
        if (flow.echo and back) or (flow.proto == 6 and ("R" in flags or flags == "SA")):
            # Answers, and what ends something.
            return Expected(Reason.NONE)
        assert sender.address is not None
        made = self.known[flow.key()] = Known(
            sender.address, self.identities(flow, back), passed={end}, since={end: self.epoch}
        )
        self.end(made, flow, flags, True)
        self.allowed_by.append(decision)
        return Expected(Reason.NONE)

    @staticmethod
    def identities(flow: Flow, turned: bool) -> tuple[int, int]:
        ends = flow.client.identity, flow.server.identity
        return ends[::-1] if turned else ends

    @staticmethod
    def end(known: Known, flow: Flow, flags: str, forward: bool) -> None:
        if flow.proto == 6 and ("F" in flags or "R" in flags):
            known.closed = True
            known.reset |= "R" in flags


def refused(decision: Decision) -> Expected:
    return Expected(Reason.POLICY_DENIED if decision.deciding else Reason.POLICY_DEFAULT, decision)


# ---- the same in the kernel -------------------------------------------------------------------------------------
class Addresses:
    """Identities of addresses that are of no pod of this node."""

    def __init__(self, instance: Instance) -> None:
        pins = instance.pin_dir
        self._known = BpfMap.open(pins / pipeline.MAPS["ipc_addr"], pipeline.FibAddr, pipeline.IpcacheEntry)
        self._near = BpfMap.open(pins / pipeline.MAPS["ipc_near"], ct.c_uint32, pipeline.IpcacheNear)

    def set(self, everybody: Mapping[Address, int]) -> None:
        for key in list(self._known.keys()):
            self._known.delete(key)
        for address, identity in everybody.items():
            entry = pipeline.IpcacheEntry(identity=identity, flags=pipeline.IpcacheFlag.SINGLE)
            self._known.update(pipeline.FibAddr.of(address), entry)
        for slot in range(pipeline.IPC_NEAR_SLOTS):
            self._near.update(slot, pipeline.IpcacheNear())

    def close(self) -> None:
        self.set({})
        self._known.close()
        self._near.close()


class Kernel:
    """What is installed, with the policies of a world."""

    def __init__(self, rig: Rig, addresses: Addresses, universe: Universe, policies: list[Policy]) -> None:
        self.rig, self.universe = rig, universe
        rig.clear()
        for key in list(rig.tables.prefixes.keys()):
            rig.tables.prefixes.delete(key)
        rig.configure(flags=abi.ConfigFlag.FLOWS)
        self.numbers = RuleNumbers()
        self.enforcer = Enforcer(self.world(), self.numbers, universe.nodes["n1"].labels)
        self.writer = Writer(rig.tables)
        for number, own in universe.identities.items():
            self.enforcer.add_identity(number, own)
        self.policies: list[Policy] = []
        self.pods: dict[Address, pipeline.Endpoint] = {}
        self.addresses = addresses
        self.inhabit(universe)
        self.enforcer.use(self.writer)
        self.enforcer.set_ready()
        self.set(policies)

    def place(self, number: int) -> tuple[PolicyKey, int] | None:
        """Policy and index of the rule that the kernel calls so."""
        found = self.numbers.rule(number)
        return found.place if found is not None else None

    def inhabit(self, universe: Universe) -> None:
        """These are the labels and identities, and no others."""
        self.universe = universe
        for number, own in universe.identities.items():
            self.enforcer.add_identity(number, own)
        for number in set(self.enforcer.world.selectors.labels) - set(universe.identities):
            self.enforcer.remove_identity(number)
        for name in NAMES:
            standing = universe.named.get(name, {})
            self.enforcer.set_named(name, {port: set(having) for port, having in standing.items()})
        for pod, has in zip(self.rig.pods, universe.pods, strict=False):
            pod.identity = has.identity
            self.rig.dp.put(pod)
            self.pods.update(dict.fromkeys(has.addresses, pod))
            self.enforcer.set_endpoint(
                Endpoint(pod.id, pod.ifindex, has.labels, has.identity, named=has.named)
            )
        self.addresses.set(
            {
                each.address: each.identity
                for each in universe.peers
                if each.address is not None and each.address not in self.pods
            }
        )

    def world(self) -> World:
        facts = {
            name: NodeFacts(node.labels, frozenset(node.addresses))
            for name, node in self.universe.nodes.items()
        }
        services = {name: frozenset(backends) for name, backends in self.universe.services.items()}
        return World(backends=services, nodes=facts)

    def set(self, policies: list[Policy]) -> None:
        """Exactly these policies."""
        for gone in self.policies:
            if gone.key not in {each.key for each in policies}:
                self.enforcer.set_policy(gone.key, None)
        for each in policies:
            self.enforcer.set_policy(each.key, each)
        self.policies = policies
        asyncio.run(self.enforcer.flush(self.writer))
        assert self.enforcer.idle and not self.enforcer.contents.problems()

    def packet(self, flow: Flow, back: bool, flags: str) -> tuple[Reason, list[abi.Event]]:
        for key in list(self.rig.told.keys()):
            self.rig.told.delete(key)
        one, two = (flow.server, flow.client) if back else (flow.client, flow.server)
        packet = flow.packet(back, flags)
        sender = self.pods.get(one.address)  # type: ignore[arg-type]
        seen = self.rig.send(sender, packet) if sender else self.rig.arrive(self.pods[two.address], packet)
        return seen.reason, self.rig.events()


# ---- worlds -----------------------------------------------------------------------------------------------------
@dataclass
class Played:
    """A world, in the kernel and in the model."""

    rig: Rig
    addresses: Addresses
    universe: Universe
    policies: list[Policy]
    some: random.Random

    def __post_init__(self) -> None:
        self.kernel = Kernel(self.rig, self.addresses, self.universe, self.policies)
        self.model = Model(self.universe, self.policies, {}, self.universe.subjects[-1])
        self.flows: list[Flow] = []
        self.look_around()

    def look_around(self) -> None:
        """Who is behind which address."""
        universe, here = self.universe, list(self.kernel.pods)
        self.behind = {each.address: each for each in universe.peers if each.address is not None}
        self.here = [self.behind[address] for address in here]
        self.model.universe = universe
        self.model.pods = {
            address: subject
            for subject, has in zip(universe.subjects, universe.pods, strict=False)
            for address in has.addresses
            if address in here
        }
        self.flows = [
            replace(flow, client=self.behind[flow.client.address], server=self.behind[flow.server.address])
            for flow in self.flows
        ]

    def rename(self, universe: Universe) -> None:
        """Everybody has other labels."""
        self.universe = replace(universe, services=self.universe.services, nodes=self.universe.nodes)
        self.kernel.inhabit(self.universe)
        self.kernel.set(self.kernel.policies)
        self.look_around()
        self.model.epoch += 1

    def change(self, policies: list[Policy]) -> None:
        self.kernel.set(policies)
        self.model.policies = policies
        self.model.epoch += 1

    def age(self) -> None:
        self.rig.age(LONG)
        self.model.known.clear()

    def flow(self) -> Flow:
        some = self.some
        while True:
            pod = some.choice(self.here)
            other = some.choice(some.choice((self.here, list(self.behind.values()))))
            assert pod.address is not None and other.address is not None
            if other.address.version == pod.address.version:
                break
        client, server = (pod, other) if some.random() < 0.5 else (other, pod)
        proto, port = some.choice((*NAMED, *QUESTIONS))
        if proto in (0, 255):
            proto = STATELESS
        if proto in (1, 58):
            proto = 1 if pod.address.version == 4 else 58
            port = some.choice((8, 13) if proto == 1 else (128, 138))
        return Flow(client, server, proto, port, some.choice((80, 40000, 40001)))

    def step(self) -> None:
        some = self.some
        if not self.flows or some.random() < 0.35:
            self.flows.append(self.flow())
        flow = some.choice(self.flows[-6:])
        # Types of messages that are no echo have no answers that could be told from questions.
        one_way = flow.proto in (1, 58) and not (flow.echo and flow.key() in self.model.known)
        back = not one_way and some.random() < 0.45
        flags = some.choice(TCP_SERVER if back else TCP_CLIENT)
        self.check(flow, back, flags)

    def check(self, flow: Flow, back: bool, flags: str) -> None:
        note(f"{'back' if back else 'forth'} {flags if flow.proto == 6 else ''} {flow}")
        wanted = self.model.packet(flow, back, flags)
        reason, told = self.kernel.packet(flow, back, flags)
        event(f"{reason.name}")
        assert reason is wanted.reason, (reason, wanted)
        refusals = [each for each in told if each.verdict == DROPPED]
        begun = [each for each in told if each.type == NEW]
        rules = [self.kernel.place(each.rule) for each in begun]
        assert rules == [each.deciding for each in self.model.allowed_by]
        if reason is Reason.NONE:
            assert not refusals
        else:
            assert wanted.decision is not None
            assert [self.kernel.place(each.rule) for each in refusals] == [wanted.decision.deciding]


@pytest.fixture
def addresses(rig: Rig) -> Iterator[Addresses]:
    made = Addresses(rig.dp.instance)
    yield made
    made.close()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    universe=universes(),
    other=universes(first=2000),
    before=policy_sets,
    after=policy_sets,
    seed=st.integers(0, 2**32 - 1),
)
def test_programs_do_what_the_rules_say(
    rig: Rig,
    addresses: Addresses,
    universe: Universe,
    other: Universe,
    before: list[Policy],
    after: list[Policy],
    seed: int,
) -> None:
    some = random.Random(seed)
    played = Played(rig, addresses, universe, before, some)
    for _ in range(PACKETS):
        if some.random() < 0.06:
            played.change(some.choice((before, after)))
        elif some.random() < 0.02:
            played.age()
        elif some.random() < 0.05:
            universe, other = other, universe
            played.rename(universe)
            for flow in played.flows[-4:]:
                played.check(flow, False, "A")
        else:
            played.step()
