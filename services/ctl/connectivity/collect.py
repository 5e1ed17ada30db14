"""Which pods and nodes there are, as the services of the nodes that the test runs on know them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from services.ctl.connectivity.model import HERE, NODE, POD, Cluster, Source, Target
from services.ctl.connectivity.plan import versions
from services.ctl.context import Ctl


@dataclass(frozen=True)
class Origin:
    """A node the test runs on: how to call its services, and its own network namespace."""

    ctl: Ctl
    netns: str = HERE


@dataclass(frozen=True)
class View:
    """What the services of one node say, as records. `nodes` is empty where no identity service runs."""

    origin: Origin
    endpoints: Sequence[dict[str, Any]]
    nodes: Sequence[dict[str, Any]]
    entries: Sequence[dict[str, Any]]

    @property
    def local(self) -> dict[str, Any] | None:
        """The node itself; None when it does not know the cluster."""
        return next((n for n in self.nodes if n["local"]), None)

    @property
    def name(self) -> str:
        """The node's name in the cluster, or the instance's where there is none."""
        return str(self.local["name"]) if self.local is not None else self.origin.ctl.name


def view(origin: Origin) -> View:
    """Ask one node. Raises Unavailable when it does not run."""
    from services.ctl.commands import endpoint, ipcache, node

    endpoints = [e for e in endpoint.list_all(origin.ctl) if e["netns"]]
    if not origin.ctl.instance.socket("identity").exists():
        return View(origin, endpoints, [], [])
    return View(origin, endpoints, node.list_all(origin.ctl), ipcache.list_all(origin.ctl))


def cluster(views: Iterable[View]) -> Cluster:
    """Put together what the nodes of one cluster say."""
    found = Cluster()
    targets: dict[str, Target] = {}
    for each in views:
        for target in _targets(each):
            # A pod's own node knows more of it than others do.
            if target.address not in targets or target.mtu:
                targets[target.address] = target
        found.sources += _sources(each)
        found.mtu.update({(each.name, n["name"]): n["mtu"] for n in each.nodes if n["mtu"]})
    found.targets = sorted(targets.values(), key=lambda t: (t.kind != POD, t.name, t.version, t.address))
    return found


def pod_name(node: str, endpoint: dict[str, Any]) -> str:
    """How a pod is called in the test's answer."""
    return f"{node}/{endpoint['pod'] or endpoint['container_id'][:13]}"


def _sources(view: View) -> list[Source]:
    node = view.name
    found = [
        Source(
            name=pod_name(node, e),
            node=node,
            netns=e["netns"],
            addresses=frozenset(a for a in (e["ipv4"], e["ipv6"]) if a),
            families=versions((e["ipv4"], e["ipv6"])),
            is_pod=True,
            mtu=e["mtu"],
        )
        for e in view.endpoints
    ]
    own = frozenset(_own_addresses(view))
    return [*found, Source(node, node, view.origin.netns, own, versions(own), False)]


def _own_addresses(view: View) -> list[str]:
    """Addresses by which a node is asked: on the underlay, and towards its pods."""
    gateways = [e[field] for e in view.endpoints for field in ("ipv4_gateway", "ipv6_gateway")]
    return sorted({a for a in [*_addresses(view.local), *gateways] if a})


def _addresses(node: dict[str, Any] | None) -> list[str]:
    return [] if node is None else [a for a in (node["ipv4"], node["ipv6"], *node["gateways"]) if a]


def _targets(view: View) -> list[Target]:
    name = view.name
    # Addresses that every node has alike (gateways in cloud mode) are not a way to another node.
    found = [
        Target(name, name, NODE, address) for address in _own_addresses(view) if not _shared(address, view)
    ]
    for node in view.nodes:
        found += [Target(node["name"], node["name"], NODE, address) for address in _addresses(node)]
    for e in view.endpoints:
        found += [
            Target(pod_name(name, e), name, POD, address, e["mtu"])
            for address in (e["ipv4"], e["ipv6"])
            if address
        ]
    for entry in view.entries:
        address, _, length = entry["prefix"].partition("/")
        if entry["source"] == "ENTRY_SOURCE_POD" and int(length) in (32, 128):
            pod = entry["pod"] or address
            found.append(Target(f"{entry['node']}/{pod}", entry["node"], POD, address))
    return found


def _shared(address: str, view: View) -> bool:
    return bool(view.nodes) and address not in _addresses(view.local)
