"""Changes of links, addresses, routes and neighbours as values, so that callers batch them: see netlink.Rtnl.apply.

A request is idempotent unless it says otherwise.
"""

from __future__ import annotations

import errno
import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Final

from services.common.kernel import rtnl
from services.common.kernel.netns import NetNs
from services.common.kernel.rtnl import Message

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

PROTO_FIBRIL: Final = 0xF1
"""The `proto` of every route made here, by which they are told from others (`ip route show proto 241`)."""
TABLE_MAIN: Final = 254
SCOPE_UNIVERSE, SCOPE_LINK = 0, 253
UNICAST, LOCAL, BLACKHOLE, UNREACHABLE = 1, 2, 6, 7
IFF_UP, IFF_NOARP = 1, 0x80
_PERMANENT, _NODAD = 0x80, 0x02
_GONE: Final = frozenset({errno.ESRCH, errno.ENOENT, errno.ENODEV, errno.EADDRNOTAVAIL})


def family_of(address: IPAddress | IPNetwork) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def link_up(ifindex: int, what: str = "") -> Message:
    return Message(
        rtnl.SETLINK,
        {"index": ifindex, "flags": IFF_UP, "change": IFF_UP},
        [],
        what=what or f"set interface {ifindex} up",
    )


def link_mtu(ifindex: int, mtu: int) -> Message:
    return Message(
        rtnl.SETLINK,
        {"index": ifindex},
        [("IFLA_MTU", mtu)],
        what=f"set the MTU of interface {ifindex} to {mtu}",
    )


def link_noarp(ifindex: int) -> Message:
    """Have no address on the other side of an interface resolved: what is routed there is sent at once."""
    return Message(
        rtnl.SETLINK,
        {"index": ifindex, "flags": IFF_NOARP, "change": IFF_NOARP},
        [],
        what=f"turn address resolution on interface {ifindex} off",
    )


