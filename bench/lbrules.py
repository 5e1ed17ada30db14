"""The rule sets that kube-proxy would write for services, in its iptables and its nftables mode: as of Kubernetes 1.33, cluster
IPs only, without what concerns node ports and affinity.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

Service = tuple[str, int, list[tuple[str, int]]]
"""Address, port, backends."""


def iptables(services: Iterable[Service]) -> str:
    """Input of iptables-restore: one chain a service, one a backend, chosen by chance."""
    chains, rules = [":KUBE-SERVICES - [0:0]", ":KUBE-MARK-MASQ - [0:0]"], []
    rules.append("-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000")
    for number, (vip, port, backends) in enumerate(services):
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
    hooks = ["-A PREROUTING -j KUBE-SERVICES", "-A OUTPUT -j KUBE-SERVICES"]
    return "\n".join(["*nat", *chains, *hooks, *rules, "COMMIT", ""])


def nftables(services: Iterable[Service]) -> str:
    """Input of nft -f: one map of verdicts by address and port, one chain a service, one a backend."""
    return "\n".join(_nftables(list(services)))


def _nftables(services: list[Service]) -> Iterator[str]:
    yield "add table ip kube-proxy"
    yield "add chain ip kube-proxy mark-for-masquerade"
    yield "add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000"
    yield "add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }"
    yield "add chain ip kube-proxy services"
    for number, (_, _, backends) in enumerate(services):
        for at, (address, to) in enumerate(backends):
            chain = f"endpoint-{number}-{at}"
            yield f"add chain ip kube-proxy {chain}"
            yield f"add rule ip kube-proxy {chain} ip saddr {address} jump mark-for-masquerade"
            yield f"add rule ip kube-proxy {chain} meta l4proto tcp dnat to {address}:{to}"
        cases = ", ".join(f"{at} : goto endpoint-{number}-{at}" for at in range(len(backends)))
        yield f"add chain ip kube-proxy service-{number}"
        yield f"add rule ip kube-proxy service-{number} numgen random mod {len(backends)} vmap {{ {cases} }}"
    for start in range(0, len(services), 1000):
        part = services[start : start + 1000]
        elements = ", ".join(
            f"{vip} . tcp . {port} : goto service-{start + at}" for at, (vip, port, _) in enumerate(part)
        )
        yield f"add element ip kube-proxy service-ips {{ {elements} }}"
    yield "add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips"
    for name, hook in (("nat-output", "output"), ("nat-prerouting", "prerouting")):
        yield f"add chain ip kube-proxy {name} {{ type nat hook {hook} priority -100 ; }}"
        yield f"add rule ip kube-proxy {name} jump services"
    yield ""
