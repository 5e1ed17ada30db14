"""The allocator against a set-based reference, and the arithmetic of blocks."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from services.ipam.pools.model import (
    REST_S,
    Block,
    block_count,
    blocks_from,
    gateway_of,
    ranges,
    usable_range,
)


class BlockMachine(RuleBasedStateMachine):
    """Take, take by name, give back, wait and exclude in any order: never twice, never reserved, never too early."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.network = ip_network("10.9.0.0/28")
        self.excluded = {int(ip_address("10.9.0.4"))}
        self.gateway = int(ip_address("10.9.0.1"))
        self.block = Block(self.network, ranges([ip_network("10.9.0.4/32")]), self.gateway)
        self.used: set[int] = set()
        self.released: dict[int, float] = {}
        self.now = 1000.0

    def usable(self) -> set[int]:
        first, last = usable_range(self.network)
        return set(range(first, last + 1)) - self.excluded - {self.gateway}

    @rule(target=held)
    def take(self) -> int:
        number = self.block.take(self.now)
        rested = {n for n in self.usable() - self.used if self.released.get(n, -1e9) + REST_S <= self.now}
        if number is None:
            assert not rested
            return -1
        assert number in rested
        self.used.add(number)
        self.released.pop(number, None)
        return number

    @rule(target=held)
    def take_resting(self) -> int:
        waiting = {n: t for n, t in self.released.items() if n not in self.used and n in self.usable()}
        number = self.block.take_resting()
        if number is None:
            assert not {n for n, t in waiting.items() if t + REST_S > self.now}
            return -1
        assert number in waiting
        assert waiting[number] == min(waiting.values())
        self.used.add(number)
        self.released.pop(number)
        return number

    @rule(target=held, last=st.integers(0, 15))
    def take_this(self, last: int) -> int:
        number = int(self.network.network_address) + last
        expected = number in self.usable() - self.used
        assert self.block.take_this(number) is expected
        if not expected:
            return -1
        self.used.add(number)
        self.released.pop(number, None)
        return number

    @rule(number=consumes(held))
    def give(self, number: int) -> None:
        self.block.give(number, self.now)
        if number in self.used:
            self.used.discard(number)
            if number in self.usable():
                self.released[number] = self.now

    @rule(seconds=st.sampled_from([1.0, REST_S / 2, REST_S]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(last=st.sets(st.integers(2, 14), max_size=5))
    def exclude(self, last: set[int]) -> None:
        base = int(self.network.network_address)
        self.excluded = {base + n for n in last}
        self.released = {n: t for n, t in self.released.items() if n not in self.excluded}
        self.block.exclude(ranges(ip_network(n) for n in map(ip_address, self.excluded)))

    @invariant()
    def agrees(self) -> None:
        assert self.block.used == self.used
        assert self.block.capacity() == len(self.usable())


TestBlock = BlockMachine.TestCase
TestBlock.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@given(st.integers(8, 24), st.integers(0, 8), st.integers(0, 1 << 32))
def test_every_block_is_offered_once_wherever_one_starts(prefix: int, extra: int, start: int) -> None:
    network = ip_network((int(ip_address("10.0.0.0")), prefix))
    offered = list(blocks_from([network], prefix + extra, start))
    assert len(offered) == len(set(offered)) == block_count([network], prefix + extra) == 1 << extra
    assert all(block.subnet_of(network) for block in offered)  # type: ignore[arg-type]


def test_cidrs_smaller_than_a_block_are_blocks_themselves() -> None:
    cidrs = [ip_network("10.0.0.0/26"), ip_network("10.1.0.0/24")]
    assert set(blocks_from(cidrs, 25, 7)) == {
        ip_network("10.0.0.0/26"), ip_network("10.1.0.0/25"), ip_network("10.1.0.128/25")}


@pytest.mark.parametrize(("cidr", "first", "last"), [
    ("10.0.0.0/24", "10.0.0.1", "10.0.0.254"),
    ("10.0.0.0/31", "10.0.0.0", "10.0.0.1"),
    ("10.0.0.7/32", "10.0.0.7", "10.0.0.7"),
    ("fd00::/112", "fd00::1", "fd00::ffff"),
    ("fd00::/127", "fd00::", "fd00::1"),
])
def test_network_broadcast_and_anycast_addresses_are_never_usable(cidr: str, first: str, last: str) -> None:
    assert usable_range(ip_network(cidr)) == (int(ip_address(first)), int(ip_address(last)))


def test_the_gateway_is_the_first_address_that_is_not_excluded() -> None:
    network = ip_network("10.0.0.0/29")
    assert gateway_of(network, ranges([ip_network("10.0.0.0/30")])) == int(ip_address("10.0.0.4"))
    with pytest.raises(ValueError, match="excluded"):
        gateway_of(network, ranges([network]))


def test_a_huge_block_costs_nothing_until_it_is_used() -> None:
    block = Block(ip_network("fd00::/64"), (), int(ip_address("fd00::1")))
    assert block.take(0.0) == int(ip_address("fd00::2"))
    assert block.capacity() == (1 << 64) - 2
