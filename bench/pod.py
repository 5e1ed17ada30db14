"""Pod to pod: request/response, connections and streams, over IPv4 and IPv6.

On one node. Subject: two pods of a Fibril node. Peers: two pods on Debian's `bridge` plugin, and two namespaces joined
by one veth pair, the least Linux can do. bench/net.c is client and server; for rr and crr both run on one
CPU (where the answer to "which core wakes up" is not part of the figure), for streams on two. The three
take turns in every round. On two nodes: see bench/remote.py.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from bench.cnibase import Namespaces, addresses, bridge_network, fibril_network, netns_path
from bench.common import Bench, interleave, log, median, paired, quick
from bench.node import node
from bench.pairs import FAMILIES, UNITS, Pair, build, measure
from bench.remote import fibril_pair, routed_pair, vxlan_pair
from lab.cniruntime import CniRuntime

# Many short turns: the machine's speed drifts, and what drifts slower than a round cancels out.
ROUNDS = quick(11, 45)
# Which figures are promised against which peer.
REPORTED = {"bridge": ("rr", "stream"), "veth": ("rr", "crr", "stream")}
# On two nodes: mode of the subject, its peer.
REMOTE = {"overlay": ("vxlan", vxlan_pair), "routed": ("routing", routed_pair)}
REMOTE_ROUNDS = quick(5, 45)


def cni_pair(namespaces: Namespaces, runtime: CniRuntime) -> Pair:
    """Two pods of a CNI network."""
    client, server = namespaces.add(), namespaces.add()
    runtime.add(client, netns_path(client))
    return Pair(client, server, *addresses(runtime.add(server, netns_path(server))))


def veth_pair(namespaces: Namespaces) -> Pair:
    """Two namespaces joined by one veth pair."""
    client, server = namespaces.add(), namespaces.add()
    subprocess.run(
        ["ip", "-n", client, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", server],
        check=True,
    )
    for name, last in ((client, 1), (server, 2)):
        subprocess.run(["ip", "-n", name, "addr", "add", f"10.89.0.{last}/24", "dev", "eth0"], check=True)
        subprocess.run(
            ["ip", "-n", name, "addr", "add", f"fd00:89::{last}/64", "dev", "eth0", "nodad"], check=True
        )
        subprocess.run(["ip", "-n", name, "link", "set", "eth0", "up"], check=True)
    return Pair(client, server, "10.89.0.2", "fd00:89::2")


def rates(
    program: Path, mode: str, family: str, pairs: Mapping[str, Pair], rounds: int
) -> dict[str, list[float]]:
    """Measure one mode, the pairs taking turns; what came is logged."""
    subjects = {name: partial(measure, program, mode, pair, family) for name, pair in pairs.items()}
    found = interleave(subjects, rounds)
    unit, scale = UNITS[mode]
    table = (f"{name} {median(values) / scale:.5g}" for name, values in found.items())
    log(f"{mode} {family} ({unit}): {', '.join(table)}")
    return found


def emit(
    bench: Bench, metric: str, mode: str, ours: Sequence[float], peer: str, theirs: Sequence[float]
) -> None:
    """Print one promised ratio."""
    unit, scale = UNITS[mode]
    value, baseline = paired(ours, theirs)
    bench.emit(metric, unit, value / scale, peer, baseline / scale)


def on_one_node(bench: Bench, program: Path, scratch: Path) -> None:
    """Pods of one node, against bridge plugin and veth pair."""
    with node() as fresh, Namespaces() as spaces:
        # Policy has figures of its own: bench.polpod.
        fresh.fibril("up", "--services", "ipam,identity,lb")
        with fibril_network(fresh) as fibril, bridge_network(spaces, scratch) as bridge:
            pairs = {
                "fibril": cni_pair(spaces, fibril),
                "bridge": cni_pair(spaces, bridge),
                "veth": veth_pair(spaces),
            }
            for mode in UNITS:
                for family, suffix in FAMILIES.items():
                    found = rates(program, mode, family, pairs, ROUNDS)
                    for peer, modes in REPORTED.items():
                        if mode in modes:
                            emit(
                                bench,
                                f"pod_{mode}_vs_{peer}{suffix}",
                                mode,
                                found["fibril"],
                                peer,
                                found[peer],
                            )
            fibril.delete(pairs["fibril"].client)
            fibril.delete(pairs["fibril"].server)


def on_two_nodes(bench: Bench, program: Path) -> None:
    """A pod on each of two nodes, in overlay and in routed mode."""
    for network, (peer, make) in REMOTE.items():
        with Namespaces() as spaces, fibril_pair(network) as ours:
            pairs = {"fibril": ours, peer: make(spaces)}
            for mode in ("rr", "stream"):
                for family, suffix in FAMILIES.items():
                    found = rates(program, mode, family, pairs, REMOTE_ROUNDS)
                    emit(
                        bench,
                        f"remote_{mode}_{network}{suffix}",
                        mode,
                        found["fibril"],
                        peer,
                        found[peer],
                    )


def main() -> None:
    """Print the pod-to-pod figures."""
    with Bench("pod") as bench, tempfile.TemporaryDirectory() as scratch:
        program = build(Path(scratch))
        on_one_node(bench, program, Path(scratch))
        on_two_nodes(bench, program)


if __name__ == "__main__":
    main()
