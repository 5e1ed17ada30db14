"""CNI: how long ADD and DEL take, as a runtime sees it (start of the plugin's process to its end).

Subject: `fibril-cni` on a running node. Peer: Debian's `bridge` with `host-local`, dual stack, `ipMasq`.
One pod at a time, subject and peer in turn; namespaces are made and deleted outside the measured time.
`cni_add_500_vs_10` is ADD on a node with 500 pods against ADD on a second node of this kernel with 10,
again in turn, since the machine's speed drifts by more than the difference sought.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

from bench.cnibase import Namespaces, bridge_network, fibril_network, netns_path
from bench.common import Bench, interleave, log, median, order, percentile, quick
from bench.node import node
from lab.cniruntime import CniRuntime

SAMPLES = quick(40, 200)
SCALE_SAMPLES = quick(15, 60)
MANY, FEW = 500, 10


def add_and_delete(namespaces: Namespaces, runtime: CniRuntime) -> tuple[float, float]:
    """One pod's life; milliseconds of ADD and of DEL."""
    name = namespaces.add()
    try:
        start = time.perf_counter()
        runtime.add(name, netns_path(name))
        added = time.perf_counter()
        runtime.delete(name, netns_path(name))
        return (added - start) * 1e3, (time.perf_counter() - added) * 1e3
    finally:
        namespaces.delete(name)


def against_peer(bench: Bench, namespaces: Namespaces, runtimes: dict[str, CniRuntime]) -> None:
    """ADD and DEL of both, in turn."""
    adds: dict[str, list[float]] = {name: [] for name in runtimes}
    deletes: dict[str, list[float]] = {name: [] for name in runtimes}
    for number in range(SAMPLES + 2):
        for name in order(list(runtimes), number):
            add, delete = add_and_delete(namespaces, runtimes[name])
            if number >= 2:  # the first ones make the bridge and fill caches
                adds[name].append(add)
                deletes[name].append(delete)
    for name in runtimes:
        log(
            f"{name}: ADD p50 {median(adds[name]):.1f} p99 {percentile(adds[name], 99):.1f}, "
            f"DEL p50 {median(deletes[name]):.1f} ms"
        )
    peer = "bridge+host-local"
    for percent in (50, 99):
        ours, theirs = percentile(adds["fibril"], percent), percentile(adds["bridge"], percent)
        bench.emit(f"cni_add_p{percent}", "ms", ours, peer, theirs)
    bench.emit("cni_del_p50", "ms", median(deletes["fibril"]), peer, median(deletes["bridge"]))


def fill(namespaces: Namespaces, runtime: CniRuntime, count: int) -> None:
    """Give a node so many pods; they go with the node."""
    for number in range(1, count + 1):
        name = namespaces.add()
        runtime.add(name, netns_path(name))
        if number % 100 == 0:
            log(f"{number} pods")


def with_many(bench: Bench, namespaces: Namespaces, many: CniRuntime, few: CniRuntime) -> None:
    """ADD beside many pods against beside few."""
    fill(namespaces, many, MANY)
    fill(namespaces, few, FEW)
    subjects = {"many": many, "few": few}
    times = interleave(
        {
            name: partial(lambda runtime: add_and_delete(namespaces, runtime)[0], runtime)
            for name, runtime in subjects.items()
        },
        SCALE_SAMPLES,
    )
    bench.emit("cni_add_500_vs_10", "ms", median(times["many"]), "10 pods", median(times["few"]))


def main() -> None:
    """Print the CNI figures."""
    with (
        Bench("cni") as bench,
        tempfile.TemporaryDirectory() as scratch,
        node() as first,
        node() as second,
        Namespaces() as spaces,
    ):
        first.fibril("up")
        second.fibril("up")
        with (
            fibril_network(first) as fibril,
            fibril_network(second) as other,
            bridge_network(spaces, Path(scratch)) as bridge,
        ):
            against_peer(bench, spaces, {"fibril": fibril, "bridge": bridge})
            with_many(bench, spaces, fibril, other)


if __name__ == "__main__":
    main()
