"""The ctypes mirror of bpf/abi/policy.h against the layouts and numbers the compiler sees."""

from __future__ import annotations

from typing import Any

import pytest

from services.policy import abi
from tests.datapath.abikit import compile_layouts, require_same
from tests.datapath.test_abi import numbers

STRUCTS = {"pol_ep": abi.Ep, "pol_side": abi.Side, "pol_policy": abi.Policy, "pol_peer": abi.Peer,
           "pol_prefix": abi.Prefix, "ct_key": abi.CtKey, "ct_entry": abi.CtEntry, "pol_event": abi.Event,
           "pol_config": abi.Config}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compile_layouts(("abi/policy.h",), STRUCTS, tmp_path_factory.mktemp("abi"))


@pytest.mark.parametrize("name", STRUCTS)
def test_layout_is_the_compilers(compiled: dict[str, Any], name: str) -> None:
    require_same(STRUCTS[name], compiled[name])


@pytest.mark.parametrize(("pattern", "mirror"), [
    (r"^#define POL_CFG_(\w+) (0x\w+)", abi.ConfigFlag),
    (r"^\tPOL_STAT_(\w+) = (\d+),", abi.Stat),
    (r"^\tPOL_(POLICIES|CELLS) = (\d+),", abi.Table),
    (r"^#define POL_(ALLOW|DENY|DEFAULT|REJECT|KEEP) (\w+)", abi.Verdict),
])  # fmt: skip
def test_numbers_are_the_headers(pattern: str, mirror: Any) -> None:
    assert numbers("policy.h", pattern) == {name: member.value for name, member in mirror.__members__.items()}


def test_switches_of_endpoints_are_the_headers() -> None:
    mine = {flag.name: flag.value for flag in abi.EpFlag}
    assert numbers("policy_eps.h", r"^#define POL_EP_(\w+) (0x\w+)") == mine


def test_connections_flags_are_the_headers() -> None:
    flags = numbers("policy.h", r"^#define CT_(?!ECHO)(\w+) (0x\w+)")
    ingress = flags.pop("ALLOWED")
    mine = {flag.name: flag.value for flag in abi.CtFlag}
    assert (mine.pop("ALLOWED_INGRESS"), mine.pop("ALLOWED_EGRESS")) == (ingress, ingress << 1)
    assert mine == flags


def test_limits_and_rules_are_the_headers() -> None:
    assert numbers("policy.h", r"^#define (CT_NEW_MAX) (\d+)") == {"CT_NEW_MAX": abi.CT_NEW_MAX}
    assert numbers("policy.h", r"^#define CT_(PASSES_S) (\d+)") == {"PASSES_S": abi.PASSES_S}
    assert numbers("policy.h", r"^#define POL_(VERDICT) (0x\w+)") == {"VERDICT": abi.VERDICT}
    rules = numbers("policy.h", r"^#define POL_RULE_(NONE|HOST) (\d+)")
    assert rules == {"NONE": abi.RULE_NONE, "HOST": abi.RULE_HOST}
    assert numbers("policy.h", r"^\t(POL_STATS) = (\d+),") == {"POL_STATS": abi.STATS}


def test_map_names_fit_the_kernel() -> None:
    assert all(len(name) <= 15 for name in abi.MAPS)
