"""What a pool may look like; every refusal names field and fix."""

from __future__ import annotations

from typing import Any

import pytest

from services.common import errors
from services.ipam.pools.types import Pool, check_change, check_overlap, check_owner, check_ttl, checked_pool


def pool(name: str = "a", mode: int = 0, cidrs: tuple[str, ...] = ("10.0.0.0/16",), excluded: tuple[str, ...] = (),
         v4: int = 0, v6: int = 0) -> Pool:
    return checked_pool(name, mode, list(cidrs), list(excluded), v4, v6)


@pytest.mark.parametrize(("change", "field"), [
    ({"name": ""}, "pool.name"),
    ({"name": "A_b"}, "pool.name"),
    ({"name": "a" * 64}, "pool.name"),
    ({"name": "../etc"}, "pool.name"),
    ({"mode": 7}, "pool.mode"),
    ({"cidrs": ()}, "pool.cidrs"),
    ({"cidrs": ("10.0.0.1/16",)}, "pool.cidrs[0]"),
    ({"cidrs": ("10.0.0.0/16", "10.0.4.0/24")}, "pool.cidrs[1]"),
    ({"cidrs": ("224.0.0.0/8",)}, "pool.cidrs[0]"),
    ({"cidrs": ("fe80::/64",)}, "pool.cidrs[0]"),
    ({"cidrs": ("nonsense",)}, "pool.cidrs[0]"),
    ({"excluded": ("11.0.0.1",)}, "pool.excluded[0]"),
    ({"v4": 8}, "pool.block_prefix_v4"),
    ({"v4": 31}, "pool.block_prefix_v4"),
    ({"cidrs": ("fd00::/64",), "v6": 127}, "pool.block_prefix_v6"),
])
def test_a_malformed_pool_is_refused_by_field(change: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        pool(**change)
    assert caught.value.field == field
    assert caught.value.fix


def test_block_sizes_have_defaults_that_fit() -> None:
    assert pool(cidrs=("10.0.0.0/16", "fd00::/48")).block_prefix == {4: 24, 6: 112}
    assert pool(cidrs=("10.0.0.0/27",)).block_prefix[4] == 27
    assert pool(cidrs=("10.0.0.0/32",), mode=2).block_prefix[4] == 30


def test_two_pools_may_not_overlap_and_families_do_not_mix() -> None:
    with pytest.raises(errors.AlreadyExists, match=r"10\.0\.0\.0/16 of pool a"):
        check_overlap(pool("b", cidrs=("10.0.9.0/24",)), [pool("a")])
    check_overlap(pool("b", cidrs=("::a00:0/112",)), [pool("a")])
    check_overlap(pool("a", cidrs=("10.0.0.0/8",)), [pool("a")])


def test_mode_and_block_size_stay() -> None:
    with pytest.raises(errors.InvalidArgument, match="mode"):
        check_change(pool(), pool(mode=2))
    with pytest.raises(errors.InvalidArgument, match="/24"):
        check_change(pool(), pool(v4=25))


@pytest.mark.parametrize("owner", ["", " ", "x" * 256, "a\nb"])
def test_bad_owners_are_refused(owner: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        check_owner(owner)


@pytest.mark.parametrize("ttl", [-1.0, float("nan"), float("inf"), 4e7])
def test_bad_times_to_live_are_refused(ttl: float) -> None:
    with pytest.raises(errors.InvalidArgument):
        check_ttl(ttl)
