"""Pod to pod with policy enforced and connections recorded: request/response and connections, over IPv4 and IPv6.

Subject: two pods of a Fibril node whose ingress and egress are denied but for what a policy allows them. Peers: two
namespaces joined by one veth pair, with no filter at all; and two routed by a third whose nftables filter the same with the
kernel's connection tracking. All take turns in every round, client and server on one CPU.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from bench.cnibase import Namespaces, fibril_network, netns_path
from bench.common import Bench, quick
from bench.node import Node, node
from bench.pairs import FAMILIES, Pair, build
from bench.pod import cni_pair, emit, rates, veth_pair
from services.common.kernel import sysctl
from services.common.kernel.netns import NetNs

ROUNDS = quick(9, 45)
REPORTED = {"veth": ("rr", "crr"), "nft": ("rr",)}
POLICY = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: bench}
spec:
  endpointSelector: {}
  ingress: [{fromEndpoints: [{}]}]
  egress: [{toEndpoints: [{}]}]
"""
RULES = """
table inet filter {
    chain forward {
        type filter hook forward priority 0; policy drop;
        ct state established,related accept
        ip saddr 10.85.1.2 ip daddr 10.85.2.2 ct state new accept
        ip6 saddr fd00:85:1::2 ip6 daddr fd00:85:2::2 ct state new accept
    }
}
"""


def nft_pair(spaces: Namespaces) -> Pair:
    """Two namespaces routed by a third, which filters."""
    router, client, server = spaces.add(), spaces.add(), spaces.add()
    with NetNs.open(netns_path(router)) as space, space.entered():
        for key in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
            sysctl.ensure(key, 1)
    for number, pod in enumerate((client, server), 1):
        _ip(router, [
            f"link add pod{number} type veth peer name eth0 netns {pod}",
            f"address add 10.85.{number}.1/24 dev pod{number}",
            f"address add fd00:85:{number}::1/64 dev pod{number} nodad",
            f"link set pod{number} up",
        ])  # fmt: skip
        _ip(pod, [
            f"address add 10.85.{number}.2/24 dev eth0",
            f"address add fd00:85:{number}::2/64 dev eth0 nodad",
            "link set eth0 up",
            f"route add default via 10.85.{number}.1",
            f"route add default via fd00:85:{number}::1",
        ])  # fmt: skip
    subprocess.run(["ip", "netns", "exec", router, "nft", "-f", "-"], input=RULES, text=True, check=True)
    return Pair(client, server, "10.85.2.2", "fd00:85:2::2")


def _ip(space: str, commands: list[str]) -> None:
    subprocess.run(["ip", "-n", space, "-batch", "-"], input="\n".join(commands), text=True, check=True)


def enforce(fresh: Node, scratch: Path) -> None:
    """The policy is in force when this returns."""
    file = scratch / "policy.yaml"
    file.write_text(POLICY)
    fresh.fibril("policy", "apply", "-f", str(file), "--wait")


def main() -> None:
    """Print the figures."""
    with Bench("pod") as bench, tempfile.TemporaryDirectory() as scratch:
        program = build(Path(scratch))
        with node() as fresh, Namespaces() as spaces:
            fresh.fibril("up")
            with fibril_network(fresh) as fibril:
                enforce(fresh, Path(scratch))
                pairs = {"fibril": cni_pair(spaces, fibril), "veth": veth_pair(spaces), "nft": nft_pair(spaces)}
                for mode in ("rr", "crr"):
                    for family, suffix in FAMILIES.items():
                        found = rates(program, mode, family, pairs, ROUNDS)
                        for peer, modes in REPORTED.items():
                            if mode in modes:
                                metric = f"policy_{mode}_vs_{peer}{suffix}"
                                emit(bench, metric, mode, found["fibril"], peer, found[peer])
                fibril.delete(pairs["fibril"].client)
                fibril.delete(pairs["fibril"].server)


if __name__ == "__main__":
    main()
