"""What other services of the node tell: endpoints, identities, nodes, backends of services. Each to the enforcer."""

from __future__ import annotations

import array
import ctypes as ct
import time
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, Final

from fibril.endpoint.v1 import endpoint_pb2, endpoint_pb2_grpc
from fibril.identity.v1 import identity_pb2, identity_pb2_grpc
from fibril.lb.v1 import lb_pb2, lb_pb2_grpc
from fibril.node.v1 import node_pb2, node_pb2_grpc
from services.common.instance import Instance
from services.common.pipeline.abi import EP_MAX
from services.common.rpc.follow import Follower
from services.common.service import ComponentStatus
from services.identity.numbers import Reserved
from services.policy import abi
from services.policy.contents import HOST, Endpoint
from services.policy.enforcer import Enforcer
from services.policy.kernel.tables import Tables
from services.policy.model import HOSTNAME, ServicePeer
from services.policy.resolve.world import NamedPort, NodeFacts

ABSENT_S: Final = 2.0
"""A service that is not there so long after the start of this one does not run on this node."""
BACK_S: Final = 30.0
"""The balancer has so long to come back, where it has run: an upgrade starts both at once, and it compiles first."""


class Sources:
    """Used from one event loop."""

    def __init__(self, instance: Instance, enforcer: Enforcer) -> None:
        self._enforcer = enforcer
        self._named: Callable[[int, str], dict[str, NamedPort]] = lambda *_: {}
        self.flags: dict[int, tuple[int, int]] = {}
        """Owner and switches of endpoints that have any."""
        self.pods: dict[str, int] = {}
        self._began = time.monotonic()
        run = instance.run_dir
        self._balancer = instance.pin_dir / "prog" / "lb"
        self.endpoints: Follower[int] = Follower(
            "endpoints",
            run / "ipam.sock",
            lambda to: endpoint_pb2_grpc.EndpointServiceStub(to).WatchEndpoints(endpoint_pb2.WatchEndpointsRequest()),
            "endpoint",
            lambda endpoint: int(endpoint.id),
            self._endpoint,
            self._endpoint_gone,
        )
        self.identities: Follower[int] = Follower(
            "identities",
            run / "identity.sock",
            lambda to: identity_pb2_grpc.IdentityServiceStub(to).WatchIdentities(
                identity_pb2.WatchIdentitiesRequest()
            ),
            "identity",
            lambda identity: int(identity.number),
            lambda identity: enforcer.add_identity(identity.number, identity.labels),
            self._identity_gone,
        )
        self.nodes: Follower[str] = Follower(
            "nodes",
            run / "identity.sock",
            lambda to: node_pb2_grpc.NodeServiceStub(to).WatchNodes(node_pb2.WatchNodesRequest()),
            "node",
            lambda node: str(node.name),
            lambda found: enforcer.set_node(found.name, _facts(found)),
            lambda name: enforcer.set_node(name, None),
        )
        self.services: Follower[str] = Follower(
            "services",
            run / "lb.sock",
            lambda to: lb_pb2_grpc.LbServiceStub(to).WatchServices(lb_pb2.WatchServicesRequest()),
            "service",
            lambda service: str(service.name),
            lambda service: enforcer.set_backends(
                service.name, frozenset(ip_address(backend.address) for backend in service.backends)
            ),
            lambda name: enforcer.set_backends(name, frozenset()),
        )
        self.all: tuple[Follower[Any], ...] = (self.endpoints, self.identities, self.nodes, self.services)
        for reserved in Reserved:
            enforcer.add_identity(reserved, {reserved.label: ""})

    def waiting(self, adopted: bool) -> str:
        """What is not in step yet; empty: everything is, or is not there at all. adopted: an earlier process has left
        policies, so whoever told it of identities and endpoints will come back.
        """
        running = time.monotonic() - self._began
        for source in self.all:
            needed = adopted and (
                source in (self.endpoints, self.identities)
                or (source is self.services and running <= BACK_S and self._balanced())
            )
            if not source.ever and (needed or not (running > ABSENT_S and source.absent)):
                return source.name
        return ""

    def _balanced(self) -> bool:
        """Whether policies ask for backends, and there is a balancer's data path: else they would mean nobody for a while."""
        asked = any(
            isinstance(peer, ServicePeer)
            for policy in self._enforcer.policies.values()
            for rule in policy.rules
            for peer in rule.peers or ()
        )
        return asked and self._balancer.exists()

    def status(self) -> list[ComponentStatus]:
        return [source.status() for source in self.all]

    def name_ports(self, named: Callable[[int, str], dict[str, NamedPort]]) -> None:
        """Who knows the named ports of this node's endpoints."""
        self._named = named

    # ---- switches -------------------------------------------------------------------------------------------
    def adopt(self, tables: Tables) -> None:
        """Those that an earlier process set."""
        words = array.array("I", tables.eps_memory[: EP_MAX * ct.sizeof(abi.Ep)])
        for number, flags in enumerate(words[2::4]):
            if flags:
                self.flags.setdefault(number, (words[number * 4 + 3], flags))
        # Nobody tells of the host, as ipam does of pods.
        host = self._enforcer.endpoints[HOST]
        host.flags = self._flags(HOST, host.owner)

    def set_flags(self, number: int, flags: abi.EpFlag) -> None:
        """Switches of an endpoint, until it goes."""
        self.flags[number] = self._enforcer.endpoints[number].owner, int(flags)
        self._enforcer.set_flags(number, flags)

    def _flags(self, number: int, owner: int) -> int:
        known = self.flags.get(number)
        return known[1] if known is not None and known[0] == owner else 0

    # ---- endpoints ------------------------------------------------------------------------------------------
    def _endpoint(self, found: endpoint_pb2.Endpoint) -> None:
        if found.state in (endpoint_pb2.ENDPOINT_STATE_DELETING, endpoint_pb2.ENDPOINT_STATE_UNSPECIFIED):
            return
        if not found.host_ifindex:
            # Its interface is still being made.
            return
        known = self._enforcer.endpoints.get(found.id)
        if known is not None and known.container != found.container_id:
            self._endpoint_gone(found.id)
        self.pods[found.pod or found.container_id] = found.id
        self._enforcer.set_endpoint(
            Endpoint(
                found.id,
                found.host_ifindex,
                dict(found.labels),
                found.identity or Reserved.INIT,
                found.pod or found.container_id,
                found.container_id,
                tuple(ip_address(text) for text in (found.ipv4, found.ipv6) if text),
                self._named(found.id, found.container_id),
                self._flags(found.id, found.host_ifindex),
            )
        )

    def _endpoint_gone(self, number: int) -> None:
        known = self._enforcer.endpoints.get(number)
        if known is not None and self.pods.get(known.pod) == number:
            del self.pods[known.pod]
        self.flags.pop(number, None)
        self._enforcer.remove_endpoint(number)

    def _identity_gone(self, number: int) -> None:
        if number not in Reserved.__members__.values():
            self._enforcer.remove_identity(number)


def _facts(node: node_pb2.Node) -> NodeFacts:
    addresses = (node.ipv4, node.ipv6, *node.gateways)
    return NodeFacts({HOSTNAME: node.name}, frozenset(ip_address(text) for text in addresses if text))


