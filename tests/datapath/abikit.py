"""Layouts of C structures as the compiler sees them, and mirrors of them in ctypes."""

from __future__ import annotations

import ctypes as ct
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from services.common.kernel import loader

# Runs in a child, as everything that imports bcc does: one map a struct, whose leaf type BCC describes.
CHILD: Final = """
import json, sys
from pathlib import Path
from bcc import BPF
from services.common.kernel.source import flatten
root, names = Path(sys.argv[1]), sys.argv[2].split(",")
bpf = BPF(text=flatten(Path(sys.argv[3]), [root]).encode(), cflags=sys.argv[4:])
def leaf(name):
    kind = bpf[f"m_{name}".encode()].Leaf
    return {"size": __import__("ctypes").sizeof(kind), "fields": {
        f[0]: [getattr(kind, f[0]).offset, getattr(kind, f[0]).size] for f in kind._fields_}}
print(json.dumps({n: leaf(n) for n in names}))
"""


def compile_layouts(headers: Iterable[str], names: Iterable[str], scratch: Path, more: str = "") -> dict[str, Any]:
    """Of structures that these headers below bpf/ declare. more: C behind them."""
    root, source, names = loader.bpf_root(), scratch / "probe.c", list(names)
    includes = [f'#include "{header}"' for header in headers]
    source.write_text("\n".join([*includes, more, *(f"BPF_ARRAY(m_{name}, struct {name}, 1);" for name in names), ""]))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, root, ",".join(names), source,
         f"-I{root}", "-I/usr/include", f"-I/usr/include/{os.uname().machine}-linux-gnu"],
        env={**os.environ, "BCC_KERNEL_SOURCE": str(root / "headers"), "PYTHONPATH": str(loader.ROOT)},
        capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def require_same(mirror: Any, layout: dict[str, Any], words: Mapping[str, str] | None = None) -> None:
    """words: what C calls fields that Python cannot call so."""
    assert ct.sizeof(mirror) == layout["size"]
    mine = {
        (words or {}).get(field[0], field[0]): [getattr(mirror, field[0]).offset, getattr(mirror, field[0]).size]
        for field in mirror._fields_
    }
    # BCC adds padding fields of its own and puts arrays' elements first.
    theirs = {field: place for field, place in layout["fields"].items() if not field.startswith("__pad")}
    assert mine == theirs
