"""Which devices lead out of the node."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from services.common.kernel import netlink as nl
from services.common.kernel.netlink import Link, Route


def uplinks(
    names: Sequence[str], own_prefix: str, links: Iterable[Link], routes: Iterable[Route]
) -> list[Link]:
    """The devices named; without names, those of the best default route of either family. Pure."""
    if names:
        return [link for link in links if link.name in names]
    found = {link.ifindex: link for link in links if not link.name.startswith(own_prefix)}
    defaults = [
        route
        for route in routes
        if route.destination.prefixlen == 0 and route.type == nl.UNICAST and route.ifindex in found
    ]
    best = {
        min(same, key=lambda route: route.metric).ifindex
        for version in (4, 6)
        if (same := [route for route in defaults if route.destination.version == version])
    }
    return [link for index, link in found.items() if index in best]
