"""What every benchmark shares: the result line, CPU pinning, interleaving of subject and baseline, medians.

A benchmark is `with Bench("pod") as bench:` around its work. Inside, standard output is turned over to
standard error (here and in every child started), so that nothing but result lines reaches the real one.

A result line is `{"bench","metric","unit","value","baseline":{"name","value"},"ratio"}` with
ratio = value / baseline.
Where there is no peer to compare with, the baseline is the figure the project promises, named "target".

`FIBRIL_BENCH_QUICK=1` asks for a run of at most 40 s: `quick(short, full)` picks.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import statistics
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

QUICK = os.environ.get("FIBRIL_BENCH_QUICK", "") not in ("", "0")


def quick(short: T, full: T) -> T:
    """`short` in quick mode, else `full`."""
    return short if QUICK else full


def log(message: str) -> None:
    """Print progress or a table row on standard error."""
    print(message, file=sys.stderr, flush=True)


class Bench:
    """The result printer of one benchmark; owns standard output while entered."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._out = -1

    def __enter__(self) -> Bench:
        sys.stdout.flush()
        self._out = os.dup(1)
        os.set_inheritable(self._out, False)
        os.dup2(2, 1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        sys.stdout.flush()
        os.dup2(self._out, 1)
        os.close(self._out)
        self._out = -1

    def emit(self, metric: str, unit: str, value: float, baseline: str, baseline_value: float) -> float:
        """Print one result line; returns the ratio. `baseline` names the peer, or is "target"."""
        ratio = value / baseline_value if baseline_value else math.nan
        line = {"bench": self.name, "metric": metric, "unit": unit, "value": _rounded(value),
                "baseline": {"name": baseline, "value": _rounded(baseline_value)},
                "ratio": None if math.isnan(ratio) else _rounded(ratio)}
        os.write(self._out, (json.dumps(line) + "\n").encode())
        return ratio


def _rounded(value: float) -> float:
    """Five significant digits: more would be noise."""
    return float(f"{value:.5g}")


def cpus() -> list[int]:
    """The CPUs this process may run on, in order."""
    return sorted(os.sched_getaffinity(0))


@contextmanager
def pinned(*wanted: int) -> Iterator[None]:
    """Run this thread and children started meanwhile on those of these CPUs that exist (none: as before)."""
    before = os.sched_getaffinity(0)
    usable = before & set(wanted)
    if usable:
        os.sched_setaffinity(0, usable)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def order(names: Sequence[str], round_number: int) -> list[str]:
    """The names, first one moving on by one a round, so that none always runs after the same other."""
    shift = round_number % len(names) if names else 0
    return [*names[shift:], *names[:shift]]


def interleave(subjects: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every subject once a round, in a rotating order; gives each one's values in the order measured."""
    values: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds):
        for name in order(list(subjects), number):
            values[name].append(subjects[name]())
    return values


async def interleave_async(subjects: Mapping[str, Callable[[], Awaitable[float] | float]],
                           rounds: int) -> dict[str, list[float]]:
    """`interleave` for subjects of which some are coroutine functions."""
    values: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds):
        for name in order(list(subjects), number):
            result: Any = subjects[name]()
            values[name].append(await result if inspect.isawaitable(result) else result)
    return values


def median(values: Sequence[float]) -> float:
    """Median."""
    return statistics.median(values)


def paired(subject: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """(value, baseline) of values measured in the same rounds; their ratio is the median of the rounds' ratios.

    Where a machine's speed jumps between rounds, medians of the two taken apart compare different machines.
    """
    ratio = statistics.median(one / other for one, other in zip(subject, baseline, strict=True))
    value = statistics.median(subject)
    return value, value / ratio


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest-rank percentile: the smallest value that at least `percent` % of the values do not exceed."""
    if not values:
        raise ValueError("no values")
    ranked = sorted(values)
    return ranked[max(0, math.ceil(percent / 100 * len(ranked)) - 1)]
