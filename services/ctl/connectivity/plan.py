"""Who asks whom what. Pure."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from ipaddress import ip_address
from typing import TypeVar

from services.ctl.connectivity.model import NODE, POD, WORLD, Cluster, Probe, Source, Target

T = TypeVar("T")

# Of an address outside. How much fits on the way there is not known; and many pods share one address on that way,
# so that the far end, which refuses only so many datagrams of one address a second, would leave some unanswered.
WORLD_KINDS = ("icmp", "tcp")


def plan(
    cluster: Cluster,
    kinds: Collection[str],
    world: Iterable[str] = (),
    world_kinds: Collection[str] = WORLD_KINDS,
    sample: int = 0,
    seed: int | None = None,
) -> list[Probe]:
    """Every source asks every address of its families that is not its own. With `sample`, at most so many pods of
    each node are asked, and ask."""
    chosen = random.Random(seed)
    pods = [s for s in cluster.sources if s.is_pod]
    sources = [s for s in cluster.sources if not s.is_pod] + _sample(pods, sample, chosen)
    targets = _sample_pods([t for t in cluster.targets if t.kind == POD], sample, chosen)
    targets += [t for t in cluster.targets if t.kind != POD]
    targets += [Target(WORLD, "", WORLD, address) for address in world]
    return [
        Probe(source, target, kind, _size(cluster, source, target) if kind == "large" else 0)
        for source in sorted(sources, key=lambda s: s.name)
        for target in targets
        if target.version in source.families and not _own(source, target)
        for kind in kinds
        if target.kind != WORLD or kind in world_kinds
    ]


def _own(source: Source, target: Target) -> bool:
    return target.address in source.addresses or (
        not source.is_pod and target.kind == NODE and target.node == source.node
    )


def _sample(pods: Sequence[Source], most: int, chosen: random.Random) -> list[Source]:
    by_node: dict[str, list[Source]] = defaultdict(list)
    for pod in pods:
        by_node[pod.node].append(pod)
    return [pod for group in by_node.values() for pod in _pick(group, most, chosen)]


def _sample_pods(targets: Sequence[Target], most: int, chosen: random.Random) -> list[Target]:
    """As `_sample`; a pod's addresses are asked together or not at all."""
    by_node: dict[str, dict[str, list[Target]]] = defaultdict(lambda: defaultdict(list))
    for target in targets:
        by_node[target.node][target.name].append(target)
    return [
        target
        for pods in by_node.values()
        for name in _pick(sorted(pods), most, chosen)
        for target in pods[name]
    ]


def _pick(items: list[T], most: int, chosen: random.Random) -> list[T]:
    return items if not most or len(items) <= most else chosen.sample(items, most)


def _size(cluster: Cluster, source: Source, target: Target) -> int:
    """The largest packet that must get through; 0: whatever the route takes."""
    between = cluster.mtu.get((source.node, target.node), 0) if source.node != target.node else 0
    if not source.is_pod and target.kind == NODE:
        return 0  # between nodes there is no pod network
    known = [mtu for mtu in (source.mtu, target.mtu, between) if mtu]
    return min(known, default=0)


def versions(addresses: Iterable[str]) -> frozenset[int]:
    """Families of some addresses."""
    return frozenset(ip_address(address).version for address in addresses if address)
