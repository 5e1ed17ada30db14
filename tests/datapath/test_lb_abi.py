"""The ctypes mirror of bpf/abi/lb.h against the layouts and numbers the compiler sees."""

from __future__ import annotations

from typing import Any

import pytest

from services.lb import abi
from tests.datapath.abikit import compile_layouts, require_same
from tests.datapath.test_abi import numbers

STRUCTS = {"lb_stretch": abi.Stretch, "lb_service": abi.Service, "lb_backend": abi.Backend, "lb_front_key": abi.FrontKey,
           "lb_front": abi.Front, "lb_range_key": abi.RangeKey, "lb_source_key": abi.SourceKey, "lb_flow": abi.Flow,
           "lb_tuple": abi.Tuple, "lb_nat": abi.Nat, "lb_sock_key": abi.SockKey, "lb_sock": abi.Sock,
           "lb_client": abi.Client, "lb_sticky": abi.Sticky, "lb_frag_key": abi.FragKey, "lb_frag": abi.Frag,
           "lb_full_key": abi.FullKey, "lb_full": abi.Full, "lb_config": abi.Config}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compile_layouts(("abi/lb.h",), STRUCTS, tmp_path_factory.mktemp("abi"))


@pytest.mark.parametrize("name", STRUCTS)
def test_layout_is_the_compilers(compiled: dict[str, Any], name: str) -> None:
    require_same(STRUCTS[name], compiled[name])


@pytest.mark.parametrize(("prefix", "mirror"), [
    ("SVC", abi.ServiceFlag), ("BE", abi.BackendFlag), ("HINT", abi.Hint), ("FRONT", abi.FrontFlag),
    ("FLOW", abi.FlowFlag), ("NAT", abi.NatFlag), ("CFG", abi.ConfigFlag),
])  # fmt: skip
def test_flags_are_the_headers(prefix: str, mirror: Any) -> None:
    assert numbers("lb.h", rf"^#define LB_{prefix}_(\w+) (0x\w+)") == {flag.name: flag.value for flag in mirror}


def test_enumerations_are_the_headers() -> None:
    stats = numbers("lb.h", r"^\tLB_STAT_(\w+) = (\d+),")
    assert stats.pop("COUNT", abi.STAT_COUNT) == abi.STAT_COUNT
    assert stats == {stat.name: stat.value for stat in abi.Stat}
    assert numbers("lb.h", r"^\tLB_BE_(\w+) = (\d+),") == {state.name: state.value for state in abi.BackendState}
    tables = numbers("lb.h", r"^\tLB_(SERVICES|BACKENDS|SLOTS|FLOWS|FLOWS_BEFORE|HINT) = (\d+),")
    assert tables == {table.name: table.value for table in abi.Table}
    assert numbers("lb.h", r"^#define LB_(STAMP) (0x\w+)") == {"STAMP": abi.STAMP}


def test_map_names_fit_the_kernel() -> None:
    assert all(len(name) <= 15 for name in abi.MAPS)