def no_link_local(ifindex: int, what: str = "") -> Message:
    """Make no IPv6 link-local address: no duplicate address detection, router solicitation or MLD report."""
    inet6 = ("AF_INET6", {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", 1)]})
    return Message(
        rtnl.SETLINK,
        {"index": ifindex},
        [("IFLA_AF_SPEC", {"attrs": [inet6]})],
        what=what or f"turn link-local addresses of interface {ifindex} off",
    )


def address_add(ifindex: int, address: IPAddress, prefix: int | None = None, what: str = "") -> Message:
    """Add an address (default: a host prefix) without duplicate address detection; there already is fine."""
    return Message(
        rtnl.NEWADDR,
        {
            "family": family_of(address),
            "prefixlen": address.max_prefixlen if prefix is None else prefix,
            "flags": _PERMANENT | (_NODAD if address.version == 6 else 0),
            "index": ifindex,
        },
        [("IFA_LOCAL", str(address)), ("IFA_ADDRESS", str(address))],
        rtnl.CREATE | rtnl.REPLACE,
        what or f"add address {address} to interface {ifindex}",
        frozenset({errno.EEXIST}),
    )


def address_del(ifindex: int, address: IPAddress, prefix: int | None = None) -> Message:
    return Message(
        rtnl.DELADDR,
        {
            "family": family_of(address),
            "prefixlen": address.max_prefixlen if prefix is None else prefix,
            "index": ifindex,
        },
        [("IFA_LOCAL", str(address)), ("IFA_ADDRESS", str(address))],
        what=f"delete address {address} from interface {ifindex}",
        tolerate=_GONE,
    )


def _route(
    kind: int,
    destination: IPNetwork,
    ifindex: int,
    gateway: IPAddress | None,
    source: IPAddress | None,
    route_type: int,
    scope: int,
    table: int,
    mtu: int,
    metric: int,
    flags: int,
    what: str,
    tolerate: frozenset[int],
) -> Message:
    attrs: list[tuple[str, Any]] = [("RTA_DST", str(destination.network_address))]
    if ifindex:
        attrs.append(("RTA_OIF", ifindex))
    if gateway is not None and gateway.version == destination.version:
        attrs.append(("RTA_GATEWAY", str(gateway)))
    elif gateway is not None:
        attrs.append(("RTA_VIA", {"family": family_of(gateway), "addr": str(gateway)}))
    if source is not None:
        attrs.append(("RTA_PREFSRC", str(source)))
    if table > 255:
        attrs.append(("RTA_TABLE", table))
    if mtu:
        attrs.append(("RTA_METRICS", {"attrs": [("RTAX_MTU", mtu)]}))
    if metric:
        attrs.append(("RTA_PRIORITY", metric))
    return Message(
        kind,
        {
            "family": family_of(destination),
            "dst_len": destination.prefixlen,
            "table": table if table <= 255 else 0,
            "proto": PROTO_FIBRIL,
            "scope": scope,
            "type": route_type,
        },
        attrs,
        flags,
        what,
        tolerate,
    )


def route_put(
    destination: IPNetwork,
    ifindex: int = 0,
    gateway: IPAddress | None = None,
    source: IPAddress | None = None,
    route_type: int = UNICAST,
    table: int = TABLE_MAIN,
    mtu: int = 0,
    what: str = "",
    metric: int = 0,
) -> Message:
    """Add a route or replace the one with the same destination and metric. Without gateway its scope is link.

    The gateway of an IPv4 route may be an IPv6 address (RFC 8950), not the other way round.
    """
    scope = SCOPE_LINK if gateway is None and ifindex and destination.version == 4 else SCOPE_UNIVERSE
    return _route(
        rtnl.NEWROUTE,
        destination,
        ifindex,
        gateway,
        source,
        route_type,
        scope,
        table,
        mtu,
        metric,
        rtnl.CREATE | rtnl.REPLACE,
        what or f"set route to {destination}",
        frozenset(),
    )


def route_del(
    destination: IPNetwork, ifindex: int = 0, route_type: int = 0, table: int = TABLE_MAIN, metric: int = 0
) -> Message:
    """Delete our route to a destination (with a metric, if given); absent is success."""
    # Scope nowhere (255) matches any.
    return _route(
        rtnl.DELROUTE,
        destination,
        ifindex,
        None,
        None,
        route_type,
        255,
        table,
        0,
        metric,
        0,
        f"delete route to {destination}",
        _GONE,
    )


def neighbour_put(ifindex: int, address: IPAddress, mac: str, what: str = "") -> Message:
    """A permanent neighbour entry: the address is never asked for by ARP or ND."""
    return Message(
        rtnl.NEWNEIGH,
        {"family": family_of(address), "ifindex": ifindex, "state": _PERMANENT},
        [("NDA_DST", str(address)), ("NDA_LLADDR", mac)],
        rtnl.CREATE | rtnl.REPLACE,
        what or f"set neighbour {address} of interface {ifindex}",
    )


def neighbour_del(ifindex: int, address: IPAddress) -> Message:
    return Message(
        rtnl.DELNEIGH,
        {"family": family_of(address), "ifindex": ifindex},
        [("NDA_DST", str(address))],
        what=f"delete neighbour {address} of interface {ifindex}",
        tolerate=_GONE,
    )


def link_del(ifindex: int) -> Message:
    return Message(rtnl.DELLINK, {"index": ifindex}, [], what=f"delete interface {ifindex}", tolerate=_GONE)


def xdp_set(
    ifindex: int, prog_fd: int, what: str = "", flags: int = 0, expected_fd: int | None = None
) -> Message:
    """Set the XDP program of an interface, in place of any; prog_fd -1 removes it. `flags` are XDP_FLAGS_*;
    with XDP_FLAGS_REPLACE, only in place of `expected_fd`.
    """
    attrs: list[tuple[str, Any]] = [("IFLA_XDP_FD", prog_fd)]
    if flags:
        attrs.append(("IFLA_XDP_FLAGS", flags))
    if expected_fd is not None and expected_fd >= 0:
        attrs.append(("IFLA_XDP_EXPECTED_FD", expected_fd))
    return Message(
        rtnl.SETLINK,
        {"index": ifindex},
        [("IFLA_XDP", {"attrs": attrs})],
        what=what or f"set XDP program of interface {ifindex}",
    )


def veth_add(
    name: str, mac: str, peer: str, peer_mac: str, mtu: int, peer_netns: NetNs | None = None
) -> Message:
    """A veth pair, both ends down; the peer is born in `peer_netns`. EEXIST if either name is taken."""
    other: list[tuple[str, Any]] = [("IFLA_IFNAME", peer), ("IFLA_ADDRESS", peer_mac), ("IFLA_MTU", mtu)]
    if peer_netns is not None:
        other.append(("IFLA_NET_NS_FD", peer_netns.fd))
    data = {"attrs": [("VETH_INFO_PEER", {"attrs": other})]}
    return Message(
        rtnl.NEWLINK,
        {},
        [
            ("IFLA_IFNAME", name),
            ("IFLA_ADDRESS", mac),
            ("IFLA_MTU", mtu),
            ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", data)]}),
        ],
        rtnl.CREATE | rtnl.EXCL,
        f"create veth pair {name} and {peer}",
    )
