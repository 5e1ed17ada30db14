"""The kernel's side of all endpoints at one time: a handful of dumps, whatever their number, and a pure
comparison.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from services.common.instance import Instance
from services.common.kernel.netlink import Link, Qdisc, Rtnl
from services.common.kernel.podlink import host_network
from services.common.pipeline import abi
from services.ipam.endpoints import epmaps
from services.ipam.endpoints.epmaps import MapView
from services.ipam.endpoints.model import ID_MAX, EndpointRecord


def endpoint_id(instance: Instance, ifname: str) -> int:
    """The number in the name of a host-side interface; 0 if it is not one of this instance's."""
    prefix = f"fb{instance.tag}"
    digits = ifname.removeprefix(prefix)
    if (
        not ifname.startswith(prefix)
        or not digits
        or any(digit not in "0123456789abcdef" for digit in digits)
    ):
        return 0
    number = int(digits, 16)
    return number if 0 < number <= ID_MAX and instance.host_ifname(number) == ifname else 0


def shaping(qdiscs: Iterable[Qdisc]) -> dict[int, int]:
    """ifindex -> EndpointFlag bits, of interfaces whose traffic somebody shapes."""
    flags: dict[int, int] = {}
    for qdisc in qdiscs:
        flag = shaping_flag(qdisc)
        if flag:
            flags[qdisc.ifindex] = flags.get(qdisc.ifindex, 0) | flag
    return flags


def shaping_flag(qdisc: Qdisc) -> int:
    """What a qdisc on a host-side interface means for the data path."""
    if qdisc.kind == "ingress":
        return int(abi.EndpointFlag.SHAPED_OUT)
    root = 0xFFFF_FFFF
    if qdisc.parent == root and qdisc.kind != "noqueue":
        return int(abi.EndpointFlag.SHAPED_IN)
    return 0


@dataclass(frozen=True)
class Observed:
    links: dict[int, Link]
    """Host-side links by endpoint number."""
    routes: dict[int, frozenset[str]]
    """ifindex -> destinations of our routes, as text."""
    neighbours: dict[int, dict[str, str]]
    """ifindex -> address -> MAC of permanent entries."""
    flags: dict[int, int]
    maps: MapView | None
    """None while there is no data path."""
    ids: frozenset[int] = field(default_factory=frozenset)
    """Every endpoint number that occurs."""


def observe(node: Rtnl, instance: Instance, maps: epmaps.EndpointMaps | None) -> Observed:
    """Dump links, routes, neighbours, qdiscs and maps. Blocking: netlink thread."""
    links = {endpoint_id(instance, link.name): link for link in node.links(f"fb{instance.tag}")}
    links.pop(0, None)
    indexes = {link.ifindex for link in links.values()}
    routes: dict[int, set[str]] = {}
    for route in node.routes():
        if route.ifindex in indexes:
            routes.setdefault(route.ifindex, set()).add(str(route.destination))
    neighbours: dict[int, dict[str, str]] = {}
    for entry in node.neighbours():
        if entry.permanent and entry.ifindex in indexes:
            neighbours.setdefault(entry.ifindex, {})[str(entry.address)] = entry.mac
    view = maps.view() if maps is not None else None
    return Observed(
        links,
        {index: frozenset(found) for index, found in routes.items()},
        neighbours,
        shaping(node.qdiscs()),
        view,
        frozenset([*links, *(view.ids() if view else ())]),
    )


def differences(record: EndpointRecord, seen: Observed) -> Iterator[str]:
    """How the node's side differs from what a READY record says, one sentence each."""
    link = seen.links.get(record.id)
    name = record.host_ifname
    if link is None:
        yield f"interface {name} is missing on the node"
        return
    if link.ifindex != record.host_ifindex:
        yield f"interface {name} has index {link.ifindex} instead of {record.host_ifindex}"
    if not link.up:
        yield f"{name} is down"
    if link.mtu != record.mtu:
        yield f"{name} has MTU {link.mtu} instead of {record.mtu}"
    if link.mac != record.host_mac:
        yield f"{name} has MAC {link.mac} instead of {record.host_mac}"
    routes, neighbours = seen.routes.get(link.ifindex, frozenset()), seen.neighbours.get(link.ifindex, {})
    for address in filter(None, (record.ipv4, record.ipv6)):
        if str(host_network(ipaddress.ip_address(address))) not in routes:
            yield f"route to {address} through {name} is missing"
        if neighbours.get(address) != record.mac:
            have = neighbours.get(address, "missing")
            yield f"neighbour {address} of {name} is {have} instead of {record.mac}"
    if seen.maps is not None:
        yield from map_differences(record, link.ifindex, seen.flags.get(link.ifindex, 0), seen.maps)


def map_differences(record: EndpointRecord, ifindex: int, flags: int, maps: MapView) -> Iterator[str]:
    """How the map entries differ from what they should be."""
    want = bytes(epmaps.value_of(record, ifindex, flags))
    if maps.iface.get(ifindex) != want:
        yield f"map ep_iface lacks interface {ifindex} or has another value"
    for address in filter(None, (record.ipv4, record.ipv6)):
        if maps.addr.get(bytes(abi.FibAddr.of(address))) != want:
            yield f"map ep_addr lacks {address} or has another value"
    if record.netns_cookie and record.netns_cookie not in maps.netns:
        yield f"map ep_netns lacks namespace {record.netns_cookie}"
    if record.cgroup_id and record.cgroup_id not in maps.cgroup:
        yield f"map ep_cgroup lacks cgroup {record.cgroup_id}"
