"""Has the kernel enforce what policies say of this node's endpoints: works out what has changed, and writes only that.

    endpoints of the same labels and named ports are a group; groups selected by the same rules share one policy in the kernel
    a rule changes       the groups it selected or selects get another policy
    an identity comes    it gets a class in each policy with a term that matches it
    anything else        (backends, nodes, named ports) the policies that name it are worked out anew

Nothing is written before all sources are in step: until then the kernel enforces what an earlier process left. A change that
cannot be written leaves what was there, and is named in status.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from services.common.errors import FibrilError
from services.policy import abi
from services.policy.kernel.writer import Published, Writer
from services.policy.labels import effective
from services.policy.model import Policy, PolicyKey, Rule
from services.policy.resolve.numbers import RuleNumbers, RuleRef
from services.policy.resolve.resolved import Resolved
from services.policy.resolve.selectors import Term
from services.policy.resolve.world import IPAddress, NamedPort, NodeFacts, World

log = logging.getLogger(__name__)

HOST: Final = 0
"""Endpoint number of the node's host."""
REST_S: Final = 1.0
SWEEP_S: Final = 5.0
"""Between looks for numbers that rules need no longer; what the kernel has told by them must have been read in that time."""
GroupKey = tuple[frozenset[tuple[str, str]], frozenset[tuple[str, NamedPort]], bool]
ContentKey = tuple[tuple[RuleRef, ...], frozenset[tuple[str, NamedPort]]]


@dataclass
class Endpoint:
    """A pod of this node, or the host. owner: index of its host-side interface."""

    number: int
    owner: int
    labels: Mapping[str, str]
    identity: int = 0
    pod: str = ""
    container: str = ""
    addresses: tuple[IPAddress, ...] = ()
    named: Mapping[str, NamedPort] = field(default_factory=dict)
    flags: int = 0
    """abi.EpFlag"""


@dataclass(eq=False)
class Content:
    """A policy, as some groups have it."""

    key: ContentKey
    groups: set[GroupKey] = field(default_factory=set)
    resolved: Resolved | None = None
    published: Published | None = None
    holders: set[int] = field(default_factory=set)
    """Endpoints that have it in the kernel; those whose group's own is not there yet keep it."""
    behind: bool = False
    """Not all of its classes are in the kernel."""
    problem: str = ""


