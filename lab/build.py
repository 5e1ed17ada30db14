"""Makes and removes what a lab consists of in the kernel: namespaces, the underlay's bridge, links,
addresses.

Everything is found by its name, so a lab half made or half removed is completed by doing it again.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lab import topology
from lab.topology import Lab, Node
from services.common.errors import AlreadyExists, FailedPrecondition, NotFound
from services.common.kernel import netns

NETNS_DIR = Path("/run/netns")


def path(lab: str, place: str) -> Path:
    """File of a place's namespace."""
    return NETNS_DIR / topology.netns(lab, place)


@contextmanager
def inside(lab: str, place: str) -> Iterator[None]:
    """Be in a place's network namespace (this thread); what is started there stays there. Raises NotFound.

    Unlike `ip netns exec` this leaves the mounts alone, so bpffs and cgroups stay in sight."""
    try:
        space = netns.NetNs.open(path(lab, place))
    except NotFound:
        raise NotFound(f"lab {lab!r} has no {place!r}", fix="see: fibril lab ls") from None
    with space, space.entered():
        yield


def build(lab: Lab) -> None:
    """Make all that is missing. Raises FailedPrecondition naming the command that failed."""
    _add(lab.name, topology.UNDERLAY)
    _ip(lab.name, topology.UNDERLAY, ["link set lo up"])
    if not _has_link(lab.name, topology.UNDERLAY, "br0"):
        _ip(lab.name, topology.UNDERLAY, ["link add br0 type bridge", "link set br0 up"])
    _add(lab.name, topology.WORLD)
    _plug(lab.name, topology.WORLD, topology.WORLD_UNDERLAY)
    _ip(lab.name, topology.WORLD, [f"address replace {a} dev lo" for a in topology.WORLD_ADDRESSES])
    for node in lab.nodes():
        _add(lab.name, node.name)
        _plug(lab.name, node.name, node.addresses)
        _ip(lab.name, node.name, [f"route replace default via {w} dev eth0" for w in topology.WORLD_UNDERLAY])


def remove(lab: str) -> None:
    """Remove every namespace of a lab; links go with them. Nothing there is fine."""
    for place in places(lab):
        netns.remove(path(lab, place))


def places(lab: str) -> list[str]:
    """Every namespace of a lab that exists; sorted."""
    return [place for found, place in _all() if found == lab]


def nodes(lab: str) -> list[Node]:
    """Nodes of a lab that exist, in order."""
    found = [topology.parse_node(lab, place) for place in places(lab)]
    return sorted((n for n in found if n is not None), key=lambda n: (n.cluster, n.number))


def labs() -> list[str]:
    """Every lab on this machine; sorted."""
    return sorted({lab for lab, _ in _all()})


def _all() -> list[tuple[str, str]]:
    if not NETNS_DIR.is_dir():
        return []
    return sorted(p for p in (topology.parse_netns(f.name) for f in NETNS_DIR.iterdir()) if p is not None)


def _add(lab: str, place: str) -> None:
    try:
        netns.add(path(lab, place))
    except AlreadyExists:
        return


def _plug(lab: str, place: str, addresses: tuple[str, str]) -> None:
    """Connect a place to the underlay: its eth0 is a port of the bridge, named after the place."""
    if not _has_link(lab, topology.UNDERLAY, place):
        _ip(lab, topology.UNDERLAY, [
            f"link add {place} type veth peer name eth0 netns {topology.netns(lab, place)}",
        ])  # fmt: skip
    _ip(lab, topology.UNDERLAY, [f"link set {place} master br0 up"])
    _ip(lab, place, [
        "link set lo up",
        *(f"address replace {address}/{prefix} dev eth0{' nodad' if ':' in address else ''}"
          for address, prefix in zip(addresses, topology.UNDERLAY_PREFIXES, strict=True)),
        "link set eth0 up",
    ])  # fmt: skip


def _has_link(lab: str, place: str, name: str) -> bool:
    with inside(lab, place):
        return name in _link_names()


def _link_names() -> list[str]:
    import socket

    return [name for _, name in socket.if_nameindex()]


def _ip(lab: str, place: str, commands: Sequence[str]) -> None:
    """iproute2 commands in a place, one process for all."""
    argv = ["ip", "-netns", topology.netns(lab, place), "-batch", "-"]
    done = subprocess.run(argv, input="\n".join(commands), text=True, capture_output=True, check=False)
    if done.returncode:
        raise FailedPrecondition(
            f"cannot build {place} of lab {lab!r}: {done.stderr.strip() or done.returncode}",
            fix=f"commands given to `{' '.join(argv)}`: {'; '.join(commands)}",
        )
