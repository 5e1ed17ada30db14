"""The policy of an endpoint, worked out: peers in classes that it treats alike, and the ranges that hold for each.

Each rule that selects the endpoint is a bit; two or more, if a named port does not stand for one number with all of its
peers. An identity's mask has the bits of all rules that match it, an address's likewise; equal masks are one class. So
what a class says on the ports depends on nothing but its mask, and thousands of peers in one rule are one class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from services.common.errors import ResourceExhausted
from services.policy.abi import Verdict
from services.policy.model import (
    Action,
    CidrPeer,
    Direction,
    EndpointPeer,
    Entity,
    EntityPeer,
    IPNetwork,
    NodePeer,
    Port,
    Rule,
    ServicePeer,
    Tier,
)
from services.policy.resolve.numbers import RuleRef
from services.policy.resolve.prefixes import prefix_masks
from services.policy.resolve.ranges import Asked, Default, Range, Spans, find, flatten, spans_of
from services.policy.resolve.selectors import Term
from services.policy.resolve.world import IPAddress, NamedPort, World

CELLS_MAX: Final = 1 << 20
"""Cells that the tables of one policy may take."""
WORK_MAX: Final = 1 << 20
"""Rules that may have to be looked at to make them, for all kinds of peers together: some seconds of it."""


@dataclass(frozen=True)
class Bit:
    """A rule with ports, as far as they are numbers: one place in masks."""

    ref: RuleRef
    order: int
    spans: Spans
    needs: int = 0
    """Mask of another that must be there, too."""

    def asked(self) -> Asked:
        rule = self.ref.rule
        return Asked(
            self.order, self.ref.number, rule.tier, rule.action, self.spans, rule.reject, rule.keep_established
        )


@dataclass
class Restricted:
    """Bits of rules that match a term, but only those identities where a port's name stands for one number."""

    bit: int
    terms: frozenset[Term] | None
    numbers: set[int]


@dataclass
class Tables:
    """What the kernel needs. classes: of identities, but for those of class 0. cells: class tables, then ranges; all places are
    relative to the first cell.
    """

    cells: list[int]
    sides: tuple[tuple[int, bool], tuple[int, bool]]
    """For each direction where its class table begins, and whether it is enforced."""
    prefix_classes: int
    unknown: int
    prefixes: dict[IPNetwork, int] = field(default_factory=dict)


