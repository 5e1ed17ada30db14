"""One table of drop reasons: all that is generated from it agrees."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fibril.types.v1 import reasons_pb2
from services.common.pipeline import counters, reasons

ROOT = Path(__file__).resolve().parents[2]


def test_c_proto_and_python_have_the_same_names_and_numbers() -> None:
    c_names = {name: int(number) for name, number in re.findall(
        r"^\tREASON_(\w+) = (\d+),", (ROOT / "bpf/abi/reasons.h").read_text(), re.MULTILINE)}
    assert c_names.pop("COUNT") == reasons.COUNT
    python = {reason.name: reason.value for reason in reasons.Reason}
    proto = {name.removeprefix("DROP_REASON_"): number for name, number in reasons_pb2.DropReason.items()}
    proto["NONE"] = proto.pop("UNSPECIFIED")
    assert c_names == python == proto
    assert reasons.TEXTS.keys() == set(python.values())


def test_every_reason_says_what_to_do() -> None:
    for reason in reasons.Reason:
        if reason:
            assert reason.text.endswith(".") and reason.fix.endswith("."), reason
    assert reasons.Reason.SPOOFED_MAC.label == counters.reason_name(2) == "spoofed_mac"
    assert counters.reason_name(127) == "127"


def test_generated_files_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts/gen_reasons.py", "--check"], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", ["1\tA\tb.", "x\tA\tb.\tc.", "1\tlower\tb.\tc.", "128\tA\tb.\tc.", "0\tA\tb.\tc.",
                                  "1\tA\tb.\tc.\n1\tB\tb.\tc.", "2\tA\tb.\tc.\n3\tA\tb.\tc."])
def test_a_wrong_table_is_refused(tmp_path: Path, line: str) -> None:
    spec = importlib.util.spec_from_file_location("gen_reasons", ROOT / "scripts/gen_reasons.py")
    assert spec is not None and spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    table = tmp_path / "reasons.tsv"
    table.write_text(line + "\n")
    with pytest.raises(ValueError):
        generator.read(table)
