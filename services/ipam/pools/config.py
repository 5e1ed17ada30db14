"""Configuration of address pools and of the way to etcd."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from services.common.errors import InvalidArgument
from services.common.etcd.client import EtcdTls
from services.ipam.pools.types import DEFAULT_POOL, Pool, checked_pool


@dataclass(frozen=True)
class PoolsConfig:
    """The pool that is made when the cluster has none called "default". Later changes go through the API."""

    ipv4: str = field(
        default="10.244.0.0/16", metadata={"help": "IPv4 prefix of the default pool; empty: none"}
    )
    ipv6: str = field(
        default="fd00:10:244::/48", metadata={"help": "IPv6 prefix of the default pool; empty: none"}
    )
    block_prefix_v4: int = field(
        default=24, metadata={"help": "prefix length of the IPv4 block a node claims"}
    )
    block_prefix_v6: int = field(
        default=112, metadata={"help": "prefix length of the IPv6 block a node claims"}
    )

    def __post_init__(self) -> None:
        self.first()

    def first(self) -> Pool | None:
        """The default pool, None when both prefixes are empty. InvalidArgument names the field."""
        cidrs = [cidr for cidr in (self.ipv4, self.ipv6) if cidr]
        if not cidrs:
            return None
        return checked_pool(
            DEFAULT_POOL,
            0,
            cidrs,
            [],
            self.block_prefix_v4 if self.ipv4 else 0,
            self.block_prefix_v6 if self.ipv6 else 0,
        )


@dataclass(frozen=True)
class EtcdConfig:
    """Where etcd is, and which part of it is this cluster's."""

    endpoints: tuple[str, ...] = field(
        default=("http://127.0.0.1:2379",), metadata={"help": "URLs of the members, http(s):// or unix:"}
    )
    cluster: str = field(default="default", metadata={"help": "cluster name, part of every key"})
    node: str = field(
        default="", metadata={"help": "this node's name in the cluster; empty: host name and instance"}
    )
    ca: str = field(
        default="", metadata={"help": "PEM file of the authority that signed the servers' certificates"}
    )
    cert: str = field(default="", metadata={"help": "PEM file of the client certificate"})
    key: str = field(default="", metadata={"help": "PEM file of its key"})
    timeout_s: float = field(default=3.0, metadata={"help": "seconds after which a call to etcd has failed"})

    def __post_init__(self) -> None:
        for name in ("cluster", "node"):
            value = getattr(self, name)
            if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?", value) and (
                value or name == "cluster"
            ):
                raise InvalidArgument(
                    f"{name} {value[:60]!r} is malformed",
                    field=name,
                    fix="use letters, digits, '.', '-' and '_'",
                )
        if not 0.1 <= self.timeout_s <= 60:
            raise InvalidArgument(f"{self.timeout_s:g} is outside 0.1..60", field="timeout_s")
        self.tls()

    def tls(self) -> EtcdTls | None:
        """The files for https endpoints; None when none is named."""

        def path(text: str) -> Path | None:
            return Path(text) if text else None

        if not (self.ca or self.cert or self.key):
            return None
        return EtcdTls(path(self.ca), path(self.cert), path(self.key))