class Resolved:
    """refs: the rules that select the endpoint, in any order. named: the endpoint's own named ports."""

    def __init__(self, refs: Iterable[RuleRef], named: Mapping[str, NamedPort], world: World) -> None:
        self.refs = tuple(sorted(refs, key=lambda each: each.order))
        self._world = world
        self.bits: list[Bit] = []
        self.terms: dict[Term, int] = {}
        """Mask of the rules that a term is a peer of."""
        self._cidrs: dict[CidrPeer, int] = {}
        self.services: set[ServicePeer] = set()
        self.nodes: set[NodePeer] = set()
        self._restricted: list[Restricted] = []
        self.names: set[str] = set()
        """Of ports, as other endpoints have them."""
        self._always = 0
        self._sides = [0, 0]
        """Bits of each direction."""
        self._uncertain = 0
        """Bits of rules that an identity may match, whatever its address is."""
        self._defaults = tuple(self._default(direction) for direction in Direction)
        self._enforced = tuple(any(ref.rule.direction is direction for ref in self.refs) for direction in Direction)
        for order, ref in enumerate(self.refs):
            self._enter(order, ref, named)
        self._actions = {
            action: sum(1 << at for at, bit in enumerate(self.bits) if bit.ref.rule.action is action) for action in Action
        }
        """Bits of each action."""
        self._prefixes = prefix_masks(self._cidrs.items(), WORK_MAX)
        world.selectors.hold(self.terms)
        self.prefix_masks: list[int] = sorted({0, *self._prefixes.values()})
        self._ranges: dict[tuple[int, int], tuple[Range, ...]] = {}
        self.masks: list[int] = [0]
        """Of classes of identities; some may be of nobody."""
        self._class_of_mask: dict[int, int] = {0: 0}
        self.classes: dict[int, int] = {}
        """Of identities, but for those of class 0."""

    def close(self) -> None:
        """Selectors need not be kept up to date for it any longer."""
        self._world.selectors.drop(self.terms)

    # ---- rules ----------------------------------------------------------------------------------------------
    def _enter(self, order: int, ref: RuleRef, named: Mapping[str, NamedPort]) -> None:
        rule = ref.rule
        numbers = [port for port in rule.ports or () if not port.name]
        names = [port for port in rule.ports or () if port.name]
        if rule.direction is Direction.INGRESS:
            for port in names:
                numbers += _number(port, named.get(port.name))
            names = []
        if rule.ports is None or numbers:
            self._peers(self._bit(Bit(ref, order, spans_of(numbers if rule.ports is not None else None))), rule)
        addresses = 0
        if names and any(not isinstance(peer, EndpointPeer | EntityPeer) for peer in rule.peers or ()):
            # Says nothing by itself: it takes an address of the rule's and an identity with the name.
            addresses = self._bit(Bit(ref, order, ()))
            self._addresses(addresses, rule)
        for port in names:
            self.names.add(port.name)
            for stands_for, having in self._world.named.get(port.name, {}).items():
                found = _number(port, stands_for)
                if not found:
                    continue
                bit = Bit(ref, order, spans_of(found))
                self._restrict(self._bit(bit), rule, having)
                if addresses:
                    mask = self._bit(replace(bit, needs=addresses))
                    self._uncertain |= mask
                    self._restricted.append(Restricted(mask, None, having))

    def _bit(self, bit: Bit) -> int:
        mask = 1 << len(self.bits)
        self.bits.append(bit)
        self._sides[bit.ref.rule.direction] |= mask
        return mask

    def _peers(self, mask: int, rule: Rule) -> None:
        if _is_everybody(rule):
            self._always |= mask
            return
        for peer in rule.peers or ():
            if isinstance(peer, EndpointPeer | EntityPeer):
                self._uncertain |= mask
                self.terms[peer] = self.terms.get(peer, 0) | mask
        self._addresses(mask, rule)

    def _addresses(self, mask: int, rule: Rule) -> None:
        for peer in rule.peers or ():
            match peer:
                case CidrPeer():
                    self._cidrs[peer] = self._cidrs.get(peer, 0) | mask
                case ServicePeer():
                    self.services.add(peer)
                    for cidr in self._world.service(peer):
                        self._cidrs[cidr] = self._cidrs.get(cidr, 0) | mask
                case NodePeer():
                    self.nodes.add(peer)
                    for cidr in self._world.node(peer):
                        self._cidrs[cidr] = self._cidrs.get(cidr, 0) | mask

    def _restrict(self, mask: int, rule: Rule, having: set[int]) -> None:
        terms = None
        self._uncertain |= mask
        if not _is_everybody(rule):
            terms = frozenset(peer for peer in rule.peers or () if isinstance(peer, EndpointPeer | EntityPeer))
            for term in terms:
                self.terms.setdefault(term, 0)
        self._restricted.append(Restricted(mask, terms, having))

    # ---- classes --------------------------------------------------------------------------------------------
    def classify(self, before: Resolved | None = None) -> bool:
        """Give all known identities their classes. True: `before`'s table of peers serves as it is."""
        masks: dict[int, int] = {}
        selectors = self._world.selectors
        for term, mask in self.terms.items():
            if mask:
                for number in selectors.numbers(term):
                    masks[number] = masks.get(number, 0) | mask
        for each in self._restricted:
            for number in self._allowed_by_name(each):
                masks[number] = masks.get(number, 0) | each.bit
        if before is not None and self._same_classes(before, masks):
            return True
        for number, mask in masks.items():
            self.classes[number] = self._class(mask)
        return False

    def _allowed_by_name(self, each: Restricted) -> Iterable[int]:
        selectors = self._world.selectors
        known = (number for number in each.numbers if number in selectors.labels)
        if each.terms is None:
            return known
        terms = each.terms
        return (number for number in known if any(number in selectors.numbers(term) for term in terms))

    def _same_classes(self, before: Resolved, masks: Mapping[int, int]) -> bool:
        """Take over another's classes if no two identities of one class are told apart now."""
        found: dict[int, int] = {}
        classes, others = before.classes, 0
        for number, index in classes.items():
            mask = masks.get(number, 0)
            if found.setdefault(index, mask) != mask:
                return False
        for number, mask in masks.items():
            if number not in classes:
                others += 1
                if found.setdefault(0, mask) != mask:
                    return False
        # All that neither names.
        if len(self._world.selectors.labels) > len(classes) + others and found.setdefault(0, 0):
            return False
        if len(before.masks) > 2 * len(found) + 16:
            # Too many that nobody has any longer.
            return False
        self.classes = classes
        self.masks = [found.get(index, 0) for index in range(len(before.masks))]
        self._class_of_mask = {mask: index for index, mask in reversed(list(enumerate(self.masks)))}
        if self.masks[0]:
            # Class 0 means something else than that nothing matches: what is new must not fall into it.
            self._class_of_mask.pop(0, None)
        return True

    def _class(self, mask: int) -> int:
        found = self._class_of_mask.get(mask)
        if found is None:
            found = self._class_of_mask[mask] = len(self.masks)
            self.masks.append(mask)
        return found

    def mask_of(self, terms: Iterable[Term], number: int) -> int:
        """Of an identity that these terms match."""
        mask, matching = 0, set(terms)
        for term in matching:
            mask |= self.terms.get(term, 0)
        for each in self._restricted:
            if number in each.numbers and (each.terms is None or not each.terms.isdisjoint(matching)):
                mask |= each.bit
        return mask

    def add(self, number: int, terms: Iterable[Term]) -> tuple[int, bool]:
        """Class of an identity that is new, and whether that class is: then tables must be made anew."""
        count = len(self.masks)
        found = self._class(self.mask_of(terms, number))
        if found:
            self.classes[number] = found
        return found, len(self.masks) > count

    def remove(self, number: int) -> int:
        """The class of an identity that is gone."""
        return self.classes.pop(number, 0)

    # ---- what they say --------------------------------------------------------------------------------------
    def enforced(self, direction: Direction) -> bool:
        """Whether any rule is about this direction."""
        return self._enforced[direction]

    def _default(self, direction: Direction) -> Default:
        rules = [ref.rule for ref in self.refs if ref.rule.direction is direction and ref.rule.default_deny]
        return Default(
            bool(rules), any(rule.reject for rule in rules), any(rule.keep_established for rule in rules)
        )

    def ranges(self, direction: Direction, mask: int) -> tuple[Range, ...]:
        """What holds for peers of a mask: of identity and address together."""
        key = direction, (mask | self._always) & self._sides[direction]
        found = self._ranges.get(key)
        if found is None:
            found = flatten([bit.asked() for bit in self._of(key[1])], self._defaults[direction])
            self._ranges[key] = found
        return found

    def _of(self, mask: int, certain: int = 0) -> list[Bit]:
        found = []
        there = mask | certain
        while mask:
            low = mask & -mask
            bit = self.bits[low.bit_length() - 1]
            if not bit.needs & ~there:
                found.append(bit)
            mask ^= low
        return found

    def unknown(self, direction: Direction, certain: int) -> tuple[Range, ...]:
        """What holds for an identity that nothing is known of, but which rules its address matches: only what would be
        allowed whatever it turned out to be.
        """
        certain = (certain | self._always) & self._sides[direction]
        possible = self._uncertain & self._sides[direction] & ~certain
        sure = self._of(certain)
        harmful = self._of(possible & self._actions[Action.DENY], certain)
        # The last tier's leave nothing but to allow.
        passing = [
            bit
            for bit in self._of(possible & self._actions[Action.PASS], certain)
            if bit.ref.rule.tier is not Tier.BASELINE
        ]
        default = self._defaults[direction]
        # A rule that passes on may skip one that allows, or one that denies: whichever is worse.
        first = flatten([bit.asked() for bit in (*sure, *harmful)], default)
        if not passing:
            return first
        return _stricter(first, flatten([bit.asked() for bit in (*sure, *harmful, *passing)], default))

    def verdict(self, direction: Direction, number: int, address_mask: int, protocol: int, port: int) -> Range:
        """The kernel's answer, without the kernel."""
        if not self.enforced(direction):
            return Range(0, int(Verdict.ALLOW), 0)
        if number not in self._world.selectors.labels:
            return find(self.unknown(direction, address_mask), protocol, port)
        mask = self.masks[self.classes.get(number, 0)]
        return find(self.ranges(direction, mask | address_mask), protocol, port)

    def address_mask(self, address: IPAddress | None) -> int:
        """Of the longest prefix that holds an address."""
        found, longest = 0, -1
        if address is not None:
            for prefix, mask in self._prefixes.items():
                if prefix.version == address.version and prefix.prefixlen > longest and address in prefix:
                    found, longest = mask, prefix.prefixlen
        return found

    def prefixes(self) -> Mapping[IPNetwork, int]:
        """Prefix -> mask of the rules that addresses match for which it is the longest."""
        return self._prefixes

    # ---- for the kernel -------------------------------------------------------------------------------------
    def cells_needed(self) -> int:
        """Of class tables alone."""
        sides = sum(self.enforced(direction) for direction in Direction)
        return sides * (len(self.masks) + 1) * len(self.prefix_masks)

    def _work(self) -> int:
        """Rules to look at for all kinds of peers, and for those that nothing is known of."""
        work = 0
        for direction in Direction:
            side, always = self._sides[direction], self._always
            open_ = self._uncertain & side & (self._actions[Action.DENY] | self._actions[Action.PASS])
            work += len(self.prefix_masks) * open_.bit_count()
            for mask in self.masks:
                work += sum(((mask | prefix | always) & side).bit_count() for prefix in self.prefix_masks)
        return work

    def tables(self) -> Tables:
        """ResourceExhausted, with the count, for what is too large."""
        needed = self.cells_needed()
        if needed > CELLS_MAX:
            raise ResourceExhausted(
                f"{len(self.masks)} kinds of identities times {len(self.prefix_masks)} kinds of prefixes are "
                f"{needed} combinations, the limit is {CELLS_MAX}",
                fix="put peers with the same ports into one rule",
            )
        work = self._work()
        if work > WORK_MAX:
            raise ResourceExhausted(
                f"{len(self.refs)} rules for {needed} kinds of peers are {work} combinations, the limit is {WORK_MAX}",
                fix="put peers with the same ports into one rule",
            )
        classes: list[list[int]] = [[], []]
        ranges: list[int] = []
        places: dict[tuple[Range, ...], int] = {}
        for direction in Direction:
            if not self.enforced(direction):
                continue
            for index in range(len(self.masks) + 1):
                for prefix in self.prefix_masks:
                    if index == len(self.masks):
                        found = self.unknown(direction, prefix)
                    else:
                        found = self.ranges(direction, self.masks[index] | prefix)
                    place = places.get(found)
                    if place is None:
                        place = places[found] = len(ranges)
                        ranges.extend(
                            each.protocol << 56 | each.port << 40 | each.verdict << 32 | each.number for each in found
                        )
                        if needed + len(ranges) > CELLS_MAX:
                            raise ResourceExhausted(
                                f"more than {CELLS_MAX} ranges of ports for {needed} kinds of peers together",
                                fix="use ranges instead of single ports, fewer of them, or fewer kinds of peers",
                            )
                    classes[direction].append(len(found) << 32 | place)
        base = len(classes[0]) + len(classes[1])
        # Ranges follow the class tables.
        cells = [cell + base for side in classes for cell in side] + ranges
        place_of = {mask: index for index, mask in enumerate(self.prefix_masks)}
        return Tables(
            cells,
            (
                (0, self.enforced(Direction.INGRESS)),
                (len(classes[0]), self.enforced(Direction.EGRESS)),
            ),
            len(self.prefix_masks),
            len(self.masks),
            {prefix: place_of[mask] for prefix, mask in self._prefixes.items()},
        )


def _is_everybody(rule: Rule) -> bool:
    """Whoever it is, known or not."""
    return rule.peers is None or EntityPeer(Entity.ALL) in rule.peers


def _number(port: Port, stands_for: NamedPort | None) -> list[Port]:
    """A named port as a number, if the name stands for one of its protocol."""
    if stands_for is None:
        return []
    protocol, number = stands_for
    if port.protocol not in (0, protocol):
        return []
    return [Port(protocol, number, number)]


def _stricter(a: Sequence[Range], b: Sequence[Range]) -> tuple[Range, ...]:
    """Allowed where both are."""
    found: list[Range] = []
    for start in sorted({each.start for each in (*a, *b)}):
        one, two = find(a, start // 65536, start % 65536), find(b, start // 65536, start % 65536)
        chosen = two if one.allowed else one
        if not found or (found[-1].verdict, found[-1].number) != (chosen.verdict, chosen.number):
            found.append(Range(start, chosen.verdict, chosen.number))
    return tuple(found)


