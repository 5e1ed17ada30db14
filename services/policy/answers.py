"""Trace and Why: questions about one connection, answered from the rules and from the kernel."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv6Address, ip_address

from fibril.policy.v1 import policy_pb2 as pb
from fibril.types.v1 import reasons_pb2
from services.common import errors
from services.common.instance import Instance
from services.common.pipeline.abi import IPAddress
from services.identity.numbers import Reserved
from services.policy import abi, convert
from services.policy.contents import HOST
from services.policy.enforcer import Enforcer
from services.policy.explain import Explainer, Found, Match, Who
from services.policy.kernel import replay
from services.policy.kernel.connections import Connection, Connections
from services.policy.kernel.tables import Tables
from services.policy.model import ICMP, ICMPV6, PORT_MAX, TCP, Direction, Entity
from services.policy.resolve.selectors import entity_matches

_REASONS = {
    abi.Verdict.DENY: reasons_pb2.DROP_REASON_POLICY_DENIED,
    abi.Verdict.DEFAULT: reasons_pb2.DROP_REASON_POLICY_DEFAULT,
}


PROTOCOL_MAX = 255
TYPE_MAX = 255


class Answers:
    """Used from one event loop."""

    def __init__(
        self,
        instance: Instance,
        enforcer: Enforcer,
        explainer: Explainer,
        connections: Connections,
        tables: Callable[[], Tables | None],
    ) -> None:
        self._instance, self._enforcer, self._explainer = instance, enforcer, explainer
        self._connections, self._tables = connections, tables

    # ---- trace ----------------------------------------------------------------------------------------------
    def trace(self, request: pb.TraceRequest) -> pb.TraceResponse:
        """By the rules alone. InvalidArgument, NotFound."""
        # "from" is a word of Python's.
        client, server = self._party(getattr(request, "from"), "from"), self._party(request.to, "to")
        protocol, port = int(request.protocol) or TCP, request.port
        _require_port(protocol, port, "port")
        if client.endpoint is not None and client.endpoint == server.endpoint and client.endpoint != HOST:
            own = pb.Decision(allowed=True, reason="allowed: an endpoint may reach itself")
            return pb.TraceResponse(allowed=True, egress=own, ingress=own)
        egress = self._explainer.decide(Direction.EGRESS, client, server, protocol, port)
        ingress = self._explainer.decide(Direction.INGRESS, server, client, protocol, port)
        return pb.TraceResponse(
            allowed=egress.allowed and ingress.allowed,
            egress=self.decision(egress),
            ingress=self.decision(ingress),
            matches=[self._match(found, each) for found in (egress, ingress) for each in found.matching],
        )

    def _party(self, party: pb.Party, at: str) -> Who:
        explainer = self._explainer
        match party.WhichOneof("is"):
            case "endpoint":
                return explainer.endpoint(party.endpoint, f"{at}.endpoint")
            case "identity":
                return explainer.identity(party.identity)
            case "labels":
                return explainer.by_labels(dict(party.labels.labels))
            case "address":
                address = _address(party.address, f"{at}.address")
                return explainer.by_address(address, replay.identity_of(self._instance, address))
            case "pod":
                return explainer.pod(party.pod, f"{at}.pod")
            case "entity":
                return self._entity(party.entity, f"{at}.entity")
            case _:
                raise errors.InvalidArgument("nobody is named", field=at, fix="give an endpoint, labels, an address, …")

    def _entity(self, number: int, at: str) -> Who:
        if number not in Entity.__members__.values():
            raise errors.InvalidArgument(f"{number} is no entity", field=at)
        entity = Entity(number)
        if entity not in (Entity.ALL, Entity.CLUSTER, Entity.NONE):
            for reserved in Reserved:
                if entity_matches(entity, reserved):
                    return self._explainer.identity(int(reserved))
        raise errors.InvalidArgument(
            f"{entity.name.lower()} is many", field=at, fix="name one: world, host, remote-node, init, health, …"
        )

    def decision(self, found: Found) -> pb.Decision:
        """As a message."""
        shown = pb.Decision(
            allowed=found.allowed,
            direction=pb.TrafficDirection.ValueType(found.direction + 1),
            reason=found.reason,
            enforced=found.enforced,
        )
        if found.decided is not None:
            self._name(shown, found.decided)
        return shown

    def _match(self, found: Found, match: Match) -> pb.Decision:
        shown = pb.Decision(
            allowed=match.rule.action.name == "ALLOW",
            direction=pb.TrafficDirection.ValueType(found.direction + 1),
            reason=f"{match.rule.action.name.lower()} in tier {match.rule.tier.name.lower()}",
            enforced=True,
        )
        self._name(shown, match)
        return shown

    def _name(self, shown: pb.Decision, match: Match) -> None:
        shown.policy.CopyFrom(convert.key_message(match.key))
        shown.rule_index, shown.rule_name = match.index, match.rule.title(match.index)
        shown.rule_id = self._enforcer.rule_number(match.key, match.index, match.rule)

    # ---- why ------------------------------------------------------------------------------------------------
    def why(self, request: pb.WhyRequest) -> pb.WhyResponse:
        """By the kernel's tables. InvalidArgument; FailedPrecondition without tables; NotFound: neither end is here."""
        source, destination = _address(request.source, "source"), _address(request.destination, "destination")
        if source.version != destination.version:
            raise errors.InvalidArgument("source and destination are of two families", field="destination")
        protocol = request.protocol or TCP
        if request.source_port > PORT_MAX:
            raise errors.InvalidArgument(f"{request.source_port} is outside 0..{PORT_MAX}", field="source_port")
        _require_port(protocol, request.destination_port, "destination_port")
        tables = self._tables()
        if tables is None:
            raise errors.FailedPrecondition("this node has no tables of policies", fix="see: fibril status")
        identities = [replay.identity_of(self._instance, address) for address in (source, destination)]
        ends = [self._number(*each) for each in zip((source, destination), identities, strict=True)]
        if ends == [None, None]:
            raise errors.NotFound(
                "neither source nor destination is this node's or a pod's of it",
                field="source",
                fix="ask the node of one of them",
            )
        answer = pb.WhyResponse(allowed=True)
        if ends[0] == ends[1]:
            return answer
        for at, direction in enumerate((Direction.EGRESS, Direction.INGRESS)):
            end = ends[at]
            if end is None:
                continue
            peer, address = identities[1 - at], (destination, source)[at]
            found = replay.ask(tables, end, direction, peer, address, protocol, request.destination_port)
            shown = answer.egress if direction is Direction.EGRESS else answer.ingress
            self._kernel(shown, found, direction, end, peer)
            audited = (found.policy and found.flags & abi.EpFlag.AUDIT) or tables.config.flags & abi.ConfigFlag.AUDIT
            if not shown.decision.allowed and audited and not found.flags & abi.EpFlag.LOCKDOWN:
                shown.decision.reason += "; it is only audited, the packet passes"
                shown.drop_reason = reasons_pb2.DROP_REASON_UNSPECIFIED
                continue
            answer.allowed &= shown.decision.allowed
        connection = self._connections.find(
            source, destination, protocol, request.source_port, request.destination_port
        )
        if connection is not None:
            answer.connection.CopyFrom(connection_message(connection))
        return answer

    def _number(self, address: IPAddress, identity: int) -> int | None:
        """The endpoint of this node, a pod or the host, that has an address."""
        for number, endpoint in self._enforcer.endpoints.items():
            if number != HOST and address in endpoint.addresses:
                return number
        return HOST if identity == Reserved.HOST else None

    def _kernel(
        self, shown: pb.KernelDecision, found: replay.Answer, direction: Direction, endpoint: int, peer: int
    ) -> None:
        decision = shown.decision
        decision.direction = pb.TrafficDirection.ValueType(direction + 1)
        shown.endpoint, shown.peer_identity, shown.generation = endpoint, peer, found.revision
        decision.enforced = found.enforced
        if found.flags & abi.EpFlag.LOCKDOWN:
            decision.reason = "denied: the endpoint is in lockdown"
            shown.drop_reason = reasons_pb2.DROP_REASON_POLICY_LOCKDOWN
            return
        if not found.policy and endpoint == HOST:
            decision.allowed, decision.enforced = True, False
            decision.reason = "allowed: the host has no policy"
            return
        if not found.policy:
            decision.reason = "denied: the kernel has no policy of this endpoint yet"
            shown.drop_reason = reasons_pb2.DROP_REASON_POLICY_UNKNOWN
            return
        decision.allowed, decision.rule_id = found.allowed, found.rule
        verb = "allowed" if found.allowed else "denied"
        match = self._enforcer.numbers.rule(found.rule)
        if match is not None:
            decision.policy.CopyFrom(convert.key_message(match.key))
            decision.rule_index, decision.rule_name = match.index, match.title
            decision.reason = f'{verb} by {match.key}, rule "{match.title}"'
        elif found.rule == abi.RULE_HOST:
            decision.reason = "allowed: this node's host may reach its own pods"
        elif found.rule >= abi.RULE_FIRST:
            decision.reason = f"{verb} by rule {found.rule} of a policy that this process has not read yet"
        elif found.allowed:
            decision.reason = f"allowed: {'no rule denies it' if found.enforced else 'no policy selects the endpoint'}"
        else:
            decision.reason = "denied: no rule allows it"
        if not found.allowed:
            verdict = abi.Verdict(found.verdict & abi.VERDICT)
            shown.drop_reason = _REASONS.get(verdict, reasons_pb2.DROP_REASON_POLICY_BROKEN)


