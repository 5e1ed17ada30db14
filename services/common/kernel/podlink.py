"""A pod's link: the veth pair, its addresses, routes and neighbour entries on both sides.

Topology (one host prefix and one family shown; the other is alike):

    node                                             pod's namespace
    route 10.244.0.5/32 dev fb..., src 10.244.0.1    10.244.0.5/32 on eth0
    neighbour 10.244.0.5 = pod_mac, permanent        route 10.244.0.1/32 scope link, default via 10.244.0.1
    fb... (host_mac) ------------------------------- eth0 (pod_mac); neighbour 10.244.0.1 = host_mac,
    permanent

Nothing on either side ever asks by ARP or ND. All functions block: run them on the netlink thread, e.g.
`await netlink.call(podlink.wire, spec, attach)`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Final

from services.common import errors
from services.common.kernel import netlink as nl
from services.common.kernel.netlink import IPAddress, IPNetwork, Rtnl
from services.common.kernel.netns import NetNs
from services.common.kernel.rtnl import Message

log = logging.getLogger(__name__)

_ADDRESS_S: Final = 5.0
_ANY: Final[dict[int, IPNetwork]] = {4: IPv4Network("0.0.0.0/0"), 6: IPv6Network("::/0")}


@dataclass(frozen=True)
class PodLink:
    """What to wire. A family is wired if its address and gateway are given."""

    host_ifname: str
    host_mac: str
    pod_mac: str
    mtu: int
    netns: str
    """Path of the pod's namespace."""
    pod_ifname: str = "eth0"
    v4: IPv4Address | None = None
    v6: IPv6Address | None = None
    gateway4: IPv4Address | None = None
    gateway6: IPv6Address | None = None

    def families(self) -> Iterator[tuple[IPAddress, IPAddress]]:
        """(pod's address, gateway) of each family in use."""
        if self.v4 is not None and self.gateway4 is not None:
            yield self.v4, self.gateway4
        if self.v6 is not None and self.gateway6 is not None:
            yield self.v6, self.gateway6


@dataclass(frozen=True)
class WiredLink:
    """ifindexes are of the host side in the node and of the pod's side in its namespace."""

    host_ifindex: int
    pod_ifindex: int
    netns_inode: int
    netns_cookie: int


def wire(node: Rtnl, link: PodLink, attach: Callable[[WiredLink], None] | None = None) -> WiredLink:
    """Create the pair and configure both sides; on any failure nothing is left.

    `attach` runs when both ends exist and are down: fill maps and attach programs there, so that no packet
    passes unseen. It must undo its own work if it raises, and its caller must if wire() raises after it.

    AlreadyExists if an interface name is taken on either side, NotFound if the namespace is gone,
    FailedPrecondition for what the kernel refuses (e.g. a gateway that is not an address of the node).
    """
    with NetNs.open(link.netns) as netns, Rtnl(netns) as pod:
        create(node, pod, link, netns)
        try:
            wired = WiredLink(
                node.ifindex(link.host_ifname), pod.ifindex(link.pod_ifname), netns.inode, pod.netns_cookie()
            )
            if attach is not None:
                attach(wired)
            host_side(node, link, wired.host_ifindex)
            pod_side(pod, netns, link, wired.pod_ifindex)
            _await_address(pod, link)
        except BaseException:
            # Deleting one end deletes the other, and with them addresses, routes, neighbours and programs.
            for failure in node.try_apply([nl.link_del(node.ifindex(link.host_ifname))]):
                log.error(
                    "undo of a failed pod link", extra={"interface": link.host_ifname, "error": str(failure)}
                )
            raise
    return wired


def create(node: Rtnl, pod: Rtnl, link: PodLink, netns: NetNs) -> None:
    """Only the pair, both ends down. AlreadyExists names the side on which the name is taken."""
    try:
        node.apply(
            [nl.veth_add(link.host_ifname, link.host_mac, link.pod_ifname, link.pod_mac, link.mtu, netns)]
        )
    except errors.AlreadyExists:
        if node.ifindex(link.host_ifname):
            raise errors.AlreadyExists(f"interface {link.host_ifname} exists already on the node") from None
        raise errors.AlreadyExists(
            f"interface {link.pod_ifname} exists already in {link.netns}", field="ifname"
        ) from None


def host_side(node: Rtnl, link: PodLink, ifindex: int) -> None:
    """Node: link up, a host route and a neighbour entry a family. Idempotent: also repairs."""
    node.apply(list(host_messages(link, ifindex)))


def host_messages(link: PodLink, ifindex: int) -> Iterator[Message]:
    """The requests of host_side, for a reconciler that batches."""
    name = link.host_ifname
    yield nl.no_link_local(ifindex, f"turn link-local addresses of {name} off")
    yield nl.link_up(ifindex, f"set {name} up")
    for address, gateway in link.families():
        yield nl.route_put(
            host_network(address),
            ifindex,
            source=gateway,
            what=f"set route to {address} through {name} with source {gateway}",
        )
        yield nl.neighbour_put(ifindex, address, link.pod_mac, f"set neighbour {address} of {name}")


