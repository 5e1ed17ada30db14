"""Why a connection may be or not: from the rules as they are declared, one after the other, and from the kernel's tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from services.common.errors import InvalidArgument, NotFound
from services.common.pipeline.abi import IPAddress
from services.identity.numbers import Reserved, make
from services.policy.abi import RULE_HOST
from services.policy.contents import HOST
from services.policy.enforcer import Enforcer
from services.policy.labels import effective
from services.policy.model import (
    ICMP,
    ICMPV6,
    Action,
    CidrPeer,
    Direction,
    EndpointPeer,
    EntityPeer,
    NodePeer,
    Peer,
    Policy,
    PolicyKey,
    Port,
    Rule,
    ServicePeer,
    Tier,
)
from services.policy.resolve.selectors import matches
from services.policy.resolve.world import NamedPort, World

UNHEARD_OF: Final = make(1, (1 << 20) - 1)
"""Stands for an identity that labels would have."""


@dataclass(frozen=True)
class Who:
    """One end of a connection. labels: effective ones. address None: not known, so no prefix holds it."""

    identity: int
    labels: Mapping[str, str]
    address: IPAddress | None = None
    named: Mapping[str, NamedPort] = field(default_factory=dict)
    endpoint: int | None = None
    node: Mapping[str, str] | None = None
    """Labels of the node, if it is a node's host."""


@dataclass(frozen=True)
class Match:
    """A rule that matches."""

    key: PolicyKey
    index: int
    rule: Rule


@dataclass(frozen=True)
class Found:
    """What policies say of one direction. decided: by which rule; None: by none."""

    direction: Direction
    allowed: bool
    enforced: bool
    decided: Match | None
    matching: tuple[Match, ...]
    selecting: tuple[PolicyKey, ...] = ()
    """Policies whose default deny refuses it."""
    local_host: bool = False

    @property
    def reason(self) -> str:
        """One sentence."""
        if self.local_host:
            return "allowed: this node's host may reach its own pods"
        if self.decided is not None:
            verb = "allowed" if self.allowed else "denied"
            return f'{verb} by {self.decided.key}, rule "{self.decided.rule.title(self.decided.index)}"'
        if not self.allowed:
            return f"denied: no rule allows it, and {', '.join(map(str, self.selecting[:3]))} selects the endpoint"
        if not self.enforced:
            return "allowed: no policy selects the endpoint in this direction"
        return "allowed: no rule denies it"


