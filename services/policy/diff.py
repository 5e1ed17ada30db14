"""What a change of policies would change, before it is made: pairs of endpoints, and connections seen lately.

Only endpoints that a changed policy selects, before or after, can see another verdict; of those, only with peers of classes
whose ranges differ. Peers are known by identity; prefixes count for pods of this node, whose addresses are known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from fibril.flow.v1 import flow_pb2
from fibril.policy.v1 import policy_pb2 as pb
from services.common.pipeline.abi import IPAddress
from services.identity.numbers import Reserved
from services.policy.answers import Answers
from services.policy.contents import HOST
from services.policy.enforcer import Enforcer
from services.policy.explain import Explainer, Found, Who
from services.policy.labels import effective
from services.policy.model import ICMP, ICMPV6, Direction, Policy, PolicyKey
from services.policy.resolve.numbers import ONLY_TRIED, RuleRef
from services.policy.resolve.ranges import END, SPAN, Range, find
from services.policy.resolve.resolved import Resolved

SHOWN_MAX: Final = 1000
PORTS_MAX: Final = 100
_STEP: Final = 200
Flows = Callable[[float], Iterable[flow_pb2.Flow]]


@dataclass(frozen=True)
class _Side:
    """An endpoint's policy before and after."""

    before: Resolved
    after: Resolved

    def ranges(
        self, direction: Direction, peer: int, address: IPAddress | None
    ) -> tuple[Sequence[Range], Sequence[Range]]:
        return (
            _ranges(self.before, direction, peer, address),
            _ranges(self.after, direction, peer, address),
        )


