"""The ctypes mirror of bpf/abi/trace.h: the compiler itself is asked to agree with it."""

from __future__ import annotations

import ctypes as ct
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.common.kernel import loader
from services.identity.workload import abi

STRUCTS: dict[str, Any] = {
    "trace_who": abi.Who, "trace_exec": abi.ExecRecord, "trace_connect": abi.ConnectRecord, "trace_wanted": abi.Wanted,
}  # fmt: skip
NUMBERS = {"TRACE_PATH_MAX": abi.PATH_MAX, "TRACE_ARGS_MAX": abi.ARGS_MAX, "TRACE_KINDS": len(abi.Kind),
           **{f"TRACE_{kind.name}": int(kind) for kind in abi.Kind}}  # fmt: skip

# In a child, as everything that imports bcc.
CHILD = """
import sys
from pathlib import Path
from bcc import BPF
from services.common.kernel.source import flatten
BPF(text=flatten(Path(sys.argv[1]), [Path(sys.argv[2])]).encode(), cflags=sys.argv[3:])
"""


def claims() -> Iterator[str]:
    """What the mirror says, as C conditions."""
    for name, mirror in STRUCTS.items():
        yield f"sizeof(struct {name}) == {ct.sizeof(mirror)}"
        for field, *_ in mirror._fields_:
            place = getattr(mirror, field)
            yield f"__builtin_offsetof(struct {name}, {field}) == {place.offset}"
            yield f"sizeof(((struct {name} *)0)->{field}) == {place.size}"
    for name, value in NUMBERS.items():
        yield f"{name} == {value}"


def compiles(source: Path, conditions: Iterator[str]) -> subprocess.CompletedProcess[str]:
    root = loader.bpf_root()
    asserts = "".join(f'_Static_assert({condition}, "mirror");\n' for condition in conditions)
    source.write_text(f'#include "abi/trace.h"\n{asserts}')
    include = (f"-I{root}", "-I/usr/include", f"-I/usr/include/{os.uname().machine}-linux-gnu")
    return subprocess.run(
        [sys.executable, "-c", CHILD, source, root, *include],
        env={**os.environ, "BCC_KERNEL_SOURCE": str(root / "headers"), "PYTHONPATH": str(loader.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_layouts_and_numbers_are_the_compilers(tmp_path: Path) -> None:
    done = compiles(tmp_path / "probe.c", claims())
    assert done.returncode == 0, done.stderr


def test_a_wrong_claim_would_be_noticed(tmp_path: Path) -> None:
    done = compiles(tmp_path / "probe.c", iter(["sizeof(struct trace_who) == 63"]))
    assert done.returncode != 0 and "trace_who) == 63" in done.stderr


def test_map_names_fit_the_kernel() -> None:
    for name, path in abi.MAPS.items():
        assert len(name) <= 15 and Path(path).name == name
