"""Policies in the kernel: worked out, written, given to endpoints, kept up to date as identities come and go.

    groups that the same rules select, and whose named ports are the same as far as these ask, share one: a Content
    one that is worked out anew is written beside what the kernel has; endpoints have the old one until then
    one that nobody is to have any longer, and nobody has, is given up

A change that cannot be written leaves what was there; `problems` names it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from services.common.errors import FibrilError
from services.policy.kernel.writer import Published, Writer
from services.policy.model import PolicyKey
from services.policy.resolve.numbers import RuleRef
from services.policy.resolve.resolved import Resolved
from services.policy.resolve.selectors import Term
from services.policy.resolve.world import IPAddress, NamedPort, World

log = logging.getLogger(__name__)

HOST: Final = 0
"""Endpoint number of the node's host."""
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
    groups: set[Group] = field(default_factory=set)
    resolved: Resolved | None = None
    published: Published | None = None
    holders: set[int] = field(default_factory=set)
    """Endpoints that have it in the kernel; those whose group's own is not there yet keep it."""
    behind: bool = False
    """Not all of its classes are in the kernel."""
    problem: str = ""

    @property
    def members(self) -> set[int]:
        """Endpoints that are to have it, or have it."""
        return self.holders.union(*(group.members for group in self.groups))


@dataclass(eq=False)
class Group:
    """Endpoints that nothing tells apart."""

    key: GroupKey
    labels: Mapping[str, str]
    refs: dict[PolicyKey, tuple[RuleRef, ...]] = field(default_factory=dict)
    members: set[int] = field(default_factory=set)
    content: Content | None = None
    """What its members have been given."""


