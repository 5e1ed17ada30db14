"""The ctypes mirror of bpf/abi/sockaccel.h against the layouts and numbers the compiler sees."""

from __future__ import annotations

from typing import Any

import pytest

from services.sockaccel import abi
from tests.datapath.abikit import compile_layouts, require_same
from tests.datapath.test_abi import numbers

STRUCTS = {"sa_config": abi.Config, "sa_space": abi.Space, "sa_port": abi.Port, "sa_end": abi.End, "sa_pair": abi.Pair,
           "sa_program": abi.Program, "sa_event": abi.Event}  # fmt: skip
WORDS = {"class_": "class"}
NO_CODE = "int none(void *ctx) { return 0; }"
"""Types of a socket's storage are known to the kernel only with those of a function."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return compile_layouts(("abi/sockaccel.h",), STRUCTS, tmp_path_factory.mktemp("abi"), NO_CODE)


@pytest.mark.parametrize("name", STRUCTS)
def test_layout_is_the_compilers(compiled: dict[str, Any], name: str) -> None:
    require_same(STRUCTS[name], compiled[name], WORDS)


@pytest.mark.parametrize(("pattern", "mirror"), [
    (r"^#define SA_CFG_(\w+) (0x\w+)", abi.ConfigFlag),
    (r"^#define SA_SPACE_(\w+) (0x\w+)", abi.SpaceFlag),
    (r"^#define SA_PAIR_(\w+) (0x\w+)", abi.PairFlag),
    (r"^\tSA_STAT_(\w+) = (\d+),", abi.Stat),
    (r"^\tSA_EVENT_(\w+) = (\d+),", abi.EventKind),
    (r"^\tSA_(FREE|STUCK|DOUBT|OVERTAKEN) = (\d+),", abi.Stuck),
    (r"^\tSA_(TCP|SHORT) = (\d+),", abi.Mode),
    (r"^\tSA_(NOT_ENDED|CLOSED|BULK|READS|SENDS|OPTION|BEHIND) = (\d+),", abi.EndReason),
])  # fmt: skip
def test_numbers_are_the_headers(pattern: str, mirror: Any) -> None:
    assert numbers("sockaccel.h", pattern) == {name: member.value for name, member in mirror.__members__.items()}


def test_limits_are_the_headers() -> None:
    assert numbers("sockaccel.h", r"^#define SA_(CLASSES|PAIRS_MAX) (\d+)") == {
        "CLASSES": abi.CLASSES, "PAIRS_MAX": abi.PAIRS_MAX,
    }  # fmt: skip
    assert numbers("sockaccel.h", r"^\t(SA_STATS) = (\d+),") == {"SA_STATS": abi.STATS}


def test_map_names_fit_the_kernel() -> None:
    assert all(len(name) <= 15 for name in abi.MAPS)