def pod_side(pod: Rtnl, netns: NetNs, link: PodLink, ifindex: int) -> None:
    """Pod: loopback and eth0 up, addresses, gateway and default routes, the gateway's neighbour entry.

    Idempotent. IPv6 is enabled on the interface if the namespace has it off by default.
    """
    where = f"{link.pod_ifname} in {link.netns}"
    if link.v6 is not None:
        with netns.entered():
            _enable_ipv6(link.pod_ifname)
    batch = [nl.link_up(1, f"set lo in {link.netns} up"), nl.no_link_local(ifindex), nl.link_up(ifindex)]
    for address, gateway in link.families():
        batch += [
            nl.address_add(ifindex, address, what=f"add address {address} to {where}"),
            nl.route_put(host_network(gateway), ifindex, what=f"set route to gateway {gateway} on {where}"),
            nl.route_put(_ANY[address.version], ifindex, gateway, what=f"set default route on {where}"),
            nl.neighbour_put(ifindex, gateway, link.host_mac, f"set neighbour {gateway} of {where}"),
        ]
    pod.apply(batch)


def _await_address(pod: Rtnl, link: PodLink) -> None:
    """Wait until the pod takes packets to its IPv6 address in.

    The kernel makes that route on a work queue, after the request has been answered; until then the pod
    would drop what it receives. Microseconds, unless many interfaces come and go.
    """
    if link.v6 is None:
        return
    deadline = time.monotonic() + _ADDRESS_S
    while not pod.is_local(link.v6):
        if time.monotonic() > deadline:
            raise errors.Unavailable(
                f"address {link.v6} of {link.netns} did not come into use within {_ADDRESS_S:g} s",
                fix="try again",
            )
        time.sleep(0.0002)


def problems(node: Rtnl, link: PodLink) -> list[str]:
    """What differs from `link` (routes, addresses, neighbours, MTU, MAC), a sentence each."""
    found: list[str] = []
    host = node.link(link.host_ifname)
    if host is None:
        return [f"interface {link.host_ifname} is missing on the node"]
    _compare(
        node,
        found,
        host,
        link.host_ifname,
        link.host_mac,
        link,
        {host_network(a) for a, _ in link.families()},
        {a: link.pod_mac for a, _ in link.families()},
    )
    try:
        with NetNs.open(link.netns) as netns, Rtnl(netns) as pod:
            inner = pod.link(link.pod_ifname)
            if inner is None or inner.peer_ifindex != host.ifindex:
                return [*found, f"interface {link.pod_ifname} is missing in {link.netns}"]
            routes = {host_network(g) for _, g in link.families()} | {
                _ANY[a.version] for a, _ in link.families()
            }
            _compare(
                pod,
                found,
                inner,
                f"{link.pod_ifname} in {link.netns}",
                link.pod_mac,
                link,
                routes,
                {g: link.host_mac for _, g in link.families()},
            )
            present = {entry.address for entry in pod.addresses(inner.ifindex)}
            found += [
                f"address {a} is missing on {link.pod_ifname}" for a, _ in link.families() if a not in present
            ]
    except errors.NotFound as error:
        found.append(error.message)
    return found


def _compare(
    side: Rtnl,
    found: list[str],
    link: nl.Link,
    label: str,
    mac: str,
    spec: PodLink,
    routes: set[IPNetwork],
    neighbours: dict[IPAddress, str],
) -> None:
    if not link.up:
        found.append(f"{label} is down")
    if link.mac != mac:
        found.append(f"{label} has MAC {link.mac} instead of {mac}")
    if link.mtu != spec.mtu:
        found.append(f"{label} has MTU {link.mtu} instead of {spec.mtu}")
    missing = routes - {route.destination for route in side.routes(link.ifindex)}
    found.extend(
        f"route to {destination} through {label} is missing" for destination in sorted(missing, key=str)
    )
    known = {entry.address: entry.mac for entry in side.neighbours(link.ifindex) if entry.permanent}
    found.extend(
        f"neighbour {address} of {label} is {known.get(address, 'missing')} instead of {wanted}"
        for address, wanted in neighbours.items()
        if known.get(address) != wanted
    )


def host_network(address: IPAddress) -> IPNetwork:
    """The prefix that holds just this address."""
    return IPv4Network(address) if address.version == 4 else IPv6Network(address)


def _enable_ipv6(name: str) -> None:
    """Runs inside the pod's namespace: container runtimes often switch IPv6 off for every new interface."""
    switch = Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")
    try:
        if switch.read_text().strip() != "0":
            switch.write_text("0")
    except FileNotFoundError:
        raise errors.FailedPrecondition(
            "the kernel has no IPv6", fix="allocate from IPv4 pools only"
        ) from None
    except OSError as error:
        raise errors.FailedPrecondition(f"cannot switch IPv6 on for {name}: {error.strerror}") from None
