"""Has the kernel enforce what policies say of this node's endpoints: knows whom rules select, and what a change concerns.

    endpoints of the same labels and named ports are a group; each has one policy in the kernel (contents.py)
    a rule changes       the groups it selected or selects get another policy
    an identity comes    it gets a class in each policy with a term that matches it
    anything else        (backends, nodes, named ports) the policies that name it are worked out anew

Nothing is written before all sources are in step: until then the kernel enforces what an earlier process left.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from services.policy import abi
from services.policy.contents import HOST, Content, Contents, Endpoint, Group, GroupKey
from services.policy.kernel.writer import Writer
from services.policy.labels import effective
from services.policy.model import Policy, PolicyKey, Rule
from services.policy.resolve.numbers import RuleNumbers, RuleRef
from services.policy.resolve.world import IPAddress, NamedPort, NodeFacts, World

REST_S: Final = 1.0
SWEEP_S: Final = 5.0
"""Between looks for numbers that rules need no longer; what the kernel has told by them must have been read in that time."""


class Enforcer:
    """Used from one event loop."""

    def __init__(self, world: World, numbers: RuleNumbers, node_labels: Mapping[str, str]) -> None:
        self.world, self.numbers = world, numbers
        self.node_labels = node_labels
        self.writer: Writer | None = None
        self.ready = False
        self.waiting = ""
        """What is not in step yet, for people."""
        self.policies: dict[PolicyKey, Policy] = {}
        self._refs: dict[PolicyKey, tuple[RuleRef, ...]] = {}
        self.endpoints: dict[int, Endpoint] = {}
        self._group_of: dict[int, GroupKey] = {}
        self.groups: dict[GroupKey, Group] = {}
        self.contents = Contents(world, self.endpoints)
        self._dirty_groups: OrderedDict[GroupKey, None] = OrderedDict()
        self._new: dict[int, None] = {}
        self._later: dict[int, None] = {}
        """Identities that there was no room for."""
        self._gone: dict[int, None] = {}
        self._pruned = False
        self._news = asyncio.Event()
        self._noted = 0
        self.enforced = 0
        """etcd's revision up to which policies are in force."""
        self._waiters = asyncio.Condition()
        self.set_endpoint(Endpoint(HOST, 0, {}))

    # ---- what there is to be enforced -----------------------------------------------------------------------
    def set_policy(self, key: PolicyKey, policy: Policy | None) -> None:
        """A policy is so now; None: it is gone."""
        if self.policies.get(key) == policy:
            return
        if policy is None:
            del self.policies[key]
            self._refs.pop(key, None)
        else:
            self.policies[key] = policy
            before = self._refs.get(key, ())
            self._refs[key] = tuple(
                before[index] if index < len(before) and before[index].rule == rule else self.numbers.ref(key, index, rule)
                for index, rule in enumerate(policy.rules)
            )
        for group in self.groups.values():
            if self._select(group, key):
                self._dirty_groups[group.key] = None
        self._news.set()

    def rule_number(self, key: PolicyKey, index: int, rule: Rule) -> int:
        """What the kernel calls a rule; 0: it is none of those there are."""
        refs = self._refs.get(key, ())
        return refs[index].number if index < len(refs) and refs[index].rule == rule else abi.RULE_NONE

    def sweep(self) -> None:
        """Give up numbers of rules that are not there any longer, and that no policy in the kernel has."""
        there = itertools.chain(self._refs.values(), (content.key[0] for content in self.contents))
        self.numbers.sweep(ref.number for refs in there for ref in refs)

    def _select(self, group: Group, key: PolicyKey) -> bool:
        """Find which rules of a policy are about a group; whether they are others than before."""
        node = group.key[2]
        found = tuple(
            ref
            for ref in self._refs.get(key, ())
            if ref.rule.subject_is_node == node and ref.rule.subject.matches(group.labels)
        )
        if found == group.refs.get(key, ()):
            return False
        if found:
            group.refs[key] = found
        else:
            del group.refs[key]
        return True

    def set_endpoint(self, endpoint: Endpoint) -> None:
        """An endpoint is there, or is another than before."""
        number = endpoint.number
        before = self.endpoints.get(number)
        self.endpoints[number] = endpoint
        node = number == HOST
        labels = dict(self.node_labels) if node else effective(endpoint.labels)
        key: GroupKey = frozenset(labels.items()), frozenset(endpoint.named.items()), node
        if before is not None and self._group_of[number] != key:
            self._leave(number)
        self._group_of[number] = key
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = Group(key, labels)
            for policy in self._refs:
                self._select(group, policy)
        group.members.add(number)
        if group.content is not None and group.content.published is not None:
            self.contents.give(number, group.content)
        else:
            self._dirty_groups[key] = None
            self._news.set()

    def remove_endpoint(self, number: int) -> None:
        """An endpoint is gone. Whoever gets its number next is denied everything at first."""
        if self.endpoints.pop(number, None) is None:
            return
        self._leave(number)
        if self.writer is not None and self._pruned:
            self.writer.clear_endpoint(number)
        self.contents.take(number)

    def _leave(self, number: int) -> None:
        key = self._group_of.pop(number)
        group = self.groups[key]
        group.members.discard(number)
        if not group.members:
            del self.groups[key]
            self._dirty_groups.pop(key, None)
            self.contents.unassign(group)

    def add_identity(self, number: int, labels: Mapping[str, str]) -> None:
        """An identity is there. Of one that is known: its number may be another's by now, for a snapshot tells of nothing that
        went and came again before it.
        """
        known = self.world.selectors.labels.get(number)
        if known is not None:
            if known == effective(labels):
                return
            self.remove_identity(number)
        self.world.selectors.add(number, labels)
        # If it was there before and is still to be taken away, that comes first: its labels may be others now.
        self._new[number] = None
        self._news.set()

    def remove_identity(self, number: int) -> None:
        """An identity is gone."""
        if number in self.world.selectors.labels:
            self.world.selectors.remove(number)
            self._new.pop(number, None)
            self._later.pop(number, None)
            self._gone[number] = None
            self._news.set()

    def set_backends(self, name: str, addresses: frozenset[IPAddress]) -> None:
        """Addresses of a service's backends; none: it has none, or is not there."""
        if self.world.backends.get(name, frozenset()) == addresses:
            return
        if addresses:
            self.world.backends[name] = addresses
        else:
            del self.world.backends[name]
        self.contents.again(lambda resolved: any(peer.name == name for peer in resolved.services))
        self._news.set()

    def set_node(self, name: str, facts: NodeFacts | None) -> None:
        """A node of the cluster; None: it is gone."""
        if self.world.nodes.get(name) == facts:
            return
        if facts is not None:
            self.world.nodes[name] = facts
        else:
            del self.world.nodes[name]
        self.contents.again(lambda resolved: bool(resolved.nodes))
        self._news.set()

    def set_named(self, name: str, found: dict[NamedPort, set[int]]) -> None:
        """What a port's name stands for, by identity."""
        if self.world.named.get(name, {}) == found:
            return
        if found:
            self.world.named[name] = found
        else:
            del self.world.named[name]
        self.contents.again(lambda resolved: name in resolved.names)
        self._news.set()

    def note(self, revision: int) -> None:
        """All that etcd has said up to this revision has been told."""
        self._noted = max(self._noted, revision)
        self._news.set()

    # ---- enforcing ------------------------------------------------------------------------------------------
    def use(self, writer: Writer | None) -> None:
        """Tables to write to; None: they are gone."""
        self.writer = writer
        self._pruned = False
        self.contents.use(writer)
        self._later.clear()
        for group in self.groups.values():
            group.content = None
            self._dirty_groups[group.key] = None
        self._new = dict.fromkeys(self.world.selectors.labels)
        self._news.set()

    def set_ready(self) -> None:
        """All sources are in step."""
        if not self.ready:
            self.ready = True
            self._news.set()

    @property
    def idle(self) -> bool:
        """Whether all that is known is in force, or cannot be."""
        return self._pruned and not (self._dirty_groups or self.contents.dirty or self._new or self._gone)

    async def run(self) -> None:
        """Until cancelled."""
        sweep = 0.0
        while True:
            if time.monotonic() >= sweep:
                self.sweep()
                sweep = time.monotonic() + SWEEP_S
            try:
                async with asyncio.timeout(REST_S):
                    await self._news.wait()
            except TimeoutError:
                if self.writer is not None:
                    self.writer.rest()
                    self.contents.try_again()
                if not self._later and self.idle:
                    continue
            self._news.clear()
            if self.ready and self.writer is not None:
                await self.flush(self.writer)

    async def flush(self, writer: Writer) -> None:
        """Write all that has changed, what changed first first: else changes that keep coming would keep it waiting."""
        self._new.update(self._later)
        self._later.clear()
        while self.writer is writer:
            noted = self._noted
            if self._gone:
                gone, self._gone = self._gone, {}
                self.contents.take_identities(gone)
            elif self._dirty_groups:
                group = self.groups.get(self._dirty_groups.popitem(last=False)[0])
                if group is not None:
                    self.contents.assign(group)
            elif self.contents.dirty:
                self.contents.build_next()
            elif self._new:
                new, self._new = self._new, {}
                if not self.contents.put_identities(new):
                    self._later.update(new)
            else:
                break
            await asyncio.sleep(0)
        else:
            return
        if not self._pruned or writer.left:
            writer.prune(self.endpoints)
            self._pruned = True
        writer.rest()
        if noted > self.enforced:
            self.enforced = noted
        async with self._waiters:
            self._waiters.notify_all()

    async def wait(self, revision: int) -> None:
        """Until this revision (0: what is known) is in force."""
        async with self._waiters:
            await self._waiters.wait_for(lambda: self.idle and self.enforced >= revision)

    # ---- who has what ---------------------------------------------------------------------------------------
    def content_of(self, number: int) -> Content | None:
        """The policy of an endpoint."""
        key = self._group_of.get(number)
        return self.groups[key].content if key is not None else None

    def set_flags(self, number: int, flags: abi.EpFlag) -> None:
        """Switches of an endpoint."""
        endpoint = self.endpoints[number]
        endpoint.flags = int(flags)
        content = self.content_of(number)
        if content is not None and content.published is not None:
            self.contents.give(number, content)
        elif self.writer is not None:
            self.writer.set_flags(number, endpoint.owner, endpoint.flags)
