"""The rule sets that kube-proxy would write for services, in its iptables and its nftables mode: as of Kubernetes 1.33, cluster
IPs only, without what concerns node ports and affinity.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

Service = tuple[str, int, list[tuple[str, int]]]
"""Address, port, backends."""

PART: Final = 1000
"""Services that are written together where not all are."""


def iptables(services: list[Service], whole: bool = True) -> Iterator[str]:
    """Inputs of iptables-restore --noflush, one or several: one chain a service, one a backend, chosen by chance. In one, as
    kube-proxy writes it, 50,000 services take much longer; what is there in the end is the same.
    """
    blocks = list(_iptables(services))
    if whole:
        blocks = [([c for chains, _ in blocks for c in chains], [r for _, rules in blocks for r in rules])]
    return ("\n".join(["*nat", *chains, *rules, "COMMIT", ""]) for chains, rules in blocks)


def _iptables(services: list[Service]) -> Iterator[tuple[list[str], list[str]]]:
    """Chains and rules that can be written together."""
    yield (
        [":KUBE-SERVICES - [0:0]", ":KUBE-MARK-MASQ - [0:0]"],
        ["-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000"],
    )
    for start in range(0, len(services), PART):
        chains, rules = [], []
        for number, (vip, port, backends) in enumerate(services[start : start + PART], start):
            service = f"KUBE-SVC-{number:016X}"
            chains.append(f":{service} - [0:0]")
            rules.append(f"-A KUBE-SERVICES -d {vip}/32 -p tcp -m tcp --dport {port} -j {service}")
            for at, (address, to) in enumerate(backends):
                endpoint = f"KUBE-SEP-{number:012X}{at:04X}"
                chains.append(f":{endpoint} - [0:0]")
                left = len(backends) - at
                chance = f"-m statistic --mode random --probability {1 / left:.10f} " if left > 1 else ""
                rules.append(f"-A {service} {chance}-j {endpoint}")
                rules.append(f"-A {endpoint} -s {address}/32 -j KUBE-MARK-MASQ")
                rules.append(f"-A {endpoint} -p tcp -m tcp -j DNAT --to-destination {address}:{to}")
        yield chains, rules
    # Last: from then on the kernel looks with each change whether chains lead in circles.
    yield [], ["-A PREROUTING -j KUBE-SERVICES", "-A OUTPUT -j KUBE-SERVICES"]


def nftables(services: list[Service], whole: bool = True) -> Iterator[str]:
    """Inputs of nft -f, one or several: one map of verdicts by address and port, one chain a service, one a backend."""
    blocks = list(_nftables(services))
    if whole:
        blocks = [[line for block in blocks for line in block]]
    return ("\n".join([*block, ""]) for block in blocks)


def _nftables(services: list[Service]) -> Iterator[list[str]]:
    """Lines that can be written together."""
    yield [
        "add table ip kube-proxy",
        "add chain ip kube-proxy mark-for-masquerade",
        "add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000",
        "add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }",
        "add chain ip kube-proxy services",
    ]
    for start in range(0, len(services), PART):
        part, lines = services[start : start + PART], []
        for number, (_, _, backends) in enumerate(part, start):
            for at, (address, to) in enumerate(backends):
                chain = f"endpoint-{number}-{at}"
                lines.append(f"add chain ip kube-proxy {chain}")
                lines.append(f"add rule ip kube-proxy {chain} ip saddr {address} jump mark-for-masquerade")
                lines.append(f"add rule ip kube-proxy {chain} meta l4proto tcp dnat to {address}:{to}")
            cases = ", ".join(f"{at} : goto endpoint-{number}-{at}" for at in range(len(backends)))
            lines.append(f"add chain ip kube-proxy service-{number}")
            lines.append(
                f"add rule ip kube-proxy service-{number} numgen random mod {len(backends)} vmap {{ {cases} }}"
            )
        elements = ", ".join(
            f"{vip} . tcp . {port} : goto service-{start + at}" for at, (vip, port, _) in enumerate(part)
        )
        yield [*lines, f"add element ip kube-proxy service-ips {{ {elements} }}"]
    lines = ["add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips"]
    for name, hook in (("nat-output", "output"), ("nat-prerouting", "prerouting")):
        lines.append(f"add chain ip kube-proxy {name} {{ type nat hook {hook} priority -100 ; }}")
        lines.append(f"add rule ip kube-proxy {name} jump services")
    yield lines
