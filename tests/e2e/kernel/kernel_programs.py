"""The test programs of this directory, ready to load."""

from __future__ import annotations

from pathlib import Path

from services.common.kernel.loader import LoadResult, ProgramSpec, load

HERE = Path(__file__).parent


def counter_spec(**changes: object) -> ProgramSpec:
    """programs.c with its maps pinned."""
    values: dict[str, object] = {
        "source": HERE / "programs.c",
        "service": "test",
        "functions": {"count_packets": "sched_cls", "second": "sched_cls"},
        "maps": {"counts": "family/v1/counts", "slots": "family/v1/slots", "samples": "family/v1/samples"},
        "slots": {"slots": {1: "second"}},
    }
    return ProgramSpec(**{**values, **changes})  # type: ignore[arg-type]


async def load_counter(pin_dir: Path, **changes: object) -> LoadResult:
    return await load([counter_spec(**changes)], pin_dir)
