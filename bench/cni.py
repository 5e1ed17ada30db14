"""CNI: how long ADD and DEL take, as a runtime sees it (start of the plugin's process to its end).

Subject: `fibril-cni` on a running node. Peer: Debian's `bridge` with `host-local`, dual stack, `ipMasq`.
One pod at a time, subject and peer in turn; namespaces are made and deleted outside the measured time.
`cni_add_500_vs_10` is Fibril's ADD with 500 pods on the node against itself with 10 (measured before and
after the 500).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from bench.cnibase import Namespaces, bridge_network, fibril_network, netns_path
from bench.common import Bench, log, median, order, percentile, quick
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


def with_many(bench: Bench, namespaces: Namespaces, runtime: CniRuntime) -> None:
    """ADD with many pods present against few."""
    present: list[str] = []

    def grow(count: int) -> None:
        while len(present) < count:
            present.append(namespaces.add())
            runtime.add(present[-1], netns_path(present[-1]))
            if len(present) % 100 == 0:
                log(f"{len(present)} pods")

    def shrink(count: int) -> None:
        while len(present) > count:
            name = present.pop()
            runtime.delete(name, netns_path(name))
            namespaces.delete(name)

    def sample() -> list[float]:
        return [add_and_delete(namespaces, runtime)[0] for _ in range(SCALE_SAMPLES)]

    grow(FEW)
    few = sample()
    grow(MANY)
    many = sample()
    shrink(FEW)
    few += sample()
    shrink(0)
    bench.emit("cni_add_500_vs_10", "ms", median(many), "10 pods", median(few))


def main() -> None:
    """Print the CNI figures."""
    with (
        Bench("cni") as bench,
        tempfile.TemporaryDirectory() as scratch,
        node() as fresh,
        Namespaces() as spaces,
    ):
        fresh.fibril("up")
        with fibril_network(fresh) as fibril, bridge_network(spaces, Path(scratch)) as bridge:
            against_peer(bench, spaces, {"fibril": fibril, "bridge": bridge})
            with_many(bench, spaces, fibril)


if __name__ == "__main__":
    main()