class Differ:
    """Used from one event loop."""

    def __init__(self, enforcer: Enforcer, explainer: Explainer, answers: Answers, flows: Flows) -> None:
        """flows: connections allowed within so many seconds, 0: all that are remembered."""
        self._enforcer, self._explainer, self._answers, self._flows = enforcer, explainer, answers, flows

    async def diff(self, changed: Sequence[Policy], gone: bool, seconds: float) -> pb.DiffResponse:
        """gone: the policies are to be deleted, not upserted."""
        before = self._enforcer.policies
        after = {key: policy for key, policy in before.items() if key not in {each.key for each in changed}}
        if not gone:
            after.update((policy.key, policy) for policy in changed)
        answer = pb.DiffResponse()
        touched = {each.key for each in changed if before.get(each.key) != after.get(each.key)}
        if touched:
            await self._pairs(answer, after, touched)
            await self._broken(answer, list(after.values()), seconds)
        return answer

    # ---- pairs ----------------------------------------------------------------------------------------------
    async def _pairs(self, answer: pb.DiffResponse, after: dict[PolicyKey, Policy], touched: set[PolicyKey]) -> None:
        known = self._enforcer.world.selectors.labels
        pods = self._pods()
        sides: dict[int, _Side] = {}
        seen: set[tuple[int, int]] = set()
        work = 0
        try:
            for number in list(known):
                if number in Reserved.__members__.values() or not self._concerned(number, after, touched):
                    continue
                own = self._side(sides, number, after)
                for peer in list(known):
                    for client, server in ((number, peer), (peer, number)):
                        work += 1
                        if work % _STEP == 0:
                            await asyncio.sleep(0)
                        if (client, server) in seen:
                            continue
                        direction = Direction.EGRESS if client == number else Direction.INGRESS
                        if self._explainer.is_local_host(direction, peer):
                            continue
                        one, two = own.ranges(direction, peer, _first(pods.get(peer)))
                        if one == two:
                            continue
                        seen.add((client, server))
                        other = self._side(sides, peer, after)
                        three, four = other.ranges(Direction(1 - direction), number, _first(pods.get(number)))
                        ports = list(_changes(one, two, three, four))
                        if ports:
                            self._add(answer, client, server, ports, pods)
        finally:
            for side in sides.values():
                side.before.close()
                side.after.close()

    def _pods(self) -> dict[int, list[tuple[str, IPAddress | None]]]:
        """Of this node, by identity."""
        found: dict[int, list[tuple[str, IPAddress | None]]] = {}
        for number, endpoint in self._enforcer.endpoints.items():
            if number != HOST:
                address = endpoint.addresses[0] if endpoint.addresses else None
                found.setdefault(endpoint.identity, []).append((endpoint.pod, address))
        return found

    def _concerned(self, number: int, after: dict[PolicyKey, Policy], touched: set[PolicyKey]) -> bool:
        labels = self._enforcer.world.selectors.labels[number]
        return any(
            not rule.subject_is_node and rule.subject.matches(labels)
            for policies in (self._enforcer.policies, after)
            for key in touched
            if key in policies
            for rule in policies[key].rules
        )

    def _side(self, sides: dict[int, _Side], number: int, after: dict[PolicyKey, Policy]) -> _Side:
        found = sides.get(number)
        if found is None:
            before = self._resolve(number, self._enforcer.policies.values())
            found = sides[number] = _Side(before, self._resolve(number, after.values()))
        return found

    def _resolve(self, number: int, policies: Iterable[Policy]) -> Resolved:
        labels = self._enforcer.world.selectors.labels[number]
        refs = []
        if number not in Reserved.__members__.values():
            refs = [
                RuleRef(policy.key, index, rule, ONLY_TRIED)
                for policy in policies
                for index, rule in enumerate(policy.rules)
                if not rule.subject_is_node and rule.subject.matches(labels)
            ]
        resolved = Resolved(refs, {}, self._enforcer.world)
        resolved.classify()
        return resolved

    def _add(
        self,
        answer: pb.DiffResponse,
        client: int,
        server: int,
        ports: Sequence[pb.DiffPort],
        pods: dict[int, list[tuple[str, IPAddress | None]]],
    ) -> None:
        answer.pair_count += 1
        if len(answer.pairs) < SHOWN_MAX:
            answer.pairs.add(
                source_identity=client,
                destination_identity=server,
                source_labels=self._explainer.labels(client),
                destination_labels=self._explainer.labels(server),
                source_pods=[name for name, _ in pods.get(client, ())],
                destination_pods=[name for name, _ in pods.get(server, ())],
                ports=ports[:PORTS_MAX],
            )

    # ---- flows ----------------------------------------------------------------------------------------------
    async def _broken(self, answer: pb.DiffResponse, after: Sequence[Policy], seconds: float) -> None:
        for count, flow in enumerate(self._flows(seconds)):
            if count % _STEP == _STEP - 1:
                await asyncio.sleep(0)
            found = self._denied(flow, after)
            if found is None:
                continue
            answer.flow_count += 1
            if len(answer.flows) < SHOWN_MAX:
                answer.flows.add(flow=flow, decision=self._answers.decision(found))

    def _denied(self, flow: flow_pb2.Flow, after: Sequence[Policy]) -> Found | None:
        """What would deny a connection that is allowed now; None: nothing."""
        client, server = self._end(flow.source), self._end(flow.destination)
        port = flow.icmp_type if flow.protocol in (ICMP, ICMPV6) else flow.destination.port
        refused: Found | None = None
        for direction, subject, peer in ((Direction.EGRESS, client, server), (Direction.INGRESS, server, client)):
            if subject.endpoint is None:
                continue
            # What the client's end let pass may have been refused at the server's.
            if not self._explainer.decide(direction, subject, peer, flow.protocol, port).allowed:
                return None
            then = self._explainer.decide(direction, subject, peer, flow.protocol, port, after)
            if not then.allowed and refused is None:
                refused = then
        return refused

    def _end(self, end: flow_pb2.FlowEnd) -> Who:
        endpoint = self._enforcer.endpoints.get(end.endpoint) if end.endpoint else None
        address = ip_address(end.address)
        if endpoint is not None and address in endpoint.addresses:
            return Who(endpoint.identity, effective(endpoint.labels), address, endpoint.named, endpoint.number)
        return Who(end.identity, self._explainer.labels(end.identity), address)


def _first(pods: Sequence[tuple[str, IPAddress | None]] | None) -> IPAddress | None:
    return pods[0][1] if pods else None


def _ranges(resolved: Resolved, direction: Direction, peer: int, address: IPAddress | None) -> Sequence[Range]:
    if not resolved.enforced(direction):
        return (Range(0, 1, 0),)
    mask = resolved.masks[resolved.classes.get(peer, 0)]
    return resolved.ranges(direction, mask | resolved.address_mask(address))


def _changes(
    own: Sequence[Range], own_after: Sequence[Range], other: Sequence[Range], other_after: Sequence[Range]
) -> Iterator[pb.DiffPort]:
    """Stretches on which what both ends say together would be another."""
    starts = sorted({each.start for ranges in (own, own_after, other, other_after) for each in ranges})
    for at, start in enumerate(starts):
        end = (starts[at + 1] if at + 1 < len(starts) else END) - 1
        protocol, port = divmod(start, SPAN)
        before = all(find(ranges, protocol, port).allowed for ranges in (own, other))
        after = all(find(ranges, protocol, port).allowed for ranges in (own_after, other_after))
        if before != after:
            one = end // SPAN == protocol
            yield pb.DiffPort(
                protocol=protocol if one else 0,
                first=port if one else 0,
                last=end % SPAN if one else 0,
                allowed_before=before,
                allowed_after=after,
                reason="allowed" if after else "denied",
            )