class Explainer:
    """Used from one event loop."""

    def __init__(self, enforcer: Enforcer, allow_local_host: bool) -> None:
        self._enforcer, self.allow_local_host = enforcer, allow_local_host

    @property
    def world(self) -> World:
        return self._enforcer.world

    # ---- names ----------------------------------------------------------------------------------------------
    def labels(self, identity: int) -> Mapping[str, str]:
        """Of an identity; none for one that is not known."""
        return self.world.selectors.labels.get(identity, {})

    def rule_name(self, number: int) -> tuple[str, str]:
        """Policy and name of the rule that the kernel calls so; empty if it is no policy's."""
        if number == RULE_HOST:
            return "", "local host"
        found = self._enforcer.numbers.rule(number)
        return (str(found.key), found.title) if found is not None else ("", "")

    # ---- ends -----------------------------------------------------------------------------------------------
    def endpoint(self, number: int, at: str) -> Who:
        """An endpoint of this node. NotFound."""
        found = self._enforcer.endpoints.get(number)
        if found is None:
            raise NotFound(f"there is no endpoint {number} on this node", field=at, fix="see: fibril endpoint ls")
        if number == HOST:
            return self.identity(int(Reserved.HOST))
        address = found.addresses[0] if found.addresses else None
        return Who(found.identity, effective(found.labels), address, found.named, number)

    def pod(self, name: str, at: str) -> Who:
        """A pod of this node, by its name. NotFound."""
        for number, found in self._enforcer.endpoints.items():
            if number != HOST and found.pod == name:
                return self.endpoint(number, at)
        raise NotFound(f"there is no pod {name!r} on this node", field=at, fix="see: fibril pod ls")

    def identity(self, number: int, address: IPAddress | None = None) -> Who:
        """Whoever has an identity."""
        labels = self.world.selectors.labels.get(number)
        if labels is None:
            raise NotFound(f"identity {number} is not known", field="identity", fix="see: fibril identity ls")
        node = self._enforcer.node_labels if number == Reserved.HOST else None
        return Who(number, labels, address, node=node)

    def by_labels(self, labels: Mapping[str, str]) -> Who:
        """Somebody with these labels, whether there is anybody or not."""
        wanted = effective(labels)
        for number, known in self.world.selectors.labels.items():
            if known == wanted:
                return Who(number, known)
        return Who(UNHEARD_OF, wanted)

    def by_address(self, address: IPAddress, identity: int) -> Who:
        """Whoever has an address, which has that identity."""
        for number, found in self._enforcer.endpoints.items():
            if address in found.addresses:
                return Who(found.identity, effective(found.labels), address, found.named, number)
        labels = self.world.selectors.labels.get(identity, {})
        node = self._enforcer.node_labels if identity == Reserved.HOST else None
        return Who(identity, labels, address, node=node)

    # ---- rules ----------------------------------------------------------------------------------------------
    def decide(
        self,
        direction: Direction,
        subject: Who,
        peer: Who,
        protocol: int,
        port: int,
        rules: Sequence[Match] | None = None,
    ) -> Found:
        """What policies say of a connection in one direction. rules: instead of those that select the subject (`selecting`)."""
        if protocol in (ICMP, ICMPV6) and port > 255:
            raise InvalidArgument(f"{port} is no type of ICMP", field="port", fix="give 0 to 255")
        if direction is Direction.INGRESS and peer.identity == Reserved.HOST and self.allow_local_host:
            return Found(direction, True, True, None, (), local_host=True)
        if rules is None:
            rules = self.selecting(subject, direction, self._enforcer.policies.values())
        matching = tuple(each for each in rules if self._matches(each.rule, subject, peer, protocol, port))
        decided, allowed, selecting = _by_tiers(rules, matching)
        return Found(direction, allowed, bool(rules), decided, matching, selecting)

    def selecting(self, subject: Who, direction: Direction, policies: Iterable[Policy]) -> list[Match]:
        """Rules of these that select somebody, in the order they are asked."""
        node = subject.node is not None
        labels = subject.node if subject.node is not None else subject.labels
        found = [
            Match(policy.key, index, rule)
            for policy in policies
            for index, rule in enumerate(policy.rules)
            if rule.direction is direction and rule.subject_is_node == node and rule.subject.matches(labels)
        ]
        return sorted(found, key=_order)

    def _matches(self, rule: Rule, subject: Who, peer: Who, protocol: int, port: int) -> bool:
        if rule.peers is not None and not any(self._is(each, peer) for each in rule.peers):
            return False
        return rule.ports is None or any(
            self._is_named(rule, each, subject, peer, protocol, port) if each.name else _is_port(each, protocol, port)
            for each in rule.ports
        )

    def _is_named(self, rule: Rule, wanted: Port, subject: Who, peer: Who, protocol: int, port: int) -> bool:
        if wanted.protocol not in (0, protocol):
            return False
        if rule.direction is Direction.INGRESS:
            return subject.named.get(wanted.name) == (protocol, port)
        # Of peers it is known by identity what they call their ports, wherever they are.
        return peer.identity in self.world.named.get(wanted.name, {}).get((protocol, port), ())

    def _is(self, term: Peer, peer: Who) -> bool:
        match term:
            case EndpointPeer() | EntityPeer():
                return matches(term, peer.identity, peer.labels)
            case CidrPeer():
                return _holds(term, peer.address)
            case ServicePeer():
                return any(_holds(each, peer.address) for each in self.world.service(term))
            case NodePeer():
                return any(_holds(each, peer.address) for each in self.world.node(term))


def _order(each: Match) -> tuple[int, int, PolicyKey, int]:
    # Priority does not count in the tier between.
    return each.rule.tier, 0 if each.rule.tier is Tier.NORMAL else each.rule.priority, each.key, each.index


def _holds(cidr: CidrPeer, address: IPAddress | None) -> bool:
    if address is None or address.version != cidr.prefix.version or address not in cidr.prefix:
        return False
    return not any(address in hole for hole in cidr.excepted)


def _is_port(wanted: Port, protocol: int, port: int) -> bool:
    protocols = (wanted.protocol,) if wanted.protocol else (6, 17, 132)
    return protocol in protocols and wanted.first <= port <= wanted.last


def _by_tiers(rules: Sequence[Match], matching: Sequence[Match]) -> tuple[Match | None, bool, tuple[PolicyKey, ...]]:
    """The rule that decides, what comes out, and whose default deny it was."""
    for each in matching:
        if each.rule.tier is Tier.ADMIN:
            if each.rule.action is Action.PASS:
                break
            return each, each.rule.action is Action.ALLOW, ()
    normal = [each for each in matching if each.rule.tier is Tier.NORMAL]
    for action in (Action.DENY, Action.ALLOW):
        for each in normal:
            if each.rule.action is action:
                return each, action is Action.ALLOW, ()
    denying = tuple(dict.fromkeys(each.key for each in rules if each.rule.default_deny))
    if denying:
        return None, False, denying
    for each in matching:
        if each.rule.tier is Tier.BASELINE:
            if each.rule.action is Action.PASS:
                break
            return each, each.rule.action is Action.ALLOW, ()
    return None, True, ()
