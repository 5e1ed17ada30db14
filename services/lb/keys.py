"""Where services are in etcd, and the values there.

    /fibril/v1/<cluster>/lb/services/<name>                   fibril.lb.v1.Service without backends
    /fibril/v1/<cluster>/lb/backends/<name>/<address>:<port>  fibril.lb.v1.Backend: one changed backend is one key
    /fibril/v1/<cluster>/vips/<address>/<block>               fibril.lb.v1.StoredClaims: whose 4,096 of its ports are

All that is followed is below lb/; claims are only read by those who change services.

Names are quoted as in URLs, "/" included, so that no name is the beginning of another's keys.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache, partial
from urllib.parse import quote, unquote

from fibril.lb.v1 import lb_pb2 as pb
from services.lb import convert
from services.lb.claims import Claim, Claims, Place
from services.lb.model import Backend, BackendKey, Spec

SERVICES = "services/"
BACKENDS = "backends/"


def root(cluster: str) -> str:
    return f"/fibril/v1/{cluster}/lb/"


def vips(cluster: str) -> str:
    return f"/fibril/v1/{cluster}/vips/"


# The same names come with each of their backends.
_quote = lru_cache(1 << 12)(partial(quote, safe=""))
_unquote = lru_cache(1 << 12)(unquote)


def service_key(name: str) -> str:
    """Below root, as all that follow."""
    return SERVICES + _quote(name)


def backends_prefix(name: str) -> str:
    return f"{BACKENDS}{_quote(name)}/"


def backend_key(name: str, key: BackendKey) -> str:
    return f"{backends_prefix(name)}{key.address}:{key.port}"


def place_of(key: str) -> Place:
    """The place in a key below vips. ValueError."""
    address, _, block = key.partition("/")
    return Place(ipaddress.ip_address(address), int(block))


def service_of(key: str) -> str:
    """The name in a service's key."""
    return _unquote(key.removeprefix(SERVICES))


@lru_cache(1 << 12)
def _owner(prefix: str) -> str:
    """The name whose backends' keys begin so. ValueError."""
    name = _unquote(prefix.removeprefix(BACKENDS))
    if backends_prefix(name) != prefix + "/":
        raise ValueError(f"{prefix!r} names no service")
    return name


def read_backend(key: str, value: bytes) -> tuple[str, Backend]:
    """Service and backend. ValueError if the value is another one's; InvalidArgument, protobuf's DecodeError."""
    prefix, _, where = key.rpartition("/")
    name, backend = _owner(prefix), decode_backend(value)
    # !s: an address is slow to format.
    if where != f"{backend.key.address!s}:{backend.key.port}":
        raise ValueError(f"it holds the backend {backend.key}")
    return name, backend


def backend_of(key: str) -> tuple[str, BackendKey]:
    """Service and backend of a backend's key. ValueError."""
    name, _, where = key.removeprefix(BACKENDS).partition("/")
    address, _, port = where.rpartition(":")
    return _unquote(name), BackendKey(ipaddress.ip_address(address), int(port))


def encode_claims(claims: Claims) -> bytes:
    ordered = sorted(claims, key=lambda each: (each[1].proto, each[1].first, each[1].node))
    return pb.StoredClaims(
        claims=[
            pb.StoredClaims.Claim(
                protocol=c.proto, port=c.first, port_last=c.last, service=service, node=c.node
            )
            for service, c in ordered
        ]
    ).SerializeToString(deterministic=True)


def decode_claims(value: bytes) -> Claims:
    """protobuf's DecodeError if it is none."""
    found: dict[str, list[Claim]] = {}
    for each in pb.StoredClaims.FromString(value).claims:
        found.setdefault(each.service, []).append(Claim(each.protocol, each.port, each.port_last, each.node))
    return Claims(found)


def encode_spec(spec: Spec) -> bytes:
    return convert.to_proto(spec).SerializeToString(deterministic=True)


def decode_spec(value: bytes) -> Spec:
    """InvalidArgument, protobuf's DecodeError."""
    return convert.spec(pb.Service.FromString(value))


def encode_backend(backend: Backend) -> bytes:
    return convert.backend_to_proto(backend).SerializeToString(deterministic=True)


def decode_backend(value: bytes) -> Backend:
    """InvalidArgument, protobuf's DecodeError."""
    return convert.backend(pb.Backend.FromString(value), "backend")