@dataclass(eq=False)
class Group:
    """Endpoints that nothing tells apart."""

    key: GroupKey
    labels: Mapping[str, str]
    refs: dict[PolicyKey, tuple[RuleRef, ...]] = field(default_factory=dict)
    members: set[int] = field(default_factory=set)
    content: Content | None = None
    """What its members have been given."""


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
        self.contents: dict[ContentKey, Content] = {}
        self._users: dict[Term, set[Content]] = {}
        self._dirty_groups: dict[GroupKey, None] = {}
        self._dirty: dict[Content, None] = {}
        self._new: dict[int, None] = {}
        self._later: dict[int, None] = {}
        """Identities that there was no room for."""
        self._gone: dict[int, None] = {}
        self._held: dict[int, Content] = {}
        self._pruned = False
        self._tried = 0
        """writer.freed, when what does not fit was tried last."""
        self._news = asyncio.Event()
        self._noted = 0
        self.enforced = 0
        """etcd's revision up to which policies are in force."""
        self._waiters = asyncio.Condition()
        self.built = 0
        """Policies worked out: what tests count."""
        self._host_callbacks: list[Callable[[bool], None]] = []
        self.set_endpoint(Endpoint(HOST, 0, {}))

    # ---- what there is to be enforced -----------------------------------------------------------------------
    def on_host(self, callback: Callable[[bool], None]) -> None:
        """Call back with whether the host has a policy, when that is decided."""
        self._host_callbacks.append(callback)

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
        there = itertools.chain(self._refs.values(), (content.key[0] for content in self.contents.values()))
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
            self._give(number, group.content)
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
        self._hold(number, None)

    def _leave(self, number: int) -> None:
        key = self._group_of.pop(number)
        group = self.groups[key]
        group.members.discard(number)
        if not group.members:
            del self.groups[key]
            self._dirty_groups.pop(key, None)
            self._unuse(group)

    def add_identity(self, number: int, labels: Mapping[str, str]) -> None:
        """An identity is there."""
        if number in self.world.selectors.labels:
            return
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
        self._again(
            content
            for content in self.contents.values()
            if content.resolved is not None and any(peer.name == name for peer in content.resolved.services)
        )

    def set_node(self, name: str, facts: NodeFacts | None) -> None:
        """A node of the cluster; None: it is gone."""
        if self.world.nodes.get(name) == facts:
            return
        if facts is not None:
            self.world.nodes[name] = facts
        else:
            del self.world.nodes[name]
        self._again(
            content for content in self.contents.values() if content.resolved is not None and content.resolved.nodes
        )

    def set_named(self, name: str, found: dict[NamedPort, set[int]]) -> None:
        """What a port's name stands for, by identity."""
        if self.world.named.get(name, {}) == found:
            return
        if found:
            self.world.named[name] = found
        else:
            del self.world.named[name]
        self._again(
            content
            for content in self.contents.values()
            if content.resolved is not None and name in content.resolved.names
        )

    def _again(self, contents: Iterable[Content]) -> None:
        self._dirty.update(dict.fromkeys(contents))
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
        for content in self.contents.values():
            if content.resolved is not None:
                content.resolved.close()
        self.contents.clear()
        self._users.clear()
        self._dirty.clear()
        self._held.clear()
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
        return self._pruned and not (self._dirty_groups or self._dirty or self._new or self._gone)

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
                    self.try_again(self.writer)
                if not self._later and self.idle:
                    continue
            self._news.clear()
            if self.ready and self.writer is not None:
                await self.flush(self.writer)

    def try_again(self, writer: Writer) -> None:
        """What does not fit, if there is more room than when it was tried last."""
        if writer.freed != self._tried:
            self._tried = writer.freed
            self._dirty.update((content, None) for content in self.contents.values() if content.problem)

    async def flush(self, writer: Writer) -> None:
        """Write all that has changed."""
        self._new.update(self._later)
        self._later.clear()
        while self.writer is writer:
            noted = self._noted
            if self._gone:
                self._take_identities(writer)
            elif self._dirty_groups:
                self._regroup(self.groups.get(self._dirty_groups.popitem()[0]))
            elif self._dirty:
                self._build(writer, self._dirty.popitem()[0])
            elif self._new:
                self._put_identities(writer)
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

    def _regroup(self, group: Group | None) -> None:
        """Find the policy of a group."""
        if group is None:
            return
        refs = [ref for found in group.refs.values() for ref in found]
        key: ContentKey = tuple(sorted(refs, key=lambda each: each.order)), self._names(group, refs)
        content = self.contents.get(key)
        if content is None:
            content = self.contents[key] = Content(key)
        content.groups.add(group.key)
        before, group.content = group.content, content
        if before is not None and before is not content:
            before.groups.discard(group.key)
        if content.published is not None:
            for number in group.members:
                self._give(number, content)
            self._release(before)
        else:
            # What it had may serve the new one for its peers; its endpoints keep it until that is there.
            self._dirty.pop(content, None)
            self._build(self.writer, content, before)

    @staticmethod
    def _names(group: Group, refs: Iterable[RuleRef]) -> frozenset[tuple[str, NamedPort]]:
        """Named ports of the group that its rules ask for: others make no difference."""
        wanted = {port.name for ref in refs for port in ref.rule.ports or () if port.name}
        return frozenset(each for each in group.key[1] if each[0] in wanted)

    def _build(self, writer: Writer | None, content: Content, before: Content | None = None) -> None:
        """Work a policy out and have its endpoints get it. before: what its first group had."""
        if writer is None or self.contents.get(content.key) is not content:
            return
        self.built += 1
        members = self._members(content)
        # Two that are both in force cannot share a table of peers.
        old = before if before is not None and not before.groups and before.holders <= members else None
        serves = content if content.resolved is not None else old
        resolved: Resolved | None = None
        try:
            resolved = Resolved(content.key[0], dict(content.key[1]), self.world)
            same = resolved.classify(serves.resolved if serves is not None else None)
            published = writer.publish(resolved, serves.published if serves is not None else None, same)
        except FibrilError as error:
            if resolved is not None:
                resolved.close()
            if str(error) != content.problem:
                log.error("a policy does not fit", extra={"cause": str(error), "endpoints": self._pods(content)})
            content.problem = str(error)
            self._release(before)
            return
        replaced, was = content.published, content.resolved
        self._index(content, resolved)
        content.resolved, content.published, content.problem, content.behind = resolved, published, "", False
        after = published if old is not None and serves is old else None
        for number in members:
            self._give(number, content, after)
        if replaced is not None:
            writer.retire(replaced, published)
        if was is not None:
            was.close()
        self._release(before, after)

    def _members(self, content: Content) -> set[int]:
        """Endpoints that are to have it, or have it."""
        return content.holders.union(*(self.groups[key].members for key in content.groups))

    def _index(self, content: Content, resolved: Resolved) -> None:
        if content.resolved is not None:
            for term in content.resolved.terms:
                self._users[term].discard(content)
        for term in resolved.terms:
            self._users.setdefault(term, set()).add(content)

    def _release(self, content: Content | None, after: Published | None = None) -> None:
        """Give up a policy that nobody has any longer; `after` may have taken over some of it."""
        if content is None or content.groups or content.holders or self.contents.get(content.key) is not content:
            return
        del self.contents[content.key]
        self._dirty.pop(content, None)
        if content.resolved is not None:
            for term in content.resolved.terms:
                users = self._users[term]
                users.discard(content)
                if not users:
                    del self._users[term]
            content.resolved.close()
        if content.published is not None and self.writer is not None:
            self.writer.retire(content.published, after)

    def _unuse(self, group: Group) -> None:
        content, group.content = group.content, None
        if content is not None:
            content.groups.discard(group.key)
            self._release(content)

    def _give(self, number: int, content: Content, after: Published | None = None) -> None:
        if self.writer is None or content.published is None or not self.ready:
            return
        endpoint = self.endpoints[number]
        # The host has no policy unless one selects it, or it has switches that something must look at.
        needed = bool(content.key[0] or endpoint.flags)
        if number == HOST:
            for callback in self._host_callbacks:
                callback(needed)
        if number == HOST and not needed:
            self.writer.clear_endpoint(HOST)
            self._hold(HOST, None, after)
            return
        self.writer.set_endpoint(number, endpoint.owner, content.published, endpoint.flags)
        self._hold(number, content, after)

    def _hold(self, number: int, content: Content | None, after: Published | None = None) -> None:
        """The kernel has this for an endpoint now; what it had before may be given up, but for what `after` has of it."""
        before = self._held.pop(number, None)
        if content is not None:
            self._held[number] = content
            content.holders.add(number)
        if before is not None and before is not content:
            before.holders.discard(number)
            self._release(before, after)

    # ---- identities -----------------------------------------------------------------------------------------
    def _take_identities(self, writer: Writer) -> None:
        gone, self._gone = self._gone, {}
        for number in gone:
            writer.forget(number)
        for content in self.contents.values():
            if content.resolved is None or content.published is None:
                continue
            for number in gone:
                if content.resolved.remove(number):
                    writer.drop_peer(content.published, number)

    def _put_identities(self, writer: Writer) -> None:
        """Give new identities their classes; only then are they known."""
        new, self._new = self._new, {}
        selectors = self.world.selectors
        pending: list[tuple[Content, int, int]] = []
        again: dict[Content, None] = {}
        # Besides those with a term: class 0 of a policy that took over classes may be of those whom a rule matches.
        others = {
            each
            for each in self.contents.values()
            if each.resolved is not None and (each.resolved.names or each.resolved.masks[0])
        }
        for number in new:
            terms = selectors.matching(number)
            concerned = {content for term in terms for content in self._users.get(term, ())} | others
            for content in concerned:
                if content.resolved is None or number in content.resolved.classes:
                    continue
                found, fresh = content.resolved.add(number, terms)
                content.behind |= fresh
                if content.behind:
                    again[content] = None
                if found:
                    pending.append((content, number, found))
        try:
            for content in again:
                self._republish(writer, content)
            for content, number, found in pending:
                assert content.published is not None
                writer.put_peer(content.published, number, found)
            writer.know(new)
        except FibrilError as error:
            log.error("identities cannot be told to the kernel", extra={"cause": str(error), "count": len(new)})
            # They stay unknown, which is denied what is not allowed to everybody, until there is room.
            for content, number, _ in pending:
                assert content.resolved is not None
                content.resolved.remove(number)
                if content.published is not None:
                    writer.drop_peer(content.published, number)
            self._later.update(new)

    def _republish(self, writer: Writer, content: Content) -> None:
        """The same policy with one more class."""
        assert content.resolved is not None
        replaced = content.published
        content.published = writer.publish(content.resolved, replaced, True)
        content.behind = False
        for number in self._members(content):
            self._give(number, content)
        if replaced is not None:
            writer.retire(replaced, content.published)

    # ---- for status -----------------------------------------------------------------------------------------
    def _pods(self, content: Content) -> str:
        numbers = [number for key in content.groups for number in self.groups[key].members]
        return ", ".join(self.endpoints[number].pod or str(number) for number in numbers[:5])

    def problems(self) -> list[str]:
        """One sentence for each policy that is not in force as it should be."""
        return [f"{self._pods(content)}: {content.problem}" for content in self.contents.values() if content.problem]

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
            self._give(number, content)
        elif self.writer is not None:
            self.writer.set_flags(number, endpoint.owner, endpoint.flags)
