#!/usr/bin/env python3
"""Turn bpf/abi/reasons.tsv into the C enum, the proto enum and the Python table of drop reasons.

`--check` writes nothing and fails when a generated file is out of date.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "bpf/abi/reasons.tsv"
NOTE = f"Generated from {SOURCE}; do not edit."
# Reason numbers are below this; it sizes the counters' map.
COUNT = 128


class Reason(NamedTuple):
    number: int
    name: str
    text: str
    fix: str


def read(path: Path) -> list[Reason]:
    """The table's rows. ValueError names the line that is wrong."""
    rows: list[Reason] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        fields = line.split("\t")
        if len(fields) != 4 or not all(fields):
            raise ValueError(f"{SOURCE}:{number}: need four columns separated by tabs")
        row = Reason(int(fields[0]), *fields[1:])
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", row.name) or not 0 < row.number < COUNT:
            raise ValueError(f"{SOURCE}:{number}: name must be in capitals, number 1 to {COUNT - 1}")
        if any(row.number <= other.number or row.name == other.name for other in rows):
            raise ValueError(f"{SOURCE}:{number}: numbers must grow and names be unique")
        rows.append(row)
    return rows


def c_header(rows: list[Reason]) -> str:
    entries = "".join(f"\tREASON_{r.name} = {r.number}, /* {r.text} */\n" for r in rows)
    return (f"/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */\n/* {NOTE} */\n#pragma once\n\n"
            f"enum drop_reason {{\n\tREASON_NONE = 0, /* Not dropped. */\n{entries}"
            f"\tREASON_COUNT = {COUNT}, /* room, not a reason */\n}};\n")


def proto(rows: list[Reason]) -> str:
    entries = "".join(f"  // {r.text}\n  // {r.fix}\n  DROP_REASON_{r.name} = {r.number};\n" for r in rows)
    return (f'syntax = "proto3";\n\n// {NOTE}\npackage fibril.types.v1;\n\n'
            "// Why the data path dropped a packet.\nenum DropReason {\n"
            f"  // Not dropped.\n  DROP_REASON_UNSPECIFIED = 0;\n{entries}}}\n")


PYTHON = '''"""Drop reasons. {note}"""

from __future__ import annotations

import enum
from typing import Final


class Reason(enum.IntEnum):
    """Why the data path dropped a packet. Numbers as in fibril.types.v1.DropReason."""

    NONE = 0
{names}
    @property
    def label(self) -> str:
        """What metrics and people call it: "spoofed_mac"."""
        return self.name.lower()

    @property
    def text(self) -> str:
        """One sentence: what was wrong."""
        return TEXTS[self][0]

    @property
    def fix(self) -> str:
        """One sentence: what to do about it."""
        return TEXTS[self][1]


COUNT: Final = {count}
"""Room in the counters' map; every reason's number is below."""

TEXTS: Final[dict[int, tuple[str, str]]] = {{
    0: ("Not dropped.", ""),
{texts}}}
'''


def python(rows: list[Reason]) -> str:
    texts = (f"    {r.number}: (\n        {json.dumps(r.text)},\n        {json.dumps(r.fix)},\n    ),\n"
             for r in rows)
    return PYTHON.format(note=NOTE, count=COUNT, names="".join(f"    {r.name} = {r.number}\n" for r in rows),
                         texts="".join(texts))


def outputs(rows: list[Reason]) -> dict[str, str]:
    return {"bpf/abi/reasons.h": c_header(rows), "proto/fibril/types/v1/reasons.proto": proto(rows),
            "services/common/pipeline/reasons.py": python(rows)}


def main() -> int:
    made = outputs(read(ROOT / SOURCE))
    if "--check" in sys.argv[1:]:
        stale = [name for name, text in made.items()
                 if not (ROOT / name).is_file() or (ROOT / name).read_text() != text]
        for name in stale:
            print(f"{name} is not what {SOURCE} gives: run 'make proto', commit the result", file=sys.stderr)
        return 1 if stale else 0
    for name, text in made.items():
        (ROOT / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
