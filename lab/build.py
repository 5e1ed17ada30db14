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
from services.common.instance import Instance
from services.common.kernel import netns, sysctl

NETNS_DIR = Path("/run/netns")
ROUTER_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    # It sends packets out of the subnet they came from, which is how a provider's network looks.
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
}


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
    for subnet in range(1, lab.subnets + 1):
        if not _has_link(lab.name, topology.UNDERLAY, _bridge(subnet)):
            _ip(lab.name, topology.UNDERLAY, [f"link add {_bridge(subnet)} type bridge"])
        _ip(lab.name, topology.UNDERLAY, [f"link set {_bridge(subnet)} up"])
    _add(lab.name, topology.WORLD)
    if lab.has_router:
        _build_router(lab)
    else:
        _plug(lab, topology.WORLD, 1, lab.gateways(1))
    _ip(lab.name, topology.WORLD, [f"address replace {a} dev lo" for a in lab.world])
    for node in lab.nodes():
        _add(lab.name, node.name)
        _plug(lab, node.name, node.subnet, lab.underlay_of(node))
        _ip(lab.name, node.name, [
            f"route replace default via {address} dev eth0" for address, _ in lab.gateways(node.subnet)
        ])  # fmt: skip


def _bridge(subnet: int) -> str:
    return f"br{subnet - 1}"


def _build_router(lab: Lab) -> None:
    """A leg in every subnet (eth0, …), one towards the world, and the pods' addresses in cloud mode."""
    _add(lab.name, topology.ROUTER)
    with inside(lab.name, topology.ROUTER):
        for key, value in ROUTER_SYSCTLS.items():
            sysctl.ensure(key, value)
    for subnet in range(1, lab.subnets + 1):
        _plug(lab, topology.ROUTER, subnet, lab.gateways(subnet), ifname=f"eth{subnet - 1}")
    if not _has_link(lab.name, topology.ROUTER, "world"):
        _ip(lab.name, topology.ROUTER, [
            f"link add world type veth peer name eth0 netns {topology.netns(lab.name, topology.WORLD)}",
        ])  # fmt: skip
    for place, side, ifname in ((topology.ROUTER, 0, "world"), (topology.WORLD, 1, "eth0")):
        _ip(lab.name, place, [
            "link set lo up",
            f"link set {ifname} mtu {lab.mtu} up",
            *(f"address replace {a}/{n} dev {ifname}{_nodad(a)}" for a, n in lab.transit(side)),
        ])  # fmt: skip
    via = {_version(router): (router, world) for (router, _), (world, _) in zip(
        lab.transit(0), lab.transit(1), strict=True)}  # fmt: skip
    _ip(lab.name, topology.ROUTER, [f"route replace {a} via {via[_version(a)][1]}" for a in lab.world])
    _ip(lab.name, topology.WORLD, [
        f"route replace {prefix} via {via[_version(prefix)][0]}"
        for prefix in topology.ALL_UNDERLAYS if _version(prefix) in via
    ])  # fmt: skip
    if lab.mode == "cloud":
        _ip(lab.name, topology.ROUTER, [
            f"route replace {prefix} via {address}"
            for node in lab.nodes()
            for prefix in node.delegated
            for address, _ in lab.underlay_of(node)
            if _version(prefix) == _version(address)
        ])  # fmt: skip
        pools = sorted({prefix for node in lab.nodes() for prefix in node.pool if _version(prefix) in via})
        _ip(
            lab.name, topology.WORLD, [f"route replace {pool} via {via[_version(pool)][0]}" for pool in pools]
        )


def _version(text: str) -> int:
    return 6 if ":" in text else 4


def _nodad(address: str) -> str:
    return " nodad" if _version(address) == 6 else ""


def remove(lab: str) -> None:
    """Remove every namespace of a lab, links with them, and its description. Nothing there is fine."""
    for place in places(lab):
        netns.remove(path(lab, place))
    forget(lab)


def places(lab: str) -> list[str]:
    """Every namespace of a lab that exists; sorted."""
    return [place for found, place in _all() if found == lab]


def nodes(lab: str) -> list[Node]:
    """Nodes of a lab that exist, in order."""
    described = recall(lab)
    found = [described.node_at(place) for place in places(lab)]
    return sorted((n for n in found if n is not None), key=lambda n: (n.cluster, n.number))


def remember(lab: Lab) -> None:
    """Write down how a lab is shaped, for those who come back to it."""
    file = _description(lab.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".new")
    fresh.write_text(lab.dump())
    fresh.rename(file)


def known(name: str) -> Lab | None:
    """How a lab was shaped when it was last built; None when nobody wrote it down."""
    try:
        return Lab.load(_description(name).read_text())
    except FileNotFoundError:
        return None


def recall(name: str) -> Lab:
    """As `known`, the default shape when nobody wrote it down."""
    return known(name) or Lab(name)


def forget(name: str) -> None:
    """Remove what `remember` wrote, and the directory with the last of it."""
    file = _description(name)
    file.unlink(missing_ok=True)
    try:
        file.parent.rmdir()
    except OSError:
        return  # other instances and labs are there


def _description(name: str) -> Path:
    return Instance.from_env().run_root / f"lab-{topology.check_name(name)}.json"


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


def _plug(
    lab: Lab, place: str, subnet: int, addresses: Sequence[tuple[str, int]], ifname: str = "eth0"
) -> None:
    """Connect a place to a subnet: its `ifname` is a port of the bridge, named after the place."""
    port = place if ifname == "eth0" else f"{place}-{ifname}"
    if not _has_link(lab.name, topology.UNDERLAY, port):
        _ip(lab.name, topology.UNDERLAY, [
            f"link add {port} type veth peer name {ifname} netns {topology.netns(lab.name, place)}",
        ])  # fmt: skip
    _ip(lab.name, topology.UNDERLAY, [f"link set {port} mtu {lab.mtu} master {_bridge(subnet)} up"])
    _ip(lab.name, place, [
        "link set lo up",
        f"link set {ifname} mtu {lab.mtu}",
        *(f"address replace {address}/{length} dev {ifname}{_nodad(address)}" for address, length in addresses),
        f"link set {ifname} up",
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
