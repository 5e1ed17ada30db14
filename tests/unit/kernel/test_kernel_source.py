"""Expanding project includes into one text for BCC."""

from pathlib import Path

import pytest

from services.common.kernel.source import SourceError, flatten


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def code(text: str) -> list[str]:
    return [line for line in text.split("\n") if line and not line.startswith("#line")]


def test_a_header_included_twice_appears_once(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "lib/a.h": "#pragma once\nstruct a;\n",
            "lib/b.h": '#pragma once\n#include "a.h"\nstruct b;\n',
            "m.c": '#include "lib/a.h"\n#include "lib/b.h"  /* both */\nint f;\n',
        },
    )
    assert code(flatten(tmp_path / "m.c")) == ["struct a;", "struct b;", "int f;"]


def test_headers_that_include_each_other_end(tmp_path: Path) -> None:
    write(tmp_path, {"a.h": '#include "b.h"\nA\n', "b.h": '#include "a.h"\nB\n', "m.c": '#include "a.h"\n'})
    assert code(flatten(tmp_path / "m.c")) == ["B", "A"]


def test_the_search_path_comes_after_the_includers_directory(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "root/x.h": "far\n",
            "root/y.h": "found\n",
            "src/x.h": "near\n",
            "src/m.c": '#include "x.h"\n#include "y.h"\n',
        },
    )
    assert code(flatten(tmp_path / "src/m.c", [tmp_path / "root"])) == ["near", "found"]


def test_angle_includes_are_left_to_the_compiler(tmp_path: Path) -> None:
    write(tmp_path, {"m.c": "#include <linux/ip.h>\n"})
    assert code(flatten(tmp_path / "m.c")) == ["#include <linux/ip.h>"]


def test_line_marks_name_the_real_file_and_line(tmp_path: Path) -> None:
    write(tmp_path, {"bpf/lib/a.h": "one\ntwo\n", "bpf/m.c": 'first\n#include "lib/a.h"\nthird\n'})
    lines = flatten(tmp_path / "bpf/m.c", [tmp_path / "bpf"]).split("\n")
    assert lines[0] == '#line 1 "bpf/m.c"'
    assert lines[lines.index("one") - 1] == '#line 1 "bpf/lib/a.h"'
    assert lines[lines.index("third") - 1] == '#line 3 "bpf/m.c"'


def test_a_missing_header_is_named_with_its_includer_and_line(tmp_path: Path) -> None:
    write(tmp_path, {"m.c": '\n#include "gone.h"\n'})
    with pytest.raises(SourceError, match=r'm\.c:2: "gone\.h" not found in .*'):
        flatten(tmp_path / "m.c")
