"""Pod to pod on one node: request/response, connections and streams, over IPv4 and IPv6.

Subject: two pods of a Fibril node. Peers: two pods on Debian's `bridge` plugin, and two namespaces joined
by one veth pair, the least Linux can do. bench/net.c is client and server; for rr and crr both run on one
CPU (where the answer to "which core wakes up" is not part of the figure), for streams on two. The three
take turns in every round.
"""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.cnibase import Namespaces, addresses, bridge_network, fibril_network, netns_path
from bench.common import Bench, cpus, interleave, log, median, paired, quick
from bench.node import node
from lab.cniruntime import CniRuntime

# Many short turns: the machine's speed drifts, and what drifts slower than a round cancels out.
ROUNDS = quick(15, 45)
MILLISECONDS = quick(60, 150)
WARMUP_MILLISECONDS = 20
UNITS = {"rr": ("transactions/s", 1.0), "crr": ("connections/s", 1.0), "stream": ("Gbit/s", 1e9)}
# Which figures are promised against which peer.
REPORTED = {"bridge": ("rr", "stream"), "veth": ("rr", "crr", "stream")}


@dataclass(frozen=True)
class Pair:
    """Two namespaces that reach each other; the addresses are the server's."""

    client: str
    server: str
    ipv4: str
    ipv6: str


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


def measure(program: Path, mode: str, pair: Pair, family: str) -> float:
    """One run; transactions, connections or bits a second. CalledProcessError if any connection failed."""
    usable = cpus()
    client, server = (usable[0], usable[-1]) if mode == "stream" else (usable[-1], usable[-1])
    address = pair.ipv4 if family == "v4" else pair.ipv6
    words = [
        mode,
        netns_path(pair.client),
        netns_path(pair.server),
        address,
        MILLISECONDS,
        client,
        server,
        WARMUP_MILLISECONDS,
    ]
    done = subprocess.run(
        [program, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True, timeout=60
    )
    return float(done.stdout)


def compare(bench: Bench, program: Path, pairs: dict[str, Pair]) -> None:
    """Measure every mode and family, the pairs taking turns, and print the promised ratios."""
    for mode, (unit, scale) in UNITS.items():
        for family in ("v4", "v6"):
            subjects = {
                name: lambda pair=pair: measure(program, mode, pair, family)  # type: ignore[misc] # noqa: B023
                for name, pair in pairs.items()
            }
            rates = interleave(subjects, ROUNDS)
            table = (f"{name} {median(values) / scale:.5g}" for name, values in rates.items())
            log(f"{mode} {family} ({unit}): {', '.join(table)}")
            for peer, modes in REPORTED.items():
                if mode in modes:
                    suffix = "" if family == "v4" else "_v6"
                    ours, theirs = paired(rates["fibril"], rates[peer])
                    bench.emit(f"pod_{mode}_vs_{peer}{suffix}", unit, ours / scale, peer, theirs / scale)


def main() -> None:
    """Print the pod-to-pod figures."""
    with (
        Bench("pod") as bench,
        tempfile.TemporaryDirectory() as scratch,
        node() as fresh,
        Namespaces() as spaces,
    ):
        program = Path(scratch) / "net"
        source = Path(__file__).with_name("net.c")
        subprocess.run(["gcc", "-O2", "-o", program, source], check=True)
        fresh.fibril("up")
        with fibril_network(fresh) as fibril, bridge_network(spaces, Path(scratch)) as bridge:
            pairs = {
                "fibril": cni_pair(spaces, fibril),
                "bridge": cni_pair(spaces, bridge),
                "veth": veth_pair(spaces),
            }
            compare(bench, program, pairs)
            fibril.delete(pairs["fibril"].client)
            fibril.delete(pairs["fibril"].server)


if __name__ == "__main__":
    main()
