"""What a change of policies would change, before it is made: pairs of endpoints, and connections seen lately.

Peers are known by identity; prefixes count for pods of this node, whose addresses are known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from ipaddress import ip_address
from itertools import islice, product
from typing import Final

from fibril.flow.v1 import flow_pb2
from fibril.policy.v1 import policy_pb2 as pb
from services.common.pipeline.abi import IPAddress
from services.identity.numbers import Reserved
from services.policy.answers import Answers
from services.policy.contents import HOST
from services.policy.enforcer import Enforcer
from services.policy.explain import Explainer, Found, Match, Who
from services.policy.labels import effective
from services.policy.model import ICMP, ICMPV6, Direction, Policy, PolicyKey
from services.policy.pairs import Pairs

SHOWN_MAX: Final = 1000
COUNT_MAX: Final = 0xFFFFFFFF
PORTS_MAX: Final = 100
_STEP: Final = 200
Flows = Callable[[float], Iterable[flow_pb2.Flow]]


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
        if any(before.get(each.key) != after.get(each.key) for each in changed):
            await self._pairs(answer, after)
            await self._broken(answer, list(after.values()), seconds)
        return answer

    # ---- pairs ----------------------------------------------------------------------------------------------
    async def _pairs(self, answer: pb.DiffResponse, after: Mapping[PolicyKey, Policy]) -> None:
        pods: dict[int, list[str]] = {}
        addresses: dict[int, IPAddress] = {}
        for number, endpoint in self._enforcer.endpoints.items():
            if number != HOST:
                pods.setdefault(endpoint.identity, []).append(endpoint.pod)
                for address in endpoint.addresses[:1]:
                    addresses.setdefault(endpoint.identity, address)
        count = 0
        pairs = Pairs(self._enforcer.world, addresses, self._explainer.allow_local_host)
        async with aclosing(pairs.changed(dict(self._enforcer.policies), after)) as changed:
            async for clients, servers, ports in changed:
                count += len(clients) * len(servers)
                for client, server in islice(product(clients, servers), SHOWN_MAX - len(answer.pairs)):
                    answer.pairs.add(
                        source_identity=client,
                        destination_identity=server,
                        source_labels=self._explainer.labels(client),
                        destination_labels=self._explainer.labels(server),
                        source_pods=pods.get(client, ()),
                        destination_pods=pods.get(server, ()),
                        ports=ports[:PORTS_MAX],
                    )
        answer.pair_count = min(count, COUNT_MAX)

    # ---- flows ----------------------------------------------------------------------------------------------
    async def _broken(self, answer: pb.DiffResponse, after: Sequence[Policy], seconds: float) -> None:
        now, then = (_Selecting(self._explainer, side) for side in (list(self._enforcer.policies.values()), after))
        for count, flow in enumerate(self._flows(seconds)):
            if count % _STEP == _STEP - 1:
                await asyncio.sleep(0)
            found = self._denied(flow, now, then)
            if found is None:
                continue
            answer.flow_count += 1
            if len(answer.flows) < SHOWN_MAX:
                answer.flows.add(flow=flow, decision=self._answers.decision(found))

    def _denied(self, flow: flow_pb2.Flow, now: _Selecting, then: _Selecting) -> Found | None:
        """What would deny a connection that is allowed now; None: nothing."""
        client, server = self._end(flow.source), self._end(flow.destination)
        port = flow.icmp_type if flow.protocol in (ICMP, ICMPV6) else flow.destination.port
        refused: Found | None = None
        for direction, subject, peer in ((Direction.EGRESS, client, server), (Direction.INGRESS, server, client)):
            if subject.endpoint is None:
                continue
            asked = direction, subject, peer, flow.protocol, port
            # What the client's end let pass may have been refused at the server's.
            if not self._explainer.decide(*asked, now.rules(subject, direction)).allowed:
                return None
            found = self._explainer.decide(*asked, then.rules(subject, direction))
            if not found.allowed and refused is None:
                refused = found
        return refused

    def _end(self, end: flow_pb2.FlowEnd) -> Who:
        address = ip_address(end.address)
        if end.identity == Reserved.HOST:
            return Who(end.identity, self._explainer.labels(end.identity), address, {}, HOST, self._enforcer.node_labels)
        endpoint = self._enforcer.endpoints.get(end.endpoint) if end.endpoint else None
        if endpoint is not None and address in endpoint.addresses:
            return Who(endpoint.identity, effective(endpoint.labels), address, endpoint.named, endpoint.number)
        return Who(end.identity, self._explainer.labels(end.identity), address)


class _Selecting:
    """Which rules of some policies select an endpoint: found once for each."""

    def __init__(self, explainer: Explainer, policies: Sequence[Policy]) -> None:
        self._explainer, self._policies = explainer, policies
        self._known: dict[tuple[int | None, Direction], list[Match]] = {}

    def rules(self, subject: Who, direction: Direction) -> list[Match]:
        key = subject.endpoint, direction
        if key not in self._known:
            self._known[key] = self._explainer.selecting(subject, direction, self._policies)
        return self._known[key]
