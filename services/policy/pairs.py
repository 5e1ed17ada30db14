"""Pairs of identities whose verdict would be another by other policies.

Identities that the same rules select are one group, and a group's policy treats most peers alike. So what is compared is
groups with groups, by classes: thousands of identities that one policy selects are one comparison for each kind of peers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final, NamedTuple

from fibril.policy.v1 import policy_pb2 as pb
from services.common.pipeline.abi import IPAddress
from services.identity.numbers import Reserved
from services.policy.model import Direction, EndpointPeer, Policy, PolicyKey, Selector
from services.policy.resolve.numbers import ONLY_TRIED, RuleRef
from services.policy.resolve.ranges import END, SPAN, Range, find
from services.policy.resolve.resolved import Resolved
from services.policy.resolve.world import World

_STEP: Final = 2000
_OPEN: Final = (Range(0, 1, 0),)
_RESERVED: Final = frozenset(map(int, Reserved))
Policies = Mapping[PolicyKey, Policy]


class Changed(NamedTuple):
    """Each of these clients with each of these servers."""

    clients: Sequence[int]
    servers: Sequence[int]
    ports: Sequence[pb.DiffPort]


@dataclass(eq=False)
class _Group:
    """Identities, and what selects them before and after: the same object if nothing changes for them."""

    numbers: list[int]
    before: Resolved
    after: Resolved
    local_host: bool
    """Whether it is the node's host, which reaches this node's pods whatever policies say."""

    @property
    def concerned(self) -> bool:
        return self.before is not self.after


class Pairs:
    """Of the identities that are known. addresses: of those that have pods here."""

    def __init__(self, world: World, addresses: Mapping[int, IPAddress], local_host: bool) -> None:
        self._world, self._addresses, self._local_host = world, addresses, local_host
        self._work = 0

    async def changed(self, before: Policies, after: Policies) -> AsyncGenerator[Changed]:
        """Others have their turn meanwhile."""
        groups: list[_Group] = []
        try:
            async for group in self._groups(before, after):
                groups.append(group)
            concerned = [group for group in groups if group.concerned]
            others = [group for group in groups if not group.concerned]
            for clients, servers in ((concerned, groups), (others, concerned)):
                for client in clients:
                    for server in servers:
                        await self._turn(len(client.numbers) + len(server.numbers))
                        for found in self._between(client, server):
                            yield found
        finally:
            for group in groups:
                group.before.close()
                if group.concerned:
                    group.after.close()

    async def _turn(self, work: int) -> None:
        self._work += work
        if self._work > _STEP:
            self._work = 0
            await asyncio.sleep(0)

    # ---- groups ---------------------------------------------------------------------------------------------
    async def _groups(self, before: Policies, after: Policies) -> AsyncIterator[_Group]:
        refs = {key: _refs(policy) for key, policy in before.items()}
        now = [_refs(policy, refs.get(key, ())) for key, policy in after.items()]
        sides = [list(chain(*refs.values())), list(chain(*now))]
        subjects = {ref.rule.subject: 0 for side in sides for ref in side}
        for at, subject in enumerate(subjects):
            subjects[subject] = 1 << at
        for numbers, mask in await self._selected(subjects):
            selecting = [[ref for ref in side if mask & subjects[ref.rule.subject]] for side in sides]
            await self._turn(len(sides[0]) + len(numbers))
            one = self._resolve(selecting[0])
            two = one if selecting[0] == selecting[1] else self._resolve(selecting[1])
            yield _Group(numbers, one, two, self._local_host and Reserved.HOST in numbers)

    async def _selected(self, subjects: Mapping[Selector, int]) -> list[tuple[list[int], int]]:
        """Identities that the same subjects select, with the mask of these."""
        selectors = self._world.selectors
        masks = dict.fromkeys(selectors.labels, 0)
        for subject, bit in subjects.items():
            term = (EndpointPeer(subject),)
            selectors.hold(term)
            for number in selectors.numbers(*term) - _RESERVED:
                masks[number] = masks.get(number, 0) | bit
            selectors.drop(term)
            await self._turn(len(masks))
        groups: dict[tuple[int, bool], list[int]] = {}
        for number, mask in masks.items():
            groups.setdefault((mask, number == Reserved.HOST), []).append(number)
        return [(numbers, mask) for (mask, _), numbers in groups.items()]

    def _resolve(self, refs: Iterable[RuleRef]) -> Resolved:
        resolved = Resolved(refs, {}, self._world)
        resolved.classify()
        return resolved

    # ---- two groups -----------------------------------------------------------------------------------------
    def _between(self, client: _Group, server: _Group) -> Iterator[Changed]:
        out = list(self._kinds(client, Direction.EGRESS, server.numbers))
        for into, clients in self._kinds(server, Direction.INGRESS, client.numbers, client.local_host):
            for egress, servers in out:
                ports = list(_changes(*egress, *into))
                if ports:
                    yield Changed(clients, servers, ports)

    def _kinds(
        self, group: _Group, direction: Direction, peers: Iterable[int], always: bool = False
    ) -> Iterator[tuple[tuple[Sequence[Range], Sequence[Range]], list[int]]]:
        """Peers that the group's policy treats alike, with what it says of them before and after. always: it is not asked."""
        kinds: dict[tuple[int, int], list[int]] = {}
        for peer in peers:
            address = self._addresses.get(peer)
            key = _mask(group.before, peer, address), _mask(group.after, peer, address) if group.concerned else 0
            kinds.setdefault(key, []).append(peer)
        for (one, two), found in kinds.items():
            if always:
                yield (_OPEN, _OPEN), found
                continue
            before = _ranges(group.before, direction, one)
            yield (before, _ranges(group.after, direction, two) if group.concerned else before), found


def _refs(policy: Policy, before: Sequence[RuleRef] = ()) -> list[RuleRef]:
    """Of those rules that are about endpoints; those there were before, where they are the same."""
    there = {(ref.index, ref.rule): ref for ref in before}
    return [
        there.get((index, rule)) or RuleRef(policy.key, index, rule, ONLY_TRIED)
        for index, rule in enumerate(policy.rules)
        if not rule.subject_is_node
    ]


def _mask(resolved: Resolved, peer: int, address: IPAddress | None) -> int:
    return resolved.masks[resolved.classes.get(peer, 0)] | resolved.address_mask(address)


def _ranges(resolved: Resolved, direction: Direction, mask: int) -> Sequence[Range]:
    return resolved.ranges(direction, mask) if resolved.enforced(direction) else _OPEN


def _changes(
    own: Sequence[Range], own_after: Sequence[Range], other: Sequence[Range], other_after: Sequence[Range]
) -> Iterator[pb.DiffPort]:
    """Stretches on which what both ends say together would be another."""
    if own == own_after and other == other_after:
        return
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
