"""Where services are in etcd, and the values there.

    /fibril/v1/<cluster>/lb/services/<name>                   fibril.lb.v1.Service without backends
    /fibril/v1/<cluster>/lb/backends/<name>/<address>:<port>  fibril.lb.v1.Backend: one changed backend is one key
    /fibril/v1/<cluster>/lb/vips/<address>                    fibril.lb.v1.StoredClaims: whose the address's ports are

Names are quoted as in URLs, "/" included, so that no name is the beginning of another's keys.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import quote, unquote

from fibril.lb.v1 import lb_pb2 as pb
from services.common.pipeline.abi import IPAddress
from services.lb import convert
from services.lb.model import Backend, BackendKey, Frontend, Spec

SERVICES = "services/"
BACKENDS = "backends/"
VIPS = "vips/"


def root(cluster: str) -> str:
    return f"/fibril/v1/{cluster}/lb/"


def service_key(name: str) -> str:
    """Below root, as all that follow."""
    return SERVICES + quote(name, safe="")


def backends_prefix(name: str) -> str:
    return f"{BACKENDS}{quote(name, safe='')}/"


def backend_key(name: str, key: BackendKey) -> str:
    return f"{backends_prefix(name)}{key.address}:{key.port}"


def vip_key(address: IPAddress) -> str:
    return f"{VIPS}{address}"


def service_of(key: str) -> str:
    """The name in a service's key."""
    return unquote(key.removeprefix(SERVICES))


def backend_of(key: str) -> tuple[str, BackendKey]:
    """Service and backend of a backend's key. ValueError."""
    name, _, where = key.removeprefix(BACKENDS).partition("/")
    address, _, port = where.rpartition(":")
    return unquote(name), BackendKey(ipaddress.ip_address(address), int(port))


@dataclass(frozen=True, slots=True)
class Claim:
    """A range of ports of an address that a service has; node: on that one only, "" everywhere."""

    proto: int
    port: int
    port_last: int
    service: str
    node: str = ""

    def conflicts(self, other: Claim) -> bool:
        return (
            self.proto == other.proto
            and self.port <= other.port_last
            and other.port <= self.port_last
            and (not self.node or not other.node or self.node == other.node)
        )


Claims = tuple[Claim, ...]


def claim_of(spec: Spec, front: Frontend) -> Claim:
    return Claim(front.proto, front.port, front.port_last, spec.name, front.node)


def encode_claims(claims: Claims) -> bytes:
    ordered = sorted(claims, key=lambda c: (c.proto, c.port, c.node))
    return pb.StoredClaims(
        claims=[
            pb.StoredClaims.Claim(
                protocol=c.proto, port=c.port, port_last=c.port_last, service=c.service, node=c.node
            )
            for c in ordered
        ]
    ).SerializeToString(deterministic=True)


def decode_claims(value: bytes) -> Claims:
    """protobuf's DecodeError if it is none."""
    return tuple(
        Claim(c.protocol, c.port, c.port_last, c.service, c.node)
        for c in pb.StoredClaims.FromString(value).claims
    )


def encode_spec(spec: Spec) -> bytes:
    return convert.spec_to(spec).SerializeToString(deterministic=True)


def decode_spec(value: bytes) -> Spec:
    """InvalidArgument, protobuf's DecodeError."""
    return convert.spec_from(pb.Service.FromString(value))[0]


def encode_backend(backend: Backend) -> bytes:
    return convert.backend_to(backend).SerializeToString(deterministic=True)


def decode_backend(value: bytes) -> Backend:
    """InvalidArgument, protobuf's DecodeError."""
    backends = convert.backends_from([pb.Backend.FromString(value)], "backends", 1)
    return next(iter(backends.values()))