class Contents:
    """Used from one event loop."""

    def __init__(self, world: World, endpoints: Mapping[int, Endpoint]) -> None:
        self._world, self._endpoints = world, endpoints
        self._writer: Writer | None = None
        self._all: dict[ContentKey, Content] = {}
        self._users: dict[Term, set[Content]] = {}
        self._held: dict[int, Content] = {}
        self.dirty: OrderedDict[Content, None] = OrderedDict()
        """To be worked out anew."""
        self._tried = 0
        """writer.freed, when what does not fit was tried last."""
        self.built = 0
        """Policies worked out: what tests count."""
        self._host_callbacks: list[Callable[[bool], None]] = []

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Content]:
        return iter(self._all.values())

    def on_host(self, callback: Callable[[bool], None]) -> None:
        """Call back with whether the host has a policy, when that is decided."""
        self._host_callbacks.append(callback)

    def use(self, writer: Writer | None) -> None:
        """Tables to write to, which have none of these; None: they are gone."""
        self._writer = writer
        for content in self:
            if content.resolved is not None:
                content.resolved.close()
        self._all.clear()
        self._users.clear()
        self.dirty.clear()
        self._held.clear()

    # ---- working out ----------------------------------------------------------------------------------------
    def again(self, concerned: Callable[[Resolved], bool]) -> None:
        """Those of which something is another that only they know of."""
        self.dirty.update(
            (content, None) for content in self if content.resolved is not None and concerned(content.resolved)
        )

    def try_again(self) -> None:
        """What does not fit, if there is more room than when it was tried last."""
        if self._writer is not None and self._writer.freed != self._tried:
            self._tried = self._writer.freed
            self.dirty.update((content, None) for content in self if content.problem)

    def build_next(self) -> None:
        """Of those to be worked out anew the first one."""
        self._build(self.dirty.popitem(last=False)[0])

    def assign(self, group: Group) -> None:
        """Give a group what its rules come to."""
        refs = [ref for found in group.refs.values() for ref in found]
        key: ContentKey = tuple(sorted(refs, key=lambda each: each.order)), _names(group, refs)
        content = self._all.get(key)
        if content is None:
            content = self._all[key] = Content(key)
        content.groups.add(group)
        before, group.content = group.content, content
        if before is not None and before is not content:
            before.groups.discard(group)
        if content.published is not None:
            for number in group.members:
                self.give(number, content)
            self._release(before)
        else:
            # What it had may serve the new one for its peers; its endpoints keep it until that is there.
            self.dirty.pop(content, None)
            self._build(content, before)

    def unassign(self, group: Group) -> None:
        """There is no such group any longer."""
        content, group.content = group.content, None
        if content is not None:
            content.groups.discard(group)
            self._release(content)

    def _build(self, content: Content, before: Content | None = None) -> None:
        """Work a policy out and have its endpoints get it. before: what its first group had."""
        writer = self._writer
        if writer is None or self._all.get(content.key) is not content:
            return
        self.built += 1
        members = content.members
        # Two that are both in force cannot share a table of peers.
        old = before if before is not None and not before.groups and before.holders <= members else None
        serves = content if content.resolved is not None else old
        resolved: Resolved | None = None
        try:
            resolved = Resolved(content.key[0], dict(content.key[1]), self._world)
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
        if was is not None:
            self._unuse(content, was)
        for term in resolved.terms:
            self._users.setdefault(term, set()).add(content)
        content.resolved, content.published, content.problem, content.behind = resolved, published, "", False
        after = published if old is not None and serves is old else None
        for number in members:
            self.give(number, content, after)
        if replaced is not None:
            writer.retire(replaced, published)
        if was is not None:
            was.close()
        self._release(before, after)

    def _unuse(self, content: Content, resolved: Resolved) -> None:
        for term in resolved.terms:
            users = self._users[term]
            users.discard(content)
            if not users:
                del self._users[term]

    def _release(self, content: Content | None, after: Published | None = None) -> None:
        """Give up a policy that nobody has any longer; `after` may have taken over some of it."""
        if content is None or content.groups or content.holders or self._all.get(content.key) is not content:
            return
        del self._all[content.key]
        self.dirty.pop(content, None)
        if content.resolved is not None:
            self._unuse(content, content.resolved)
            content.resolved.close()
        if content.published is not None and self._writer is not None:
            self._writer.retire(content.published, after)

    # ---- who has them ---------------------------------------------------------------------------------------
    def give(self, number: int, content: Content, after: Published | None = None) -> None:
        """Have an endpoint have a policy from now on, if that is there. after: what took over some of what it had."""
        if self._writer is None or content.published is None:
            return
        endpoint = self._endpoints[number]
        # The host has no policy unless one selects it, or it has switches that something must look at.
        needed = bool(content.key[0] or endpoint.flags)
        if number == HOST:
            for callback in self._host_callbacks:
                callback(needed)
        if number == HOST and not needed:
            self._writer.clear_endpoint(HOST)
            self._hold(HOST, None, after)
            return
        self._writer.set_endpoint(number, endpoint.owner, content.published, endpoint.flags)
        self._hold(number, content, after)

    def take(self, number: int) -> None:
        """An endpoint is gone."""
        self._hold(number, None)

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
    def take_identities(self, gone: Iterable[int]) -> None:
        """They are not known any longer."""
        writer = self._writer
        if writer is None:
            return
        gone = list(gone)
        for number in gone:
            writer.forget(number)
        for content in self:
            if content.resolved is None or content.published is None:
                continue
            for number in gone:
                if content.resolved.remove(number):
                    writer.drop_peer(content.published, number)

    def put_identities(self, new: Iterable[int]) -> bool:
        """Give new identities their classes; only then are they known. False: there is no room for them."""
        writer = self._writer
        if writer is None:
            return False
        new = list(new)
        pending: list[tuple[Content, int, int]] = []
        again: dict[Content, None] = {}
        # Besides those with a term: class 0 of a policy that took over classes may be of those whom a rule matches.
        others = {
            each for each in self if each.resolved is not None and (each.resolved.names or each.resolved.masks[0])
        }
        for number in new:
            terms = self._world.selectors.matching(number)
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
            return False
        return True

    def _republish(self, writer: Writer, content: Content) -> None:
        """The same policy with one more class."""
        assert content.resolved is not None
        replaced = content.published
        content.published = writer.publish(content.resolved, replaced, True)
        content.behind = False
        for number in content.members:
            self.give(number, content)
        if replaced is not None:
            writer.retire(replaced, content.published)

    # ---- for status -----------------------------------------------------------------------------------------
    def _pods(self, content: Content) -> str:
        numbers = [number for group in content.groups for number in group.members]
        return ", ".join(self._endpoints[number].pod or str(number) for number in numbers[:5])

    def problems(self) -> list[str]:
        """One sentence for each policy that is not in force as it should be."""
        return [f"{self._pods(content)}: {content.problem}" for content in self if content.problem]


def _names(group: Group, refs: Iterable[RuleRef]) -> frozenset[tuple[str, NamedPort]]:
    """Named ports of a group that its rules ask for: others make no difference."""
    wanted = {port.name for ref in refs for port in ref.rule.ports or () if port.name}
    return frozenset(each for each in group.key[1] if each[0] in wanted)
