"""What the kernel's tables are to hold, from classes, pods and the host. Nothing here touches anything."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from services.common.pipeline.abi import IPAddress
from services.sockaccel.config import SockAccelSection
from services.sockaccel.model import Class, Scope
from services.sockaccel.tables import Wanted


@dataclass(frozen=True)
class Pod:
    """What matters of an endpoint."""

    id: int
    name: str
    netns_cookie: int
    labels: Mapping[str, str]
    identity: int
    addresses: frozenset[IPAddress]
    netns: str = ""
    """Path of its network namespace."""


@dataclass(frozen=True)
class Host:
    """What matters of the host."""

    netns_cookie: int
    addresses: frozenset[IPAddress]


_CLIENTS_IN_PODS = {Scope.POD, Scope.PODS, Scope.HOST_POD}
_IN_HOST = {Scope.HOST_POD, Scope.HOST}


def plan(
    on: bool,
    classes: Collection[tuple[int, Class]],
    pods: Collection[Pod],
    host: Host,
    section: SockAccelSection,
    group_id: Callable[[str], int],
    off: frozenset[int],
) -> tuple[Wanted, dict[str, str]]:
    """The tables, and what is amiss by name of class.

    group_id: of a control group, 0 if there is none. off: pairs that are switched off.
    """
    every = [(1 << bit, each) for bit, each in classes]
    spaces = _spaces(every, pods, host)
    ports: dict[int, tuple[int, bool]] = {port: (0, True) for port in section.proxy_ports}
    groups: dict[int, int] = {}
    amiss: dict[str, str] = {}
    for mask, each in every:
        for first, last in each.ports:
            for port in range(first, last + 1):
                known, proxy = ports.get(port, (0, False))
                ports[port] = known | mask, proxy
        for path in each.cgroups:
            number = group_id(path)
            if number:
                groups[number] = groups.get(number, 0) | mask
            else:
                amiss[each.name] = f"there is no control group {path}"
    return (
        Wanted(
            on=on,
            classes=_mask(mask for mask, each in every if each.enabled),
            any_port=_mask(mask for mask, each in every if not each.ports),
            any_group=_mask(mask for mask, each in every if not each.cgroups),
            proxies=_mask(mask for mask, each in every if each.proxies_only),
            nonblocking=_mask(mask for mask, each in every if each.nonblocking_only),
            same=_mask(mask for mask, each in every if Scope.POD in each.scopes),
            pods=_mask(mask for mask, each in every if Scope.PODS in each.scopes),
            host=_mask(mask for mask, each in every if Scope.HOST_POD in each.scopes),
            within=_mask(mask for mask, each in every if Scope.HOST in each.scopes),
            run_bytes=section.bulk_bytes,
            proofs=section.proofs,
            beat_s=section.beat_s,
            spaces=spaces,
            endpoints=frozenset(pod.id for pod in pods if pod.netns_cookie in spaces),
            ports=ports,
            uids=frozenset(section.proxy_uids),
            groups=groups,
            hosts=host.addresses,
            off=off,
        ),
        amiss,
    )


def _spaces(
    every: Collection[tuple[int, Class]], pods: Iterable[Pod], host: Host
) -> dict[int, tuple[int, int, int]]:
    """Masks a network namespace: none for one whose sockets no class can be about."""
    spaces = {}
    for pod in pods:
        client = _mask(m for m, each in every if each.scopes & _CLIENTS_IN_PODS and _has(pod, each.client_labels))
        server = _mask(m for m, each in every if each.scopes & _CLIENTS_IN_PODS and _has(pod, each.server_labels))
        if pod.netns_cookie and (client or server):
            spaces[pod.netns_cookie] = client, server, pod.id
    client = _mask(mask for mask, each in every if each.scopes & _IN_HOST and not each.client_labels)
    server = _mask(mask for mask, each in every if each.scopes & _IN_HOST and not each.server_labels)
    if client or server:
        spaces[host.netns_cookie] = client, server, 0
    return spaces


def _has(pod: Pod, labels: Mapping[str, str]) -> bool:
    return all(pod.labels.get(key) == value for key, value in labels.items())


def _mask(bits: Iterable[int]) -> int:
    found = 0
    for bit in bits:
        found |= bit
    return found