def connection_message(found: Connection) -> pb.Connection:
    return pb.Connection(
        source=str(found.source),
        destination=str(found.destination),
        protocol=found.protocol,
        source_port=found.source_port,
        destination_port=found.destination_port,
        state=found.state,
        idle_seconds=found.idle_s,
        source_identity=found.entry.client,
        destination_identity=found.entry.server,
    )


def _require_port(protocol: int, port: int, at: str) -> None:
    if protocol > PROTOCOL_MAX:
        raise errors.InvalidArgument(f"{protocol} is outside 0..{PROTOCOL_MAX}", field="protocol")
    if protocol in (ICMP, ICMPV6) and port > TYPE_MAX:
        raise errors.InvalidArgument(f"{port} is no type of ICMP", field=at, fix=f"give 0 to {TYPE_MAX}")
    if port > PORT_MAX:
        raise errors.InvalidArgument(f"{port} is outside 0..{PORT_MAX}", field=at)


def _address(text: str, at: str) -> IPAddress:
    try:
        if "%" in text:
            raise ValueError
        found = ip_address(text)
    except ValueError:
        raise errors.InvalidArgument(f"{text[:60]!r} is no address", field=at, fix="as 10.0.0.1 or fd00::1") from None
    # What the kernel takes for IPv4 is IPv4.
    return (found.ipv4_mapped if isinstance(found, IPv6Address) else None) or found
