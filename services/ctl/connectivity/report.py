"""How a test's results are shown: failures first, then a matrix as fine as the line is long. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from services.ctl.connectivity.model import NODE, POD, WORLD, Probe
from services.ctl.render import Column, columns, table

FAILURES = columns("from", "to", "address", "kind", "result")
SHOWN = 40  # failures listed in a table; JSON has all


def record(probes: Sequence[Probe]) -> dict[str, Any]:
    """All of it, for JSON and YAML."""
    return {
        "asked": len(probes),
        "failed": sum(not p.ok for p in probes),
        "results": [p.record() for p in probes],
    }


def text(probes: Sequence[Probe], width: int) -> str:
    """Failures, smaller packets than there should be, the matrix, and a sentence."""
    failed = [p for p in probes if not p.ok]
    parts = []
    if failed:
        parts.append(table([p.record() for p in failed[:SHOWN]], FAILURES))
        if len(failed) > SHOWN:
            parts[-1] += f"\n… and {len(failed) - SHOWN} more; -o json has all"
    smaller = [p for p in probes if p.ok and 0 < p.passed < p.size]
    if smaller:
        parts.append("\n".join(sorted({_smaller(p) for p in smaller})[:SHOWN]))
    parts.append(matrix(probes, width))
    places = len({p.source.name for p in probes})
    addresses = len({p.target.address for p in probes})
    total = f"{len(probes)} questions from {places} places to {addresses} addresses"
    parts.append(f"{len(failed)} of {total} failed" if failed else f"all of {total} answered")
    return "\n\n".join(parts)


def _smaller(probe: Probe) -> str:
    return (
        f"only packets of {probe.passed} bytes instead of {probe.size} pass from {probe.source.name} "
        f"to {probe.target.name} ({probe.target.address})"
    )


# From fine to coarse: what a column is.
GROUPS: Sequence[Callable[[Probe], str]] = (
    lambda p: p.target.name,
    lambda p: f"pods of {p.target.node}" if p.target.kind == POD else p.target.name,
    lambda p: _far(p) if p.target.kind == POD else "world" if p.target.kind == WORLD else "nodes",
)


def _far(probe: Probe) -> str:
    return "pods here" if probe.target.node == probe.source.node else "pods elsewhere"


def matrix(probes: Sequence[Probe], width: int) -> str:
    """Rows are sources; columns are targets, or groups of them where single ones would not fit."""
    for group in GROUPS:
        shown = _matrix(probes, group)
        if max(map(len, shown.splitlines())) <= width:
            break
    return shown


def _matrix(probes: Sequence[Probe], group: Callable[[Probe], str]) -> str:
    cells: dict[str, dict[str, list[Probe]]] = defaultdict(lambda: defaultdict(list))
    heads: dict[str, int] = {}
    for probe in probes:
        cells[probe.source.name][group(probe)].append(probe)
        heads.setdefault(group(probe), (POD, NODE, WORLD).index(probe.target.kind))
    ordered = sorted(heads, key=lambda h: (heads[h], h))
    rows = [
        {"from": source, **{h: _cell(found.get(h, [])) for h in heads}} for source, found in cells.items()
    ]
    return table(rows, [Column("FROM", "from"), *(Column(h, _getter(h)) for h in ordered)])


def _getter(head: str) -> Callable[[Any], object]:
    return lambda row: row[head]


def _cell(probes: Sequence[Probe]) -> str:
    """ "ok", or what failed: each kind with its family, or how many when that would be long."""
    failed = [p for p in probes if not p.ok]
    if not failed:
        return "ok" if probes else ""
    kinds = sorted({f"{p.kind}{p.target.version}" for p in failed})
    if len(failed) == len(probes):
        return "FAIL"
    return ",".join(kinds) if len(kinds) <= 2 else f"{len(failed)}/{len(probes)} FAIL"
