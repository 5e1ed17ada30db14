"""One text out of a C file and the project headers it includes.

BCC rewrites map accesses (`map.lookup(&key)`) in the main file only: the same words in an included header
compile to a call the verifier refuses. So `#include "..."` lines are expanded here, each header once and with
`#line` marks, so that compiler messages keep naming the real file; `#include <...>` is left to the compiler.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"\s*(?://.*|/\*.*\*/\s*)?$')
_PRAGMA_ONCE = re.compile(r"^\s*#\s*pragma\s+once\s*$")


class SourceError(Exception):
    """A quoted include that is nowhere to be found."""


def flatten(path: Path, search: Sequence[Path] = ()) -> str:
    """The text of `path` with quoted includes expanded (next to the includer first, then in `search`).

    A header counts as included wherever it first appears, even in an `#if` that is off: include at the top.
    Raises SourceError naming includer and line, OSError for an unreadable file.
    """
    out: list[str] = []
    _expand(path.resolve(), [root.resolve() for root in search], set(), out)
    return "\n".join(out) + "\n"


def _expand(path: Path, search: Sequence[Path], seen: set[Path], out: list[str]) -> None:
    seen.add(path)
    label = next(
        (str(path.relative_to(root.parent)) for root in search if path.is_relative_to(root)), str(path)
    )
    out.append(f'#line 1 "{label}"')
    for number, line in enumerate(path.read_text().split("\n"), 1):
        match = _INCLUDE.match(line)
        if not match:
            out.append("" if _PRAGMA_ONCE.match(line) else line)
            continue
        places = [path.parent, *search]
        target = next((p.resolve() for p in (d / match[1] for d in places) if p.is_file()), None)
        if target is None:
            raise SourceError(f'{label}:{number}: "{match[1]}" not found in {", ".join(map(str, places))}')
        if target in seen:
            out.append("")
        else:
            _expand(target, search, seen, out)
            out.append(f'#line {number + 1} "{label}"')
