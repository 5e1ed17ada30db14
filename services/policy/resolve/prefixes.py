"""Which prefixes an address is in, for a table where the longest one answers for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_network
from typing import Final

from services.common.errors import ResourceExhausted
from services.policy.model import CidrPeer, IPNetwork

_MAPPED: Final = ip_network("::ffff:0:0/96")
_ALL_IPV4: Final = ip_network("0.0.0.0/0")


def prefix_masks(peers: Iterable[tuple[CidrPeer, int]], limit: int) -> Mapping[IPNetwork, int]:
    """What each prefix named by the peers, holes included, means for the addresses that have no longer one: the bits of
    all peers that they belong to. ResourceExhausted: these are more than the limit, all prefixes together.
    """
    work = 0
    own: dict[IPNetwork, list[tuple[CidrPeer, int]]] = {}
    holes: dict[IPNetwork, list[tuple[CidrPeer, int]]] = {}
    for peer, bits in peers:
        if peer.prefix in peer.excepted or _holds(_MAPPED, peer.prefix):
            # Of addresses of IPv4 as IPv6 has them there are no packets.
            continue
        own.setdefault(peer.prefix, []).append((peer, bits))
        for hole in peer.excepted:
            if _holds(_MAPPED, hole):
                continue
            own.setdefault(hole, [])
            holes.setdefault(hole, []).append((peer, bits))
    found: dict[IPNetwork, int] = {}
    # Around the present one, widest first, each with its peers.
    around: list[tuple[IPNetwork, list[tuple[CidrPeer, int]]]] = []
    for prefix in sorted(own, key=lambda each: (each.version, int(each.network_address), each.prefixlen)):
        while around and not _holds(around[-1][0], prefix):
            around.pop()
        inherited = around[-1][1] if around else []
        gone = holes.get(prefix)
        if gone:
            left = {id(peer) for peer, _ in gone}
            inherited = [each for each in inherited if id(each[0]) not in left]
        here = [*inherited, *own[prefix]] if own[prefix] else inherited
        around.append((prefix, here))
        work += len(here)
        if work > limit:
            raise ResourceExhausted(
                f"prefixes are within each other {limit} times and more",
                fix="name no prefix that a wider one of the same rule holds",
            )
        mask = 0
        for _, bits in here:
            mask |= bits
        found[prefix] = mask
    if any(prefix.version == 6 and _holds(prefix, _MAPPED) for prefix in found):
        # The kernel has IPv4 in there.
        found.setdefault(_ALL_IPV4, 0)
    return found


def _holds(outer: IPNetwork, inner: IPNetwork) -> bool:
    if outer.version != inner.version or outer.prefixlen > inner.prefixlen:
        return False
    shift = outer.max_prefixlen - outer.prefixlen
    return int(outer.network_address) >> shift == int(inner.network_address) >> shift
